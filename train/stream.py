"""The order of training: text of one or several corpora, shuffled window by window, without end.

Where the order stands is a few integers and a cursor for each corpus, whatever its size: a window is read
again from its start and shuffled again to the same order.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intlm.errors import InputError, shown
from train.corpus import Corpus, Cursor, Fingerprint, cut
from train.formats import count as counted
from train.split import UNCUT

WINDOW_BYTES = 32 << 20
"""Training text that is shuffled together; a corpus of up to this is shuffled whole."""
FRAGMENT_BYTES = 8 << 10
"""Text that stays together: longer documents are shuffled in fragments, so that no few of them fill a chunk."""


LARGEST_COUNT = (1 << 63) - 1
"""No place has a larger number in it: it is a count of bytes, rows or documents, or the size of a file."""
LONGEST_COMMIT = 256


@dataclass
class Place:
    """Where a source stands: before a fragment. JSON can hold it."""

    cursor: Cursor = field(default_factory=dict)
    """The corpus' own, at the start of the window, or of the long document that it starts inside."""
    skip: int = 0
    """Blocks of that long document that belong to the window before."""
    epoch: int = 0
    window: int = 0
    """Windows of this epoch before this one."""
    index: int = 0
    """Fragments of this window given so far."""
    documents: int = 0
    """Documents opened so far in all epochs."""
    bytes: int = 0
    """Bytes of them: what a mixture goes by."""

    @classmethod
    def from_dict(cls, values: Any) -> "Place":
        """The inverse of `dataclasses.asdict`. Raises ValueError for anything else."""
        wanted = {item.name: dict if item.name == "cursor" else int for item in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or values.keys() != wanted.keys():
            raise ValueError("a place has other keys")
        for name, kind in wanted.items():
            if type(values[name]) is not kind or (kind is int and not 0 <= values[name] <= LARGEST_COUNT):
                raise ValueError(f"{name} is {shown(values[name])}")
        for key, value in values["cursor"].items():
            if type(value) is int:
                fits = key != "commit" and 0 <= value <= LARGEST_COUNT
            else:
                fits = key == "commit" and isinstance(value, str) and len(value) <= LONGEST_COMMIT
            if not fits:
                raise ValueError(f"cursor: {shown(key)} is {shown(value)}")
        return cls(**copy.deepcopy(dict(values)))


class Source:
    """One corpus in training order, again and again, each time in another order.

    Reads nothing before it is asked for a fragment. `InputError` for unusable text, or for none.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        weight: int = 1,
        block: int = UNCUT,
        holds_out: Callable[[bytes], bool] | None = None,
        place: Place | None = None,
    ):
        """Go on at `place`. Documents of more than `block` bytes are cut; what `holds_out` picks is left out."""
        self.corpus, self.weight = corpus, weight
        self.place = place or Place()
        self._seed, self._block, self._holds_out = seed, block, holds_out
        self._pieces: Iterator[tuple[bytes, Cursor, int]] | None = None
        self._fragments: list[bytes] = []
        self._opens: list[bool] = []
        self._order: list[int] | None = None
        self._behind: tuple[Cursor, int] | None = None

    def fragment(self) -> tuple[bytes, bool]:
        """The text at the place, and whether it opens a document."""
        if self._order is None:
            self._read_window()
        while self.place.index >= len(self._order or ()):
            self._turn()
        assert self._order is not None
        number = self._order[self.place.index]
        return self._fragments[number], self._opens[number]

    def upcoming(self, size: int) -> list[bytes]:
        """The text at the place and what follows in this window, at least one fragment and about `size` bytes."""
        texts = [self.fragment()[0]]
        assert self._order is not None
        for number in self._order[self.place.index + 1 :]:
            if size <= 0:
                break
            texts.append(self._fragments[number])
            size -= len(texts[-1])
        return texts

    def advance(self) -> None:
        """Go on behind the fragment."""
        assert self._order is not None
        place, number = self.place, self._order[self.place.index]
        place.index += 1
        place.documents += self._opens[number]
        place.bytes += len(self._fragments[number])

    def _turn(self) -> None:
        """Go on to the next window, or to the next epoch."""
        place = self.place
        place.index = 0
        if self._behind:
            place.cursor, place.skip = self._behind
            place.window += 1
            self._read_window()
        elif place.window == 0:
            if not self._fragments:
                raise InputError(f"--data: {self.corpus.name!r} has no text to train on")
            place.epoch += 1  # all of it is here already
            self._shuffle()
        else:
            place.cursor, place.skip = {}, 0
            place.epoch += 1
            place.window = 0
            self._read_window()

    def _read_window(self) -> None:
        """Read the window at the place; `_behind` is where the next one starts, None at the corpus' end."""
        if self._pieces is None:
            self._pieces = self._read(self.place.cursor, self.place.skip)
        self._fragments, self._opens, self._behind = [], [], None
        size = 0
        for piece, cursor, skip in self._pieces:
            if self._holds_out is None or not self._holds_out(piece):
                fragments = cut(piece, FRAGMENT_BYTES)
                self._fragments += fragments
                self._opens += [True] + [False] * (len(fragments) - 1)
                size += len(piece)
                if size >= WINDOW_BYTES:
                    self._behind = cursor, skip
                    break
        else:
            self._pieces = None
        self._shuffle()

    def _read(self, cursor: Cursor, skip: int) -> Iterator[tuple[bytes, Cursor, int]]:
        """Every block from a place on, and the place behind it."""
        for document, after in self.corpus.read(cursor):
            if len(document) <= self._block:
                if not skip:
                    yield document, after, 0
            else:
                left = len(document)
                for number, piece in enumerate(cut(document, self._block), start=1):
                    left -= len(piece)
                    if number > skip:
                        yield (piece, cursor, number) if left else (piece, after, 0)
            cursor, skip = after, 0

    def _shuffle(self) -> None:
        place = self.place
        self._order = permutation(self._seed, place.epoch, place.window, len(self._fragments)).tolist()


class Stream:
    """Fragments of all sources, interleaved so that bytes come in proportion to the sources' weights.

    The next one is of the source with the least bytes / weight so far, compared exactly; the first of
    them where there are several. Each source goes round on its own, so a short one comes again while a long
    one goes on. `InputError`, as of `Source`.
    """

    def __init__(self, sources: Sequence[Source]):
        """Go on where the `sources` stand."""
        self.sources = sources
        self._shares = shares([source.weight for source in sources])
        self._choose()

    def fragment(self) -> tuple[bytes, bool]:
        """The text that the stream stands before, and whether it opens a document."""
        return self._current.fragment()

    @property
    def current(self) -> Source:
        """The source of the fragment that the stream stands before."""
        return self._current

    def advance(self) -> None:
        """Go on behind this fragment."""
        self._current.advance()
        self._choose()

    def places(self) -> list[dict[str, Any]]:
        """Where the sources stand: copies that JSON can hold, for `Place.from_dict`."""
        return [dataclasses.asdict(source.place) for source in self.sources]

    def _choose(self) -> None:
        if len(self.sources) == 1:
            self._current = self.sources[0]
        else:
            served = [
                source.place.bytes * share for source, share in zip(self.sources, self._shares, strict=True)
            ]
            self._current = self.sources[served.index(min(served))]


class Limited(Corpus):
    """The first documents of a corpus, as a corpus. Its cursor has `given`, how many there were, on top."""

    def __init__(self, corpus: Corpus, documents: int):
        """At most `documents` of them."""
        self.name = corpus.name
        self._corpus, self._limit = corpus, documents

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """See `Corpus.read`."""
        inner = {key: value for key, value in cursor.items() if key != "given"}
        first = counted(cursor, "given") + 1
        if first <= self._limit:
            for number, (document, after) in enumerate(self._corpus.read(inner), start=first):
                yield document, {**after, "given": number}
                if number >= self._limit:
                    return

    def fingerprint(self) -> Fingerprint:
        """Of the whole corpus."""
        return self._corpus.fingerprint()


def shares(weights: Sequence[int]) -> list[int]:
    """What a byte of each source costs it, an integer: the source that has paid the least is next."""
    common = math.lcm(*weights)
    return [common // weight for weight in weights]


def permutation(seed: int, epoch: int, window: int, count: int) -> np.ndarray:
    """The order of a window of `count` fragments: int64 [count], a function of these integers alone."""
    words = hashlib.shake_256(f"order {seed} {epoch} {window}".encode()).digest(8 * count)
    return np.argsort(np.frombuffer(words, "<u8"), kind="stable")
