"""Many readers of one token stream, in step with each other."""

from fractions import Fraction

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from intlm.errors import InputError

BLOCK_SEGMENTS = 64
BLOCK_TOKENS = 1 << 22


class Lanes:
    """Reads a stream of S tokens as a circle, from L places at once, a segment of T tokens at a time.

    Lane i starts at offset i·S // L, so together the lanes read the whole stream once in S / L tokens each.
    `position`, the tokens read per lane, is the complete state: lanes made anew with it go on with exactly
    the next token, even with another segment length.
    """

    def __init__(self, stream_S: np.ndarray, lanes: int, segment: int, position: int = 0):
        """Place `lanes` readers on the integers `stream_S`, which is not copied.

        `InputError` for a stream shorter than `segment` + 1 tokens, or a count or position out of range.
        """
        for name, value, least in (("lanes", lanes, 1), ("segment", segment, 1), ("position", position, 0)):
            if value < least:
                raise InputError(f"{name}: {value} (accepted: {least} or more)")
        if len(stream_S) < segment + 1:
            raise InputError(
                f"the text is too short: {len(stream_S)} tokens (accepted: {segment + 1} or more,"
                f" a segment of {segment} and its last target)"
            )
        self._stream_S = stream_S
        self._segment = segment
        self._position = int(position)
        self._offsets_L = np.arange(lanes) * len(stream_S) // lanes
        # Segments are sliced from a block, since gathering each from all over the stream would be slow.
        segments = min(BLOCK_SEGMENTS, max(1, BLOCK_TOKENS // (lanes * segment)))
        self._width = segments * segment + 1
        self._column = self._width
        # A block's row that runs past the end of the stream is taken from a copy of the circle's seam.
        self._seam_start = max(0, len(stream_S) - self._width + 1)
        seam = np.arange(self._seam_start, len(stream_S) + self._width)
        self._seam = stream_S[seam % len(stream_S)]
        self._block_LxW = np.empty((lanes, self._width), stream_S.dtype)

    @property
    def position(self) -> int:
        """Tokens read so far by each lane."""
        return self._position

    @property
    def epoch(self) -> Fraction:
        """Passes over the stream so far, exactly: position · lanes / S."""
        return Fraction(self._position * len(self._offsets_L), len(self._stream_S))

    def next_segment(self) -> np.ndarray:
        """The next tokens of every lane, int32 [lanes, segment + 1]; `position` moves on by `segment`.

        Inputs are `[:, :-1]` and targets `[:, 1:]`: the last token of a segment is the first of the next.
        """
        if self._column + self._segment >= self._width:
            self._refill()
        tokens_LxT1 = self._block_LxW[:, self._column : self._column + self._segment + 1].astype(np.int32)
        self._column += self._segment
        self._position += self._segment
        return tokens_LxT1

    def _refill(self) -> None:
        size = len(self._stream_S)
        starts_L = (self._offsets_L + self._position % size) % size
        on_seam_L = starts_L >= self._seam_start
        sources = ((~on_seam_L, self._stream_S, 0), (on_seam_L, self._seam, self._seam_start))
        for rows_L, source, origin in sources:
            if rows_L.any():
                windows = sliding_window_view(source, self._width)
                self._block_LxW[rows_L] = windows[starts_L[rows_L] - origin]
        self._column = 0
