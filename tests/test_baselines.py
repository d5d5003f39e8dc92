import gzip
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval import baselines as baselines_module
from eval.baselines import baselines, compressed_bits_per_byte, ngram_bits_per_byte, own_entropy
from intlm.errors import InputError

few_letters = st.lists(st.binary(max_size=30) | st.text("ab\0", max_size=30).map(str.encode), max_size=5)
some_text = few_letters.filter(any)


def grams(documents, order):
    for document in documents:
        padded = bytes(order - 1) + document
        for position in range(order - 1, len(padded)):
            yield padded[position - order + 1 : position], padded[position]


def slow_ngram(train, held_out, order):
    following = defaultdict(Counter)
    for length in range(1, order + 1):
        for context, byte in grams(train, length):
            following[context][byte] += 1

    def probability(context, byte):
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = following.get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    costs = [-math.log2(probability(context, byte)) for context, byte in grams(held_out, order)]
    return sum(costs) / len(costs)


def slow_entropy(documents, order):
    pairs = list(grams(documents, order))
    joint = Counter(pairs)
    contexts = Counter(context for context, _ in pairs)
    return sum(-math.log2(joint[pair] / contexts[pair[0]]) for pair in pairs) / len(pairs)


@pytest.mark.parametrize("order", [1, 2, 3])
@settings(deadline=None, max_examples=15)
@given(train=few_letters, held_out=some_text)
@example(train=[b"abab", b"", b"ba"], held_out=[b"", b"abc", b"ba\0"])
def test_ngram_matches_a_dictionary_of_counts(order, train, held_out):
    expected = slow_ngram(train, held_out, order)
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@settings(deadline=None, max_examples=15)
@given(held_out=some_text, train=few_letters)
def test_own_entropy_is_what_no_ngram_model_beats(order, held_out, train):
    entropy = own_entropy(held_out, order)
    assert entropy == pytest.approx(slow_entropy(held_out, order), rel=1e-9, abs=1e-9)
    assert entropy <= ngram_bits_per_byte(train, held_out, order) + 1e-9


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counting_in_chunks_changes_nothing(order, monkeypatch):
    train, held_out = [b"the cat sat on the mat", b"a", b""], [b"that hat", b"the"]
    whole = ngram_bits_per_byte(train, held_out, order)
    monkeypatch.setattr(baselines_module, "CHUNK", 3)
    assert ngram_bits_per_byte(train, held_out, order) == whole


def test_no_context_crosses_a_document():
    held_out = [b"ab", b"ab"]
    assert own_entropy(held_out, 1) == 1
    # After the separator always a, after a always b.
    assert own_entropy(held_out, 2) == 0
    assert ngram_bits_per_byte([b"a", b"b"], held_out, 3) == ngram_bits_per_byte([b"b", b"a"], held_out, 3)


def test_without_training_text_every_byte_costs_eight_bits():
    assert ngram_bits_per_byte([], [b"abc"], 2) == 8


def test_compression_counts_bits_per_byte():
    documents = [b"some text ", b"and some more text"]
    text = b"".join(documents)
    sizes = compressed_bits_per_byte(documents)
    assert sizes["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert set(sizes) == {"gzip", "xz"} and sizes["xz"] > 0


def test_all_baselines_at_once():
    train, held_out = [b"the cat sat", b"on the mat"] * 5, [b"the hat", b"a cat"]
    found = baselines(train, iter(held_out))
    assert [found.unigram, found.bigram, found.trigram] == [
        ngram_bits_per_byte(train, held_out, order) for order in (1, 2, 3)
    ]
    assert [found.own_unigram, found.own_bigram, found.own_trigram] == [
        own_entropy(held_out, order) for order in (1, 2, 3)
    ]
    assert {"gzip": found.gzip, "xz": found.xz} == compressed_bits_per_byte(held_out)
    assert found.bytes == 12


@pytest.mark.parametrize(
    "measure",
    [
        lambda held_out: baselines([b"a"], held_out),
        lambda held_out: ngram_bits_per_byte([b"a"], held_out, 2),
        lambda held_out: own_entropy(held_out, 1),
        compressed_bits_per_byte,
    ],
)
@pytest.mark.parametrize("held_out", [[], [b""]])
def test_nothing_held_out(measure, held_out):
    with pytest.raises(InputError, match=r"^the held-out text is empty \(accepted: at least one byte\)$"):
        measure(held_out)


@pytest.mark.parametrize("order", [0, 4])
def test_order_out_of_range(order):
    with pytest.raises(InputError, match=rf"^order: {order} \(accepted: 1, 2, 3\)$"):
        ngram_bits_per_byte([b"a"], [b"a"], order)
    with pytest.raises(InputError, match=rf"^order: {order} \(accepted: 1, 2, 3\)$"):
        own_entropy([b"a"], order)
