from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm.errors import InputError
from train import lanes as lanes_module
from train.lanes import Lanes


def slow_segment(stream, lanes, segment, position):
    size = len(stream)
    rows = [
        [stream[(lane * size // lanes + position + step) % size] for step in range(segment + 1)]
        for lane in range(lanes)
    ]
    return np.array(rows)


@st.composite
def layouts(draw):
    segment = draw(st.integers(1, 9))
    size = draw(st.integers(segment + 1, 300))
    stream = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    return stream, draw(st.integers(1, 12)), segment


@settings(deadline=None)
@given(layouts(), st.integers(0, 10**20), st.integers(1, 150))
def test_segments_are_the_circle_read_from_each_start(layout, position, steps):
    stream, count, segment = layout
    lanes = Lanes(stream, count, segment, position=position)
    for _ in range(steps):
        tokens = lanes.next_segment()
        assert tokens.dtype == np.int32 and tokens.shape == (count, segment + 1)
        np.testing.assert_array_equal(tokens, slow_segment(stream, count, segment, position))
        position += segment
        assert lanes.position == position


@settings(deadline=None)
@given(layouts(), st.lists(st.integers(0, 80), max_size=6))
def test_runs_that_are_killed_and_resumed_read_the_same_tokens(layout, runs):
    undisturbed = Lanes(*layout)
    position = 0
    for steps in runs:
        resumed = Lanes(*layout, position=position)
        for _ in range(steps):
            np.testing.assert_array_equal(resumed.next_segment(), undisturbed.next_segment())
        position = resumed.position


@settings(deadline=None)
@given(layouts(), st.integers(1, 9))
def test_another_segment_length_goes_on_with_the_next_token(layout, other):
    stream, count, segment = layout
    first = Lanes(stream, count, segment)
    last = first.next_segment()[:, -1]
    other = min(other, len(stream) - 1)
    following = Lanes(stream, count, other, position=first.position).next_segment()
    np.testing.assert_array_equal(following[:, 0], last)


def test_targets_are_the_inputs_shifted_and_segments_overlap_by_one():
    lanes = Lanes(np.arange(10), lanes=2, segment=4)
    assert lanes.next_segment().tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert lanes.next_segment().tolist() == [[4, 5, 6, 7, 8], [9, 0, 1, 2, 3]]


def test_lanes_read_the_stream_once_in_an_epoch():
    lanes = Lanes(np.arange(12), lanes=3, segment=2)
    seen = [lanes.next_segment()[:, :-1] for _ in range(2)]
    assert sorted(np.concatenate(seen, axis=1).ravel()) == list(range(12))
    assert lanes.epoch == 1
    lanes.next_segment()
    assert lanes.epoch == Fraction(3, 2) and float(lanes.epoch) == 1.5


def test_there_may_be_more_lanes_than_tokens():
    lanes = Lanes(np.arange(3), lanes=7, segment=2)
    assert lanes.next_segment()[:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_segments_are_the_callers_own():
    lanes = Lanes(np.arange(10), lanes=1, segment=3)
    lanes.next_segment()[:] = -1
    assert lanes.next_segment().tolist() == [[3, 4, 5, 6]]


def test_blocks_that_hold_a_single_segment(monkeypatch):
    monkeypatch.setattr(lanes_module, "BLOCK_TOKENS", 1)
    stream = np.arange(50)
    lanes = Lanes(stream, lanes=3, segment=7)
    for step in range(20):
        np.testing.assert_array_equal(lanes.next_segment(), slow_segment(stream, 3, 7, 7 * step))


def test_a_segment_may_span_the_whole_stream():
    assert Lanes(np.arange(5), lanes=1, segment=4, position=2).next_segment().tolist() == [[2, 3, 4, 0, 1]]


def test_text_too_short():
    message = r"^the text is too short: 4 tokens \(accepted: 5 or more, a segment of 4 and its last target\)$"
    with pytest.raises(InputError, match=message):
        Lanes(np.arange(4), lanes=1, segment=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lanes": 0, "segment": 4}, r"^lanes: 0 \(accepted: 1 or more\)$"),
        ({"lanes": 1, "segment": 0}, r"^segment: 0 \(accepted: 1 or more\)$"),
        ({"lanes": 1, "segment": 4, "position": -1}, r"^position: -1 \(accepted: 0 or more\)$"),
    ],
)
def test_counts_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        Lanes(np.arange(9), **arguments)
