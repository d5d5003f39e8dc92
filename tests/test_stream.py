"""The order of training: a function of the seed and the corpora, resumed from a few integers."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers import ListCorpus
from hypothesis import given
from hypothesis import strategies as st

from intlm.errors import InputError
from train import stream as stream_module
from train.corpus import cut
from train.stream import Limited, Place, Source, Stream, permutation

WINDOW = 50
FRAGMENT = 11


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "WINDOW_BYTES", WINDOW)
        patch.setattr(stream_module, "FRAGMENT_BYTES", FRAGMENT)
        yield


def take(stream, count):
    taken = []
    for _ in range(count):
        taken.append(stream.fragment()[0])
        stream.advance()
    return taken


def slow_epoch(documents, seed, epoch, block, holds_out):
    """One epoch as the documentation has it."""
    pieces = [piece for document in documents for piece in cut(document, block)]
    windows, size = [[]], 0
    for piece in pieces:
        if holds_out(piece):
            continue
        if size >= WINDOW:
            windows.append([])
            size = 0
        windows[-1] += [(fragment, number == 0) for number, fragment in enumerate(cut(piece, FRAGMENT))]
        size += len(piece)
    ordered = []
    for number, window in enumerate(windows):
        ordered += [window[index] for index in permutation(seed, epoch, number, len(window))]
    return ordered


@st.composite
def corpora(draw):
    """Documents, of which some are long, a block size, and what is held out: never all."""
    documents = draw(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=40))
    block = draw(st.integers(4, 50))
    pieces = sorted({piece for document in documents for piece in cut(document, block)})
    held_out = draw(st.sets(st.sampled_from(pieces), max_size=len(pieces) - 1))
    return documents, block, held_out.__contains__


@given(corpora(), st.integers(0, 2**64 - 1))
def test_windows_are_shuffled_and_epochs_differ(corpus, seed):
    documents, block, holds_out = corpus
    stream = Stream([Source(ListCorpus(documents), seed, block=block, holds_out=holds_out)])
    for epoch in range(3):
        expected = slow_epoch(documents, seed, epoch, block, holds_out)
        for fragment in expected:
            assert stream.fragment() == fragment
            stream.advance()


@st.composite
def mixtures(draw):
    count = draw(st.integers(1, 3))
    return [(*draw(corpora()), draw(st.integers(1, 5))) for _ in range(count)]


def make(mixture, seed, places=None):
    places = [Place() for _ in mixture] if places is None else [Place.from_dict(p) for p in places]
    return Stream(
        [
            Source(ListCorpus(documents), seed, weight, block, holds_out, place)
            for (documents, block, holds_out, weight), place in zip(mixture, places, strict=True)
        ]
    )


@given(mixtures(), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 60), max_size=6), st.data())
def test_a_stream_goes_on_from_its_places(mixture, seed, runs, data):
    undisturbed, places = make(mixture, seed), None
    for count in runs:
        resumed = make(mixture, seed, places)
        assert take(resumed, count) == take(undisturbed, count)
        if data.draw(st.booleans()):
            assert resumed.fragment() == undisturbed.fragment()  # looking changes nothing
        places = json.loads(json.dumps(resumed.places()))
        assert places == undisturbed.places()


def test_an_epoch_is_every_document_once_and_a_window_is_shuffled_whole():
    documents = [b"%02d" % number for number in range(25)]
    stream = make([(documents, 10, lambda _: False, 1)], seed=1)
    epochs = [take(stream, 25) for _ in range(3)]
    assert all(sorted(epoch) == documents for epoch in epochs)
    assert len({tuple(epoch) for epoch in [documents, *epochs]}) == 4


def test_the_order_is_pinned():
    # A change here would give every run another order of documents.
    assert permutation(0, 0, 0, 8).tolist() == PINNED[0]
    assert permutation(1, 2, 3, 8).tolist() == PINNED[1]


PINNED = [[3, 0, 6, 2, 1, 5, 4, 7], [5, 1, 4, 7, 6, 2, 0, 3]]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**33), st.integers(0, 2**33), st.integers(0, 300))
def test_a_permutation_is_one(seed, epoch, window, count):
    assert sorted(permutation(seed, epoch, window, count)) == list(range(count))


def test_permutations_are_fair():
    """Each of 4 documents is as often in each of 4 places: within 5 standard deviations."""
    seen = np.zeros((4, 4), int)
    for window in range(4000):
        seen[permutation(7, 0, window, 4), range(4)] += 1
    assert abs(seen - 1000).max() < 5 * 27.4
    keys = [(seed, epoch, window) for seed in (0, 1) for epoch in (0, 1) for window in (0, 1)]
    assert len({tuple(permutation(*key, 30)) for key in keys}) == 8


def test_bytes_come_in_proportion_to_weights():
    lengths = {b"a": 3, b"b": 7, b"c": 1}
    mixture = [([letter * length] * 5, 50, lambda _: False, weight)
               for (letter, length), weight in zip(lengths.items(), (3, 1, 2), strict=True)]  # fmt: skip
    stream = make(mixture, seed=0)
    served = Counter()
    for document in take(stream, 5000):
        served[document[:1]] += len(document)
        # Never further from its share than one document of each.
        assert all(
            abs(served[a] * weight_b - served[b] * weight_a) <= 7 * 3
            for a, weight_a in zip(lengths, (3, 1, 2), strict=True)
            for b, weight_b in zip(lengths, (3, 1, 2), strict=True)
        )
    assert take(make(mixture, 0), 3) == [b"aaa", b"bbbbbbb", b"c"]  # ties go by position


def test_a_short_source_repeats_while_a_long_one_goes_on():
    mixture = [
        ([b"short"], 50, lambda _: False, 1),
        ([b"%05d" % n for n in range(1000)], 50, lambda _: False, 1),
    ]
    stream = make(mixture, 0)
    assert sorted(take(stream, 400)[1::2]) == [b"%05d" % n for n in range(200)]
    assert [place["epoch"] for place in stream.places()] == [199, 0]


def test_a_corpus_of_one_window_is_read_once():
    corpus = ListCorpus([b"0123456789"] * 3)
    take(Stream([Source(corpus, 0)]), 100)
    assert corpus.opened == 1


def test_nothing_to_train_on():
    with pytest.raises(InputError, match=r"^--data: 'list' has no text to train on$"):
        Stream([Source(ListCorpus([b"a", b"b"]), 0, holds_out=lambda _: True)]).fragment()


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9))
def test_the_first_documents_of_a_corpus(count, limit, start):
    corpus = Limited(ListCorpus([b"%d" % number for number in range(count)]), limit)
    read = list(corpus.read({}))
    assert [document for document, _ in read] == [b"%d" % number for number in range(min(count, limit))]
    if start < len(read):
        assert list(corpus.read(read[start][1])) == read[start + 1 :]
    assert (corpus.name, corpus.fingerprint()) == ("list", {"documents": count})


@pytest.mark.parametrize(
    "change", [{"index": -1}, {"index": None}, {"epoch": True}, {"cursor": 3}, {"more": 1}, None]
)
def test_what_is_no_place(change):
    values = Place().__dict__ | change if change else [1]
    with pytest.raises(ValueError):
        Place.from_dict(values)
