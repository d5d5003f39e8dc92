from functools import cache, reduce
from itertools import pairwise

import jax
import numpy as np
import pytest
from helpers import assert_same, exact_slope, extreme_parameters, extremes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm import eggroll, fixedpoint, model, noise, whitening
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine import reference as reference_module
from intlm.engine import xla as xla_module
from intlm.engine.engine import make_engine
from intlm.engine.reference import ReferenceEngine, token_step
from intlm.engine.xla import XlaEngine
from intlm.errors import InputError
from intlm.fixedpoint import log_likelihood

CASES = {
    # name: (model, EGGROLL, pairs that XLA evaluates at once)
    "activation": (
        ModelConfig(layers=2, vocabulary=256),
        EggrollConfig(population=12, segment=6),
        4,
    ),
    "activation, tables": (
        ModelConfig(layers=1, vocabulary=100, gate="sigmoid", candidate="tanh", mlp="relu"),
        EggrollConfig(
            population=6, segment=8, rank_head=1, horizon=0, horizon_recurrent=3, sigma_embedding=5, sigma_gate=5,
            sigma_candidate=5, sigma_mlp=5, sigma_norm=5,
        ),
        1,
    ),
    "activation, wide and deep": (
        ModelConfig(
            width=128, layers=3, vocabulary=300, gate="sigmoid_soft", candidate="tanh_soft", mlp="identity"
        ),
        EggrollConfig(
            population=8, segment=5, rank_head=3, horizon=6, horizon_recurrent=2, update="threshold", alpha=30000
        ),
        0,
    ),
    "weight": (
        ModelConfig(layers=2, vocabulary=256),
        EggrollConfig(estimator="weight", population=12, segment=6),
        3,
    ),
    "weight, sign, rank 2": (
        ModelConfig(layers=1, vocabulary=100, gate="tanh_soft", candidate="sigmoid_soft", mlp="relu"),
        EggrollConfig(
            estimator="weight", population=6, segment=8, rank=2, fitness="sign", sigma_weight=3, sigma_norm=4
        ),
        1,
    ),
    "weight, gaussian, rank 2": (
        ModelConfig(width=128, layers=1, vocabulary=300, candidate="relu2", mlp="tanh"),
        EggrollConfig(
            estimator="weight", population=8, segment=5, rank=2, noise="gaussian", sigma_weight=1, sigma_norm=3
        ),
        2,
    ),
    "paper": (
        ModelConfig(layers=1, vocabulary=256, mlp="identity"),
        EggrollConfig(
            estimator="weight", population=4, segment=5, noise="gaussian", fitness="sign", update="threshold"
        ),
        0,
    ),
}  # fmt: skip

cases = pytest.mark.parametrize("case", CASES)
corruptions = st.integers(0, 2)


@cache
def engines(case):
    """Both engines of a case. Whatever they compile is kept for all tests."""
    config, eggroll_config, chunk = CASES[case]
    return ReferenceEngine(config, eggroll_config), XlaEngine(config, eggroll_config, chunk)


def inputs(case, seed, corruption):
    """What a population step takes: tokens with separators, states and scales at their extremes."""
    config, eggroll_config, _ = CASES[case]
    rng = np.random.default_rng(seed)
    pairs, segment = eggroll_config.pairs, eggroll_config.segment
    tokens = rng.integers(0, config.vocabulary, (pairs, segment + 1))
    tokens[rng.random(tokens.shape) < rng.choice([0, 0.2, 0.9])] = model.SEPARATOR
    if rng.random() < 0.3:
        tokens[:] = tokens[:, :1]  # one row of the embedding, over and over
    state = extremes(rng, (pairs, config.layers, config.width)).astype(np.int8)
    scales = eggroll.first_scales(eggroll_config, config)
    if eggroll_config.estimator == "weight":
        scales = {"difference": np.array(rng.choice([1, 7, 64, 300, 300, 1 << 28]), np.int32)}
    else:
        low, high = [(6, 14), (0, 3), (0, 30)][rng.integers(3)]
        scales = {name: rng.integers(low, high + 1, v.shape).astype(np.int32) for name, v in scales.items()}
    key = eggroll.step_key(noise.seed_key(int(rng.integers(1 << 62))), np.uint32(rng.integers(1 << 31)))
    return extreme_parameters(config, seed, corruption), key, scales, tokens.astype(np.int32), state


# --- both engines -----------------------------------------------------------------------------------------


@cases
@settings(max_examples=15)
@given(seed=seeds, corruption=corruptions, first_pair=st.sampled_from([0, 1, 5, 2**23 - 6]))
def test_population_step_gives_the_same_bits(case, seed, corruption, first_pair):
    reference, xla = engines(case)
    arguments = inputs(case, seed, corruption)
    expected = reference.population_step(*arguments, first_pair)
    assert_same(expected, xla.population_step(*arguments, first_pair), case)
    votes, statistics, state = expected
    config = CASES[case][0]
    assert {name: value.shape for name, value in votes.items()} == model.shapes(config)
    assert all(value.dtype == np.int32 for value in votes.values())
    kinds = {name: np.asarray(value).dtype for name, value in statistics.items()}
    assert kinds.pop("fitness", np.int8) == np.int8
    assert set(kinds.values()) == {np.dtype(np.int64)}
    assert state.dtype == np.int8 and state.shape == arguments[-1].shape
    assert state.min() >= -127


@pytest.mark.parametrize("case", ["activation", "weight, gaussian, rank 2"])
def test_what_xla_does_on_gpus_gives_the_same_bits(case, monkeypatch):
    """Large chunks, and projections and slopes apart from the matmuls; here on a CPU."""
    arguments = inputs(case, 3, 0)
    engine = XlaEngine(*CASES[case][:2])
    monkeypatch.setattr(engine, "_on_cpu", False)
    assert_same(engines(case)[0].population_step(*arguments), engine.population_step(*arguments))


@pytest.mark.parametrize("case", ["activation", "paper"])
def test_scores_without_votes_are_the_same(case):
    arguments = inputs(case, 5, 0)
    for engine in engines(case):
        _, statistics, state = engine.population_step(*arguments)
        votes, alone, state_alone = engine.population_step(*arguments, votes=False)
        assert votes == {}
        assert_same(eggroll.of_scores(statistics), alone)
        assert_same(state, state_alone)


@pytest.mark.parametrize("case", ["weight", "weight, gaussian, rank 2"])
@settings(max_examples=15)
@given(seed=seeds, corruption=corruptions, first_pair=st.sampled_from([0, 1, 5, 2**23 - 6]))
def test_fitness_and_noise_give_the_votes_again(case, seed, corruption, first_pair):
    arguments = inputs(case, seed, corruption)
    for engine in engines(case):
        votes, statistics, _ = engine.population_step(*arguments, first_pair)
        expected = {name: value for name, value in votes.items() if name != "embedding"}
        found = engine.fitness_votes(arguments[1], statistics["fitness"], first_pair)
        assert_same(expected, found, f"{case}, {engine.name}")
        embedding = engine.embedding_votes(arguments[1], statistics["fitness"], arguments[3], first_pair)
        assert_same(votes["embedding"], embedding, f"{case}, {engine.name}")


@cases
@settings(max_examples=10)
@given(seed=seeds, corruption=corruptions)
def test_forward_gives_the_same_bits(case, seed, corruption):
    reference, xla = engines(case)
    parameters, _, _, tokens, state = inputs(case, seed, corruption)
    expected = reference.forward(parameters, tokens, state)
    assert_same(expected, xla.forward(parameters, tokens, state), case)
    assert_same(reference.score(parameters, tokens, state), xla.score(parameters, tokens, state), case)
    logits, after = expected
    assert logits.dtype == np.int16 and logits.shape == (*tokens.shape, CASES[case][0].vocabulary)
    assert np.abs(logits.astype(int)).max() <= 2047
    assert after.dtype == np.int8 and after.min() >= -127


@pytest.mark.parametrize("case", ["activation", "activation, wide and deep", "weight", "paper"])
def test_scales_and_update_give_the_same_bits_after_a_step(case):
    config, eggroll_config, _ = CASES[case]
    reference, xla = engines(case)
    compiled = [
        (
            engine.compile(lambda *values: eggroll.next_scales(eggroll_config, config, *values)),
            engine.compile(lambda *values: eggroll.update(eggroll_config, config, *values)),
        )
        for engine in (reference, xla)
    ]
    moved = set()
    for seed in range(6):
        arguments = inputs(case, seed, seed % 3)
        votes, statistics, _ = reference.population_step(*arguments)
        if eggroll_config.whitens:
            votes, _ = eggroll.whitened(eggroll_config, config, votes, statistics, whitening.initial(config))
        rng = np.random.default_rng(seed)
        masters = {
            name: extremes(rng, shape, -32512, 32512).astype(np.int16)
            for name, shape in model.shapes(config).items()
        }
        size, quantile = eggroll.schedule(eggroll_config, config, seed, 5)
        found = [
            (
                next_scales(arguments[2], statistics),
                update(masters, votes, statistics, np.int64(size), np.int64(quantile)),
            )
            for next_scales, update in compiled
        ]
        assert_same(*found, case)
        moved |= {name for name in masters if np.any(found[0][1][name] != masters[name])}
    assert len(moved) > 8


# --- slices -------------------------------------------------------------------------------------------------


def added(parts):
    votes = {name: sum(part[0][name] for part in parts) for name in parts[0][0]}
    statistics = reduce(eggroll.join, [part[1] for part in parts])
    return votes, statistics, np.concatenate([part[2] for part in parts])


def sliced(engine, arguments, bounds, first_pair=0):
    parameters, key, scales, tokens, state = arguments
    parts = []
    for start, stop in pairwise(bounds):
        part = engine.population_step(
            parameters, key, scales, tokens[start:stop], state[start:stop], first_pair + start
        )
        parts.append(jax.tree.map(np.asarray, part))
    return added(parts)


@cases
def test_slices_and_chunks_add_up_to_the_whole(case):
    config, eggroll_config, _ = CASES[case]
    pairs = eggroll_config.pairs
    parameters, key, scales, tokens, state = inputs(case, 0, 0)
    scales = {name: np.full_like(value, 64 if name == "difference" else 6) for name, value in scales.items()}
    arguments = parameters, key, scales, tokens, state
    whole = ReferenceEngine(config, eggroll_config).population_step(*arguments)
    assert all(np.any(value) for value in whole[0].values()), "votes of nothing prove nothing"
    for bounds in ((0, 1, pairs), (0, pairs // 2, pairs), range(pairs + 1)):
        assert_same(whole, sliced(engines(case)[0], arguments, bounds), f"slices {list(bounds)}")
    for chunk in (1, 4, pairs, 100):
        engine = ReferenceEngine(config, eggroll_config, chunk)
        assert_same(whole, engine.population_step(*arguments), f"chunk {chunk}")


def test_xla_adds_up_the_slices_that_it_makes_itself(monkeypatch):
    case = "activation, tables"
    reference, xla = engines(case)
    arguments = inputs(case, 4, 2)
    whole = reference.population_step(*arguments)
    monkeypatch.setattr(xla_module, "SLICE_PAIRS", 1)
    assert_same(whole, xla.population_step(*arguments), case)
    assert_same(whole, sliced(xla, arguments, range(CASES[case][1].pairs + 1)), case)


def test_pairs_are_told_apart_by_their_number_alone():
    # The same text and state, so that nothing but the noise differs.
    case = "weight"
    parameters, key, scales, tokens, state = inputs(case, 5, 0)
    tokens[:], state[:] = tokens[0], state[0]
    scales = {"difference": np.array(64, np.int32)}
    engine = engines(case)[0]
    one = [
        engine.population_step(parameters, key, scales, tokens[:1], state[:1], pair)[0] for pair in (0, 1, 2)
    ]
    assert not np.array_equal(one[0]["head"], one[1]["head"])
    swapped = engine.population_step(parameters, key, scales, tokens[:2], state[:2], 1)
    np.testing.assert_array_equal(swapped[0]["head"], one[1]["head"] + one[2]["head"])
    other = engine.population_step(parameters, noise.fold(key, 1), scales, tokens[:1], state[:1])[0]
    assert not np.array_equal(one[0]["head"], other["head"])


# --- the two members of a pair -------------------------------------------------------------------------------


@cases
def test_a_members_perturbation_is_the_others_negated(case, monkeypatch):
    """On the same input, after every rounding, at every place where one is added."""
    seen = set()

    def checked_step(config, parameters, tokens, state, perturb):
        def checked(name, layer, x):
            same = np.stack([x[0], x[0]])
            added = np.asarray(perturb(name, layer, same))
            if added.ndim:
                np.testing.assert_array_equal(added[0], -added[1])
                assert added.dtype == np.int32
                if np.any(added):
                    seen.add(name)
            return perturb(name, layer, x)

        return token_step(config, parameters, tokens, state, checked)

    monkeypatch.setattr(reference_module, "token_step", checked_step)
    for seed in range(3):
        engines(case)[0].population_step(*inputs(case, seed, 0))
    sites = {"embedding", "gate_input", "candidate_input", "mlp_in", "mlp_out", *eggroll.NORMS}
    assert seen == (sites if CASES[case][1].estimator == "activation" else set(model.TRAINED))


@pytest.mark.parametrize(
    "case", ["activation, tables", "weight", "weight, sign, rank 2", "weight, gaussian, rank 2", "paper"]
)
@settings(max_examples=4)
@given(seed=seeds, corruption=corruptions)
def test_where_members_change_places_votes_change_sign(case, seed, corruption):
    """With the opposite signs the members change places: scores and states stay, every vote is negated.

    But for the head's under `activation`, whose sum neither member perturbs.
    Scales are such that no rounding of the fitness hides a difference: mean 32, shifts 0, no horizon.
    """
    config, eggroll_config, _ = CASES[case]
    kinds = {"fitness": "sign"} if eggroll_config.noise == "gaussian" else {}
    kinds |= {"horizon": 0, "horizon_recurrent": 0}
    changed = EggrollConfig(**(vars(eggroll_config) | kinds))
    parameters, key, scales, tokens, state = inputs(case, seed, corruption)
    fixed = {"difference": 32}
    scales = {name: np.full_like(value, fixed.get(name, 0)) for name, value in scales.items()}
    engine = ReferenceEngine(config, changed)
    arguments = parameters, key, scales, tokens, state
    votes, statistics, after = engine.population_step(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "_SIGNS", -reference_module._SIGNS)
        swapped = engine.population_step(*arguments)
    apart = {"head": votes.pop("head")} if changed.estimator == "activation" else {}
    assert_same({name: -value for name, value in votes.items()} | apart, swapped[0])
    if "fitness" in statistics:
        np.testing.assert_array_equal(-statistics.pop("fitness"), swapped[1].pop("fitness"))
    assert_same((statistics, after), swapped[1:])


@cases
def test_without_a_perturbation_both_members_are_the_model(case, monkeypatch):
    monkeypatch.setattr(reference_module, "_SIGNS", 0 * reference_module._SIGNS)
    engine = engines(case)[0]
    parameters, key, scales, tokens, state = inputs(case, 8, 0)
    votes, statistics, after = engine.population_step(parameters, key, scales, tokens, state)
    logits, expected = engine.forward(parameters, tokens[:, :-1], state)
    np.testing.assert_array_equal(after, expected)
    assert statistics["score"] == 2 * np.sum(log_likelihood(logits, tokens[:, 1:]))
    assert statistics["difference"] == 0
    compared = tokens[:, 1:].size if engine.config.estimator == "activation" else engine.config.pairs
    assert statistics["ties"] == compared
    if engine.config.estimator == "activation":
        del votes["head"]
    assert not any(np.any(value) for value in votes.values())


# --- the estimators, told again from their definitions --------------------------------------------------------


def noise_of(config, key, name, layer, row, sizes):
    """A and B of one pair: int64 [r, M] and [r, K]."""
    made = []
    for stream, size in zip((eggroll.output_stream, eggroll.input_stream), sizes, strict=True):
        flat = noise.rademacher(noise.fold(key, stream(name), layer), np.array([row]), config.rank * size)
        made.append(flat.reshape(config.rank, size).astype(np.int64))
    return made


def dense_member(case, arguments, row, sign):
    """Weights of one member with its perturbation added in full, its noise, and its score and state."""
    config, eggroll_config, _ = CASES[case]
    parameters, key, _, tokens, state = arguments
    member, directions = {"head_bias": parameters["head_bias"]}, {}
    for name, shape in model.shapes(config).items():
        weight = parameters[name].astype(np.int64)
        layers = config.layers if name in model.LAYER else 1
        change = np.zeros_like(weight).reshape(layers, *shape[1:] if name in model.LAYER else shape)
        for layer in range(layers):
            if name in (*eggroll.NORMS, *model.LAYER_BIASES):
                a = noise.rademacher(
                    noise.fold(key, eggroll.output_stream(name), layer), np.array([row]), config.width
                )[0]
                directions[name, layer] = a.astype(np.int64)
                change[layer] = directions[name, layer] << eggroll_config.sigma_norm
            else:
                a, b = noise_of(eggroll_config, key, name, layer, row, shape[-2:])
                directions[name, layer] = np.einsum("rm,rk->mk", a, b)
                change[layer] = directions[name, layer] << eggroll_config.sigma_weight
        member[name] = weight + sign * change.reshape(weight.shape)
    score, h = 0, state
    for t in range(len(tokens) - 1):
        logits, h = token_step(config, member, tokens[t : t + 1], h[None] if t == 0 else h, lambda *_: 0)
        score += int(log_likelihood(logits, tokens[t + 1 : t + 2])[0])
    return directions, score, h[0].astype(int)


@pytest.mark.parametrize("case", ["weight", "weight, sign, rank 2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_weight_is_a_population_of_perturbed_weights(case, seed):
    config, eggroll_config, _ = CASES[case]
    parameters, key, _, tokens, state = inputs(case, seed, seed)
    scales = {"difference": np.array(100, np.int32)}
    votes = {name: np.zeros(shape, np.int64) for name, shape in model.shapes(config).items()}
    after, scores, differences = np.zeros_like(state), 0, []
    for row in range(eggroll_config.pairs):
        arguments = parameters, key, scales, tokens[row], state[row]
        directions, plus, h_plus = dense_member(case, arguments, row, 1)
        _, minus, h_minus = dense_member(case, arguments, row, -1)
        after[row] = (h_plus + h_minus) // 2
        scores += plus + minus
        differences.append(plus - minus)
        if eggroll_config.fitness == "sign":
            q = int(np.sign(plus - minus))
        else:
            clipped = max(-300, min(300, plus - minus))
            q = (clipped * (2**21 // 100) + 2**15) >> 16
        for (name, layer), direction in directions.items():
            where = layer if name in model.LAYER else ()
            if name == "embedding":
                direction = direction * np.isin(np.arange(config.vocabulary), tokens[row, :-1])[:, None]
            votes[name][where] += q * direction
    found = engines(case)[0].population_step(parameters, key, scales, tokens, state)
    assert_same({name: value.astype(np.int32) for name, value in votes.items()}, found[0])
    np.testing.assert_array_equal(after, found[2])
    assert found[1]["score"] == scores
    assert found[1]["difference"] == np.sum(np.abs(differences)) > 0
    assert found[1]["ties"] == differences.count(0)
    assert found[1]["seen"] == sum(len(set(row[:-1])) for row in tokens.tolist())


def activation_member(case, arguments, row, sign):
    """One member token by token: its scores, its slopes, its state, and what each matrix has read."""
    config, eggroll_config, _ = CASES[case]
    parameters, key, _, tokens, state = arguments
    segment = len(tokens) - 1
    read, scores, slopes, h = {}, [], [], state[None]
    sites = {"gate_input": "gate", "candidate_input": "candidate", "mlp_in": "mlp_in", "mlp_out": "mlp_out"}
    sites |= {"embedding": "embedding"}
    directions = head_directions(config, eggroll_config, key, row).tolist()
    sigmas = {
        "gate": eggroll_config.sigma_gate,
        "candidate": eggroll_config.sigma_candidate,
        "embedding": eggroll_config.sigma_embedding,
    }
    for t in range(segment):

        def perturb(name, layer, x, t=t):
            read.setdefault((name, layer), []).append(np.asarray(x).reshape(-1).astype(np.int64))
            if name in eggroll.NORMS:
                a = noise.rademacher(
                    noise.fold(key, eggroll.output_stream(name), layer), np.array([row]), config.width
                )
                return sign * a.astype(np.int32) * 2**eggroll_config.sigma_norm
            if name not in sites:
                return 0
            site = sites[name]
            a = noise.rademacher(
                noise.fold(key, eggroll.direction_stream(site), layer), np.array([row]), size(config, site)
            )
            signs = noise.rademacher(
                noise.fold(key, eggroll.sign_stream(site), layer), np.array([row]), segment
            )
            step = 2 ** sigmas.get(site, eggroll_config.sigma_mlp)
            if site != "embedding":
                step *= 2 ** fixedpoint.matmul_shift(4 * config.width if site == "mlp_out" else config.width)
            return sign * int(signs[0, t]) * a.astype(np.int32) * step

        logits, h = token_step(config, parameters, tokens[t : t + 1], h, perturb)
        scores.append(int(log_likelihood(logits, tokens[t + 1 : t + 2])[0]))
        slopes.append([exact_slope(logits[0].tolist(), int(tokens[t + 1]), a) for a in directions])
    return scores, slopes, h[0].astype(int), read


def head_directions(config, eggroll_config, key, row):
    """A pair's directions: int64 [R, V]."""
    return np.concatenate(
        [
            noise.rademacher(noise.fold(key, 74 + r, 0), np.array([row]), config.vocabulary)
            for r in range(eggroll_config.rank_head)
        ]
    ).astype(np.int64)


def size(config, site):
    return {"mlp_in": 4 * config.width, "head": config.vocabulary}.get(site, config.width)


def saturated_half_up(accumulator, shift):
    return np.clip((2 * accumulator + 2**shift) // 2 ** (shift + 1), -127, 127)


@pytest.mark.parametrize("case", ["activation", "activation, tables"])
@pytest.mark.parametrize("seed", [0, 1])
def test_activation_is_credit_times_inputs(case, seed):
    config, eggroll_config, _ = CASES[case]
    parameters, key, scales, tokens, state = inputs(case, seed, seed)
    segment = eggroll_config.segment
    votes = {name: np.zeros(shape, np.int64) for name, shape in model.shapes(config).items()}
    squares = {name: np.zeros(value.shape, np.int64) for name, value in scales.items()}
    after, total, absolute, ties = np.zeros_like(state), 0, 0, 0
    for row in range(eggroll_config.pairs):
        arguments = parameters, key, scales, tokens[row], state[row]
        plus, slopes_plus, h_plus, read_plus = activation_member(case, arguments, row, 1)
        minus, slopes_minus, h_minus, read_minus = activation_member(case, arguments, row, -1)
        after[row] = (h_plus + h_minus) // 2
        total += sum(plus) + sum(minus)
        credit = [max(-512, min(512, one - other)) for one, other in zip(plus, minus, strict=True)]
        absolute, ties = absolute + sum(map(abs, credit)), ties + credit.count(0)
        for name in model.TRAINED:
            for layer in range(config.layers if name in model.LAYER else 1):
                where = layer if name in model.LAYER else ()
                if name in eggroll.NORMS:
                    stream = noise.fold(key, eggroll.output_stream(name), layer)
                    a = noise.rademacher(stream, np.array([row]), config.width)[0].astype(np.int64)
                    accumulator = np.array([sum(credit)])
                elif name == "head":
                    a = head_directions(config, eggroll_config, key, row)
                    slopes = np.add(slopes_plus, slopes_minus)
                    accumulator = slopes.T @ np.add(read_plus[name, layer], read_minus[name, layer])
                else:
                    site = eggroll.SITE_OF[name]
                    a = noise.rademacher(
                        noise.fold(key, eggroll.direction_stream(site), layer),
                        np.array([row]),
                        size(config, site),
                    )[0].astype(np.int64)
                    signs = noise.rademacher(
                        noise.fold(key, eggroll.sign_stream(site), layer), np.array([row]), segment
                    )[0]
                    k = eggroll_config.horizon
                    if name.endswith("_recurrent"):
                        k = eggroll_config.horizon_recurrent
                    if name.startswith("mlp") and layer == config.layers - 1:
                        k = 0
                    reward, accumulator = 0, 0
                    for t in reversed(range(segment)):
                        reward = credit[t] + reward - reward // 2**k
                        x = read_plus[name, layer][t] + read_minus[name, layer][t]
                        if name == "embedding":
                            x = (np.arange(config.vocabulary) == tokens[row, t]).astype(np.int64)
                        elif name.endswith("bias"):
                            x = np.array([2])
                        accumulator = accumulator + int(signs[t]) * reward * x
                b = saturated_half_up(accumulator, int(scales[f"shift.{name}"][where]))
                squares[f"shift.{name}"][where] += np.sum(b**2)
                change = np.outer(b, a) if name == "embedding" else np.atleast_2d(a).T @ np.atleast_2d(b)
                votes[name][where] += change.reshape(votes[name][where].shape)
    found = engines(case)[0].population_step(parameters, key, scales, tokens, state)
    assert_same({name: value.astype(np.int32) for name, value in votes.items()}, found[0])
    np.testing.assert_array_equal(after, found[2])
    statistics = found[1]
    assert (statistics["score"], statistics["difference"], statistics["ties"]) == (total, absolute, ties)
    for name in model.TRAINED:
        np.testing.assert_array_equal(statistics[f"square.{name}"], squares[f"shift.{name}"])
    assert absolute > 0


# --- the unperturbed model ---------------------------------------------------------------------------------


def test_forward_carries_its_state():
    case = "activation"
    reference, _ = engines(case)
    parameters, _, _, tokens, state = inputs(case, 6, 0)
    logits, last = reference.forward(parameters, tokens, state)
    first, middle = reference.forward(parameters, tokens[:, :3], state)
    second, end = reference.forward(parameters, tokens[:, 3:], middle)
    assert_same((logits, last), (np.concatenate([first, second], axis=1), end))


def test_a_separator_forgets_what_was_before_it():
    case = "activation"
    reference, xla = engines(case)
    parameters, _, _, tokens, state = inputs(case, 7, 0)
    tokens[tokens == 0] = 1
    tokens[:, 2] = model.SEPARATOR
    other = tokens.copy()
    other[:, :2] = 9
    for engine in (reference, xla):
        one, one_state = jax.tree.map(np.asarray, engine.forward(parameters, tokens, state))
        two, two_state = jax.tree.map(np.asarray, engine.forward(parameters, other, np.zeros_like(state)))
        np.testing.assert_array_equal(one[:, 2:], two[:, 2:])
        np.testing.assert_array_equal(one_state, two_state)
        assert not np.array_equal(one[:, :2], two[:, :2])
        tokens[:, 2] = 1
        three, _ = engine.forward(parameters, tokens, state)
        assert not np.array_equal(np.asarray(three)[:, 3:], one[:, 3:])
        tokens[:, 2] = model.SEPARATOR


def test_a_model_of_zeros_gives_its_head_bias():
    case = "activation"
    config, _, _ = CASES[case]
    parameters, _, _, tokens, state = inputs(case, 1, 1)
    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    zeros["head_bias"] = parameters["head_bias"]
    for engine in engines(case):
        logits, _ = engine.forward(zeros, tokens, state)
        expected = np.broadcast_to(parameters["head_bias"], (*tokens.shape, config.vocabulary))
        np.testing.assert_array_equal(np.asarray(logits), expected)


# --- the choice of an engine ---------------------------------------------------------------------------------


def test_make_engine():
    config, eggroll_config, _ = CASES["paper"]
    for name in ("reference", "xla"):
        engine = make_engine(name, config, eggroll_config, chunk=3)
        assert engine.name == name and engine.chunk == 3
    assert make_engine("auto", config, eggroll_config).name != "reference"
    message = r"^--engine: unknown 'refrence'; did you mean 'reference'\? \(accepted: auto, "
    with pytest.raises(InputError, match=message):
        make_engine("refrence", config, eggroll_config)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_engines_refuse_what_can_overflow(name):
    with pytest.raises(InputError, match="can overflow 32 bits"):
        make_engine(name, ModelConfig(), EggrollConfig(segment=4096, horizon=6))
