"""Which text is held out: about one document in 32, chosen by what is in it, whatever the order."""

import hashlib
from dataclasses import dataclass

from intlm.errors import InputError
from train.corpus import Corpus, cut

HELD_OUT_ONE_IN = 32
SMALLEST_BLOCK = 512
OPENING_BYTES = 16 << 20
"""How far into a corpus we look for 32 different documents."""
UNCUT = 1 << 62
"""A block that no document is too long for."""


@dataclass(frozen=True)
class Split:
    """Which side a document is on, by its hash alone, so that copies of it are always on one side.

    `moved`: hashes of documents that are on the other side than the rule says, so that none is left empty.
    """

    moved: frozenset[bytes] = frozenset()

    def holds_out(self, document: bytes) -> bool:
        """Whether `document` is held out."""
        return self.holds_out_key(content_key(document))

    def holds_out_key(self, key: bytes) -> bool:
        """The same, from `content_key(document)`."""
        # The first 8 bytes as a big-endian integer are a multiple of 32.
        return (key[7] % HELD_OUT_ONE_IN == 0) != (key in self.moved)


@dataclass(frozen=True)
class Opening:
    """What the start of a corpus decides: how long documents may be, and what may not be held out."""

    block: int
    """Documents of more bytes are cut, see `cut`."""
    kept: frozenset[bytes] = frozenset()
    """Hash of the one block of a short corpus that is trained on although the rule would hold it out."""


def content_key(document: bytes) -> bytes:
    """SHA-256 of a document's bytes."""
    return hashlib.sha256(document).digest()


def opening(corpus: Corpus, flag: str, hold_out: bool = True) -> Opening:
    """Look into a corpus until 32 different documents are found, for `OPENING_BYTES` at most.

    Where there are fewer, documents are cut into blocks of at most 1/256 of the bytes seen, or 512, so that a
    single file gets a held-out part too. Where something is to be held out (`hold_out`), raises InputError
    for a corpus that has not even two different blocks.
    """
    documents: list[bytes] = []
    different: set[bytes] = set()
    size = 0
    for document, _ in corpus.read({}):
        documents.append(document)
        different.add(content_key(document))
        size += len(document)
        if len(different) >= HELD_OUT_ONE_IN:
            return Opening(UNCUT)
        if size >= OPENING_BYTES:
            break
    block = max(SMALLEST_BLOCK, min(size, OPENING_BYTES) // 256)
    if not hold_out or size >= OPENING_BYTES:
        return Opening(block)
    keys = {content_key(piece) for document in documents for piece in cut(document, block)}
    if len(keys) < 2:
        raise InputError(
            f"{flag}: {corpus.name!r} is too short to hold out text: {size} bytes make {len(keys)} block of "
            f"different text (accepted: two different documents, or one of more than {SMALLEST_BLOCK} bytes)"
        )
    trains = not all(map(Split().holds_out_key, keys))
    return Opening(block, frozenset() if trains else frozenset({min(keys)}))
