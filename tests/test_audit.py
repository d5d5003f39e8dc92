from dataclasses import replace
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eval.sampling import SamplingConfig, draw
from intlm import eggroll
from intlm.audit import Operation, audit, table, trace
from intlm.config import EggrollConfig, ModelConfig

MODEL = ModelConfig(width=64, layers=1, vocabulary=40)
ACTIVATION = EggrollConfig(population=4, segment=3)
PAPER = EggrollConfig(
    estimator="weight", noise="gaussian", fitness="sign", update="threshold", population=4, segment=3
)
STAGES = {
    "initialisation", "step key", "weights", "population step", "update", "scales", "forward", "log-likelihood",
}  # fmt: skip


def floats(found):
    return {operation for operation in found if operation.has_float}


@pytest.mark.parametrize(
    ("model_config", "config"),
    [
        (MODEL, ACTIVATION),
        # An audit takes the shapes of masters alone, not the 6 GB that these would be.
        (replace(MODEL, width=8192, layers=2, gate="sigmoid", candidate="tanh", mlp="relu"), ACTIVATION),
        (MODEL, PAPER),
        (MODEL, replace(PAPER, noise="rademacher", fitness="graded", update="linear", rank=2)),
    ],
)
def test_training_has_no_float(model_config, config):
    sampling = SamplingConfig(top_k=5, top_p=60000, min_p=1000)
    found = audit(model_config, config, lambda *values: draw(sampling, *values))
    assert floats(found) == set()
    own = {"whitening"} if config.whitens else set()
    assert {operation.stage for operation in found} == STAGES | own | {"sampling"}
    assert sum(found.values()) > 1000
    assert "FLOAT" not in table(found)
    primitives = {operation.primitive for operation in found if operation.stage == "population step"}
    assert {"dot_general", "scan", "shift_right_arithmetic"} <= primitives
    matmuls = [o for o in found if o.primitive == "dot_general"]
    assert all(o.outputs == ("int32",) for o in matmuls)
    # Credit and whitening under `activation` sum products of 32 bits; whatever meets a weight has 8.
    sums = {("int32",)} if config.estimator == "activation" else set()
    assert {o.inputs for o in matmuls} == {("int8",)} | sums


def detour(function):
    """The same values by way of a float."""

    def changed(*arguments, **keywords):
        value = function(*arguments, **keywords)
        if isinstance(value, dict):
            return {name: detour(lambda v=v: v)() for name, v in value.items()}
        return (value * jnp.float32(1.0)).astype(value.dtype)

    return changed


@pytest.fixture
def untraced():
    """JAX keeps the traces of functions that it has seen: none from before a change, none of the changed."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "name", "stages"),
    [
        ("intlm.noise", "bell", {"initialisation"}),
        ("intlm.noise", "fold", {"initialisation", "step key", "population step"}),
        ("intlm.model", "parameters", {"weights"}),
        ("intlm.engine.xla", "normalize", {"population step", "forward"}),
        ("intlm.eggroll", "discount", {"population step"}),
        ("intlm.fixedpoint", "log2_sum_exp2", {"population step", "log-likelihood"}),
        ("intlm.fixedpoint", "integer_sqrt", {"whitening", "update"}),
        ("intlm.whitening", "invert", {"whitening"}),
        ("intlm.fixedpoint", "floor_log2", {"population step", "scales", "log-likelihood"}),
    ],
)
@pytest.mark.usefixtures("untraced")
def test_a_float_is_found_wherever_it_is_planted(module, name, stages, monkeypatch):
    monkeypatch.setattr(f"{module}.{name}", detour(getattr(import_module(module), name)))
    found = audit(MODEL, ACTIVATION)
    assert {operation.stage for operation in floats(found)} == stages
    marked = [line for line in table(found).splitlines() if line.endswith("<-- FLOAT")]
    assert len(marked) == len(floats(found)) and all("float32" in line for line in marked)


@pytest.mark.parametrize("name", ["fitness", "matrix_perturbation"])
@pytest.mark.usefixtures("untraced")
def test_a_float_in_the_estimator_weight_is_found(name, monkeypatch):
    monkeypatch.setattr(eggroll, name, detour(getattr(eggroll, name)))
    found = audit(MODEL, PAPER)
    assert {operation.stage for operation in floats(found)} == {"population step"}


def test_a_float_in_the_sampler_is_found():
    def sampler(logits, random):
        return jnp.argmax(logits / 2, axis=-1)

    found = audit(MODEL, ACTIVATION, sampler)
    assert {operation.stage for operation in floats(found)} == {"sampling"}


# --- the walk -----------------------------------------------------------------------------------------------


def hidden(x):
    return x + lax.convert_element_type(jnp.sin(x * jnp.float32(0.5)), jnp.int32)


def in_a_loop(x):
    return lax.fori_loop(0, 3, lambda i, y: hidden(y), x)


def in_a_while(x):
    return lax.while_loop(lambda y: jnp.float32(0.5) * y[0] < 4, lambda y: y + 1, x)


def in_a_scan(x):
    return lax.scan(lambda y, _: (hidden(y), None), x, length=3)[0]


def in_a_branch(x):
    return lax.cond(x[0] > 0, hidden, lambda y: y, x)


def in_a_map(x):
    return lax.map(hidden, x)


def in_a_call(x):
    return jax.jit(hidden)(x)


def in_a_derivative_rule(x):
    @jax.custom_jvp
    def inner(y):
        return hidden(y)

    inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0]))
    return inner(x)


def in_a_checkpoint(x):
    return jax.checkpoint(hidden)(x)


def in_loops_in_loops(x):
    def outer(y, _):
        return lax.cond(
            y[0] > 0, lambda z: lax.fori_loop(0, 2, lambda i, w: jax.jit(in_a_scan)(w), z), hidden, y
        ), None

    return lax.scan(outer, x, length=2)[0]


@pytest.mark.parametrize(
    "function",
    [
        hidden, in_a_loop, in_a_while, in_a_scan, in_a_branch, in_a_map, in_a_call, in_a_derivative_rule,
        in_a_checkpoint, in_loops_in_loops,
    ],
)  # fmt: skip
def test_no_inner_program_hides_a_float(function):
    found = trace("here", function, np.arange(3, dtype=np.int32))
    assert floats(found)
    assert {operation.stage for operation in found} == {"here"}


def test_the_depth_of_a_float_makes_no_difference():
    deep = floats(trace("here", in_loops_in_loops, np.arange(3, dtype=np.int32)))
    shallow = floats(trace("here", hidden, np.arange(3, dtype=np.int32)))
    assert {o.primitive for o in shallow} <= {o.primitive for o in deep}


def test_floats_that_only_pass_through_are_found():
    assert floats(trace("here", lambda x: x, np.zeros(3, np.float32)))
    constant = np.zeros(3, np.float32)
    assert floats(trace("here", lambda x: x + constant.astype(int) + jnp.asarray(constant).astype(int), 1))


def test_other_kinds_of_numbers_count_as_floats():
    for dtype in (np.float16, np.float64, jnp.bfloat16, np.complex64, jnp.float8_e4m3fn):
        found = trace("here", partial(jnp.add, 1), np.zeros(2, dtype))
        assert floats(found), dtype
    for dtype in (np.bool_, np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64):
        found = trace("here", lambda x: x ^ x, np.zeros(2, dtype))
        assert not floats(found), dtype


def test_operations_are_counted():
    found = trace("here", lambda x: (x + x) * (x + 1) + 2, np.int32(1))
    assert found[Operation("here", "add", ("int32",), ("int32",))] == 3
    assert found[Operation("here", "mul", ("int32",), ("int32",))] == 1
    assert found[Operation("here", "argument", (), ("int32",))] == 1


def test_the_table_marks_what_has_a_float():
    found = trace("here", lambda x: (x / 2).astype(int), np.int32(1))
    lines = table(found).splitlines()
    assert lines[0].split() == ["stage", "primitive", "count", "inputs", "->", "outputs"]
    assert len(lines) == len(found) + 1
    for line in lines[1:]:
        assert line.startswith("here ")
        assert ("<-- FLOAT" in line) == ("float" in line)
    assert any("<-- FLOAT" in line for line in lines)
