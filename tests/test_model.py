import math

import numpy as np
import pytest
from helpers import assert_digest, both, extremes, seeds
from hypothesis import given
from hypothesis import strategies as st

from intlm import fixedpoint, model, noise
from intlm.config import ModelConfig


def masters(config, seed=0):
    return model.initial_masters(config, noise.seed_key(seed))


def test_shapes_by_hand():
    found = model.shapes(ModelConfig(width=128, layers=3, vocabulary=300))
    assert found == {
        "embedding": (300, 128),
        "head": (300, 128),
        "norm_output": (128,),
        "gate_input": (3, 128, 128),
        "gate_recurrent": (3, 128, 128),
        "candidate_input": (3, 128, 128),
        "candidate_recurrent": (3, 128, 128),
        "mlp_in": (3, 512, 128),
        "mlp_out": (3, 128, 512),
        "norm_recurrent": (3, 128),
        "norm_mlp": (3, 128),
        "gate_bias": (3, 128),
        "candidate_bias": (3, 128),
    }


def test_trained_names_number_the_noise_streams():
    # Append only: another order would change the noise of every run.
    assert model.TRAINED == (
        "embedding", "head", "norm_output",
        "gate_input", "gate_recurrent", "candidate_input", "candidate_recurrent", "mlp_in", "mlp_out",
        "norm_recurrent", "norm_mlp", "gate_bias", "candidate_bias",
    )  # fmt: skip
    assert tuple(model.shapes(ModelConfig())) == model.TRAINED


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_initial_masters_have_the_documented_deviations(width):
    config = ModelConfig(width=width, layers=2, vocabulary=256)
    made = masters(config)
    for name, shape in model.shapes(config).items():
        value = made[name]
        assert value.shape == shape and value.dtype == np.int16
        if value.ndim == 1 or name.startswith("norm") or name.endswith("bias"):
            np.testing.assert_array_equal(value, 16 * 256 if name.startswith("norm") else 0)
            continue
        deviation = {"embedding": 4, "head": 4, "gate_recurrent": 8, "candidate_recurrent": 8}.get(name, 24)
        if name != "embedding":
            inputs = shape[-1]
            deviation *= 2 ** (fixedpoint.matmul_shift(inputs) - 4) / math.sqrt(inputs)
        found = value / 256
        assert abs(found.mean()) < 5 * deviation / math.sqrt(value.size)
        # 0.2% for what is clipped at 127 and for rounding.
        assert abs(found.std() / deviation - 1) < 5 / math.sqrt(2 * value.size) + 0.002, name


def test_the_shift_after_a_matmul_is_exact_with_initial_weights():
    # Inputs of magnitude 16 times weights of deviation 24: 24 steps after the shift at any width.
    for width in (64, 128, 192, 320):
        config = ModelConfig(width=width, layers=1)
        weight = fixedpoint.round_masters(masters(config)["mlp_in"])[0].astype(int)
        x = np.random.default_rng(0).choice([-16, 16], (64, width))
        out = (x @ weight.T) / 2 ** fixedpoint.matmul_shift(width)
        assert abs(out.std() / 24 - 1) < 0.05


def test_initial_masters_are_deterministic_and_of_the_seed():
    config = ModelConfig(width=64, layers=2, vocabulary=100)
    first, again, other = masters(config, 3), masters(config, 3), masters(config, 4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        if not name.startswith("norm") and not name.endswith("bias"):
            assert not np.array_equal(first[name], other[name])
            flat = first[name].reshape(-1, first[name].shape[-1])
            assert len(np.unique(flat, axis=0)) == len(flat)  # every row has noise of its own
    assert not np.array_equal(first["gate_input"], first["candidate_input"])


def test_numpy_and_jax_make_the_same_masters():
    config = ModelConfig(width=128, layers=2, vocabulary=100)
    both(lambda key: model.initial_masters(config, key), noise.seed_key(2**63 + 5))


def test_initial_masters_are_pinned():
    made = masters(ModelConfig(width=64, layers=2, vocabulary=256))
    assert_digest(
        made, "76cda681fa35b814bc62fd01af558a288a0c20b733d484b4b64808cd332298e5", "the initial masters"
    )


# --- head bias ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10) | st.integers(0, 2**62), min_size=2, max_size=40))
def test_head_bias_is_log2_of_the_counts(counts):
    bias = model.head_bias(np.array(counts))
    assert bias.dtype == np.int16 and bias.shape == (len(counts),)
    top = max(1, *counts)
    for count, value in zip(counts, bias.tolist(), strict=True):
        exact = 768 + 256 * (math.log2(max(count, 1)) - math.log2(top))
        assert abs(value - max(-2047, exact)) <= 1.5  # two logarithms, each within 0.67
    assert bias.max() == 768


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=40))
def test_head_bias_keeps_the_order_of_the_counts(counts):
    order = np.argsort(counts, kind="stable")
    assert np.all(np.diff(model.head_bias(np.array(counts))[order].astype(int)) >= 0)


def test_head_bias_ends():
    assert model.head_bias(np.zeros(5, np.int64)).tolist() == [768] * 5
    assert model.head_bias(np.array([2**62, 1, 0])).tolist() == [768, -2047, -2047]
    assert model.head_bias(np.array([8, 4, 1])).tolist() == [768, 512, 0]


def test_head_bias_is_the_entropy_of_single_tokens():
    counts = np.array([1000, 500, 250, 125, 125])
    bias = model.head_bias(counts)
    losses = -fixedpoint.log_likelihood(np.tile(bias, (5, 1)), np.arange(5, dtype=np.int32))
    share = counts / counts.sum()
    assert abs(share @ losses / 256 + share @ np.log2(share)) < 3 / 256


# --- weights ------------------------------------------------------------------------------------------------


@given(seeds)
def test_weights_are_rounded_masters_and_never_minus_128(seed):
    rng, limit = np.random.default_rng(seed), fixedpoint.MASTER_LIMIT
    some = {"head": extremes(rng, (5, 64), -limit, limit).astype(np.int16)}
    bias = np.arange(5, dtype=np.int16)
    made = both(model.parameters, some, bias)
    assert set(made) == {"head", "head_bias"} and made["head"].dtype == np.int8
    np.testing.assert_array_equal(made["head"], np.floor(some["head"] / 256 + 0.5))
    assert made["head"].min() >= -127
    np.testing.assert_array_equal(made["head_bias"], bias)


def test_initial_weights_never_are_minus_128():
    made = masters(ModelConfig(width=256, layers=3))
    for name, value in made.items():
        assert np.abs(value.astype(int)).max() <= fixedpoint.MASTER_LIMIT
        assert fixedpoint.round_masters(value).min() >= -127, name
    assert max(np.abs(value.astype(int)).max() for value in made.values()) > 100 * 256


def test_initial_state_is_zero():
    state = model.initial_state(ModelConfig(width=64, layers=3), 5)
    assert state.shape == (5, 3, 64) and state.dtype == np.int8 and not state.any()
