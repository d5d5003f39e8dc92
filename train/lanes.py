"""Many readers of one endless stream of tokens, in step with each other."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from intlm.engine.engine import usable_cores
from intlm.errors import InputError, shown
from tokenizer import ByteTokenizer, Tokenizer
from train.corpus import numbered
from train.stream import Stream

CHUNK_TOKENS = 1 << 22
MOST_SEGMENTS = 256
FEWEST_SEGMENTS = 4
"""A chunk is 256 segments of every lane, or as many as make `CHUNK_TOKENS`, but at least 4."""
ENCODED_BYTES = 1 << 20
"""Text whose tokens are made together, by as many threads as there are cores."""
POLL_SECONDS = 0.1
CLOSE_SECONDS = 5.0


def segments_of(lanes: int, segment: int) -> int:
    """Segments of a lane in a chunk."""
    return max(FEWEST_SEGMENTS, min(MOST_SEGMENTS, CHUNK_TOKENS // (lanes * segment)))


@dataclass(frozen=True)
class _Chunk:
    """tokens_LxC1: a view in which lanes overlap by one token; start, end: places in the stream; text_bytes: of
    all lanes, those of other processes too."""

    tokens_LxC1: np.ndarray
    start: dict[str, Any]
    end: dict[str, Any]
    text_bytes: int


class Lanes:
    """Reads the tokens of a stream by L lanes, a segment of T tokens a step. A separator opens each document.

    The stream is taken in chunks of L·C tokens, C = `segments_of(L, T)`·T. Lane i reads the i-th span of C
    tokens of each chunk: token t of the span as input, token t + 1 of the stream as its target, also where
    that is the first of the next span or chunk.

    The next chunk is read, tokenized and packed in a thread while lanes read this one; the result does not
    depend on when. `position` is the complete state: lanes made with it, on a stream at its places, go on
    with exactly the next token.

    One process of several keeps the tokens of its own lanes alone. Of the text between them it has to know how
    many tokens it makes: of bytes, that is its length.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        lanes: int,
        segment: int,
        offset: int = 0,
        column: int = 0,
        own: tuple[int, int] | None = None,
    ):
        """Read from where `stream` stands: `offset` tokens into its fragment, and `column` segments on.

        own: the first lane that is wanted and how many are; None wants all. `InputError` for a count out of
        range. The stream belongs to the lanes from now on.
        """
        for name, value, least in (
            ("lanes", lanes, 1),
            ("segment", segment, 1),
            ("offset", offset, 0),
            ("column", column, 0),
        ):
            if type(value) is not int or value < least:
                raise InputError(f"{name}: {shown(value)} (accepted: {least} or more)")
        self._stream, self._tokenizer = stream, tokenizer
        self._lanes, self._segment, self._segments = lanes, segment, segments_of(lanes, segment)
        self._first, self._count = own or (0, lanes)
        if not (self._first >= 0 and 1 <= self._count <= lanes - self._first):
            raise InputError(f"own: {own} (accepted: a first lane and a count within {lanes} lanes)")
        self._skips = self._count < lanes and isinstance(tokenizer, ByteTokenizer)
        if column >= self._segments:
            raise InputError(f"column: {shown(column)} (accepted: 0 to {self._segments - 1})")
        self._offset, self._column = offset, column
        self._rest: np.ndarray | None = None
        self._encoded: dict[int, deque[np.ndarray]] = {}
        self._start: dict[str, Any] = {"sources": stream.places(), "offset": offset}
        self._chunk: _Chunk | None = None
        self._thread: threading.Thread | None = None
        self._ahead: _Chunk | None = None
        self._error: BaseException | None = None
        self._closing = False

    @property
    def position(self) -> dict[str, Any]:
        """Where the lanes stand: `sources`, `offset` and `column`, of a constant size. JSON can hold it."""
        if self._chunk is None:
            return {**self._start, "column": self._column}
        if self._column == self._segments:
            return {**self._chunk.end, "column": 0}
        return {**self._chunk.start, "column": self._column}

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token in this chunk, separators counted as tokens; for people to read."""
        tokens = self._lanes * self._segments * self._segment
        return self._chunk.text_bytes / tokens if self._chunk else 1.0

    @property
    def at_boundary(self) -> bool:
        """Whether the next segment is the first of a chunk, which may have to be waited for, and may fail."""
        return self._chunk is None or self._column == self._segments

    def progress(self) -> dict[str, int]:
        """`documents` and `text_bytes` read so far by all lanes together, estimated inside of a chunk."""
        start, end = (self._chunk.start, self._chunk.end) if self._chunk else (self._start, self._start)
        done = {}
        for name, key in (("documents", "documents"), ("text_bytes", "bytes")):
            before, after = (sum(place[key] for place in state["sources"]) for state in (start, end))
            done[name] = before + (after - before) * self._column // self._segments
        return done

    def epochs(self) -> dict[str, int]:
        """By corpus, how often it has been read to its end before this chunk."""
        start = self._chunk.start if self._chunk else self._start
        names = numbered(source.corpus.name for source in self._stream.sources)
        return {name: place["epoch"] for name, place in zip(names, start["sources"], strict=True)}

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait until the next segment is at hand; False as soon as `stop` says so."""
        if self.at_boundary:
            self._look_ahead()
            while self._thread is not None and self._thread.is_alive() and not stop():
                self._thread.join(POLL_SECONDS)
        return not stop()

    def next_segment(self) -> np.ndarray:
        """The next tokens of every lane that is wanted, int32 [lanes, segment + 1].

        Inputs are `[:, :-1]` and targets `[:, 1:]`. What went wrong while the text was read is raised here,
        and `position` still stands where it stood.
        """
        if self.at_boundary:
            self._take()
        assert self._chunk is not None
        first = self._column * self._segment
        self._column += 1
        return self._chunk.tokens_LxC1[:, first : first + self._segment + 1].astype(np.int32)

    def rewind(self) -> None:
        """Go back to the first segment of this chunk."""
        self._column = 0

    def close(self) -> None:
        """Stop reading ahead. What waits for a network is left to itself after some seconds."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _look_ahead(self) -> None:
        if self._thread is None:
            # A daemon, so that a source that does not answer cannot keep the process.
            self._thread = threading.Thread(target=self._work, name="intlm-lanes", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        try:
            self._ahead = self._build()
        except BaseException as error:
            self._error = error

    def _take(self) -> None:
        """Go on to the chunk that was built ahead, and have the next one built."""
        self._look_ahead()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._chunk is not None:
            self._column = 0
        self._chunk, self._ahead, self._thread = self._ahead, None, None
        self._look_ahead()

    def _encode(self) -> np.ndarray:
        """The tokens of the fragment at hand, which are made with those of the same source that come next."""
        source = self._stream.current
        if self._skips:
            return self._tokenizer.encode(source.fragment()[0])
        encoded = self._encoded.setdefault(id(source), deque())
        if not encoded:
            encoded += self._tokenizer.encode_batch(source.upcoming(ENCODED_BYTES), usable_cores())
        return encoded.popleft()

    def _build(self) -> _Chunk | None:
        """The next chunk: its tokens and the first one after them. None where that was cut short."""
        stream, tokenizer, rest = self._stream, self._tokenizer, self._rest
        separator = np.array([tokenizer.separator], tokenizer.encode(b"").dtype)
        width = self._segments * self._segment
        count = self._lanes * width
        # The tokens that are wanted, and one more.
        low, high = self._first * width, (self._first + self._count) * width + 1
        tokens = np.empty(high - low, separator.dtype)
        start = {"sources": stream.places(), "offset": self._offset}
        passed = text_bytes = 0
        while True:
            text, opens = stream.fragment()
            size = opens + len(text) - self._offset if rest is None else len(rest)
            if rest is None and not (self._skips and (passed + size <= low or passed >= high)):
                rest = self._encode()
                rest = (np.concatenate([separator, rest]) if opens else rest)[self._offset :]
                size = len(rest)
            taken = min(size, count + 1 - passed)
            begin, end = max(passed, low), min(passed + taken, high)
            if rest is not None and begin < end:
                tokens[begin - low : end - low] = rest[begin - passed : end - passed]
            passed += taken
            text_bytes += len(text) * taken // max(1, self._offset + size)
            if passed > count:
                break
            stream.advance()
            self._offset, rest = 0, None
            if self._closing:
                return None
        # The last token is a target of this chunk and the first input of the next.
        self._offset += taken - 1
        self._rest = None if rest is None else rest[taken - 1 :]
        item = tokens.itemsize
        view = as_strided(tokens, (self._count, width + 1), (width * item, item), writeable=False)
        return _Chunk(view, start, {"sources": stream.places(), "offset": self._offset}, text_bytes)
