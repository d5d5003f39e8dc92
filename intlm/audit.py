"""Proof that a traced program has no float in it: a walk over every operation of its jaxpr.

JAX traces a function to a jaxpr, in which every value has a dtype. The walk goes into every inner jaxpr
(loops, conditions, calls), so that nothing between the arguments and the results escapes it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from intlm import eggroll, fixedpoint, model, noise, whitening
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.xla import XlaEngine
from intlm.evolution import zeros


@dataclass(frozen=True)
class Operation:
    """One kind of operation of a program: where, which primitive, and the dtypes going in and coming out."""

    stage: str
    primitive: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def has_float(self) -> bool:
        """Whether any value is neither an integer nor a boolean."""
        return any(not _is_integer(dtype) for dtype in (*self.inputs, *self.outputs))


def _is_integer(dtype: str) -> bool:
    return dtype == "bool" or dtype.startswith(("int", "uint"))


def trace(stage: str, function: Callable[..., Any], *arguments: Any) -> Counter[Operation]:
    """Every operation of `function` on arguments like these, with how often it stands in the program."""
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(function)(*arguments)
    found: Counter[Operation] = Counter()
    for value in (*closed.jaxpr.invars, *closed.jaxpr.constvars):
        found[Operation(stage, "argument", (), (_dtype(value),))] += 1
    for value in closed.jaxpr.outvars:
        found[Operation(stage, "result", (_dtype(value),), ())] += 1
    for equation in _equations(closed.jaxpr):
        inputs = tuple(sorted({_dtype(value) for value in equation.invars}))
        outputs = tuple(sorted({_dtype(value) for value in equation.outvars}))
        found[Operation(stage, equation.primitive.name, inputs, outputs)] += 1
    return found


def _dtype(value: Any) -> str:
    return str(getattr(value.aval, "dtype", "none"))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def audit(
    model_config: ModelConfig, config: EggrollConfig, sampler: Callable[..., Any] | None = None
) -> Counter[Operation]:
    """Every operation of the training step, and of `sampler` (logits [N, V] int16, random [N] uint32).

    Stages: initialisation; population step (noise, forward pass, loss, credit or fitness, votes); whitening;
    update; scales; the unperturbed forward pass; log-likelihood; sampling. Shapes are those of a small
    population: the program is the same for any.
    """
    pairs = min(config.pairs, 4)
    engine = XlaEngine(model_config, config, chunk=2)
    key = noise.seed_key(0)
    # Shapes and dtypes are all that a trace takes of its arguments.
    like = zeros(model_config, dataclasses.replace(config, population=2 * pairs, pairs_per_lane=1))
    masters, bias, scales, state = like.masters, like.head_bias, like.scales, like.recurrent
    parameters = {name: np.broadcast_to(np.int8(0), value.shape) for name, value in masters.items()}
    parameters["head_bias"] = bias
    tokens = np.zeros((pairs, config.segment + 1), np.int32)
    votes = {name: np.broadcast_to(np.int32(0), value.shape) for name, value in masters.items()}
    with jax.enable_x64(True):
        step = jax.make_jaxpr(engine._population_slice, return_shape=True)
        _, shapes = step(parameters, key, scales, tokens, state, np.int32(0))
        statistics = {name: np.zeros(value.shape, value.dtype) for name, value in shapes[1].items()}
    size = np.int64(0)
    logits = np.zeros((pairs, model_config.vocabulary), np.int16)
    # JAX arrays make the code that NumPy could run as well be traced; a lambda, that it is traced each time.
    found = trace("initialisation", lambda k: model.initial_masters(model_config, k), jnp.asarray(key))
    found += trace("step key", lambda *values: eggroll.step_key(*values), jnp.asarray(key), np.uint32(0))
    found += trace("weights", lambda *values: model.parameters(*values), masters, bias)
    found += trace(
        "population step", engine._population_slice, parameters, key, scales, tokens, state, np.int32(0)
    )
    if config.whitens:

        def whiten(votes: Any, statistics: Any, known: Any, step: Any) -> Any:
            votes, known = eggroll.whitened(config, model_config, votes, statistics, known)
            return votes, whitening.renewed(known, step)

        found += trace("whitening", whiten, votes, statistics, like.whitening, np.uint32(1))
    found += trace(
        "update",
        lambda *values: eggroll.update(config, model_config, *values),
        masters, votes, statistics, size, size,
    )  # fmt: skip
    found += trace(
        "scales",
        lambda *values: eggroll.next_scales(config, model_config, *values),
        scales, statistics,
    )  # fmt: skip
    found += trace("forward", engine._forward_all, parameters, tokens, state)
    found += trace(
        "log-likelihood",
        lambda *values: fixedpoint.log_likelihood(*values),
        logits, np.zeros(pairs, np.int32),
    )  # fmt: skip
    if sampler is not None:
        found += trace("sampling", sampler, logits, np.zeros(pairs, np.uint32))
    return found


def table(operations: Counter[Operation]) -> str:
    """The operations as lines of text, floats marked."""
    lines = [f"{'stage':16s} {'primitive':24s} {'count':>6s}  inputs -> outputs"]
    for operation, count in sorted(operations.items(), key=lambda item: repr(item[0])):
        mark = "   <-- FLOAT" if operation.has_float else ""
        inputs, outputs = ", ".join(operation.inputs), ", ".join(operation.outputs)
        lines.append(
            f"{operation.stage:16s} {operation.primitive:24s} {count:6d}  {inputs} -> {outputs}{mark}"
        )
    return "\n".join(lines)
