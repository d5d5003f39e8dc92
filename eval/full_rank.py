"""Full-rank evolution strategies, as a measure for EGGROLL: every weight of every member is perturbed by itself.

The same model on the same noise generator, with matrices of its own for every member: a batched int8 matmul on
XLA where EGGROLL shares one matrix. A benchmark alone; nothing trains with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eval.throughput import (
    ROUNDS,
    Case,
    Figure,
    Prepared,
    limited_threads,
    multiply_adds,
    prepare,
    seconds_of,
)
from intlm import eggroll, fixedpoint, model
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.native import available_isas, choose_isa, measured_peak
from intlm.engine.xla import Tree, _Plain, _sequence, jit
from intlm.model import LAYER, TRAINED

CHUNK_BYTES = 1 << 20
"""What the matrices of the members evaluated at once may take (one pair at least): they then stay in the cache,
which is several times as fast as memory."""

_SIGN = np.array([1, -1], np.int32)


def member_noise(config: EggrollConfig, model_config: ModelConfig, key: jax.Array, rows_n: jax.Array) -> Tree:
    """A number for each weight of each pair, of the configured kind of noise: int8 [n, ...] by name."""

    def draw(name: str, shape: tuple[int, ...], layer: int) -> jax.Array:
        flat = eggroll.draw(config, key, eggroll.output_stream(name), layer, rows_n, math.prod(shape))
        return flat.reshape(-1, *shape)

    def drawn(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name not in LAYER:
            return draw(name, shape, 0)
        return jnp.stack([draw(name, shape[1:], layer) for layer in range(shape[0])], axis=1)

    return {name: drawn(name, shape) for name, shape in model.shapes(model_config).items()}


def member_weights(config: EggrollConfig, parameters: Tree, noise: Tree) -> tuple[Tree, Tree]:
    """Every member's own weights: int8 [L, 2, n, ...] of the layers and [2, n, ...] of what has no layer.

    Each element is perturbed by its noise and saturated; the members of a pair by + and - of the same.
    """

    def perturbed(name: str) -> jax.Array:
        weight = parameters[name].astype(jnp.int32)
        is_matrix = weight.ndim > 1 + (name in LAYER)
        wide = noise[name].astype(jnp.int32) << (config.sigma_weight if is_matrix else config.sigma_norm)
        change = wide if config.noise == "rademacher" else fixedpoint.rounding_shift(wide, 4)
        return fixedpoint.saturate(weight + _SIGN.reshape(2, *[1] * change.ndim) * change)

    members = {name: perturbed(name) for name in TRAINED}
    layers = {name: jnp.moveaxis(members.pop(name), 2, 0) for name in LAYER}
    return layers, members


class _FullRank(_Plain):
    """Members are [T, 2, n, ...]; the noise is their own weights, and the shared ones are not read."""

    def linear(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> list[jax.Array]:
        return [_batched(x, noise[name]) for name in names]

    def recurrent(self, name: str, weight: jax.Array, h: jax.Array, noise: Tree) -> jax.Array:
        return _batched(h[None], noise[name])[0]

    def vector(self, name: str, weight_D: jax.Array, noise: Tree) -> jax.Array:
        return noise[name]

    def embed(self, embedding: jax.Array, tokens: jax.Array, noise: Tree) -> jax.Array:
        one = jax.vmap(lambda weight_VxD, tokens_T: weight_VxD[tokens_T], (0, 1), 1)
        return jax.vmap(one, (0, None), 1)(noise["embedding"], tokens[:, 0])


def _batched(x: jax.Array, weight: jax.Array) -> jax.Array:
    """int8 [T, 2, n, K] and [2, n, M, K] to int32 [T, 2, n, M]: a matmul for each member."""
    dimensions = (((3,), (3,)), ((0, 1), (0, 1)))
    result = lax.dot_general(
        jnp.moveaxis(x, 0, 2), weight, dimensions, preferred_element_type=jnp.int32
    )  # [2, n, T, M]
    return jnp.moveaxis(result, 2, 0)


def evaluator(model_config: ModelConfig, config: EggrollConfig, at_once: bool) -> Callable[..., Any]:
    """Scores int32 [2, n] and votes (int32, of the parameters' shapes) of n pairs over a segment, compiled:
    `(parameters, key, mean, tokens_nxT1, state_nxLxD, rows_n)` to both. mean: see `eggroll.fitness`.

    at_once: all tokens go through a layer before the next layer, so that a matrix is read once for all of them
    but for the recurrence; otherwise token after token goes through the whole model, as in generation.
    """
    plain = _FullRank()

    def evaluate(
        parameters: Tree,
        key: jax.Array,
        mean: jax.Array,
        tokens_nxT1: jax.Array,
        state_nxLxD: jax.Array,
        rows_n: jax.Array,
    ) -> tuple[jax.Array, Tree]:
        noise = member_noise(config, model_config, key, rows_n)
        layers, own = member_weights(config, parameters, noise)
        state = jnp.swapaxes(state_nxLxD, 0, 1)[:, None]
        state = jnp.broadcast_to(state, (state.shape[0], 2, *state.shape[2:]))
        inputs, targets = tokens_nxT1[:, :-1].T[:, None], tokens_nxT1[:, 1:].T[:, None]

        def some(state: jax.Array, tokens: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, state, _ = _sequence(model_config, parameters, tokens[0], state, plain, layers, own)
            targets = jnp.broadcast_to(tokens[1], logits.shape[:-1])
            return state, jnp.sum(fixedpoint.log_likelihood(logits, targets), axis=0, dtype=jnp.int32)

        if at_once:
            _, scores = some(state, (inputs, targets))
        else:
            _, by_token = lax.scan(some, state, (inputs[:, None], targets[:, None]))
            scores = jnp.sum(by_token, axis=0, dtype=jnp.int32)
        fitness_n = eggroll.fitness(config, scores[0] - scores[1], mean).astype(jnp.int32)
        votes = {
            name: jnp.sum(value * fitness_n.reshape(-1, *[1] * (value.ndim - 1)), axis=0, dtype=jnp.int32)
            for name, value in noise.items()
        }
        return scores, votes

    return jit(evaluate)


@dataclass(frozen=True)
class FullRank:
    """EGGROLL's evaluation over full-rank ones of the same size, noise and text, on as many threads.

    eggroll, at_once, by_token: member-tokens/s of the evaluation, votes included, with low-rank perturbations and
    with full-rank ones in the two orders of `evaluator`. floor: the most member-tokens/s of any code that stores
    each member's matrices and then multiplies with them: as measured, to write them without making noise, and to
    multiply at the int8 peak. Ratios round by round; `pairs`: those evaluated at once.
    """

    engine: str
    estimator: str
    threads: int
    population: int
    segment: int
    pairs: int
    eggroll: Figure
    at_once: Figure
    by_token: Figure
    floor: Figure | None
    over_at_once: Figure
    over_by_token: Figure
    over_floor: Figure | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def lines(self) -> str:
        """For a terminal."""
        head = (
            f"full-rank perturbations, XLA, population {self.population:,}, segment {self.segment}, threads "
            f"{self.threads}; beside {self.engine}, {self.estimator}: {self.eggroll.median:,.0f} member-tok/s"
        )
        rows = [
            ("segment at once", self.at_once, self.over_at_once),
            ("token by token", self.by_token, self.over_by_token),
            ("bound", self.floor, self.over_floor),
        ]
        return "\n".join(
            [head]
            + [
                f"  {name:17s} {rate.median:12,.0f} member-tok/s; low rank is {ratio.median:7.1f}x as fast "
                f"({ratio.lowest:.1f} to {ratio.highest:.1f})"
                for name, rate, ratio in rows
                if rate and ratio
            ]
        )


def compare(
    model_config: ModelConfig, case: Case, seconds: float, progress: Callable[[str], None]
) -> FullRank:
    """Time `case` and full-rank perturbations of the same population in turn.

    Full-rank members are evaluated a chunk at a time, since all of them would not fit into memory; each costs the
    same, so that a chunk's rate is the population's.
    """
    config = case.config
    progress("preparing full-rank perturbations")
    ready: Prepared = prepare(model_config, case)
    engine, state, tokens = ready.engine, ready.state, ready.tokens_PxT1
    parameters = ready.evolution.parameters(state.masters, state.head_bias)
    pairs = max(1, min(config.pairs, CHUNK_BYTES // (2 * model_config.weights)))
    key, rows = np.array([1, 2], np.uint32), np.arange(pairs, dtype=np.int32)
    start = model.initial_state(model_config, pairs)

    def eggroll_evaluation() -> None:
        votes, _, _ = engine.population_step(parameters, key, state.scales, tokens, state.recurrent)
        np.asarray(votes["head"])

    def full_rank(at_once: bool) -> Callable[[], Any]:
        run = evaluator(model_config, config, at_once)
        arguments = parameters, key, np.int32(1), tokens[:pairs], start, rows
        return lambda: jax.block_until_ready(run(*arguments))

    matrix = jnp.ones((model_config.weights,), jnp.int8)
    write = jax.jit(lambda weight, member: weight[None, :] ^ member[:, None])
    members = jnp.arange(2 * pairs, dtype=jnp.int8)

    tokens_of_chunk = 2 * pairs * config.segment
    tasks: dict[str, tuple[Callable[[], Any], int]] = {
        "eggroll": (eggroll_evaluation, config.population * config.segment),
        "at_once": (full_rank(True), tokens_of_chunk),
        "by_token": (full_rank(False), tokens_of_chunk),
        "write": (lambda: write(matrix, members).block_until_ready(), tokens_of_chunk),
    }
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    peak = 0.0
    with limited_threads(case.threads, case.engine):
        for task, _ in tasks.values():
            task()
        for number in range(ROUNDS):
            progress(f"round {number + 1} of {ROUNDS}, full-rank perturbations")
            if available_isas():
                peak = max(peak, measured_peak(choose_isa(), case.threads, seconds=0.05))
            for name, (task, count) in tasks.items():
                rates[name].append(count / seconds_of(task, seconds))
    floor = None
    if peak:
        work = multiply_adds(model_config) / peak
        floor = [1 / (1 / rate + work) for rate in rates["write"]]

    def over(other: list[float]) -> Figure:
        return Figure.of(a / b for a, b in zip(rates["eggroll"], other, strict=True))

    return FullRank(
        case.engine,
        config.estimator,
        case.threads,
        config.population,
        config.segment,
        pairs,
        Figure.of(rates["eggroll"]),
        Figure.of(rates["at_once"]),
        Figure.of(rates["by_token"]),
        Figure.of(floor) if floor else None,
        over(rates["at_once"]),
        over(rates["by_token"]),
        over(floor) if floor else None,
    )
