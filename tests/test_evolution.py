from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from helpers import assert_digest, assert_same

from intlm import eggroll, evolution, model, noise, whitening
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import make_engine
from intlm.engine.native import available_isas
from intlm.evolution import Evolution

MODEL = ModelConfig(width=64, layers=1, vocabulary=40, gate="identity", candidate="identity", mlp="relu2")
COMMON = EggrollConfig(
    # Every number that a result depends on, so that a new default leaves the pinned runs as they are.
    population=8,
    segment=5,
    pairs_per_lane=2,
    step_size=154,
    step_head=2,
    step_embedding=1,
    step_norm=1,
    alpha=3277,
    horizon=1,
    horizon_recurrent=1,
    sigma_weight=0,
    sigma_norm=0,
    sigma_embedding=1,
    sigma_gate=3,
    sigma_candidate=2,
    sigma_mlp=1,
    update="linear",
    seed=3,
)
CONFIGS = {
    "activation": replace(COMMON, estimator="activation"),
    "weight": replace(COMMON, estimator="weight"),
    "paper": replace(
        COMMON, estimator="weight", noise="gaussian", fitness="sign", update="threshold", rank=2
    ),
}
STEPS = 3


def segments(config, count=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocabulary, (count, config.lanes, config.segment + 1)).astype(np.int32)
    tokens[1:, :, 0] = tokens[:-1, :, -1]
    return tokens


def start(config, seed=None):
    config = config if seed is None else replace(config, seed=seed)
    return evolution.initial(MODEL, config, np.arange(MODEL.vocabulary)[::-1] ** 2)


@cache
def steps(engine, estimator, count=STEPS):
    """The states before each of `count` steps and after the last, and the statistics."""
    config = CONFIGS[estimator]
    made = Evolution(make_engine(engine, MODEL, config), MODEL, config, STEPS)
    states, statistics = [start(config)], []
    for tokens in segments(config)[:count]:
        state, counts = made.step(states[-1], tokens)
        states.append(state)
        statistics.append(jax.tree.map(np.asarray, counts))
    return states, statistics


def contents(state):
    arrays = {f"masters.{name}": np.asarray(value) for name, value in state.masters.items()}
    arrays |= {f"scales.{name}": np.asarray(value) for name, value in state.scales.items()}
    arrays |= {f"whitening.{name}": np.asarray(value) for name, value in state.whitening.items()}
    return arrays | {"recurrent": np.asarray(state.recurrent), "head_bias": np.asarray(state.head_bias)}


# --- golden -------------------------------------------------------------------------------------------------

GOLDEN = {
    "activation": "2f07133f2e1f9be0793081a4d24fc9b3061ae268de07aaad102554217a13e8bc",
    "weight": "5e27e9052561a320c56593aaeabc3b8457919fcd9b74a4c89228aee016556238",
    "paper": "1bb6960886e50b4c5ac5d926698d6a787b2d2c47f88d2643bab361350a99033e",
}


@pytest.mark.parametrize("estimator", CONFIGS)
def test_three_steps_are_pinned(estimator):
    states, _ = steps("reference", estimator)
    assert_digest(contents(states[-1]), GOLDEN[estimator], f"three steps of the estimator {estimator}")


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_both_engines_make_the_same_run(estimator):
    reference, xla = steps("reference", estimator), steps("xla", estimator)
    for one, other in zip(reference[0], xla[0], strict=True):
        assert one.step == other.step
        assert_same(contents(one), contents(other))
    for one, other in zip(reference[1], xla[1], strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_steps_change_what_they_should(estimator):
    states, _ = steps("reference", estimator)
    assert [state.step for state in states] == [0, 1, 2, 3]
    first, last = states[0], states[-1]
    for name in model.TRAINED:
        assert last.masters[name].dtype == np.int16
        assert np.abs(last.masters[name].astype(int)).max() <= 127 * 256
        assert not np.array_equal(first.masters[name], last.masters[name]), name
    np.testing.assert_array_equal(first.head_bias, last.head_bias)
    assert np.any(last.recurrent) and last.recurrent.dtype == np.int8


# --- one step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", CONFIGS)
def test_a_step_is_what_its_parts_make(estimator):
    config = CONFIGS[estimator]
    states, statistics = steps("reference", estimator)
    engine = make_engine("reference", MODEL, config)
    for number in (1, 2):
        before, after = states[number], states[number + 1]
        tokens = segments(config)[number]
        # Two pairs read each lane.
        tokens = np.stack([tokens[0], tokens[0], tokens[1], tokens[1]])
        key = noise.fold(noise.seed_key(3), number)
        votes, counts, recurrent = engine.population_step(
            model.parameters(before.masters, before.head_bias), key, before.scales, tokens, before.recurrent
        )
        size, quantile = eggroll.schedule(config, MODEL, number, STEPS)
        known = before.whitening
        if known:
            votes, known = eggroll.whitened(config, MODEL, votes, counts, known)
            known = whitening.renewed(known, np.uint32(number + 1))
        assert_same(known, after.whitening)
        masters = eggroll.update(
            config, MODEL, before.masters, votes, counts, np.int64(size), np.int64(quantile)
        )
        assert_same(masters, after.masters)
        assert_same(recurrent, after.recurrent)
        assert_same(counts, statistics[number])
        assert_same(eggroll.next_scales(config, MODEL, before.scales, counts), after.scales)


@pytest.mark.parametrize("estimator", CONFIGS)
def test_the_first_step_measures_its_scales(estimator):
    config = CONFIGS[estimator]
    engine = make_engine("reference", MODEL, config)
    given, calls = [], engine.population_step

    def counted(parameters, key, scales, tokens, state):
        given.append((scales, key, state))
        return calls(parameters, key, scales, tokens, state)

    engine.population_step = counted
    made = Evolution(engine, MODEL, config, STEPS)
    state = start(config)
    tokens = segments(config)
    after, statistics = made.step(state, tokens[0])
    assert 2 <= len(given) <= evolution.FIRST_MEASUREMENTS + 1
    for _, key, recurrent in given:
        np.testing.assert_array_equal(key, given[0][1])
        np.testing.assert_array_equal(recurrent, state.recurrent)
    # They stood still: the step's own statistics give the scales that it was taken with.
    settled = eggroll.next_scales(config, MODEL, given[-1][0], statistics)
    assert_same(given[-1][0], settled)
    assert not np.array_equal(next(iter(given[0][0].values())), next(iter(settled.values())))
    before = len(given)
    made.step(after, tokens[1])
    assert len(given) == before + 1


def test_a_run_is_decided_by_its_seed():
    config = CONFIGS["activation"]
    again = start(config)
    assert_same(contents(again), contents(steps("reference", "activation")[0][0]))
    other = start(config, seed=4)
    assert not np.array_equal(other.masters["head"], again.masters["head"])
    # The same masters and another seed: other noise.
    engine = make_engine("reference", MODEL, config)
    tokens = segments(config)[0]
    one, _ = Evolution(engine, MODEL, config, STEPS).step(again, tokens)
    two, _ = Evolution(engine, MODEL, replace(config, seed=4), STEPS).step(again, tokens)
    assert not np.array_equal(one.masters["head"], two.masters["head"])


def test_a_step_leaves_its_input_as_it_was():
    config = CONFIGS["weight"]
    state = start(config)
    before = {name: value.copy() for name, value in contents(state).items()}
    Evolution(make_engine("reference", MODEL, config), MODEL, config, STEPS).step(state, segments(config)[0])
    assert_same(before, contents(state))


def test_after_the_last_step_nothing_moves():
    config = CONFIGS["weight"]
    state = replace(steps("reference", "weight")[0][-1], step=STEPS)
    made = Evolution(make_engine("reference", MODEL, config), MODEL, config, STEPS)
    after, _ = made.step(state, segments(config)[0])
    assert_same(state.masters, after.masters)


def test_the_first_state():
    state = start(CONFIGS["activation"])
    assert state.step == 0 and state.recurrent.shape == (4, 1, 64) and not state.recurrent.any()
    assert state.head_bias[0] == model.HEAD_BIAS_TOP
    assert_same(state.masters, model.initial_masters(MODEL, noise.seed_key(3)))


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_it_learns_to_remember(estimator):
    """Eight tokens in a fixed order, each twice: 3 bits alone, 1 bit after the last token, 0 with a memory."""
    # A text without noise: the head's credit has none either, and overshoots with larger steps.
    step_size = {"activation": 150, "weight": 300}[estimator]
    config = EggrollConfig(estimator=estimator, population=256, segment=16, step_size=step_size)
    count = 80
    text = np.tile(np.repeat(1 + np.random.default_rng(1).permutation(8), 2), 400)
    starts = np.arange(config.lanes) * 7
    engine = make_engine("native" if available_isas() else "xla", MODEL, config)
    made = Evolution(engine, MODEL, config, count)
    state = evolution.initial(MODEL, config, np.bincount(text, minlength=MODEL.vocabulary))
    scores = []
    for step in range(count):
        at = (starts + step * config.segment)[:, None] + np.arange(config.segment + 1)
        state, statistics = made.step(state, text[at % len(text)].astype(np.int32))
        scores.append(int(statistics["score"]))
    bits = -np.array(scores) / (256 * config.population * config.segment)
    assert 2.8 < bits[0] < 3.5  # the head bias alone
    assert bits[-10:].mean() < 0.4
