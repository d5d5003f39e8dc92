"""The native engine's own way to draw tokens gives the tokens of the reference, for every instruction set."""

from functools import cache

import numpy as np
import pytest
from helpers import extreme_parameters, extremes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sampling import SAMPLING, Sampler, SamplingConfig, draw, draw_rule
from intlm import model, noise
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine import native
from intlm.engine.engine import SamplingEngine, make_engine
from intlm.engine.reference import ReferenceEngine
from intlm.fixedpoint import ACTIVATIONS

ISAS = native.available_isas()

pytestmark = pytest.mark.skipif(
    not ISAS, reason="installed without a native engine: there was no C++ compiler"
)

isas = pytest.mark.parametrize("isa", ISAS)

EGGROLL = EggrollConfig(population=2)
MODELS = {
    "70 tokens": ModelConfig(layers=2, vocabulary=70),
    "256 tokens, tables": ModelConfig(width=128, layers=1, gate="sigmoid", candidate="tanh", mlp="relu"),
    "1000 tokens": ModelConfig(width=192, layers=1, vocabulary=1000, gate="relu2", candidate="relu2"),
    "two tokens": ModelConfig(layers=1, vocabulary=2, mlp="identity"),
}
models = pytest.mark.parametrize("name", MODELS)


def corners(high, *more):
    return st.sampled_from([0, 1, 2, high // 2, high - 1, high, *more]) | st.integers(0, high)


configs = st.builds(
    SamplingConfig,
    temperature=corners(1 << 16, 64, 205, 256, 300),
    top_k=st.integers(0, 80) | corners(1 << 16),
    top_p=corners(1 << 16),
    min_p=corners(1 << 16, 300),
    seed=corners((1 << 64) - 1),
)
likely = st.builds(  # where most of the tokens stay in
    SamplingConfig,
    temperature=st.integers(200, 5000),
    top_k=st.integers(30, 300),
    top_p=st.integers(50000, 1 << 16),
    min_p=st.integers(0, 100),
    seed=seeds,
)


@cache
def engine(config, isa):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTLM_ISA", isa)
        return native.NativeEngine(config, EGGROLL, threads=2)


def tokens(on, config, parameters, sampling, prompt, count, length):
    drawn = Sampler(on, config, parameters, sampling).tokens(np.array(prompt), count, length)
    return np.concatenate(list(drawn), axis=1)


def check(config, isa, parameters, sampling, prompt, count, length):
    arguments = (config, parameters, sampling, prompt, count, length)
    expected = tokens(ReferenceEngine(config, EGGROLL), *arguments)
    found = tokens(engine(config, isa), *arguments)
    assert found.dtype == np.int32 and found.shape == (count, length)
    np.testing.assert_array_equal(found, expected)
    return found


def prompt_of(rng, config, length):
    """Any tokens, with a few separators."""
    return np.where(rng.random(length) < 0.1, 0, rng.integers(0, config.vocabulary, length))


@isas
@models
@settings(max_examples=12)
@given(seed=seeds, corruption=st.integers(0, 2), sampling=configs | likely, count=st.sampled_from([1, 2, 35]))
def test_samples_are_the_reference_s(name, isa, seed, corruption, sampling, count):
    rng = np.random.default_rng(seed)
    config = MODELS[name]
    parameters = extreme_parameters(config, seed, corruption)
    prompt = prompt_of(rng, config, int(rng.integers(1, 6)))
    check(config, isa, parameters, sampling, prompt, count, int(rng.integers(1, 12)))


def draws(isa, logits, sampling, count):
    """A first token of each of `count` samples: from these very logits, the head bias of a model of zeros."""
    config = ModelConfig(layers=1, vocabulary=len(logits))
    made = {name: np.zeros(shape, np.int8) for name, shape in model.shapes(config).items()}
    parameters = made | {"head_bias": logits}
    words = noise.words(
        noise.fold(noise.fold(noise.seed_key(sampling.seed), SAMPLING), 0), np.arange(count), 1
    )
    expected = draw(sampling, np.broadcast_to(logits, (count, len(logits))), words[:, 0])
    found = tokens(engine(config, isa), config, parameters, sampling, [1], count, 1)[:, 0]
    np.testing.assert_array_equal(found, expected)
    return found


@isas
@settings(max_examples=80)
@given(seed=seeds, vocabulary=st.sampled_from([2, 3, 70, 256, 257, 1000]), sampling=configs | likely)
def test_draws_are_their_definition(isa, seed, vocabulary, sampling):
    rng = np.random.default_rng(seed)
    spread = int(rng.choice([1, 20, 300, 2047]))
    logits = extremes(rng, (vocabulary,), -spread, spread).astype(np.int16)
    draws(isa, logits, sampling, 64)


@isas
def test_nothing_overflows_at_the_largest_vocabulary(isa):
    for level in (-2047, 0, 2047):
        logits = np.full(1 << 16, level, np.int16)
        for sampling in (SamplingConfig(), SamplingConfig(temperature=1 << 16, top_p=(1 << 16) - 1)):
            assert len(np.unique(draws(isa, logits, sampling, 32))) == 32
        logits[7::9] = np.clip(level + 300, -2047, 2047)
        draws(isa, logits, SamplingConfig(top_k=40000, top_p=60000), 32)


@isas
@pytest.mark.parametrize("site", ["gate", "candidate", "mlp"])
def test_every_activation(isa, site):
    for name in ACTIVATIONS:
        config = ModelConfig(layers=1, vocabulary=70, **{site: name})
        for corruption in (0, 2):
            check(config, isa, extreme_parameters(config, 3, corruption), SamplingConfig(), [5, 9], 1, 6)


@isas
@pytest.mark.parametrize("magnitude", [0, 1, 2, 3, 4, 127])
def test_norms_of_any_magnitude(isa, magnitude):
    # The final norm reads the embedding alone, and its output decides the logits.
    config, rng = MODELS["1000 tokens"], np.random.default_rng(magnitude)
    made = {name: np.zeros(shape, np.int8) for name, shape in model.shapes(config).items()}
    made["embedding"] = (rng.choice([-1, 1], (1000, 192)) * magnitude).astype(np.int8)
    made["head"] = extremes(rng, (1000, 192)).astype(np.int8)
    made["norm_output"] = extremes(rng, (192,)).astype(np.int8)
    made["head_bias"] = np.zeros(1000, np.int16)
    check(config, isa, made, SamplingConfig(temperature=5000), [7], 1, 20)


@isas
def test_prompts_of_any_length_with_separators(isa):
    config = MODELS["70 tokens"]
    parameters = extreme_parameters(config, 1, 0)
    rng = np.random.default_rng(1)
    for length in (1, 2, native.CALL_TOKENS + 1, 3 * native.CALL_TOKENS):
        prompt = prompt_of(rng, config, length)
        check(config, isa, parameters, SamplingConfig(), prompt, 1, 3)
        check(config, isa, parameters, SamplingConfig(), [*prompt, 0], 2, 3)


def test_a_separator_that_was_drawn_resets_the_state():
    # The separator is all but certain after any token but itself: what follows one depends on it alone.
    config = MODELS["70 tokens"]
    parameters = extreme_parameters(config, 4, 0)
    parameters["head_bias"] = np.where(np.arange(70) == 0, 300, 0).astype(np.int16)
    found = check(config, ISAS[-1], parameters, SamplingConfig(), [3, 5], 2, 90)
    assert 5 < np.sum(found == 0) < 170
    greedy = check(config, ISAS[-1], parameters, SamplingConfig(temperature=0), [3, 0], 1, 40)[0]
    np.testing.assert_array_equal(
        greedy,
        tokens(engine(config, ISAS[-1]), config, parameters, SamplingConfig(temperature=0), [0], 1, 40)[0],
    )


def test_neither_the_size_of_calls_nor_their_rows_change_a_token(monkeypatch):
    config, prompt, sampling = MODELS["70 tokens"], [0, 5, 9] * 30, SamplingConfig(top_k=30)
    parameters = extreme_parameters(config, 5, 0)
    expected = check(config, ISAS[-1], parameters, sampling, prompt, 3, 140)
    sampler = Sampler(engine(config, ISAS[-1]), config, parameters, sampling)
    for together, call, seconds in ((1, 64, 1.0), (99, 1, 1.0), (99, 7, 1e9), (99, 64, 1e9), (99, 64, 0.0)):
        monkeypatch.setattr(native, "SAMPLES_TOGETHER", together)
        monkeypatch.setattr(native, "CALL_TOKENS", call)
        monkeypatch.setattr(native, "CALL_SECONDS", seconds)
        for count, length in ((3, 140), (1, 70)):
            pieces = list(sampler.tokens(np.array(prompt), count, length))
            assert max(piece.shape[1] for piece in pieces) <= call
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected[:count, :length])
        assert list(sampler.tokens(np.array(prompt), 3, 0)) == []


def test_a_sampler_reads_other_parameters():
    config = MODELS["70 tokens"]
    for seed in (1, 2, 1):
        check(config, ISAS[-1], extreme_parameters(config, seed, 0), SamplingConfig(), [1], 1, 20)


def test_samples_in_turn_do_not_disturb_each_other():
    config = MODELS["70 tokens"]
    on, rule = engine(config, ISAS[-1]), draw_rule(SamplingConfig(), 70)
    made = [extreme_parameters(config, seed, 0) for seed in (1, 2)]
    expected = [tokens(on, config, parameters, SamplingConfig(), [3], 1, 100) for parameters in made]
    both = zip(*(on.sample(parameters, np.array([3]), rule, 1, 100) for parameters in made), strict=True)
    for found, one in zip(zip(*both, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(found, axis=1), one)


@pytest.mark.parametrize("prompt", [[], [-1], [70], [3, 70, 1]])
def test_a_prompt_of_other_tokens_is_refused(prompt):
    config = MODELS["70 tokens"]
    with pytest.raises(ValueError, match="0 to 69"):
        tokens(
            engine(config, ISAS[-1]), config, extreme_parameters(config, 1, 0), SamplingConfig(), prompt, 1, 1
        )


def test_the_engines_that_sample_by_themselves():
    config = MODELS["70 tokens"]
    assert isinstance(engine(config, ISAS[-1]), SamplingEngine)
    for name in ("reference", "xla"):
        assert not isinstance(make_engine(name, config, EGGROLL), SamplingEngine)
