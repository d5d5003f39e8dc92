"""The text of a run: what its corpora begin with, which side a document is on, and the order of training."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.bits import HeldOut, lay_out
from intlm.errors import InputError
from tokenizer import Tokenizer
from train.config import TextConfig, parse_data
from train.corpus import Corpus, SourceUnavailable, cut, numbered, open_corpus
from train.run import differences
from train.split import Split, content_key, opening
from train.stream import Limited, Place, Source, Stream, shares

PREFIX_BYTES = 64 << 20
"""Text at the start of the corpora that gives the held-out text, the baselines and the counts of tokens."""
HELD_OUT_BYTES = 8 << 20
"""Held-out text that is scored at most."""
COUNTED_BYTES = 16 << 20
"""Training text whose tokens are counted for the head bias."""
BATCH = 256
"""Documents encoded at once."""
EVALUATED_TOKENS = 1 << 18
"""Held-out tokens that training looks at now and then; `intlm eval` takes all of them."""


@dataclass(frozen=True)
class Part:
    """A corpus in a mixture. block: documents of more bytes are cut."""

    corpus: Corpus
    weight: int
    block: int

    def pieces(self) -> Iterator[bytes]:
        """The documents, long ones cut, in the corpus' order."""
        for document, _ in self.corpus.read({}):
            yield from cut(document, self.block)


@dataclass(frozen=True)
class Text:
    """Documents are bytes.

    train: the training text among the first `PREFIX_BYTES`, in the corpora's order; held_out: what is scored;
    whole: whether that is all there is; digests: of `train` and `held_out`.
    """

    parts: tuple[Part, ...]
    split: Split | None
    train: list[bytes]
    held_out: list[bytes]
    whole: bool
    digests: dict[str, str]

    def stream(self, seed: int, places: Any = None) -> Stream:
        """The endless order of training, at its start or where `places` (`Stream.places`) say.

        Raises InputError for places that are none of these corpora's.
        """
        try:
            standing = [Place() for _ in self.parts] if places is None else [*map(Place.from_dict, places)]
            holds_out = self.split.holds_out if self.split else None
            return Stream(
                [
                    Source(part.corpus, seed, part.weight, part.block, holds_out, place)
                    for part, place in zip(self.parts, standing, strict=True)
                ]
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"no place in the text: {error}") from error

    def fingerprints(self) -> dict[str, Any]:
        """By corpus, what tells at resume whether it has changed. JSON can hold it."""
        names = numbered(part.corpus.name for part in self.parts)
        return {name: part.corpus.fingerprint() for name, part in zip(names, self.parts, strict=True)}

    def changes(self, fingerprints: Any, digests: Any) -> list[str]:
        """What is not as it was when the run had these `fingerprints` and its checkpoint these `digests`."""
        found = []
        if not isinstance(fingerprints, dict):
            found.append("--data: the text may have changed (data.json of the run is missing or damaged)")
        else:
            for name, after in self.fingerprints().items():
                before = fingerprints.get(name)
                if before != after:
                    lines = differences(before if isinstance(before, dict) else {}, after, "was", "is")
                    more = f"; {len(lines) - 3} more" if len(lines) > 3 else ""
                    found.append(f"--data {name}: the text has changed ({'; '.join(lines[:3])}{more})")
        if not found and digests.get("train") != self.digests["train"]:
            names = ", ".join(part.corpus.name for part in self.parts)
            found.append(f"--data {names}: the text has changed (in its first {PREFIX_BYTES >> 20} MiB)")
        if not found and digests.get("held_out") != self.digests["held_out"]:
            found.append("--held-out: the text has changed")
        return found

    def settled(self, places: list[Any]) -> tuple[list[Any], list[str]]:
        """`Stream.places` in corpora that have changed; one that is there no longer becomes the start.

        Also says so. Raises `SourceUnavailable`.
        """
        settled, notes = [], []
        for part, values in zip(self.parts, places, strict=True):
            place = Place.from_dict(values)
            try:
                next(iter(part.corpus.read(place.cursor)), None)
            except SourceUnavailable:
                raise
            except InputError as error:
                notes.append(f"{error}; {part.corpus.name} is read again from its start")
                place = Place(epoch=place.epoch + 1, documents=place.documents, bytes=place.bytes)
            settled.append(asdict(place))
        return settled, notes

    def counts(self, tokenizer: Tokenizer) -> np.ndarray:
        """How often each token occurs in the first `COUNTED_BYTES` of training text: int64 [vocabulary]."""
        counts_V = np.zeros(tokenizer.vocabulary, np.int64)
        documents = first(self.train, COUNTED_BYTES)[0]
        counts_V[tokenizer.separator] = len(documents)
        for start in range(0, len(documents), BATCH):
            encoded = tokenizer.encode_batch(documents[start : start + BATCH], os.cpu_count() or 1)
            counts_V += np.bincount(np.concatenate(encoded), minlength=len(counts_V))
        return counts_V

    def summary(self) -> str:
        """For people."""
        train, held_out = (f"{sum(map(len, side)):,}" for side in (self.train, self.held_out))
        more = "" if self.whole else "at least "
        return f"{more}{train} bytes of text in {more}{len(self.train):,} documents, {held_out} held out"


def open_limited(name: str, config: TextConfig) -> Corpus:
    """A corpus of --data, or its first `max_documents`. Raises InputError."""
    corpus = open_corpus(name, config.text_field, "--data")
    return Limited(corpus, config.max_documents) if config.max_documents else corpus


def load_text(config: TextConfig) -> Text:
    """Open the corpora of a run and read what they begin with. Raises InputError."""
    parts, kept = [], set[bytes]()
    for data in config.data:
        name, weight = parse_data(data)
        corpus = open_limited(name, config)
        start = opening(corpus, "--data", hold_out=not config.held_out)
        parts.append(Part(corpus, weight, start.block))
        kept |= start.kept
    documents, whole = _prefix(parts)
    if config.held_out:
        held_out = open_corpus(config.held_out, config.text_field, "--held-out").documents()
        return _text(parts, None, documents, first(held_out, HELD_OUT_BYTES)[0], whole)
    keys = [content_key(document) for document in documents]
    split = Split(frozenset(kept))
    if not any(map(split.holds_out_key, keys)):
        split = Split(split.moved ^ {min(keys)})
    sides: tuple[list[bytes], list[bytes]] = [], []
    for document, key in zip(documents, keys, strict=True):
        sides[split.holds_out_key(key)].append(document)
    return _text(parts, split, sides[0], first(sides[1], HELD_OUT_BYTES)[0], whole)


def evaluated(text: Text, tokenizer: Tokenizer) -> HeldOut:
    """The part of the held-out text that is scored during training."""
    return lay_out(text.held_out, tokenizer, EVALUATED_TOKENS)


def first(documents: Iterable[bytes], size: int) -> tuple[list[bytes], bool]:
    """Documents until `size` bytes are there, the last one cut there; and whether that is all of them."""
    taken: list[bytes] = []
    for document in documents:
        if size <= 0:
            return taken, False
        taken.append(document[:size])
        size -= len(document)
    return taken, size >= 0


def _prefix(parts: list[Part]) -> tuple[list[bytes], bool]:
    """The first `PREFIX_BYTES` of all corpora by their weights, and whether that is all of them.

    Interleaved as in training, but nothing is shuffled and no corpus comes twice.
    """
    readers = [part.pieces() for part in parts]
    costs = shares([part.weight for part in parts])
    paid = [0] * len(parts)
    left = list(range(len(parts)))
    documents: list[bytes] = []
    size = 0
    while left and size < PREFIX_BYTES:
        current = min(left, key=paid.__getitem__)
        document = next(readers[current], None)
        if document is None:
            left.remove(current)
        else:
            documents.append(document)
            size += len(document)
            paid[current] += len(document) * costs[current]
    return documents, not left


def _text(
    parts: list[Part], split: Split | None, train: list[bytes], held_out: list[bytes], whole: bool
) -> Text:
    digests = {"train": _digest(train), "held_out": _digest(held_out)}
    return Text(tuple(parts), split, train, held_out, whole, digests)


def _digest(documents: Iterable[bytes]) -> str:
    """Hex SHA-256 of documents in their order."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(content_key(document))
    return whole.hexdigest()
