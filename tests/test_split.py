"""Held-out text: chosen by content alone, never empty, never trained on."""

import hashlib

import pytest
from helpers import ListCorpus
from hypothesis import given
from hypothesis import strategies as st

from intlm.errors import InputError
from train import split as split_module
from train import text as text_module
from train.config import TextConfig
from train.corpus import cut
from train.split import UNCUT, Split, opening
from train.text import load_text

documents_of = st.lists(st.binary(min_size=1, max_size=20), min_size=2, max_size=80)
unequal_documents = documents_of.filter(lambda documents: len(set(documents)) > 1)


@pytest.fixture
def load(monkeypatch):
    """`load_text` of corpora in memory: (documents of each, …) -> Text."""

    def load(*corpora, held_out=None, **options):
        named = {f"corpus{number}": ListCorpus(documents) for number, documents in enumerate(corpora)}
        for name, corpus in named.items():
            corpus.name = name
        names = tuple(named)
        if held_out is not None:
            named["held-out"] = ListCorpus(held_out, "held-out")
            options["held_out"] = "held-out"
        monkeypatch.setattr(text_module, "open_corpus", lambda name, *_: named[name])
        return load_text(TextConfig(data=names, **options))

    return load


def assert_is_split(documents, text):
    assert text.train
    assert text.held_out
    assert not set(text.train) & set(text.held_out)
    assert sorted(text.train + text.held_out) == sorted(documents)
    assert text.whole


@given(unequal_documents, st.randoms(use_true_random=False))
def test_a_split_covers_everything_whatever_the_order(documents, random):
    with pytest.MonkeyPatch.context() as patch:
        corpus = ListCorpus(documents)
        patch.setattr(text_module, "open_corpus", lambda *_: corpus)
        text = load_text(TextConfig())
        assert_is_split(documents, text)
        random.shuffle(corpus.items)
        again = load_text(TextConfig())
        assert sorted(again.train) == sorted(text.train)
        assert sorted(again.held_out) == sorted(text.held_out)


def test_one_in_32_is_held_out_and_the_order_kept(load):
    documents = [b"document %d" % number for number in range(6400)]
    text = load(documents)
    assert_is_split(documents, text)
    assert 150 < len(text.held_out) < 250
    assert text.train == [document for document in documents if document not in text.held_out]
    for document in documents:
        key = hashlib.sha256(document).digest()
        held_out = int.from_bytes(key[:8]) % 32 == 0
        assert held_out == (document in text.held_out) == text.split.holds_out(document)


def test_a_longer_corpus_keeps_each_document_where_it_was(load):
    documents = [b"document %d" % number for number in range(640)]
    longer = [*documents, *(b"more %d" % number for number in range(640))]
    assert set(load(documents).held_out) <= set(load(longer).held_out)


def test_a_single_file_gets_a_held_out_part(load):
    document = b"".join(b"line %d\n" % number for number in range(20_000))
    text = load([document])
    blocks = cut(document, len(document) // 256)
    assert_is_split(blocks, text)
    assert 256 <= len(blocks) <= 260


def test_copies_of_one_document_are_cut_too(load):
    document = b"".join(b"line %d\n" % number for number in range(200))
    assert_is_split(cut(document, 512) * 40, load([document] * 40))


def test_large_documents_are_cut_however_many_there_are(load, monkeypatch):
    monkeypatch.setattr(split_module, "OPENING_BYTES", 256 * 600)
    large = [b"".join(b"%d %d\n" % (number, line) for line in range(1000)) for number in range(60)]
    text = load(large)
    assert_is_split([block for document in large for block in cut(document, 600)], text)
    small = [b"%d" % number for number in range(32)]
    assert_is_split([*small, *large], load([*small, *large]))


@pytest.mark.parametrize(("low_bits", "expected"), [(1, "held_out"), (32, "train")])
def test_a_side_left_empty_gets_the_block_with_the_smallest_hash(load, monkeypatch, low_bits, expected):
    # A stand-in hash whose first 8 bytes, modulo 32, send every document to the same side.
    for module in (split_module, text_module):
        monkeypatch.setattr(module, "content_key", lambda content: bytes(7) + bytes([low_bits]) + content)
    documents = [b"%02d" % number for number in range(30, -1, -1)]
    text = load([*documents, b"00"])
    assert_is_split([*documents, b"00"], text)
    assert getattr(text, expected) == [b"00", b"00"]


@pytest.mark.parametrize(
    ("documents", "found"),
    [([b"a"], "1 bytes make 1 block"), ([b"a"] * 50, "50 bytes make 1 block")],
)
def test_too_short_to_split(documents, found):
    with pytest.raises(
        InputError, match=f"^--text: 'list' is too short to hold out text: {found} of different text "
    ):
        opening(ListCorpus(documents), "--text")
    assert opening(ListCorpus(documents), "--text", hold_out=False).block == 512


def test_no_more_of_a_corpus_is_looked_at_than_needed():
    read = []

    class Endless(ListCorpus):
        def read(self, cursor):
            while True:
                read.append(b"%d" % len(read))
                yield read[-1], {}

    assert opening(Endless([]), "--data").block == UNCUT
    assert len(read) == 32


def test_a_held_out_corpus_of_its_own(load):
    text = load([b"train"], held_out=[b"one", b"two"])
    assert (text.train, text.held_out, text.split) == ([b"train"], [b"one", b"two"], None)


def test_only_a_prefix_is_looked_at_and_split(load, monkeypatch):
    monkeypatch.setattr(text_module, "PREFIX_BYTES", 50_000)
    documents = [b"document number %d" % number for number in range(20_000)]
    text = load(documents)
    assert not text.whole
    seen = len(text.train) + len(text.held_out)
    assert sum(map(len, documents[: seen - 1])) < 50_000 <= sum(map(len, documents[:seen]))
    assert sorted(text.train + text.held_out) == sorted(documents[:seen])
    # What comes later is held out by the same rule: in an epoch no such document is trained on.
    stream = text.stream(seed=1)
    trained = set()
    while not stream.places()[0]["epoch"]:
        trained.add(stream.fragment()[0])
        stream.advance()
    assert trained == {document for document in documents if not Split().holds_out(document)}


def test_the_held_out_text_is_bounded(load, monkeypatch):
    monkeypatch.setattr(text_module, "HELD_OUT_BYTES", 10)
    assert load([b"train"], held_out=[b"12345", b"67890ab", b"c"]).held_out == [b"12345", b"67890"]


def test_the_prefix_of_a_mixture_goes_by_the_weights(monkeypatch):
    monkeypatch.setattr(text_module, "PREFIX_BYTES", 40_000)
    named = {letter: ListCorpus([b"%s%04d" % (letter.encode(), n) for n in range(9000)]) for letter in "abc"}
    named["c"].items = named["c"].items[:100]
    monkeypatch.setattr(text_module, "open_corpus", lambda name, *_: named[name])
    text = load_text(TextConfig(data=("a=3", "b", "c=10")))
    counts = [sum(d.startswith(letter) for d in text.train + text.held_out) for letter in (b"a", b"b", b"c")]
    assert counts == [5926, 1975, 100] or counts == [5925, 1975, 100]


def test_the_first_documents_alone(load):
    documents = [b"document %d" % number for number in range(100)]
    assert_is_split(documents[:50], load(documents, max_documents=50))
