"""Where text comes from, and how it becomes one stream of tokens.

A document is `bytes`. A corpus yields documents in a fixed order; `split` holds some of them out, `shuffle`
orders the rest, and `pack` turns them into the token stream that `train.lanes` reads.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from intlm.errors import InputError
from tokenizer import Tokenizer

HELD_OUT_ONE_IN = 32
SMALLEST_BLOCK = 512
LONGEST_UTF8 = 4


Cursor = dict[str, int | str]
"""Where a reader of a corpus stands, exactly: small, flat, and fit for JSON. `{}` is the start."""

Fingerprint = dict[str, Any]
"""What a corpus is read from, fit for JSON; equal fingerprints mean equal documents."""


class SourceUnavailable(InputError):
    """A source that was there no longer answers, after every retry: what was trained so far is worth saving."""


class Corpus(Protocol):
    """Documents in a fixed order, to be read from any of them on."""

    name: str
    """The corpus as the user wrote it."""

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """Documents that are not empty, in a fixed order, from `cursor` on; each with the cursor behind it.

        `read(c)` for a `c` that was yielded goes on with exactly the next document. A document's memory is
        the reader's own; a corpus of any size takes no more than a bounded amount beside it. `InputError` for
        unusable text, and where a reader that started at `{}` finds none; `SourceUnavailable` where the
        source stopped answering.
        """
        ...

    def fingerprint(self) -> Fingerprint:
        """What tells at resume, cheaply, whether the corpus has changed. `InputError` as in `read`."""
        ...

    def documents(self) -> Iterator[bytes]:
        """All of `read({})`, without the cursors."""
        return (document for document, _ in self.read({}))


def open_corpus(name: str, text_field: str = "text", flag: str = "--data") -> Corpus:
    """The corpus that a user's `name` stands for.

    `stdlib` is the standard library (`./stdlib` a file of that name), see `train.files.StdlibCorpus`;
    `hf:NAME…` a dataset of the Hugging Face Hub and `http://…` or `https://…` a file, see `train.remote`; all
    else is a file, a directory or a glob, see `train.files.FilesCorpus`. `InputError`, starting with `flag`,
    where there is no such thing; what is wrong inside the files, or far away, shows when documents are read.
    """
    # Not above: these import this module.
    from train import files, remote

    if name == files.StdlibCorpus.name:
        return files.StdlibCorpus()
    if name.startswith("hf:"):
        return remote.HubCorpus(name, text_field, flag)
    if name.lower().startswith(("http://", "https://")):
        return remote.HttpCorpus(name, text_field, flag)
    return files.FilesCorpus(name, text_field, flag)


def split(documents: Iterable[bytes], flag: str = "--data") -> tuple[list[bytes], list[bytes]]:
    """Documents to train on and documents held out: about one in 32, chosen by their content alone.

    Order and file names do not matter, and copies of a document land on the same side. With fewer than 32
    different documents, all are first cut into blocks, which are the documents from there on. `InputError`
    where there is too little text for both sides to get some. Each side keeps the order given.
    """
    documents = [document for document in documents if document]
    total = sum(map(len, documents))
    if len(set(documents)) < HELD_OUT_ONE_IN:
        size = max(SMALLEST_BLOCK, total // 256)
        documents = [block for document in documents for block in cut(document, size)]
    hashes = [_hash(document) for document in documents]
    different = set(hashes)
    if len(different) < 2:
        raise InputError(
            f"{flag}: too short to hold out text: {total} bytes make {len(different)} block of different text"
            f" (accepted: two different documents, or one of more than {SMALLEST_BLOCK} bytes)"
        )
    held_out = {key for key in different if int.from_bytes(key[:8]) % HELD_OUT_ONE_IN == 0}
    if not held_out or held_out == different:
        # Moves the smallest to the side that has nothing.
        held_out ^= {min(different)}
    pairs = list(zip(documents, hashes, strict=True))
    return [d for d, key in pairs if key not in held_out], [d for d, key in pairs if key in held_out]


def cut(document: bytes, size: int) -> list[bytes]:
    """Blocks of at most `size` bytes (4 or more) that join to `document`.

    Each ends at the last line end that fits; in a line too long for that, between two UTF-8 characters.
    """
    blocks = []
    start = 0
    while len(document) - start > size:
        end = document.rfind(b"\n", start, start + size) + 1
        if end == 0:
            end = _character_start(document, start + size)
        blocks.append(document[start:end])
        start = end
    if start < len(document):
        blocks.append(document[start:])
    return blocks


def shuffle(documents: Iterable[bytes], seed: int) -> list[bytes]:
    """The documents in an order that depends on `seed` and their contents alone, not on the order given.

    `InputError` for a seed outside 0 … 2^64 − 1.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed: {seed} (accepted: 0 to 2^64 - 1)")
    prefix = seed.to_bytes(8, "little")
    return sorted(documents, key=lambda document: (_hash(prefix + _hash(document)), document))


def digest(documents: Iterable[bytes]) -> str:
    """Hex SHA-256 of the documents in their order: tells at resume whether the corpus has changed."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(_hash(document))
    return whole.hexdigest()


def pack(documents: Iterable[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """One stream of tokens, 1-D in the tokenizer's dtype: separator, document, separator, document, …"""
    nothing = tokenizer.encode(b"")
    separator = np.array([tokenizer.separator], nothing.dtype)
    pieces = [nothing]
    for document in documents:
        pieces += [separator, tokenizer.encode(document)]
    return np.concatenate(pieces)


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _character_start(document: bytes, position: int) -> int:
    """The nearest start of a UTF-8 character at or before `position`; `position` where there is none."""
    for start in range(position, position - LONGEST_UTF8, -1):
        if document[start] & 0xC0 != 0x80:
            return start
    return position
