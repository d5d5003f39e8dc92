from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from helpers import both, extreme_parameters, extremes, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval import sampling_speed
from eval.sampling import PROMPT_BLOCK, Sampler, SampleStream, SamplingConfig, Utf8Stream, draw, fixed
from intlm import fixedpoint, model, noise
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import make_engine
from intlm.errors import InputError
from tokenizer import ByteTokenizer

WORDS = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)


# --- one draw -----------------------------------------------------------------------------------------------


def slow_weights(config, logits):
    """(token, weight) from the likeliest on, in Python's integers: the definition of what is kept."""
    size = len(logits)
    order = sorted(range(size), key=lambda token: (-logits[token], token))
    bits = min(24, 32 - (size - 1).bit_length())
    table = fixedpoint.exp2_table().tolist()
    weights = []
    for token in order:
        below = (logits[order[0]] - logits[token]) * 256 // config.temperature
        shift = min(below >> 8, 40) + 24 - bits
        weights.append((table[below & 255] + ((1 << shift) >> 1)) >> shift)
    for i in range(size):
        if (config.top_k and i >= config.top_k) or weights[i] * 65536 < weights[0] * config.min_p:
            weights[i] = 0
    total, before, kept = sum(weights), 0, []
    for weight in weights:
        kept.append(weight if before == 0 or before * 65536 < total * config.top_p else 0)
        before += weight
    return list(zip(order, kept, strict=True))


def slow_draw(config, logits, word):
    if config.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    kept = slow_weights(config, logits)
    point = (word >> 1) * sum(weight for _, weight in kept) >> 31
    for token, weight in kept:
        if point < weight:
            return token
        point -= weight
    raise AssertionError("past the end")


CONFIGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0),
    "cold": SamplingConfig(temperature=1),
    "hot": SamplingConfig(temperature=65536),
    "cool": SamplingConfig(temperature=205),
    "top-k": SamplingConfig(top_k=3),
    "top-1": SamplingConfig(top_k=1),
    "top-k above the vocabulary": SamplingConfig(top_k=65536),
    "top-p": SamplingConfig(top_p=45000),
    "top-p of nothing": SamplingConfig(top_p=0),
    "min-p": SamplingConfig(min_p=6554),
    "min-p of everything": SamplingConfig(min_p=65536),
    "all": SamplingConfig(temperature=300, top_k=40, top_p=60000, min_p=300),
}


@cache
def drawing(name):
    """One function object a configuration, so that JAX compiles once a shape."""
    return partial(draw, CONFIGS[name])


def logits_of(rng, rows, vocabulary):
    spread = int(rng.choice([2, 300, 2047]))
    return extremes(rng, (rows, vocabulary), -spread, spread).astype(np.int16)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(seed=seeds)
def test_draw_is_its_definition(name, seed):
    rng = np.random.default_rng(seed)
    logits = logits_of(rng, 6, 256)
    words = np.where(rng.random(6) < 0.5, WORDS, rng.integers(0, 2**32, 6)).astype(np.uint32)
    found = both(drawing(name), logits, words)
    assert found.dtype == np.int32 and found.shape == (6,)
    for row, word, token in zip(logits.tolist(), words.tolist(), found.tolist(), strict=True):
        assert token == slow_draw(CONFIGS[name], row, word)


@pytest.mark.parametrize("name", ["plain", "all", "hot"])
@pytest.mark.parametrize("vocabulary", [2, 257, 1000])
def test_draw_for_other_vocabularies(name, vocabulary):
    rng = np.random.default_rng(vocabulary)
    for _ in range(3):
        logits = logits_of(rng, 6, vocabulary)
        found = both(drawing(name), logits, WORDS)
        for row, word, token in zip(logits.tolist(), WORDS.tolist(), found.tolist(), strict=True):
            assert token == slow_draw(CONFIGS[name], row, word)


def test_nothing_overflows_at_the_largest_vocabulary():
    flat = np.zeros((6, 1 << 16), np.int16)
    found = both(drawing("plain"), flat, WORDS)
    assert found.tolist() == [(word >> 1) * 65536 >> 31 for word in WORDS.tolist()]
    assert both(drawing("hot"), flat - 2047, WORDS).tolist() == found.tolist()


def test_greedy_takes_the_first_of_the_likeliest():
    logits = np.array([[5, 9, 9, 1], [-2047] * 4, [2047] * 4, [0, -1, 3, 4]], np.int16)
    for word in WORDS:
        found = both(drawing("greedy"), logits, np.full(4, word, np.uint32))
        assert found.tolist() == [1, 0, 0, 3]


def can_be_drawn(config, logits):
    row = np.array([logits], np.int16)
    words = np.linspace(0, 2**32 - 1, 4001).astype(np.uint32)
    return set(draw(config, np.repeat(row, 4001, axis=0), words).tolist())


def test_top_k_keeps_the_k_likeliest_with_ties_by_number():
    logits = [0, 100, 100, 50, 100, -300]
    assert can_be_drawn(SamplingConfig(top_k=1), logits) == {1}
    assert can_be_drawn(SamplingConfig(top_k=2), logits) == {1, 2}
    assert can_be_drawn(SamplingConfig(top_k=4), logits) == {1, 2, 3, 4}
    assert can_be_drawn(SamplingConfig(top_k=0), logits) == set(range(6))


def test_top_p_keeps_the_fewest_that_reach_the_share():
    logits = [768, 512, 256, 0, 0]  # 8 : 4 : 2 : 1 : 1 of 16
    for share, kept in ((0, 1), (1, 1), (8, 1), (8.01, 2), (12, 2), (12.01, 3), (14, 3), (15, 4), (15.01, 5)):
        found = can_be_drawn(SamplingConfig(top_p=int(share * 4096)), logits)
        assert found == set(range(kept)), share
    assert can_be_drawn(SamplingConfig(top_p=65536), logits) == set(range(5))


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = [768, 512, 256, 0, 0]
    for share, kept in ((65536, 1), (32769, 1), (32768, 2), (16384, 3), (8193, 3), (8192, 5), (0, 5)):
        assert can_be_drawn(SamplingConfig(min_p=share), logits) == set(range(kept)), share


def test_the_share_of_top_p_is_of_what_top_k_and_min_p_leave():
    logits = [768, 512, 256, 0, 0]
    # Of 8 and 4 alone, 8 is two thirds.
    assert can_be_drawn(SamplingConfig(top_k=2, top_p=40000), logits) == {0}
    assert can_be_drawn(SamplingConfig(top_k=2, top_p=45000), logits) == {0, 1}
    assert can_be_drawn(SamplingConfig(min_p=32768, top_p=40000), logits) == {0}


@pytest.mark.parametrize("temperature", [64, 128, 256, 512, 1024])
def test_draws_are_as_frequent_as_their_probability(temperature):
    logits = np.array([300, 0, 256, -100, 299, -900, 120, 10], np.int16)
    words = noise.words(noise.seed_key(temperature), np.arange(1000), 40).ravel()
    config = SamplingConfig(temperature=temperature)
    found = draw(config, np.broadcast_to(logits, (len(words), 8)), words)
    share = 2.0 ** (logits / temperature)
    expected = share / share.sum() * len(words)
    likely = expected > 10
    counts = np.bincount(found, minlength=8)
    chi_square = np.sum(((counts - expected) ** 2 / expected)[likely])
    freedom = likely.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
    assert counts[~likely].sum() < 10 + 5 * expected[~likely].sum()


def test_every_random_number_is_worth_the_same():
    # Two equal tokens split the numbers in the middle.
    config, logits = SamplingConfig(), np.zeros((2, 2), np.int16)
    words = np.array([2**31 - 1, 2**31], np.uint32)
    assert draw(config, logits, words).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -256}, "--temperature -1.0: must be from 0 to 256"),
        ({"temperature": 65537}, "--temperature 256.00390625: must be from 0 to 256"),
        ({"top_k": -1}, "--top-k -1: must be from 0 to 65536"),
        ({"top_p": 65537}, "--top-p 1.0000152587890625: must be from 0 to 1"),
        ({"min_p": -1}, "--min-p -1.52587890625e-05: must be from 0 to 1"),
        ({"seed": 2**64}, "--seed 18446744073709551616: must be from 0 to 18446744073709551615"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(InputError) as raised:
        SamplingConfig(**values)
    assert str(raised.value) == message


# --- a sampler ----------------------------------------------------------------------------------------------

MODEL = ModelConfig(width=64, layers=2, vocabulary=100)
EGGROLL = EggrollConfig(population=2)


@cache
def engine(name):
    return make_engine(name, MODEL, EGGROLL)


@cache
def parameters():
    return extreme_parameters(MODEL, 5, 0)


def sample(name="reference", prompt=(0, 5, 9), count=3, length=5, config=CONFIGS["all"]):
    sampler = Sampler(engine(name), MODEL, parameters(), config)
    return np.concatenate(list(sampler.tokens(np.array(prompt), count, length)), axis=1).T


PROMPTS = {
    "one token": (0,),
    "a few": (0, 7, 8, 9),
    "a block": tuple(range(PROMPT_BLOCK)),
    "blocks and more": tuple(i * 7 % 100 for i in range(2 * PROMPT_BLOCK + 3)),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_both_engines_draw_the_same_tokens(prompt):
    one, other = (sample(name, PROMPTS[prompt]) for name in ("reference", "xla"))
    assert one.dtype == np.int32 and one.shape == (5, 3)
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one)) > 3


def slow_sample(prompt, index, length, config):
    """One sample, token by token from the start, each time over all tokens."""
    key = noise.fold(noise.seed_key(config.seed), 0xFFFFFFFE)
    tokens = list(prompt)
    for position in range(length):
        logits, _ = engine("reference").forward(
            parameters(), np.array([tokens], np.int32), model.initial_state(MODEL, 1)
        )
        block = noise.fold(key, position - position % 64)
        word = int(noise.words(block, np.array([index]), 64)[0, position % 64])
        tokens.append(slow_draw(config, logits[0, -1].tolist(), word))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", ["one token", "blocks and more"])
def test_samples_follow_from_the_whole_text(prompt):
    found = sample(prompt=PROMPTS[prompt], length=6)
    for index in range(3):
        assert found[:, index].tolist() == slow_sample(PROMPTS[prompt], index, 6, CONFIGS["all"])


def test_a_sample_is_the_same_among_any_number():
    several = sample(count=5, length=70)  # past a block of random numbers
    for count in (1, 2, 4):
        np.testing.assert_array_equal(sample(count=count, length=70), several[:, :count])
    np.testing.assert_array_equal(sample(count=5, length=9), several[:9])
    columns = {tuple(column) for column in several.T.tolist()}
    assert len(columns) == 5


def test_a_sample_is_decided_by_its_seed():
    first = sample(length=20)
    np.testing.assert_array_equal(first, sample(length=20))
    assert not np.array_equal(first, sample(length=20, config=replace(CONFIGS["all"], seed=1)))


def test_greedy_samples_are_all_the_same():
    found = sample(config=CONFIGS["greedy"], length=8)
    assert np.all(found == found[:, :1])
    np.testing.assert_array_equal(found, sample(config=replace(CONFIGS["greedy"], seed=9), length=8))


def test_no_tokens():
    assert list(Sampler(engine("reference"), MODEL, parameters(), CONFIGS["all"]).tokens([3], 2, 0)) == []


# --- text -----------------------------------------------------------------------------------------------------

texts = (
    st.text().map(str.encode)
    | st.binary()
    | st.lists(
        st.sampled_from(
            [b"\xf0\x9f\x98\x80", b"\xe2\x82", b"\xff", b"a", "é".encode(), b"\xed\xa0\x80", b"\xf0\x9f"]
        )
    ).map(b"".join)
)


@example(b"\xf0\x9f\x98\x80", [1, 2, 3])
@given(texts, st.lists(st.integers(0, 40)))
def test_text_in_pieces_is_the_text(data, cuts):
    stream, places = Utf8Stream(), [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    text, fed = "", 0
    for start, stop in pairwise(places):
        text += stream.feed(data[start:stop])
        fed = stop
        assert data[:fed].decode(errors="replace").startswith(text)
    assert text + stream.end() == data.decode(errors="replace")


def test_a_character_is_shown_when_it_is_whole():
    stream = Utf8Stream()
    shown = [stream.feed(bytes([byte])) for byte in "a😀é".encode()]
    assert shown == ["a", "", "", "", "😀", "", "é"] and stream.end() == ""
    assert stream.feed(b"\xf0\x9f") == "" and stream.end() == "\ufffd"


@given(st.lists(st.sampled_from([b"\0", b"a", b"\n", b"\xe2\x82", "é".encode()])), st.integers(0, 9))
def test_a_blank_line_is_shown_between_documents(pieces, size):
    stream, text = SampleStream(ByteTokenizer()), b"".join(pieces)
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    # However few tokens come at once.
    shown = "".join(map(stream.feed, np.split(tokens, range(1, len(tokens), size + 1)))) + stream.end()
    expected = ""
    for number, document in enumerate(text.split(b"\0")):
        if number and expected:
            expected += "\n" * max(0, 2 - len(expected) + len(expected.rstrip("\n")))
        expected += document.decode(errors="replace")
    assert shown == expected


def test_documents_by_example():
    stream = SampleStream(ByteTokenizer())
    assert stream.start(b"") + stream.feed(np.array([0, 97, 0, 0, 98, 10, 0, 99])) == "a\n\nb\n\nc"
    assert stream.feed(np.array([0xC3, 0])) == "\ufffd\n\n" and stream.end() == ""


# --- numbers as people write them ------------------------------------------------------------------------------


@given(st.decimals(0, 256, places=12), st.sampled_from([0, 8, 16]))
def test_fixed_rounds_down_exactly(value, bits):
    assert fixed(str(value), bits, "--x", 256) == floor(Fraction(value) * 2**bits)


@pytest.mark.parametrize(
    ("text", "bits", "expected"),
    [
        ("0.8", 8, 204),
        ("1", 8, 256),
        ("0", 8, 0),
        ("-0", 8, 0),
        ("1e-3", 16, 65),
        (".5", 1, 1),
        ("0.1", 16, 6553),
        ("0.99999999999999999999", 8, 255),
        ("1e-999999", 16, 0),
    ],
)
def test_fixed_by_example(text, bits, expected):
    assert fixed(text, bits, "--x") == expected


@pytest.mark.parametrize(
    "text", ["", "a", "0,8", "nan", "sNaN", "inf", "-Infinity", "-1e-9", "1.0000001", "1e99", "0x10", "0 1"]
)
def test_fixed_refuses_anything_else(text):
    with pytest.raises(InputError) as raised:
        fixed(text, 8, "--top-p")
    assert str(raised.value) == f"--top-p {text}: must be a number from 0 to 1, such as 0.8"


def test_fixed_reads_what_the_flags_mean():
    config = SamplingConfig(
        temperature=fixed("1.7", 8, "--temperature", 256), top_p=fixed("0.9", 16, "--top-p")
    )
    assert (config.temperature, config.top_p) == (435, 58982)


# --- speed --------------------------------------------------------------------------------------------------


def test_sampling_speed_is_measured_for_every_engine_and_number_of_samples():
    said = []
    found = sampling_speed.measure(MODEL, EGGROLL, ["reference", "xla"], [1, 3], 0, said.append)
    assert [(result.engine, result.samples) for result in found] == [
        ("reference", 1), ("reference", 3), ("xla", 1), ("xla", 3)
    ]  # fmt: skip
    assert all(result.rate > 0 for result in found) and said
    lines = sampling_speed.table(found).splitlines()
    assert len(lines) == 6 and lines[2].split()[:2] == ["reference", "1"]
    assert found[0].as_dict() == {"engine": "reference", "samples": 1, "rate": found[0].rate}
