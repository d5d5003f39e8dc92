"""Lanes: the tokens of every step, whatever was interrupted, and whatever the thread ahead of them does."""

import json
import threading
import time

import numpy as np
import pytest
from helpers import ListCorpus
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm.engine.distributed import share
from intlm.errors import InputError
from tokenizer import ByteTokenizer
from train import lanes as lanes_module
from train import stream as stream_module
from train.lanes import Lanes, segments_of
from train.stream import Place, Source, Stream


class Wide:
    """A tokenizer with more than 256 tokens, of which one stands for several bytes; and the empty text."""

    separator = 999

    def encode(self, text):
        return np.array([2 * byte + 1 for byte in text if byte % 3], np.uint16)

    def encode_batch(self, documents, threads=1):
        return [self.encode(text) for text in documents]


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "WINDOW_BYTES", 60)
        patch.setattr(lanes_module, "ENCODED_BYTES", 20)
        patch.setattr(stream_module, "FRAGMENT_BYTES", 7)
        patch.setattr(lanes_module, "CHUNK_TOKENS", 200)
        patch.setattr(lanes_module, "MOST_SEGMENTS", 7)
        patch.setattr(lanes_module, "POLL_SECONDS", 0.001)
        yield


def make_stream(mixture, seed, places=None):
    places = [Place() for _ in mixture] if places is None else [Place.from_dict(place) for place in places]
    return Stream(
        [
            Source(ListCorpus(documents), seed, weight, block=9, place=place)
            for (documents, weight), place in zip(mixture, places, strict=True)
        ]
    )


def make_lanes(mixture, seed, tokenizer, count, segment, position=None, own=None):
    position = position or {"sources": None, "offset": 0, "column": 0}
    stream = make_stream(mixture, seed, position["sources"])
    return Lanes(stream, tokenizer, count, segment, position["offset"], position["column"], own)


def slow_segments(mixture, seed, tokenizer, count, segment, steps):
    """The segments as the documentation has them."""
    stream, tokens = make_stream(mixture, seed), []
    width = segments_of(count, segment) * segment
    chunks = -(-steps * segment // width)
    while len(tokens) <= chunks * count * width:
        text, opens = stream.fragment()
        tokens += [tokenizer.separator] * opens + list(tokenizer.encode(text))
        stream.advance()
    for step in range(steps):
        chunk, column = divmod(step * segment, width)
        starts = [(chunk * count + lane) * width + column for lane in range(count)]
        yield np.array([tokens[start : start + segment + 1] for start in starts])


documents_of = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12)
layouts = st.tuples(
    st.lists(st.tuples(documents_of, st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(0, 2**64 - 1),
    st.sampled_from([ByteTokenizer(), Wide()]),
    st.integers(1, 12),
    st.integers(1, 9),
)


@given(layouts, st.integers(1, 40))
def test_segments_are_the_stream_read_in_spans(layout, steps):
    lanes = make_lanes(*layout)
    for expected in slow_segments(*layout, steps):
        tokens = lanes.next_segment()
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, expected)


@settings(max_examples=60)
@given(layouts, st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=5))
def test_runs_that_are_killed_and_resumed_read_the_same_tokens(layout, runs):
    undisturbed, position = make_lanes(*layout), None
    for steps, waits in runs:
        resumed = make_lanes(*layout, position)
        for _ in range(steps):
            assert not waits or resumed.wait(lambda: False)
            np.testing.assert_array_equal(resumed.next_segment(), undisturbed.next_segment())
        position = json.loads(json.dumps(resumed.position))
        assert position == undisturbed.position
        assert not steps or resumed.progress() == undisturbed.progress()
        resumed.close()


@settings(max_examples=60)
@given(layouts, st.integers(1, 12), st.integers(0, 40), st.integers(1, 20))
def test_processes_read_their_own_lanes_of_the_same_segments(layout, processes, before, steps):
    whole = make_lanes(*layout)
    for _ in range(before):
        whole.next_segment()
    position, count = json.loads(json.dumps(whole.position)), layout[3]
    shares = [share(count, min(processes, count), process) for process in range(min(processes, count))]
    parts = [make_lanes(*layout, position, own) for own in shares]
    for _ in range(steps):
        tokens = [part.next_segment() for part in parts]
        np.testing.assert_array_equal(np.concatenate(tokens), whole.next_segment())
        for part in parts:
            assert part.position == whole.position
            assert part.progress() == whole.progress()
            assert part.bytes_per_token == whole.bytes_per_token


def test_a_process_encodes_its_own_lanes_alone(monkeypatch):
    """Of bytes; where a token is no byte, what lies before has to be encoded to know where it ends."""
    encoded = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text)
    )
    documents = [bytes([97 + number]) * 6 for number in range(26)]
    lanes = make_lanes([(documents, 1)], 0, ByteTokenizer(), 10, 4, own=(4, 2))
    lanes.next_segment()
    lanes.close()
    # Two lanes are 40 tokens of a chunk's 200: 6 or 7 documents of 7 tokens. A second chunk may be read ahead.
    assert 6 <= sum(map(bool, encoded)) <= 2 * 8


@settings(max_examples=20)
@given(layouts)
def test_positions_are_of_one_size(layout):
    lanes = make_lanes(*layout)
    sizes = set()
    for _ in range(30):
        lanes.next_segment()
        sizes.add(len(json.dumps(lanes.position)))
    assert max(sizes) < 250 * len(layout[0])


def test_a_small_example():
    lanes = make_lanes([([b"abcdefg"], 1)], 0, ByteTokenizer(), 2, 4)
    assert segments_of(2, 4) == 7
    spans = np.frombuffer((b"\0abcdefg" * 8)[:57], np.uint8)
    for step in range(7):
        first = 4 * step
        expected = [spans[first : first + 5], spans[28 + first : 33 + first]]
        np.testing.assert_array_equal(lanes.next_segment(), expected)
    # The last target of a chunk is the first input of the next.
    assert lanes.next_segment()[0, 0] == spans[56]
    assert lanes.position["column"] == 1
    assert lanes.epochs() == {"list": 7}
    assert lanes.progress() == {"documents": 8, "text_bytes": 7 * 8}


def test_chunks_are_bounded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes_module, "CHUNK_TOKENS", 1 << 22)
        patch.setattr(lanes_module, "MOST_SEGMENTS", 256)
        assert segments_of(8, 16) == 256
        assert segments_of(512, 32) == 256
        assert segments_of(2048, 32) == 64
        assert segments_of(1 << 19, 32) == 4


def test_what_is_kept_is_small_for_half_a_million_lanes(monkeypatch):
    """524,288 lanes (population 1,048,576) of 16 tokens: chunks of 32 MiB, one in use and one ahead."""
    import tracemalloc

    monkeypatch.setattr(lanes_module, "CHUNK_TOKENS", 1 << 22)
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr(stream_module, "FRAGMENT_BYTES", 1 << 20)
    corpus = ListCorpus([b"%06d" % number * 50_000 for number in range(4)])
    tracemalloc.start()
    lanes = Lanes(Stream([Source(corpus, 0)]), ByteTokenizer(), 1 << 19, 16)
    for _ in range(5):
        assert lanes.next_segment().shape == (1 << 19, 17)
    lanes.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_segments_are_the_callers_own():
    layout = ([([b"abcdefg"], 1)], 0, ByteTokenizer(), 2, 4)
    lanes, others = make_lanes(*layout), make_lanes(*layout)
    for _ in range(20):
        tokens = lanes.next_segment()
        np.testing.assert_array_equal(tokens, others.next_segment())
        tokens[:] = -1


def test_rewinding():
    lanes = make_lanes([([b"abcdefg"], 1)], 0, ByteTokenizer(), 2, 4)
    first = lanes.next_segment()
    lanes.rewind()
    np.testing.assert_array_equal(lanes.next_segment(), first)


class Failing(ListCorpus):
    """A corpus that ends in an error after some documents."""

    def read(self, cursor):
        yield from super().read(cursor)
        raise InputError("--data: the network is gone")


def test_an_error_is_raised_at_the_segment_that_needs_the_text_and_nothing_is_lost(monkeypatch):
    documents = [b"%02d" % number for number in range(50)]
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 4)
    broken = Lanes(Stream([Source(Failing(documents), 3)]), ByteTokenizer(), 2, 4)
    whole = Lanes(Stream([Source(ListCorpus(documents), 3)]), ByteTokenizer(), 2, 4)
    steps = 0
    while True:
        position = broken.position
        assert broken.wait(lambda: False)
        try:
            tokens = broken.next_segment()
        except InputError as error:
            assert str(error) == "--data: the network is gone"
            break
        np.testing.assert_array_equal(tokens, whole.next_segment())
        steps += 1
    assert broken.position == position
    assert steps == 2 * 7  # 150 tokens are two chunks of 56 and not a third
    with pytest.raises(InputError, match="network is gone"):
        broken.next_segment()
    # The same command, once the network is back.
    places = [Place.from_dict(place) for place in position["sources"]]
    again = Lanes(
        Stream([Source(ListCorpus(documents), 3, place=places[0])]),
        ByteTokenizer(),
        2,
        4,
        position["offset"],
        position["column"],
    )
    for _ in range(40):
        np.testing.assert_array_equal(again.next_segment(), whole.next_segment())


class Stalling(ListCorpus):
    """A corpus that does not answer until `let_go` is set."""

    def __init__(self, documents):
        super().__init__(documents)
        self.let_go = threading.Event()

    def read(self, cursor):
        self.let_go.wait()
        yield from super().read(cursor)


def test_waiting_ends_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(lanes_module, "CLOSE_SECONDS", 0.01)
    corpus = Stalling([b"some text"])
    lanes = Lanes(Stream([Source(corpus, 0)]), ByteTokenizer(), 2, 4)
    asked = []
    assert not lanes.wait(lambda: asked.append(1) or len(asked) > 3)
    assert lanes.position["column"] == 0
    lanes.close()  # does not wait for what does not answer
    corpus.let_go.set()


def test_closing_ends_the_thread():
    before = threading.active_count()
    lanes = make_lanes([([b"abcdefg"], 1)], 0, ByteTokenizer(), 2, 4)
    lanes.next_segment()
    lanes.close()
    while threading.active_count() > before:
        time.sleep(0.001)
    make_lanes([([b"abcdefg"], 1)], 0, ByteTokenizer(), 2, 4).close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lanes": 0, "segment": 4}, r"^lanes: 0 \(accepted: 1 or more\)$"),
        ({"lanes": 1, "segment": 0}, r"^segment: 0 \(accepted: 1 or more\)$"),
        ({"lanes": 1, "segment": 4, "offset": -1}, r"^offset: -1 \(accepted: 0 or more\)$"),
        ({"lanes": 1, "segment": 4, "column": 7}, r"^column: 7 \(accepted: 0 to 6\)$"),
    ],
)
def test_counts_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        Lanes(make_stream([([b"a"], 1)], 0), ByteTokenizer(), **arguments)
