"""The XLA engine: JAX on any platform. Layer outer, time inner.

All inputs of a segment are known in advance, so that everything but the recurrence runs over all tokens at
once: one large matmul for the input halves of gate and candidate and for each MLP matrix, and only the two
recurrent matmuls token by token. Members are laid out [T, 2, n, ...] and evaluated in chunks of n pairs
inside one compiled loop, so that what a chunk writes stays in the cache.

On CPUs an int8 matmul is fast only when it contracts the last axis of both operands; `_dot` is the one
place that writes one.

Where the process has several devices, each evaluates a part of the pairs, and the parts' votes and statistics are
added between the devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intlm import eggroll, fixedpoint
from intlm.config import EggrollConfig, ModelConfig, check_bounds
from intlm.eggroll import Scales, Statistics, Votes
from intlm.fixedpoint import activate, gated, matmul_shift, normalize, saturate
from intlm.model import (
    LAYER,
    LAYER_BIASES,
    LAYER_MATRICES,
    LAYER_NORMS,
    SEPARATOR,
    TRAINED,
    Parameters,
    shapes,
)

CHUNK_BYTES = 4 << 20
"""What a chunk's largest intermediate should take on a CPU: it has to stay in the cache."""

LARGE_CHUNK_BYTES = 1 << 30
"""The same elsewhere. A GPU is fast with few large operations."""

SLICE_PAIRS = 2048
"""Pairs evaluated by a device in one compiled call; a larger population takes several, and its memory stays
flat."""

AXIS = "population"
"""The axis of the mesh of devices."""

Tree = dict[str, jax.Array]
Streams = dict[str, tuple[int, int]]
"""Streams of noise by name: each one's number, and how many numbers of it are drawn."""


def _dot(x: jax.Array, weight_MxK: jax.Array) -> jax.Array:
    """x W^T: int8 [..., K] and int8 [M, K] to int32 [..., M].

    Zeros fill every size up to a multiple of four: of any other K, XLA can make wrong sums on GPUs.
    """
    flat_NxK = x.reshape(-1, x.shape[-1])
    left, right = (jnp.pad(m, [(0, -size % 4) for size in m.shape]) for m in (flat_NxK, weight_MxK))
    result = lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    result = result[: flat_NxK.shape[0], : weight_MxK.shape[0]]
    return result.reshape(*x.shape[:-1], weight_MxK.shape[0])


class _Plain:
    """The unperturbed model. Its subclasses add what an estimator perturbs.

    Noise is a tree for one layer, or for what has no layer (embedding, final norm, head), made before the loops
    over chunks and layers: made inside, XLA would fuse the unpacking of bits into every reader.
    """

    def linear(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> list[jax.Array]:
        """The perturbed accumulators of several matrices on one input, in one matmul: int32 [..., M] each."""
        joined = _dot(x, jnp.concatenate(weights) if len(weights) > 1 else weights[0])
        return jnp.split(joined, np.cumsum([w.shape[0] for w in weights])[:-1].tolist(), axis=-1)

    def recurrent(self, name: str, weight: jax.Array, h: jax.Array, noise: Tree) -> jax.Array:
        """The perturbed accumulator of a recurrent matrix for one token: int32 [..., M]."""
        return _dot(h, weight)

    def vector(self, name: str, weight_D: jax.Array, noise: Tree) -> jax.Array:
        """The perturbed norm weight or bias: int8, broadcastable to [..., D]."""
        return weight_D

    def embed(self, embedding: jax.Array, tokens: jax.Array, noise: Tree) -> jax.Array:
        """Rows of the embedding: int8 [..., D]."""
        return embedding[tokens]

    def record(self, **inputs: jax.Array) -> Tree:
        """What has to be kept of a layer's inputs for the votes."""
        return {}


_SIGN = np.array([1, -1], np.int32)


class _Weight(_Plain):
    """The estimator `weight`; members are [T, 2, n, ...]. Noise: A [n, r, M] and B [n, r, K] of a matrix under
    `a.<name>` and `b.<name>`, a vector's [n, D] under its name."""

    def __init__(self, config: EggrollConfig, model: ModelConfig, on_cpu: bool = True):
        """on_cpu: projections are columns of the matrices' matmul."""
        self.config, self.model, self.on_cpu = config, model, on_cpu

    def noise(self, key: jax.Array, rows_P: jax.Array, segment: int) -> tuple[Tree, Tree]:
        """The noise of the layers [P, L, ...] and of what has no layer [P, ...]."""
        rank, sizes = self.config.rank, shapes(self.model)

        def streams(matrices: Sequence[str], vectors: Sequence[str]) -> Streams:
            made = self.vectors(vectors)
            for name in matrices:
                made[f"a.{name}"] = eggroll.output_stream(name), rank * sizes[name][-2]
                made[f"b.{name}"] = eggroll.input_stream(name), rank * sizes[name][-1]
            return made

        of_layers = streams(LAYER_MATRICES, (*LAYER_NORMS, *LAYER_BIASES))
        own = streams(("embedding", "head"), ("norm_output",))
        made = _draw(self.config, key, rows_P, self.model.layers, of_layers, own)
        by_rank = [
            {name: x.reshape(*x.shape[:-1], rank, -1) if "." in name else x for name, x in tree.items()}
            for tree in made
        ]
        return by_rank[0], by_rank[1]

    def vectors(self, names: Sequence[str]) -> Streams:
        """The streams of vectors."""
        return {name: (eggroll.output_stream(name), self.model.width) for name in names}

    def linear(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> list[jax.Array]:
        plain, projections = (self._joined if self.on_cpu else self._apart)(names, weights, x, noise)
        result = []
        for name, accumulator, projection in zip(names, plain, projections, strict=True):
            change = sum(
                eggroll.matrix_perturbation(self.config, projection[..., r, None], noise[f"a.{name}"][:, r])
                for r in range(self.config.rank)
            )
            result.append(accumulator + _SIGN[:, None, None] * change)
        return result

    def _joined(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The plain accumulators, and the projections x.B: int32 [..., rank].

        The projections ride along in the matmul: all pairs' B are extra outputs, of which each member keeps its
        own pair's. On a CPU that costs far less than a reduction of its own, on a GPU far more.
        """
        b = [noise[f"b.{name}"].reshape(-1, x.shape[-1]) for name in names]
        parts = _Plain.linear(self, names, [*weights, *b], x, noise)
        n, rank = noise[f"b.{names[0]}"].shape[:2]
        own = jnp.eye(n, dtype=jnp.int32)[:, :, None]
        return parts[: len(names)], [
            jnp.sum(crossed.reshape(*crossed.shape[:-1], n, rank) * own, axis=-2, dtype=jnp.int32)
            for crossed in parts[len(names) :]
        ]

    def _apart(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The same, the projections as sums of products."""
        wide = x.astype(jnp.int32)[..., None, :]
        projections = [
            jnp.sum(wide * noise[f"b.{name}"].astype(jnp.int32), axis=-1, dtype=jnp.int32) for name in names
        ]
        return _Plain.linear(self, names, weights, x, noise), projections

    def recurrent(self, name: str, weight: jax.Array, h: jax.Array, noise: Tree) -> jax.Array:
        """One token's members are a [2, n, D] input like any other."""
        return self.linear([name], [weight], h, noise)[0]

    def vector(self, name: str, weight_D: jax.Array, noise: Tree) -> jax.Array:
        """Plus and minus the vector's noise: int8 [2, n, D]."""
        change = eggroll.vector_perturbation(self.config, noise[name])
        return saturate(weight_D.astype(jnp.int32) + _SIGN[:, None, None] * change)

    def embed(self, embedding: jax.Array, tokens: jax.Array, noise: Tree) -> jax.Array:
        """tokens: int32 [T, 1, n]. Returns int8 [T, 2, n, D]."""
        change: Any = 0
        for r in range(self.config.rank):
            row = jnp.take_along_axis(noise["a.embedding"][:, r].T, tokens[:, 0], axis=0)[..., None]
            change = change + eggroll.embedding_perturbation(self.config, row, noise["b.embedding"][:, r])
        return saturate(embedding[tokens].astype(jnp.int32) + _SIGN[:, None, None] * change[:, None])


class _Activation(_Weight):
    """The estimator `activation`. Noise: A_s [n, M] and the per-token signs [n, T] of a site under `a.<site>`
    and `s.<site>`, a norm's [n, D] under its name. The head has no signs, and several directions [n, R, V]."""

    def noise(self, key: jax.Array, rows_P: jax.Array, segment: int) -> tuple[Tree, Tree]:
        """The noise of the layers [P, L, ...] and of what has no layer [P, ...]."""
        widths = {"mlp_in": 4 * self.model.width}

        def streams(sites: Sequence[str], norms: Sequence[str]) -> Streams:
            made = self.vectors(norms)
            for site in sites:
                made[f"a.{site}"] = eggroll.direction_stream(site), widths.get(site, self.model.width)
                made[f"s.{site}"] = eggroll.sign_stream(site), segment
            return made

        of_layers = streams(("gate", "candidate", "mlp_in", "mlp_out"), LAYER_NORMS)
        own = streams(("embedding",), ("norm_output",))
        of_head = range(self.config.rank_head)
        own |= {f"{r}": (eggroll.direction_stream("head") + r, self.model.vocabulary) for r in of_head}
        made = _draw(self.config, key, rows_P, self.model.layers, of_layers, own)
        return made[0], made[1] | {"a.head": jnp.stack([made[1].pop(f"{r}") for r in of_head], axis=1)}

    def site(self, site: str, noise: Tree) -> jax.Array:
        """What a site adds to its accumulator: int32 [T, 2, n, M]."""
        shift = eggroll.site_shift(self.config, site, self.model.width)
        step = noise[f"a.{site}"].astype(jnp.int32) << shift
        signs_Txn = noise[f"s.{site}"].T.astype(jnp.int32)
        return (signs_Txn[:, None, :] * _SIGN[:, None])[..., None] * step

    def linear(
        self, names: Sequence[str], weights: Sequence[jax.Array], x: jax.Array, noise: Tree
    ) -> list[jax.Array]:
        """The plain accumulators, and each one's site. The head's is not perturbed."""
        plain = _Plain.linear(self, names, weights, x, noise)
        if "head" in names:
            return plain
        return [a + self.site(eggroll.SITE_OF[name], noise) for name, a in zip(names, plain, strict=True)]

    def recurrent(self, name: str, weight: jax.Array, h: jax.Array, noise: Tree) -> jax.Array:
        """Plain: the site is perturbed once, with the input matrix."""
        return _dot(h, weight)

    def vector(self, name: str, weight_D: jax.Array, noise: Tree) -> jax.Array:
        """Norm weights are perturbed, biases belong to their site."""
        return weight_D if name in LAYER_BIASES else super().vector(name, weight_D, noise)

    def embed(self, embedding: jax.Array, tokens: jax.Array, noise: Tree) -> jax.Array:
        """tokens: int32 [T, 1, n]. Returns int8 [T, 2, n, D]."""
        return saturate(embedding[tokens].astype(jnp.int32) + self.site("embedding", noise))

    def record(self, **inputs: jax.Array) -> Tree:
        """The sums over each pair of the matrices' inputs: int16 [T, n, K]."""
        return {name: x[:, 0].astype(jnp.int16) + x[:, 1] for name, x in inputs.items()}


def _draw(
    config: EggrollConfig, key: jax.Array, rows_P: jax.Array, layers: int, of_layers: Streams, own: Streams
) -> tuple[Tree, Tree]:
    """The noise of streams that every layer has, int8 [P, L, count], and of those without layers, [P, count].

    All of one length are made together: the generator would be most of what XLA has to compile.
    """
    made: tuple[Tree, Tree] = {}, {}
    for count in sorted({count for _, count in (*of_layers.values(), *own.values())}):
        layered, single = ([name for name in tree if tree[name][1] == count] for tree in (of_layers, own))
        which = [(of_layers[name][0], layer) for name in layered for layer in range(layers)]
        streams, layer = np.array([*which, *((own[name][0], 0) for name in single)], np.uint32).T
        draw = partial(eggroll.draw, config, key, rows_N=rows_P, count=count)
        noise = jax.vmap(lambda stream, layer, draw=draw: draw(stream, layer))(streams, layer)
        by_layer = noise[: len(which)].reshape(len(layered), layers, len(rows_P), count)
        made[0].update({name: jnp.swapaxes(by_layer[i], 0, 1) for i, name in enumerate(layered)})
        made[1].update({name: noise[len(which) + i] for i, name in enumerate(single)})
    return made


def _scan_once(
    tokens: jax.Array, body: Callable[[jax.Array, Any], Any], carry: jax.Array, stacks: Any
) -> tuple[jax.Array, Any]:
    """`lax.scan` over stacks of one, in a loop of which XLA does not know that it has one round.

    It undoes loops of one round, and then makes what a layer records again inside of every reader: on CPUs a
    population takes 1.7 times as long. tokens: any numbers that XLA does not know.
    """
    one = jax.tree.map(lambda x: x[0], stacks)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(body, carry, one)[1])
    rounds = 1 + jnp.minimum(jnp.abs(tokens.ravel()[0]), 0)
    carry, made = lax.fori_loop(0, rounds, lambda _, both: body(both[0], one), (carry, nothing))
    return carry, jax.tree.map(lambda x: x[None], made)


def _sequence(
    model: ModelConfig,
    parameters: Tree,
    tokens: jax.Array,
    state_Lx: jax.Array,
    perturbed: _Plain,
    layers_noise: Tree,
    noise: Tree,
) -> tuple[jax.Array, jax.Array, Tree]:
    """All tokens through the model: logits int16 [T, ..., V], new states, and what was recorded.

    tokens: int32 [T, ...]; state: int8 [L, ..., D]; layers_noise: [L, ...].
    """
    shift, shift_wide = matmul_shift(model.width), matmul_shift(4 * model.width)
    reset = (tokens == SEPARATOR)[..., None]

    def layer_step(x: jax.Array, layer_inputs: Any) -> Any:
        weights, h, noise = layer_inputs

        def bias(name: str) -> jax.Array:
            return perturbed.vector(name, weights[name], noise).astype(jnp.int32) << shift

        u = normalize(x, perturbed.vector("norm_recurrent", weights["norm_recurrent"], noise))
        names = ("gate_input", "candidate_input")
        gate_sum, candidate_sum = perturbed.linear(names, [weights[name] for name in names], u, noise)
        gate_sum, candidate_sum = gate_sum + bias("gate_bias"), candidate_sum + bias("candidate_bias")

        def token_step(h: jax.Array, sums: Any) -> Any:
            gate_sum, candidate_sum, reset = sums
            h = jnp.where(reset, jnp.int8(0), h)
            name = "gate_recurrent"
            gate_sum = gate_sum + perturbed.recurrent(name, weights[name], h, noise)
            gate = activate(saturate(gate_sum >> shift), model.gate)
            remembered = gated(gate, h).astype(jnp.int8)
            name = "candidate_recurrent"
            candidate_sum = candidate_sum + perturbed.recurrent(name, weights[name], remembered, noise)
            candidate = activate(saturate(candidate_sum >> shift), model.candidate)
            after = (h + gated(gate, candidate.astype(jnp.int32) - h)).astype(jnp.int8)
            return after, (h, remembered, after)

        last, (before, remembered, after) = lax.scan(token_step, h, (gate_sum, candidate_sum, reset))
        x = saturate(x.astype(jnp.int32) + after)
        v = normalize(x, perturbed.vector("norm_mlp", weights["norm_mlp"], noise))
        (hidden_sum,) = perturbed.linear(["mlp_in"], [weights["mlp_in"]], v, noise)
        hidden = activate(saturate(hidden_sum >> shift), model.mlp)
        (output_sum,) = perturbed.linear(["mlp_out"], [weights["mlp_out"]], hidden, noise)
        x = saturate(x.astype(jnp.int32) + saturate(output_sum >> shift_wide))
        recorded = perturbed.record(
            gate_input=u, gate_recurrent=before, candidate_recurrent=remembered, mlp_in=v, mlp_out=hidden
        )
        return x, (last, recorded)

    x = perturbed.embed(parameters["embedding"], tokens, noise)
    weights = {name: parameters[name] for name in LAYER}
    recording = isinstance(perturbed, _Activation) and perturbed.on_cpu
    scan = partial(_scan_once, tokens) if recording and model.layers == 1 else lax.scan
    x, (state, recorded) = scan(layer_step, x, (weights, state_Lx, layers_noise))
    y = normalize(x, perturbed.vector("norm_output", parameters["norm_output"], noise))
    (head_sum,) = perturbed.linear(["head"], [parameters["head"]], y, noise)
    logits = (head_sum >> (shift - 4)) + parameters["head_bias"].astype(jnp.int32)
    logits = jnp.clip(logits, -fixedpoint.LOGIT_LIMIT, fixedpoint.LOGIT_LIMIT)
    return logits.astype(jnp.int16), state, recorded | perturbed.record(head=y)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` traced and compiled by XLA, with 64-bit integers for the exact sums."""
    compiled = jax.jit(function)

    def call(*arguments: Any) -> Any:
        with jax.enable_x64(True):
            return compiled(*arguments)

    return call


class XlaEngine:
    """JAX on all devices of the process."""

    name = "xla"

    def __init__(
        self,
        model: ModelConfig,
        config: EggrollConfig,
        chunk: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Check the bounds of the configuration; a device evaluates `chunk` pairs at once (0: chosen).

        devices: None takes all of the default platform that belong to this process.
        """
        check_bounds(model, config)
        self.model, self.config = model, config
        widest = max(8 * model.width, 2 * model.vocabulary)
        self.devices = list(jax.local_devices() if devices is None else devices)
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self._on_cpu = self.devices[0].platform == "cpu"
        size, most = (CHUNK_BYTES, 64) if self._on_cpu else (LARGE_CHUNK_BYTES, SLICE_PAIRS)
        self.chunk = chunk or max(4, min(most, size // (config.segment * widest * 4)))
        evaluate = self._population_slice if len(self.devices) == 1 else self._sharded_slice
        self._population = self.compile(evaluate)
        self._scores = self.compile(partial(evaluate, votes=False))
        self._forward = self.compile(self._forward_all)
        self._score = self.compile(self._score_all)
        self._fitness_votes = self.compile(self._fitness_votes_slice)
        self._embedding_votes = self.compile(self._embedding_votes_slice)
        self._advance = self.compile(partial(eggroll.advance, config, model))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` traced and compiled."""
        return jit(function)

    def advance(self, *arguments: Any) -> Any:
        """See `Engine.advance`."""
        return self._advance(*self._placed(*arguments))

    def forward(self, parameters: Parameters, tokens_NxT: Any, state_NxLxD: Any) -> tuple[Any, Any]:
        """The unperturbed model; see `Engine.forward`."""
        return self._forward(parameters, jnp.asarray(tokens_NxT, jnp.int32), jnp.asarray(state_NxLxD))

    def _forward_all(
        self, parameters: Tree, tokens_NxT: jax.Array, state_NxLxD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        state = jnp.swapaxes(state_NxLxD, 0, 1)
        logits, state, _ = _sequence(self.model, parameters, tokens_NxT.T, state, _Plain(), {}, {})
        return jnp.swapaxes(logits, 0, 1), jnp.swapaxes(state, 0, 1)

    def score(self, parameters: Parameters, tokens_NxT1: Any, state_NxLxD: Any) -> tuple[Any, Any]:
        """See `Engine.score`."""
        return self._score(parameters, jnp.asarray(tokens_NxT1, jnp.int32), jnp.asarray(state_NxLxD))

    def _score_all(
        self, parameters: Tree, tokens_NxT1: jax.Array, state_NxLxD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits, state = self._forward_all(parameters, tokens_NxT1[:, :-1], state_NxLxD)
        return fixedpoint.log_likelihood(logits, tokens_NxT1[:, 1:]), state

    def population_step(
        self,
        parameters: Parameters,
        key: Any,
        scales: Scales,
        tokens_PxT1: Any,
        state_PxLxD: Any,
        first_pair: int = 0,
        votes: bool = True,
    ) -> tuple[Votes, Statistics, Any]:
        """See `Engine.population_step`."""
        evaluate = self._population if votes else self._scores
        tokens, state = jnp.asarray(tokens_PxT1, jnp.int32), jnp.asarray(state_PxLxD)
        parts = []
        pairs = SLICE_PAIRS * len(self.devices)
        for start in range(0, tokens.shape[0], pairs):
            rows = np.s_[start : start + pairs]
            placed = self._placed(parameters, key, scales, tokens[rows], state[rows])
            parts.append(evaluate(*placed, np.int32(first_pair + start)))
            if len(parts) == 2:
                parts = [self._add(*parts)]
        return parts[0]

    def _placed(self, *arguments: Any) -> Any:
        """The arguments of a call, lying on the devices as in every other call: else XLA compiles it again."""
        if len(self.devices) == 1:
            return arguments
        with jax.enable_x64(True):
            return jax.device_put(arguments, NamedSharding(self._mesh, PartitionSpec()))

    def _add(self, one: Any, other: Any) -> Any:
        with jax.enable_x64(True):
            votes = jax.tree.map(jnp.add, one[0], other[0])
            return votes, eggroll.join(one[1], other[1]), jnp.concatenate([one[2], other[2]])

    def _sharded_slice(
        self,
        parameters: Tree,
        key: jax.Array,
        scales: Tree,
        tokens_PxT1: jax.Array,
        state_PxLxD: jax.Array,
        first_pair: jax.Array,
        votes: bool = True,
    ) -> tuple[Votes, Statistics, jax.Array]:
        """`_population_slice` on every device at once, each with as many pairs.

        The last ones get pairs that do not exist, which read token 0 and are counted nowhere.
        """
        pairs, devices = tokens_PxT1.shape[0], len(self.devices)
        each = -(-pairs // devices)
        missing = each * devices - pairs
        tokens, state = (
            jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in (tokens_PxT1, state_PxLxD)
        )

        def evaluate(parameters: Tree, key: Any, scales: Tree, tokens: Any, state: Any, first: Any) -> Any:
            own = first + lax.axis_index(AXIS).astype(jnp.int32) * each
            end = first + pairs if missing else None
            made, statistics, after = self._population_slice(
                parameters, key, scales, tokens, state, own, votes, end
            )
            fitness = {name: statistics.pop(name) for name in ("fitness",) if name in statistics}
            return *lax.psum((made, statistics), AXIS), fitness, after

        everywhere, parts = PartitionSpec(), PartitionSpec(AXIS)
        made, statistics, fitness, after = jax.shard_map(
            evaluate,
            mesh=self._mesh,
            in_specs=(everywhere, everywhere, everywhere, parts, parts, everywhere),
            out_specs=(everywhere, everywhere, parts, parts),
            check_vma=False,
        )(parameters, key, scales, tokens, state, first_pair)
        fitness = {name: value[:pairs] for name, value in fitness.items()}
        return made, statistics | fitness, after[:pairs]

    def _population_slice(
        self,
        parameters: Tree,
        key: jax.Array,
        scales: Tree,
        tokens_PxT1: jax.Array,
        state_PxLxD: jax.Array,
        first_pair: jax.Array,
        votes: bool = True,
        end: jax.Array | None = None,
    ) -> tuple[Votes, Statistics, jax.Array]:
        """Chunks in a loop, what remains after them, then the votes of all pairs at once.

        Pairs from number `end` on do not exist: they add nothing to votes and statistics.
        """
        activation = self.config.estimator == "activation"
        pairs, segment = tokens_PxT1.shape[0], tokens_PxT1.shape[1] - 1
        rows_P = jnp.arange(pairs, dtype=jnp.int32) + first_pair
        perturbed = (_Activation if activation else _Weight)(self.config, self.model, self._on_cpu)
        noise = perturbed.noise(jnp.asarray(key), rows_P, segment)
        evaluate = partial(self._chunk, parameters, scales, perturbed, votes)
        chunk = min(self.chunk, pairs)
        whole = pairs - pairs % chunk
        slices = (tokens_PxT1, state_PxLxD, *noise)
        chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // chunk, chunk, *x.shape[1:]), slices)
        parts = [
            jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), lax.map(lambda s: evaluate(*s), chunks))
        ]
        if whole < pairs:
            parts.append(evaluate(*jax.tree.map(lambda x: x[whole:], slices)))
        outcome = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        seen = _seen(self.model, tokens_PxT1)
        if end is not None:
            outcome, seen = jax.tree.map(partial(_where, rows_P < end), (outcome, seen))
        scores: Statistics = {
            name: jnp.sum(outcome[name].astype(jnp.int64)) for name in ("score", "difference", "ties")
        }
        if not activation:
            scores["fitness"] = eggroll.fitness(self.config, outcome["signed"], scales["difference"])
        if not votes:
            return {}, scores, outcome["state"]
        if activation:
            made, statistics = self._activation_votes(parameters, noise, outcome)
        else:
            made, statistics = self._weight_votes(noise, scores["fitness"], seen)
        return made, statistics | scores | {"seen": jnp.sum(seen.astype(jnp.int64))}, outcome["state"]

    def _chunk(
        self,
        parameters: Tree,
        scales: Tree,
        perturbed: _Weight,
        votes: bool,
        tokens_nxT1: jax.Array,
        state_nxLxD: jax.Array,
        layers_noise: Tree,
        noise: Tree,
    ) -> Tree:
        """Both members of n pairs over the segment. Every entry has a leading axis of n pairs."""
        inputs, targets = tokens_nxT1[:, :-1].T, tokens_nxT1[:, 1:].T
        by_layer = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), layers_noise)
        state = jnp.swapaxes(state_nxLxD, 0, 1)[:, None]
        state = jnp.broadcast_to(state, (state.shape[0], 2, *state.shape[2:]))
        tokens = inputs[:, None, :]
        logits, state, recorded = _sequence(self.model, parameters, tokens, state, perturbed, by_layer, noise)
        targets = jnp.broadcast_to(targets[:, None], logits.shape[:-1])
        scores = fixedpoint.log_likelihood(logits, targets)
        average = (state[:, 0].astype(jnp.int32) + state[:, 1]) >> 1
        outcome = {
            "state": jnp.swapaxes(average.astype(jnp.int8), 0, 1),
            "score": jnp.sum(scores, axis=(0, 1), dtype=jnp.int32),
        }
        if isinstance(perturbed, _Activation):
            credit = eggroll.credit(scores)
            outcome["difference"] = jnp.sum(jnp.abs(credit), axis=0, dtype=jnp.int32)
            outcome["ties"] = jnp.sum((credit == 0).astype(jnp.int32), axis=0, dtype=jnp.int32)
            if votes:
                slopes = (_slopes_on_cpu if self._on_cpu else _slopes)(logits, targets, noise["a.head"])
                of_head = eggroll.head_credit(slopes)
                outcome |= self._factors(scales, inputs, credit, of_head, recorded, by_layer, noise)
            return outcome
        difference = jnp.sum(scores[:, 0] - scores[:, 1], axis=0, dtype=jnp.int32)
        outcome["signed"] = difference
        outcome["difference"] = jnp.abs(difference)
        outcome["ties"] = (difference == 0).astype(jnp.int32)
        return outcome

    # --- estimator `activation` -----------------------------------------------------------------------

    def _factors(
        self,
        scales: Tree,
        inputs_Txn: jax.Array,
        credit_Txn: jax.Array,
        head_credit_RxTxn: jax.Array,
        recorded: Tree,
        layers_noise: Tree,
        noise: Tree,
    ) -> Tree:
        """B of every parameter: int8 [n, ...] under `factor.<parameter>`, of the head [n, R, D]."""
        ks = sorted({0, self.config.horizon, self.config.horizon_recurrent})
        horizon = np.array(ks, np.int32)[:, None]

        def back(reward: jax.Array, credit: jax.Array) -> Any:
            reward = eggroll.discount(credit, reward, horizon)
            return reward, reward

        zero = jnp.zeros((len(ks), credit_Txn.shape[1]), jnp.int32)
        _, rewards_TxHxn = lax.scan(back, zero, credit_Txn, reverse=True)
        rewards = jnp.swapaxes(rewards_TxHxn, 0, 1)

        def which(name: str) -> np.ndarray:
            """Where a parameter's k stands among `ks`: [L] or []."""
            return np.searchsorted(ks, eggroll.horizons(self.config, self.model, name)).astype(np.int32)

        def signed(name: str, noise: Tree, index: Any) -> jax.Array:
            return noise[f"s.{eggroll.SITE_OF[name]}"].T.astype(jnp.int32) * rewards[index]

        def factor(signed_Txn: jax.Array, x_TxnxK: jax.Array, shift: jax.Array) -> jax.Array:
            products = signed_Txn[:, :, None] * x_TxnxK.astype(jnp.int32)
            return eggroll.quantize(jnp.sum(products, axis=0, dtype=jnp.int32), shift)

        # The candidate's input matrix reads what the gate's reads; a bias reads 1 in each member.
        source = {name: name for name in LAYER_MATRICES} | {"candidate_input": "gate_input"}
        both = jnp.full((*credit_Txn.shape, 1), 2, jnp.int32)
        total = jnp.sum(credit_Txn, axis=0, dtype=jnp.int32)[:, None]

        def layer_factors(_: None, layer_inputs: Any) -> Any:
            x, shifts, index, noise = layer_inputs
            made = {name: eggroll.quantize(total, shifts[name]) for name in LAYER_NORMS}
            for name in (*LAYER_MATRICES, *LAYER_BIASES):
                read = x[source[name]] if name in source else both
                made[name] = factor(signed(name, noise, index[name]), read, shifts[name])
            return None, made

        layers = (
            {name: recorded[name] for name in set(source.values())},
            {name: scales[f"shift.{name}"] for name in LAYER},
            {name: which(name) for name in (*LAYER_MATRICES, *LAYER_BIASES)},
            layers_noise,
        )
        _, made = lax.scan(layer_factors, None, layers)
        factors = {name: jnp.swapaxes(value, 0, 1) for name, value in made.items()}
        factors["norm_output"] = eggroll.quantize(total, scales["shift.norm_output"])
        sums = jnp.einsum("rtn,tnk->nrk", head_credit_RxTxn, recorded["head"].astype(jnp.int32))
        factors["head"] = eggroll.quantize(sums, scales["shift.head"])
        n = credit_Txn.shape[1]
        pair = jnp.broadcast_to(jnp.arange(n), inputs_Txn.shape)
        rows = jnp.zeros((n, self.model.vocabulary), jnp.int32)
        rows = rows.at[pair, inputs_Txn].add(signed("embedding", noise, which("embedding")))
        factors["embedding"] = eggroll.quantize(rows, scales["shift.embedding"])
        return {f"factor.{name}": value for name, value in factors.items()}

    def _activation_votes(
        self, parameters: Tree, noise: tuple[Tree, Tree], outcome: Tree
    ) -> tuple[Votes, Statistics]:
        votes: Votes = {}
        statistics: Statistics = {"saturated": jnp.int64(0)}
        for name in TRAINED:
            b = outcome[f"factor.{name}"]
            if name == "head":
                b = b.reshape(-1, b.shape[-1])
            square = jnp.sum(b.astype(jnp.int32) ** 2, axis=-1, dtype=jnp.int32)
            statistics[f"square.{name}"] = jnp.sum(square.astype(jnp.int64), axis=0)
            full = (jnp.abs(b) == fixedpoint.WEIGHT_LIMIT).astype(jnp.int32)
            statistics["saturated"] += jnp.sum(full.astype(jnp.int64))
            source = name if name in eggroll.NORMS else f"a.{eggroll.SITE_OF[name]}"
            if name in LAYER:
                factors = noise[0][source], b
                made = lax.map(lambda ab: _outer(*ab), [jnp.swapaxes(x, 0, 1) for x in factors])
                votes[name] = made.reshape(parameters[name].shape)
            else:
                a = noise[1][source]
                made_one = _outer(a.reshape(-1, a.shape[-1]), b)
                votes[name] = (made_one.T if name == "embedding" else made_one).reshape(
                    parameters[name].shape
                )
        return votes, statistics

    # --- estimator `weight` ---------------------------------------------------------------------------

    def _weight_votes(
        self, noise: tuple[Tree, Tree], q: jax.Array, seen_PxV: jax.Array
    ) -> tuple[Votes, Statistics]:
        votes = {name: self._weight_vote(name, noise, q, seen_PxV) for name in TRAINED}
        wide = q.astype(jnp.int64)
        return votes, {
            "square": jnp.sum(wide * wide),
            "saturated": jnp.sum((jnp.abs(wide) == 3 * 32).astype(jnp.int64)),
        }

    def _weight_vote(self, name: str, noise: tuple[Tree, Tree], q: jax.Array, seen_PxV: Any) -> jax.Array:
        """The votes of one parameter. seen: int8, of the embedding alone."""

        def vote(tree: Tree) -> jax.Array:
            if name in eggroll.NORMS or name in LAYER_BIASES:
                return _outer(eggroll.weigh(self.config, q, tree[name]), jnp.ones((q.shape[0], 1), jnp.int8))
            a, b = eggroll.weigh(self.config, q, tree[f"a.{name}"]), tree[f"b.{name}"]
            if name == "embedding":
                a = a * seen_PxV[:, None, :]
            return _outer(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

        if name in LAYER:
            own = {n: jnp.swapaxes(x, 0, 1) for n, x in noise[0].items() if n.split(".")[-1] == name}
            made = lax.map(vote, own)
        else:
            made = vote(noise[1])
        return made.reshape(shapes(self.model)[name])

    def fitness_votes(self, key: Any, fitness_P: Any, first_pair: int = 0) -> Votes:
        """See `Engine.fitness_votes`."""
        total: Votes | None = None
        for start in range(0, len(fitness_P), SLICE_PAIRS):
            part = self._fitness_votes(
                key, fitness_P[start : start + SLICE_PAIRS], np.int32(first_pair + start)
            )
            total = part if total is None else {name: total[name] + part[name] for name in total}
        assert total is not None
        return total

    def embedding_votes(self, key: Any, fitness_P: Any, tokens_PxT1: Any, first_pair: int = 0) -> Any:
        """See `Engine.embedding_votes`."""
        total: Any = 0
        for start in range(0, len(fitness_P), SLICE_PAIRS):
            rows = np.s_[start : start + SLICE_PAIRS]
            part = self._embedding_votes(
                key, fitness_P[rows], tokens_PxT1[rows], np.int32(first_pair + start)
            )
            total = part if start == 0 else total + part
        return total

    def _embedding_votes_slice(
        self, key: jax.Array, fitness_P: jax.Array, tokens_PxT1: jax.Array, first_pair: jax.Array
    ) -> jax.Array:
        rows_P = jnp.arange(fitness_P.shape[0], dtype=jnp.int32) + first_pair
        noise = _Weight(self.config, self.model).noise(jnp.asarray(key), rows_P, 0)
        return self._weight_vote("embedding", noise, fitness_P, _seen(self.model, tokens_PxT1))

    def _fitness_votes_slice(self, key: jax.Array, fitness_P: jax.Array, first_pair: jax.Array) -> Votes:
        rows_P = jnp.arange(fitness_P.shape[0], dtype=jnp.int32) + first_pair
        noise = _Weight(self.config, self.model).noise(jnp.asarray(key), rows_P, 0)
        names = [name for name in TRAINED if name != "embedding"]
        return {name: self._weight_vote(name, noise, fitness_P, None) for name in names}


def _slopes(logits: jax.Array, targets: jax.Array, directions_nxRxV: jax.Array) -> jax.Array:
    """The slopes of scores: int32 [R, T, 2, n] from logits [T, 2, n, V] and targets [T, 2, n]."""
    return fixedpoint.log_likelihood_slopes(logits, targets, list(jnp.swapaxes(directions_nxRxV, 0, 1)))


def _slopes_on_cpu(logits: jax.Array, targets: jax.Array, directions_nxRxV: jax.Array) -> jax.Array:
    """The same, the sums as a matmul: on a CPU each sum of its own would make the softmax's terms again.

    Two halves of the terms, 12 and 13 bits, keep the sums over 2**16 of them inside 32 bits.
    """
    terms, _ = fixedpoint.exp2_terms(logits)
    n, _, vocabulary = directions_nxRxV.shape
    signs = jnp.concatenate([jnp.ones((n, 1, vocabulary), jnp.int8), directions_nxRxV], axis=1)
    halves = jnp.stack([terms & 0xFFF, terms >> 12])
    contract, batch = ((4,), (2,)), ((3,), (0,))
    sums = lax.dot_general(halves, signs.astype(jnp.int32), (contract, batch)).astype(jnp.int64)
    total, *along = jnp.moveaxis(sums[:, 0] + (sums[:, 1] << 12), (0, 3), (3, 0))
    targets_nxTx2 = jnp.moveaxis(targets, 2, 0)
    own = jnp.take_along_axis(directions_nxRxV[:, None, None], targets_nxTx2[..., None, None], axis=-1)[
        ..., 0
    ]
    return fixedpoint.slopes(jnp.moveaxis(own, (0, 3), (3, 0)), jnp.stack(along), total)


def _outer(a_PxM: jax.Array, b_PxK: jax.Array) -> jax.Array:
    """The sum over pairs of A B^T: int32 [M, K]."""
    return _dot(a_PxM.T, b_PxK.T)


def _where(exists_P: jax.Array, x: jax.Array) -> jax.Array:
    """x [P, ...], and 0 where a pair does not exist."""
    return jnp.where(exists_P.reshape(-1, *([1] * (x.ndim - 1))), x, 0).astype(x.dtype)


def _seen(model: ModelConfig, tokens_PxT1: jax.Array) -> jax.Array:
    """1 where a pair's inputs contain a token: int8 [P, V]."""
    pairs = tokens_PxT1.shape[0]
    inputs = tokens_PxT1[:, :-1]
    pair = jnp.broadcast_to(jnp.arange(pairs)[:, None], inputs.shape)
    return jnp.zeros((pairs, model.vocabulary), jnp.int8).at[pair, inputs].set(1)
