import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm import eggroll, fixedpoint
from intlm.config import (
    ACCUMULATOR_LIMIT,
    CREDIT_LIMIT,
    EggrollConfig,
    ModelConfig,
    check_bounds,
    reward_limit,
)
from intlm.errors import InputError
from intlm.fixedpoint import matmul_shift
from intlm.model import shapes


def refused(build):
    with pytest.raises(InputError) as raised:
        build()
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("width", [0, 1, 63, 65, 96, 8256, -64])
def test_widths_that_are_no_multiple_of_64(width):
    message = refused(lambda: ModelConfig(width=width))
    assert message == f"width={width}: must be a multiple of 64, from 64 to 8192"


@pytest.mark.parametrize("width", [64, 128, 192, 8192])
def test_widths_that_are(width):
    assert ModelConfig(width=width).width == width


def within(name, low, high):
    return [(name, value, f"{name}={value}: must be from {low} to {high}") for value in (low - 1, high + 1)]


@pytest.mark.parametrize(
    ("name", "value", "message"), [*within("layers", 1, 256), *within("vocabulary", 2, 65536)]
)
def test_model_values_out_of_range(name, value, message):
    assert refused(lambda: ModelConfig(**{name: value})) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *within("segment", 1, 4096),
        *within("rank", 1, 16),
        *within("step_size", 0, 4096),
        *within("step_head", 0, 64),
        *within("step_embedding", 0, 64),
        *within("step_norm", 0, 64),
        *within("alpha", 0, 65536),
        *within("horizon", 0, 6),
        *within("horizon_recurrent", 0, 6),
        *within("sigma_weight", 0, 5),
        *within("sigma_norm", 0, 5),
        *within("sigma_embedding", 0, 5),
        *within("sigma_gate", 0, 5),
        *within("sigma_candidate", 0, 5),
        *within("sigma_mlp", 0, 5),
        *within("seed", 0, 2**64 - 1),
    ],
)
def test_eggroll_values_out_of_range(name, value, message):
    assert refused(lambda: EggrollConfig(estimator="weight", **{name: value})) == message


def test_both_ends_of_each_range_are_accepted():
    for low in (True, False):
        ModelConfig(width=64 if low else 8192, layers=1 if low else 256, vocabulary=2 if low else 65536)
        EggrollConfig(
            estimator="weight",
            population=2 if low else 1 << 24,
            seed=0 if low else 2**64 - 1,
            segment=1 if low else 4096,
            rank=1 if low else 16,
            horizon=0 if low else 6,
            sigma_weight=0 if low else 5,
            step_size=0 if low else 4096,
            alpha=0 if low else 65536,
        )


@pytest.mark.parametrize("population", [-2, 0, 1, 3, 1023, (1 << 24) + 2])
def test_populations_that_are_no_pairs(population):
    message = refused(lambda: EggrollConfig(population=population))
    assert message == (
        f"population={population}: must be an even number from 2 to 16777216 (antithetic pairs of members)"
    )


@pytest.mark.parametrize("pairs_per_lane", [-1, 0, 3, 12])
def test_lanes_that_pairs_do_not_fill(pairs_per_lane):
    message = refused(lambda: EggrollConfig(population=16, pairs_per_lane=pairs_per_lane))
    assert message == f"pairs_per_lane={pairs_per_lane}: must divide the 8 pairs of the population"


def test_pairs_and_lanes():
    config = EggrollConfig(population=24, pairs_per_lane=3)
    assert (config.pairs, config.lanes) == (12, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ModelConfig(gate="sigmoid_sot"),
            "gate (activation): unknown 'sigmoid_sot'; did you mean 'sigmoid_soft'? "
            "(accepted: identity, relu, relu2, sigmoid, sigmoid_soft, tanh, tanh_soft)",
        ),
        (
            lambda: ModelConfig(candidate="Tanh"),
            "candidate (activation): unknown 'Tanh'; did you mean 'tanh'? "
            "(accepted: identity, relu, relu2, sigmoid, sigmoid_soft, tanh, tanh_soft)",
        ),
        (
            lambda: ModelConfig(mlp="swish"),
            "mlp (activation): unknown 'swish' "
            "(accepted: identity, relu, relu2, sigmoid, sigmoid_soft, tanh, tanh_soft)",
        ),
        (
            lambda: EggrollConfig(estimator="activations"),
            "estimator: unknown 'activations'; did you mean 'activation'? (accepted: activation, weight)",
        ),
        (
            lambda: EggrollConfig(noise="normal"),
            "noise: unknown 'normal' (accepted: gaussian, rademacher)",
        ),
        (
            lambda: EggrollConfig(fitness="grade"),
            "fitness: unknown 'grade'; did you mean 'graded'? (accepted: graded, sign)",
        ),
        (
            lambda: EggrollConfig(update="treshold"),
            "update: unknown 'treshold'; did you mean 'threshold'? (accepted: linear, threshold)",
        ),
    ],
)
def test_names_that_are_unknown(build, message):
    assert refused(build) == message


@pytest.mark.parametrize(
    ("name", "value", "only"),
    [("noise", "gaussian", "rademacher"), ("rank", 2, 1), ("fitness", "sign", "graded")],
)
def test_what_the_estimator_activation_has_no_use_for(name, value, only):
    message = refused(lambda: EggrollConfig(estimator="activation", **{name: value}))
    assert message == (
        f"{name}={value}: estimator=activation takes {name}={only} alone; set estimator=weight to vary it"
    )
    assert getattr(EggrollConfig(estimator="weight", **{name: value}), name) == value


@pytest.mark.parametrize("config", [ModelConfig(), EggrollConfig()])
def test_configurations_are_frozen_and_validated_again_when_replaced(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)
    with pytest.raises(InputError):
        dataclasses.replace(config, **{"width" if field == "width" else "population": 1})
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize("config", [ModelConfig(width=192, layers=3, vocabulary=100), ModelConfig()])
def test_the_number_of_weights(config):
    assert config.weights == sum(int(np.prod(shape)) for shape in shapes(config).values())


# --- overflow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "eggroll_config", "what"),
    [
        (
            {"width": 64},
            {"segment": 4096, "horizon": 3},
            "credit times inputs over a segment can reach 4806606848",
        ),
        (
            {"width": 64},
            {"segment": 2048, "horizon_recurrent": 6},
            "credit times inputs over a segment can reach 17615814656",
        ),
        (
            {"width": 8192},
            {"estimator": "weight", "rank": 16, "sigma_weight": 5},
            "matmul over the MLP (4 * width), perturbed can reach 2659221504",
        ),
        (
            {"width": 8192},
            {"estimator": "weight", "rank": 16, "sigma_weight": 5, "noise": "gaussian"},
            "matmul over the MLP (4 * width), perturbed can reach ",
        ),
        (
            {"width": 64},
            {"estimator": "weight", "population": 1 << 24, "noise": "gaussian", "rank": 16},
            "votes over the population can reach ",
        ),
    ],
)
def test_configurations_that_can_overflow(model, eggroll_config, what):
    message = refused(lambda: check_bounds(ModelConfig(**model), EggrollConfig(**eggroll_config)))
    assert message.startswith(f"this configuration can overflow 32 bits: {what}")
    assert message.endswith(
        f", the limit is {ACCUMULATOR_LIMIT} (lower width, segment, population, rank, horizon or sigma_weight)"
    )


def test_usual_configurations_fit():
    for width in (64, 256, 1024, 4096):
        check_bounds(ModelConfig(width=width, vocabulary=65536), EggrollConfig(population=1 << 18))
        paper = EggrollConfig(
            estimator="weight", noise="gaussian", fitness="sign", update="threshold", population=1 << 18
        )
        check_bounds(ModelConfig(width=width, layers=6), paper)


def worst_sums(model, config):
    """The largest accumulators of a model all at 127, in 64 bits, by the functions that fill them."""
    wide = np.int64
    x, weight = wide(127), wide(127)
    sums = []
    for site, inputs, others in (
        ("mlp_out", 4 * model.width, 0),
        ("mlp_in", model.width, 0),
        ("head", model.width, 0),
        # Gate and candidate: two matrices and a bias at 127.
        ("gate", 2 * model.width, 127 << matmul_shift(model.width)),
        ("candidate", 2 * model.width, 127 << matmul_shift(model.width)),
    ):
        total = inputs * x * weight + others
        if config.estimator == "activation":
            total += 0 if site == "head" else 1 << eggroll.site_shift(config, site, model.width)
        else:
            unit = 1 if config.noise == "rademacher" else int(fixedpoint.gaussian_table().max())
            matrices = 2 if site in ("gate", "candidate") else 1
            projection = np.array([inputs // matrices * x * unit])
            change = eggroll.matrix_perturbation(config, projection, np.array([unit], np.int64))
            # Before it is shifted back, Gaussian noise is largest.
            assert int(projection[0] >> 4) * unit + 8 <= ACCUMULATOR_LIMIT
            total += matrices * config.rank * int(change[0])
        sums.append(int(total))
    if config.estimator == "activation":
        rewards = []
        for horizon in (0, config.horizon, config.horizon_recurrent):
            reward = total = 0
            for _ in range(config.segment):
                reward = int(eggroll.discount(CREDIT_LIMIT, reward, horizon))
                total += reward
                rewards.append(reward)
            sums.append(total * 2 * 127)
        assert max(rewards) <= reward_limit(config)
        sums.append(config.pairs * 127)
    else:
        q = np.full(1, 1 if config.fitness == "sign" else 96, np.int8)
        noise = np.full((1, 1), 1 if config.noise == "rademacher" else 67, np.int8)
        weighed = int(eggroll.weigh(config, q, noise)[0, 0])
        sums.append(config.pairs * config.rank * weighed * int(noise[0, 0]))
        sums.append(config.segment * 8192)
    return sums


@st.composite
def configurations(draw):
    model = ModelConfig(width=64 * draw(st.integers(1, 128) | st.sampled_from([1, 64, 127, 128])))
    sigma = st.integers(0, 5) | st.just(5)
    common = {
        "population": 2 * draw(st.integers(1, 1 << 23) | st.just(1 << 23)),
        "segment": draw(st.integers(1, 4096) | st.just(4096)),
    } | {f"sigma_{name}": draw(sigma) for name in ("weight", "gate", "candidate", "mlp")}
    if draw(st.booleans()):
        horizons = {name: draw(st.integers(0, 6)) for name in ("horizon", "horizon_recurrent")}
        return model, EggrollConfig(**common, **horizons)
    kinds = {
        "rank": draw(st.integers(1, 16)),
        "noise": draw(st.sampled_from(["rademacher", "gaussian"])),
        "fitness": draw(st.sampled_from(["graded", "sign"])),
    }
    return model, EggrollConfig(estimator="weight", **common, **kinds)


@settings(max_examples=150)
@given(configurations())
def test_what_is_accepted_does_not_overflow_even_at_127_everywhere(configuration):
    try:
        check_bounds(*configuration)
    except InputError:
        return
    assert max(worst_sums(*configuration)) <= ACCUMULATOR_LIMIT


@pytest.mark.parametrize("horizon", range(7))
def test_a_reward_stays_inside_its_limit(horizon):
    config = EggrollConfig(horizon=horizon, horizon_recurrent=0)
    for credit in (CREDIT_LIMIT, -CREDIT_LIMIT):
        reward = 0
        for _ in range(3000):
            reward = int(eggroll.discount(credit, reward, horizon))
            assert abs(reward) <= reward_limit(config)
    assert abs(reward) > reward_limit(config) * 0.99 - 1  # and comes close to it: the limit is not idle
