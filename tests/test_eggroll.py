import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import both, extremes, seeds
from hypothesis import given
from hypothesis import strategies as st

from intlm import eggroll, fixedpoint, model, whitening
from intlm.config import EggrollConfig, ModelConfig

MODEL = ModelConfig(width=64, layers=2, vocabulary=100)
ACTIVATION = EggrollConfig(population=64)
WEIGHT = EggrollConfig(estimator="weight", population=64)


def half_up(numerator, denominator):
    """numerator / denominator to the nearest, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


# --- perturbations ------------------------------------------------------------------------------------------


def with_sigma(noise, sigma):
    return EggrollConfig(estimator="weight", noise=noise, sigma_weight=sigma, sigma_norm=sigma)


@pytest.mark.parametrize("sigma", [0, 3, 5])
def test_vector_perturbation_for_every_number(sigma):
    a = np.arange(-67, 68, dtype=np.int8)
    plain, gaussian = with_sigma("rademacher", sigma), with_sigma("gaussian", sigma)
    found = both(lambda a: eggroll.vector_perturbation(plain, a), a)
    assert found.dtype == np.int32 and found.tolist() == [v << sigma for v in range(-67, 68)]
    found = both(lambda a: eggroll.vector_perturbation(gaussian, a), a)
    assert found.tolist() == [half_up(v << sigma, 16) for v in range(-67, 68)]


@pytest.mark.parametrize("sigma", [0, 5])
def test_embedding_perturbation_for_every_pair_of_numbers(sigma):
    values = np.arange(-67, 68, dtype=np.int8)
    plain, gaussian = with_sigma("rademacher", sigma), with_sigma("gaussian", sigma)
    found = both(lambda a, b: eggroll.embedding_perturbation(plain, a, b), values[:, None], values)
    product = np.multiply.outer(values.astype(int), values.astype(int))
    np.testing.assert_array_equal(found, product << sigma)
    found = both(lambda a, b: eggroll.embedding_perturbation(gaussian, a, b), values[:, None], values)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, half_up(product, 256) << sigma)


def test_matrix_perturbation_at_the_ends_of_a_projection():
    values = np.arange(-67, 68, dtype=np.int8)
    most = 127 * 67 * 4 * 1024
    projections = np.array([-most, -17, -16, -15, -1, 0, 1, 15, 16, most], np.int32)[:, None]
    plain, gaussian = with_sigma("rademacher", 2), with_sigma("gaussian", 2)
    signs = np.array([-1, 1], np.int8)
    found = both(lambda p, a: eggroll.matrix_perturbation(plain, p, a), projections, signs)
    np.testing.assert_array_equal(found, projections.astype(int) * signs * 4)
    found = both(lambda p, a: eggroll.matrix_perturbation(gaussian, p, a), projections, values)
    assert found.dtype == np.int32
    expected = [[half_up((p >> 4) * v, 16) * 4 for v in range(-67, 68)] for p in projections[:, 0].tolist()]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [64, 128, 1024])
def test_a_site_is_perturbed_by_whole_steps_of_its_output(width):
    config = EggrollConfig(sigma_embedding=1, sigma_gate=3, sigma_candidate=2, sigma_mlp=5)
    outputs = {"gate": 3, "candidate": 2, "mlp_in": 5, "mlp_out": 5}
    for site, sigma in outputs.items():
        inputs = 4 * width if site == "mlp_out" else width
        step = 1 << eggroll.site_shift(config, site, width)
        assert step >> fixedpoint.matmul_shift(inputs) == 1 << sigma
    assert eggroll.site_shift(config, "embedding", width) == 1
    assert set(eggroll.SITE_OF.values()) == set(eggroll.SITES)
    assert set(eggroll.SITE_OF) | set(eggroll.NORMS) == set(model.TRAINED)


# --- credit ---------------------------------------------------------------------------------------------


def test_credit_is_the_clipped_difference():
    differences = np.arange(-2000, 2001, dtype=np.int32)
    scores = np.stack([-3000 + differences, np.full(4001, -3000, np.int32)])[None]
    found = both(eggroll.credit, scores)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[0], np.clip(differences, -512, 512))


@given(st.lists(st.integers(-512, 512) | st.sampled_from([-512, 0, 512]), min_size=1, max_size=40))
def test_discount_is_the_reward_to_go(credits):
    for k in range(7):
        reward, exact = 0, 0.0
        for credit in reversed(credits):
            previous = reward
            reward = int(eggroll.discount(np.int32(credit), np.int32(reward), np.int32(k)))
            assert reward == credit + previous - math.floor(previous / 2**k)
            exact = credit + exact * (1 - 2.0**-k)
            assert 0 <= reward - exact < 2**k  # each floor adds less than 1, and 2**k of them last


@given(seeds)
def test_discount_is_the_same_on_arrays_of_horizons(seed):
    rng = np.random.default_rng(seed)
    credit, reward = extremes(rng, (5,), -512, 512), extremes(rng, (3, 5), -32832, 32832)
    horizon = rng.integers(0, 7, (3, 1))
    arrays = [value.astype(np.int32) for value in (credit, reward, horizon)]
    found = both(eggroll.discount, *arrays)
    np.testing.assert_array_equal(found, credit + reward - reward // 2**horizon)


def test_horizons_are_zero_behind_the_last_recurrence():
    config = EggrollConfig(horizon=3, horizon_recurrent=5)
    three = ModelConfig(layers=3)
    found = {name: eggroll.horizons(config, three, name).tolist() for name in eggroll.SITE_OF}
    assert found["head"] == 0 and found["embedding"] == 3
    assert found["mlp_in"] == found["mlp_out"] == [3, 3, 0]
    assert found["gate_recurrent"] == found["candidate_recurrent"] == [5, 5, 5]
    for name in ("gate_input", "candidate_input", "gate_bias", "candidate_bias"):
        assert found[name] == [3, 3, 3]


def test_quantize_rounds_and_saturates():
    accumulators = np.array([-(2**30), -129, -128, -3, -2, -1, 0, 1, 2, 3, 127, 254, 255, 2**30], np.int32)
    for shift in (0, 1, 2, 20, 29):
        found = both(eggroll.quantize, accumulators, np.int32(shift))
        expected = [max(-127, min(127, half_up(v, 2**shift))) for v in accumulators.tolist()]
        assert found.dtype == np.int8 and found.tolist() == expected


# --- fitness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1, 2, 3, 100, 1000, 4096, 1 << 20, 1 << 28])
def test_graded_fitness(mean):
    ends = [0, 1, mean // 3, mean, 2 * mean, 3 * mean - 1, 3 * mean, 3 * mean + 1, 1 << 30, (1 << 31) - 1]
    differences = np.array([*ends, *(-v for v in ends)], np.int32)
    found = both(lambda d, m: eggroll.fitness(WEIGHT, d, m), differences, np.int32(mean))
    assert found.dtype == np.int8
    for difference, q in zip(differences.tolist(), found.tolist(), strict=True):
        clipped = max(-3 * mean, min(3 * mean, difference))
        assert q == half_up(clipped * ((1 << 21) // mean), 1 << 16)
        if mean <= 4096:
            assert abs(q - 32 * clipped / mean) <= 0.5 + 3 * mean / 65536
    assert np.abs(found.astype(int)).max() <= 96


def test_sign_fitness():
    config = EggrollConfig(estimator="weight", fitness="sign")
    differences = np.array([-(2**31) + 1, -1, 0, 1, 2**31 - 1], np.int32)
    found = both(lambda d, m: eggroll.fitness(config, d, m), differences, np.int32(7))
    assert found.dtype == np.int8 and found.tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("fitness", ["graded", "sign"])
def test_weigh_for_every_fitness_and_number(noise, fitness):
    config = EggrollConfig(estimator="weight", noise=noise, fitness=fitness)
    q = np.arange(-96, 97, dtype=np.int8) if fitness == "graded" else np.array([-1, 0, 1], np.int8)
    a = np.arange(-67, 68, dtype=np.int8) if noise == "gaussian" else np.array([-1, 1], np.int8)
    tiled = np.broadcast_to(a, (len(q), 1, len(a)))
    found = both(lambda q, a: eggroll.weigh(config, q, a), q, tiled)
    product = q.astype(int)[:, None, None] * a.astype(int)
    if (noise, fitness) == ("gaussian", "graded"):
        product = half_up(product, 32)
    assert found.dtype == np.int8 and found.shape == tiled.shape
    np.testing.assert_array_equal(found, np.clip(product, -127, 127))


# --- scales ---------------------------------------------------------------------------------------------


def activation_statistics(value):
    scales = eggroll.first_scales(ACTIVATION, MODEL)
    squares = {
        f"square.{name}": np.full(scales[f"shift.{name}"].shape, value, np.int64) for name in model.TRAINED
    }
    return squares | {"score": np.int64(-1), "seen": np.int64(77)}


def test_first_scales():
    assert eggroll.first_scales(WEIGHT, MODEL)["difference"] == 1
    scales = eggroll.first_scales(ACTIVATION, MODEL)
    assert set(scales) == {f"shift.{name}" for name in model.TRAINED}
    for name, shape in model.shapes(MODEL).items():
        expected = shape[:1] if name in model.LAYER else ()
        assert scales[f"shift.{name}"].shape == expected and np.all(scales[f"shift.{name}"] == 10)


@pytest.mark.parametrize("total", [0, 31, 32, 33, 10**6, 2**60])
def test_the_next_mean_difference(total):
    statistics = {"score": np.int64(0), "difference": np.int64(total)}
    found = both(lambda s: eggroll.next_scales(WEIGHT, MODEL, {}, s), statistics)
    assert found["difference"].dtype == np.int32
    assert found["difference"] == min(max(total // 32, 1), 1 << 28)


@pytest.mark.parametrize("name", model.TRAINED)
def test_the_next_shift_brings_b_to_a_magnitude_of_16_to_32(name):
    inputs = {"mlp_out": 256, "head": 64} | {n: 64 for n in model.LAYER_MATRICES if n != "mlp_out"}
    pairs = 32 * (ACTIVATION.rank_head if name == "head" else 1)
    entries = 77 if name == "embedding" else pairs * inputs.get(name, 1)
    scales = eggroll.first_scales(ACTIVATION, MODEL)
    for root in (1, 2, 7, 15, 16, 20, 31, 32, 33, 63, 64, 120):
        statistics = activation_statistics(root * root * entries)
        found = eggroll.next_scales(ACTIVATION, MODEL, scales, statistics)[f"shift.{name}"]
        moved = np.unique(found.astype(int) - 10)
        assert len(moved) == 1 and found.dtype == np.int32
        assert 16 <= root / 2.0 ** moved[0] < 32


def test_shifts_stay_inside_a_word():
    for shift, square in ((0, 0), (30, 2**62), (0, 2**62), (30, 0)):
        scales = eggroll.first_scales(ACTIVATION, MODEL)
        scales = {name: np.full_like(value, shift) for name, value in scales.items()}
        # A mean square of int8 numbers is at most 127**2.
        statistics = activation_statistics(min(square, 127**2 * 77))
        found = both(lambda c, s: eggroll.next_scales(ACTIVATION, MODEL, c, s), scales, statistics)
        for value in found.values():
            assert np.all((value >= 0) & (value <= 30))


# --- update ---------------------------------------------------------------------------------------------


def slow_masters(config, master, votes, variance, multiple, size, quantile):
    """One element of the update in Python's integers. variance: None for votes that are whitened."""
    sign = (votes > 0) - (votes < 0)
    deviation = max(256, math.isqrt(min(variance or 0, 1 << 45) << 16))
    if variance is None and config.update == "threshold":
        delta = 256 * sign if 5 * abs(votes) > quantile << 11 else 0
    elif variance is None:
        delta = half_up(votes * (5 * size * multiple >> 3), 1 << 24)
    elif config.update == "threshold":
        delta = 256 * sign if abs(votes) << 16 > quantile * deviation else 0
    else:
        delta = half_up(votes * ((size * multiple << 24) // deviation), 1 << 24)
    return max(-32512, min(32512, master + delta))


def slow_variance(config, name, layer, statistics):
    if config.estimator == "activation":
        square = int(np.reshape(statistics[f"square.{name}"], -1)[layer])
        if name == "embedding":
            return (square << 8) // max(1, int(statistics["seen"])) * config.pairs >> 8
        inputs = {"mlp_out": 256, "head": 64} | {n: 64 for n in model.LAYER_MATRICES if n != "mlp_out"}
        return square // inputs.get(name, 1)
    vector = name.startswith("norm") or name.endswith("bias")
    square = int(statistics["square"]) * (1 if vector else config.rank)
    if config.noise == "gaussian":
        square <<= 8 if vector else 16
        square >>= 10 if config.fitness == "graded" else 0
    return square


UPDATES = {
    "activation": EggrollConfig(population=64, step_head=3, step_embedding=4, step_norm=5),
    "activation, threshold": EggrollConfig(population=64, update="threshold"),
    "not whitened": EggrollConfig(population=64, step_head=3, step_embedding=4, step_norm=5, whitening=0),
    "not whitened, threshold": EggrollConfig(population=64, update="threshold", whitening=0),
    "weight": EggrollConfig(estimator="weight", population=64, rank=2, step_head=3, step_norm=5),
    "weight, gaussian": EggrollConfig(estimator="weight", population=64, rank=3, noise="gaussian"),
    "paper": EggrollConfig(
        estimator="weight", population=64, noise="gaussian", fitness="sign", update="threshold"
    ),
}
SMALL = ModelConfig(width=64, layers=2, vocabulary=7)


@pytest.mark.parametrize("name", UPDATES)
@given(seed=seeds)
def test_update_is_exact(name, seed):
    config, rng = UPDATES[name], np.random.default_rng(seed)
    some = ("embedding", "head", "norm_output", "gate_bias", "norm_mlp", "mlp_out", "gate_recurrent")
    # A few rows stand for a matrix: the update knows nothing of its size.
    shapes = {n: (2, 3) if n in model.LAYER else (5,) for n in some}
    limit = int(rng.choice([1, 200, 10**6, 2**31 - 1]))
    masters = {n: extremes(rng, s, -32512, 32512).astype(np.int16) for n, s in shapes.items()}
    votes = {n: extremes(rng, s, -limit, limit).astype(np.int32) for n, s in shapes.items()}
    high = int(rng.choice([1, 1000, 2**38]))
    statistics = {"seen": np.int64(rng.integers(1, 500)), "square": np.int64(rng.integers(0, high))}
    for n in some:
        statistics[f"square.{n}"] = rng.integers(0, high, (2,) if n in model.LAYER else ())
        # Votes are at most sqrt(pairs * inputs) deviations: `update` may count on it.
        variance = [
            slow_variance(config, n, layer, statistics) for layer in range(2 if n in model.LAYER else 1)
        ]
        most = np.array([256 * math.isqrt(max(v, 1)) for v in variance]).reshape(
            -1, *([1] * (len(shapes[n]) - 1))
        )
        votes[n] = np.clip(votes[n], -most, most).astype(np.int32)
    size, quantile = np.int64(rng.integers(0, 2**20 + 1)), np.int64(rng.integers(0, 1153))

    def function(*values):
        return eggroll.update(config, SMALL, *values)

    found = FUNCTIONS.setdefault(name, function)(masters, votes, statistics, size, quantile)
    both(FUNCTIONS[name], masters, votes, statistics, size, quantile)
    for n in some:
        multiple = {"head": config.step_head, "embedding": config.step_embedding}.get(n, 1)
        multiple = config.step_norm if n.startswith("norm") else multiple
        assert found[n].dtype == np.int16
        for index in np.ndindex(shapes[n]):
            variance = slow_variance(config, n, index[0] if n in model.LAYER else 0, statistics)
            if config.whitens and n in whitening.NAMES:
                variance = None
            values = int(masters[n][index]), int(votes[n][index])
            assert found[n][index] == slow_masters(
                config, *values, variance, multiple, int(size), int(quantile)
            )


FUNCTIONS = {}
"""One function object a configuration, so that JAX compiles once."""


def test_masters_stop_at_their_limit():
    masters = {"head": np.array([-32512, -32512, 32512, 32512], np.int16)}
    votes = {"head": np.array([-1000, 1000, 1000, -1000], np.int32)}
    for update in ("linear", "threshold"):
        config = EggrollConfig(estimator="weight", update=update, step_size=4096)
        statistics = {"square": np.int64(1)}
        found = eggroll.update(config, SMALL, masters, votes, statistics, np.int64(1 << 20), np.int64(100))[
            "head"
        ]
        assert found[0] == -32512 and found[2] == 32512
        assert found[1] > -32512 and found[3] < 32512


def pure_noise(config, pairs, rng):
    """Votes and statistics of a population whose fitness is chance: a head of 200 x 64 and one bias."""
    sign = rng.choice([-1, 1], (pairs, config.rank, 200))
    direction = rng.choice([-1, 1], (pairs, config.rank, 64))
    vector = rng.choice([-1, 1], (pairs, 200))
    if config.estimator == "activation":
        b = np.clip(np.rint(rng.normal(0, 24, (pairs, 64))), -127, 127).astype(int)
        statistics = {
            "square.head": np.int64(np.sum(b**2)),
            "square.norm_output": np.int64(np.sum(b[:, 0] ** 2)),
        }
        votes = {"head": sign[:, 0].T @ b, "norm_output": vector.T @ b[:, 0]}
        return votes, statistics
    if config.noise == "gaussian":
        table = fixedpoint.gaussian_table()
        sign, direction, vector = (
            table[rng.integers(0, 65536, x.shape)].astype(int) for x in (sign, direction, vector)
        )
    d = np.rint(rng.normal(0, 400, pairs)).astype(np.int32)
    q = eggroll.fitness(config, d, np.int32(np.mean(np.abs(d))))
    weighed = eggroll.weigh(config, q, sign.astype(np.int8)).astype(int)
    votes = {
        "head": np.einsum("nrm,nrk->mk", weighed, direction),
        "norm_output": eggroll.weigh(config, q, vector.astype(np.int8)).astype(int).sum(axis=0),
    }
    return votes, {"square": np.int64(np.sum(q.astype(np.int64) ** 2))}


@pytest.mark.parametrize("name", UPDATES)
def test_where_fitness_is_chance_a_master_moves_by_the_step_size(name):
    config, rng = UPDATES[name], np.random.default_rng(1)
    votes, statistics = pure_noise(config, config.pairs, rng)
    masters = {n: np.zeros(v.shape, np.int16) for n, v in votes.items()}
    if config.whitens:
        # White votes are 4/5 of themselves in units of their deviation, Q17.
        votes["head"] = np.rint(votes["head"] / math.sqrt(statistics["square.head"] / 64) * 0.8 * 2**17)
    votes = {n: v.astype(np.int32) for n, v in votes.items()}
    size, quantile = eggroll.schedule(config, SMALL, 0, 10)
    found = eggroll.update(config, SMALL, masters, votes, statistics, np.int64(size), np.int64(quantile))
    for n, value in found.items():
        value = value.astype(float)
        tolerance = 0.08 if n == "head" else 0.25
        if config.update == "threshold":
            share = np.mean(value != 0)
            assert abs(share / (config.alpha / 65536) - 1) < (0.25 if n == "head" else 1.0)
            assert set(np.abs(value[value != 0])) == {256}
        else:
            expected = (size >> 8) * (config.step_head if n == "head" else config.step_norm)
            assert abs(np.sqrt(np.mean(value**2)) / expected - 1) < tolerance


# --- schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_the_schedule_falls_linearly_to_zero(steps):
    config = EggrollConfig(step_size=154, alpha=3277, update="threshold")
    for step in {0, 1, 2, steps // 2, steps - 1, steps, steps + 5}:
        left = max(0, steps - step)
        size, quantile = eggroll.schedule(config, SMALL, step, steps)
        assert size == 154 * 256 * left // steps
        assert quantile == fixedpoint.normal_tail_quantile(3277 * left // steps)
        assert eggroll.schedule(replace(config, update="linear"), SMALL, step, steps) == (size, 0)
    assert eggroll.schedule(config, SMALL, 0, steps)[0] == 154 << 8
    assert eggroll.schedule(config, SMALL, steps, steps) == (0, 1152)


@pytest.mark.parametrize(
    ("estimator", "whitening", "power"),
    [("activation", 1, 3 / 8), ("activation", 0, 1 / 4), ("weight", 1, 1 / 4)],
)
def test_an_open_step_size_follows_its_rule(estimator, whitening, power):
    def first(population=1024, segment=32, width=64, steps=305):
        config = EggrollConfig(
            estimator=estimator, population=population, segment=segment, whitening=whitening
        )
        return eggroll.first_step_size(config, ModelConfig(width=width), steps)

    base = eggroll.STEP_SIZE[estimator] << 8
    assert abs(first() / base - 1) < 0.001  # 305 steps of 32,768 member-tokens are 10 million
    assert abs(first(steps=305 * 16) / base - 16**-power) < 0.001
    assert (
        abs(first(population=4096, steps=305) / base - 4 ** (1 / 2 - power)) < 0.001
    )  # also four times the tokens
    assert abs(first(width=1024) / base - 1 / 2) < 0.001
    assert first(population=1 << 24, segment=4096, steps=1) == 4096 << 8
    given = EggrollConfig(estimator=estimator, step_size=7)
    assert eggroll.first_step_size(given, ModelConfig(), 99) == 7 << 8
