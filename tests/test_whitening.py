"""Whitening of votes: the inverse, what it does to the covariance, bounds, and every engine's bits."""

from functools import cache

import numpy as np
import pytest
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm import eggroll, model, noise, whitening
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.native import NativeEngine, available_isas
from intlm.engine.reference import ReferenceEngine
from intlm.engine.xla import XlaEngine

# An odd vocabulary, and one block or two of some matrices' inputs and four or eight of others'.
MODELS = {
    "narrow": ModelConfig(width=64, layers=2, vocabulary=67),
    "wide": ModelConfig(width=128, layers=1, vocabulary=256),
}
CONFIGS = {
    "linear": EggrollConfig(population=8, segment=4, step_head=3),
    "threshold": EggrollConfig(population=8, segment=4, update="threshold"),
    "not whitened": EggrollConfig(population=8, segment=4, whitening=0),
    "weight": EggrollConfig(population=8, segment=4, estimator="weight"),
}


@cache
def engines(shape, case):
    made = [XlaEngine(MODELS[shape], CONFIGS[case])]
    for isa in available_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INTLM_ISA", isa)
            made += [NativeEngine(MODELS[shape], CONFIGS[case], threads=threads) for threads in (1, 3)]
    return made


def positive(rng, blocks, strength, rows=100):
    """Covariances of inputs that have much in common, as int64 [B, 64, 64]."""
    common = rng.normal(0, 1, (blocks, rows, 8)) @ rng.normal(0, strength, (blocks, 8, 64))
    normal = np.clip(np.rint(16 * (rng.normal(0, 1, (blocks, rows, 64)) + common)), -127, 127)
    return np.rint(64 * 256 / rows * (normal.swapaxes(1, 2) @ normal)).astype(np.int64)


def exact(covariance):
    """In floats, which are no part of the package: what `invert` is to find."""
    mean = np.trace(covariance, axis1=1, axis2=2) / 64
    return np.linalg.inv(covariance / mean[:, None, None] + np.eye(64) / 4)


# --- the inverse --------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    strength=st.sampled_from([0, 0.3, 1, 3, 30]),
    rows=st.sampled_from([1, 8, 100]),
)
def test_the_inverse_is_within_a_five_hundredth(seed, strength, rows):
    covariance = positive(np.random.default_rng(seed), 2, strength, rows)
    found = whitening.invert(covariance.astype(np.int32))
    assert found.dtype == np.int16
    assert np.abs(found / 2048 - exact(covariance)).max() < 1 / 500


def test_of_white_inputs_it_is_four_fifths():
    for scale in (1 << 14, 1 << 16, 1 << 22, 1 << 29):
        identity = np.eye(64, dtype=np.int32)[None] * np.int32(scale)
        np.testing.assert_array_equal(whitening.invert(identity), np.rint(np.eye(64) * 0.8 * 2048)[None])


def test_where_nothing_was_seen_it_is_four():
    found = whitening.invert(np.zeros((1, 64, 64), np.int32))
    np.testing.assert_array_equal(found, 8191 * np.eye(64)[None])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_a_file_holds_has_an_inverse_in_bounds(seed):
    # No sum of squares: pivots may be negative or zero. NumPy does not tell what passes 63 bits; Python does.
    rng = np.random.default_rng(seed)
    limit = whitening.COVARIANCE_LIMIT
    covariance = rng.choice([-limit, -1, 0, 1, limit, 1 << 14], (1, 64, 64)).astype(np.int32)
    found = whitening.invert(covariance)
    assert found.dtype == np.int16 and np.abs(found.astype(int)).max() <= whitening.INVERSE_LIMIT
    np.testing.assert_array_equal(found[0], slow_inverse(covariance[0].tolist()))


def slow_inverse(covariance):
    """`invert` in Python's integers, row by row."""
    limit, places = (1 << 31) - 1, range(64)

    def clip(x, most=limit):
        return max(-most, min(most, x))

    mean = max(sum(covariance[i][i] for i in places) >> 6, 1 << 14)
    matrix = [
        [clip((covariance[i][j] * ((1 << 46) // mean) >> 26) + (1 << 18) * (i == j)) for j in places]
        for i in places
    ]
    for k in places:
        reciprocal = (1 << 40) // max(matrix[k][k], 1 << 17)
        row = [reciprocal if j == k else clip(matrix[k][j] * reciprocal >> 20) for j in places]
        for i in places:
            factor = matrix[i][k]
            assert abs(factor * max(map(abs, row))) < 1 << 63
            matrix[i] = [clip((0 if j == k else matrix[i][j]) - (factor * row[j] >> 20)) for j in places]
        matrix[k] = row
    return [[clip((matrix[i][j] + 256) >> 9, 8191) for j in places] for i in places]


def test_the_steps_that_invert():
    due = [step for step in range(1, 200) if whitening.is_due(np.uint32(step))]
    assert due == [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192]


# --- votes --------------------------------------------------------------------------------------------------


def known_after(config, votes_of, steps):
    """The whitening after so many steps of votes, and those of the last one before and after."""
    known, unit = whitening.initial(config), {name: np.array([1 << 24]) for name in whitening.NAMES}
    for step in range(1, steps + 1):
        votes = votes_of(step)
        whitened, known = whitening.whiten(votes, unit, known)
        known = whitening.renewed(known, np.uint32(step))
    return known, votes, whitened


def test_the_inverse_follows_the_covariance_of_votes():
    config, rng = MODELS["narrow"], np.random.default_rng(2)
    blocks = whitening.blocks(config)
    mix = {name: np.eye(64) + rng.normal(0, 0.3, (count, 64, 64)) for name, count in blocks.items()}

    def votes_of(_):
        made = {}
        for name in whitening.NAMES:
            layers_LxMxK = np.zeros(model.shapes(config)[name]).reshape(-1, *model.shapes(config)[name][-2:])
            layers, outputs, inputs = layers_LxMxK.shape
            votes = rng.normal(0, 20, (layers, inputs // 64, outputs, 64)) @ mix[name].reshape(
                layers, -1, 64, 64
            )
            made[name] = np.rint(votes.swapaxes(1, 2)).reshape(model.shapes(config)[name]).astype(np.int32)
        return made

    known, *_ = known_after(config, votes_of, 128)
    covariance = np.concatenate([m.swapaxes(1, 2) @ m for m in mix.values()])
    expected = exact(covariance)
    error = np.linalg.norm(known["inverse"] / 2048 - expected, axis=(1, 2)) / np.linalg.norm(
        expected, axis=(1, 2)
    )
    assert error.max() < 0.1


def test_white_votes_are_four_fifths_of_themselves():
    config, rng = MODELS["narrow"], np.random.default_rng(3)
    shapes = model.shapes(config)

    def votes_of(_):
        return {name: np.rint(rng.normal(0, 64, shapes[name])).astype(np.int32) for name in whitening.NAMES}

    known, votes, whitened = known_after(config, votes_of, 1)
    for name in whitening.NAMES:
        np.testing.assert_array_equal(whitened[name], votes[name] * 1638)
    known, votes, whitened = known_after(config, votes_of, 100)
    for name in whitening.NAMES:
        assert np.corrcoef(whitened[name].ravel(), votes[name].ravel())[0, 1] > 0.95
    # A deviation of 16 squared, in 64 steps' sum: 2**16 to 2**17 each.
    scale = np.trace(known["covariance"], axis1=1, axis2=2) / 64 / 64
    assert scale.min() > 0.7 * 2**16 and scale.max() < 1.2 * 2**17


@pytest.mark.parametrize("vocabulary", [2, 3, 65536])
def test_no_votes_pass_what_the_bounds_say(vocabulary):
    config, largest = ModelConfig(width=64, layers=1, vocabulary=vocabulary), 64 * 127 * 127 * 512
    shapes, unit = model.shapes(config), {name: np.array([1 << 30]) for name in whitening.NAMES}
    known = whitening.initial(config)
    known["inverse"] = np.full_like(known["inverse"], whitening.INVERSE_LIMIT)
    votes = {name: np.full(shapes[name], -(2**31) + 1, np.int32) for name in whitening.NAMES}
    # What 64 steps of the largest products add up to stays where it is, and is within the limit.
    known["covariance"] = np.full_like(known["covariance"], largest)
    whitened, after = whitening.whiten(votes, unit, known)
    for name in whitening.NAMES:
        assert np.all(whitened[name] == -64 * 4095 * 8191)
    assert 0 < after["covariance"].max() <= largest < whitening.COVARIANCE_LIMIT
    assert whitening.COVARIANCE_LIMIT + largest // 64 < 2**31


# --- engines ------------------------------------------------------------------------------------------------


def arguments(shape, case, seed, step):
    """What an engine's `advance` takes, extreme where it may be."""
    config, rng = MODELS[shape], np.random.default_rng(seed)
    shapes, eggroll_config = model.shapes(config), CONFIGS[case]

    def numbers(size, low, high, dtype):
        kind = rng.integers(3)
        if kind == 0:
            return np.clip(rng.choice([low, -1, 0, 1, high], size), low, high).astype(dtype)
        return rng.integers(low >> (8 * (kind - 1)), (high >> (8 * (kind - 1))) + 1, size).astype(dtype)

    masters = {name: numbers(size, -32512, 32512, np.int16) for name, size in shapes.items()}
    # More than a population of four pairs can vote: of any population.
    votes = {name: numbers(size, -(2**31) + 1, 2**31 - 1, np.int32) for name, size in shapes.items()}
    statistics = {
        "score": np.int64(-5),
        "difference": np.int64(900),
        "seen": np.int64(17),
        "square": np.int64(2**20),
    }
    scales = {}
    if eggroll_config.estimator == "activation":
        for name in model.TRAINED:
            layers = (config.layers,) if name in model.LAYER else ()
            statistics[f"square.{name}"] = numbers(layers, 0, 2**40, np.int64)
            scales[f"shift.{name}"] = numbers(layers, 0, 30, np.int32)
    else:
        scales["difference"] = np.int32(3)
    # Nothing that votes can reach is multiplied out of 63 bits; see `update`.
    any_ones = whitening.NAMES if eggroll_config.whitens else ()
    votes |= {name: np.clip(votes[name], -(2**20), 2**20) for name in votes if name not in any_ones}
    known = whitening.initial(config) if eggroll_config.whitens else {}
    if known:
        if seed % 3:
            known["covariance"] = numbers(known["covariance"].shape, -(1 << 30), 1 << 30, np.int32)
            known["inverse"] = numbers(known["inverse"].shape, -8191, 8191, np.int16)
        else:
            blocks = len(known["inverse"])
            known["covariance"] = positive(rng, blocks, 1).astype(np.int32)
            known["inverse"] = whitening.invert(known["covariance"])
    bias = numbers(config.vocabulary, -2047, 2047, np.int16)
    size, quantile = eggroll.schedule(eggroll_config, config, 1, 5)
    return (
        masters, bias, votes, statistics, scales, known, np.int64(size), np.int64(quantile), noise.seed_key(seed),
        np.uint32(step),
    )  # fmt: skip


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("case", CONFIGS)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), step=st.sampled_from([1, 3, 32, 33, 64]))
def test_every_engine_advances_to_the_same_bits(shape, case, seed, step):
    check(shape, case, seed, step, *engines(shape, case))


def check(shape, case, seed, step, *others):
    """That engines advance as the reference does."""
    given_ones = arguments(shape, case, seed, step)
    expected = ReferenceEngine(MODELS[shape], CONFIGS[case]).advance(*given_ones)
    for engine in others:
        assert_same(expected, engine.advance(*given_ones), f"{engine.name}, {getattr(engine, 'isa', '')}")
