"""The definition, in NumPy: token by token, layer by layer, one loop for each idea. Slow and obvious.

Every other engine must give the same bits. Members are laid out [2, N, ...]: the + and the - member of each
antithetic pair.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from intlm import eggroll, fixedpoint
from intlm.config import EggrollConfig, ModelConfig, check_bounds
from intlm.eggroll import Scales, Statistics, Votes
from intlm.fixedpoint import activate, gated, matmul_shift, normalize, saturate
from intlm.model import LAYER_BIASES, LAYER_MATRICES, LAYER_NORMS, SEPARATOR, TRAINED, Parameters, shapes
from intlm.whitening import Whitening

Perturb = Callable[[str, int, np.ndarray], np.ndarray | int]
"""(parameter, layer, its int8 input [..., K]) -> what is added to its int32 accumulator [..., M]."""

_SIGNS = np.array([1, -1], np.int32)[:, None, None]


def matmul(x: np.ndarray, weight_MxK: np.ndarray) -> np.ndarray:
    """x W^T in int32; x: int8 [..., K]."""
    return np.matmul(x.astype(np.int32), weight_MxK.astype(np.int32).T)


def token_step(
    config: ModelConfig, parameters: Parameters, tokens: np.ndarray, state: np.ndarray, perturb: Perturb
) -> tuple[np.ndarray, np.ndarray]:
    """One token through the model: logits int32 [..., V] and the new state int8 [..., L, D].

    tokens: int32 [...]; state: int8 [..., L, D]. `perturb` is called once for each parameter.
    """
    shift, shift_wide = matmul_shift(config.width), matmul_shift(4 * config.width)

    def product(name: str, layer: int, x: np.ndarray) -> np.ndarray:
        return matmul(x, parameters[name][layer]) + perturb(name, layer, x)

    def norm(name: str, layer: int, x: np.ndarray) -> np.ndarray:
        weight = parameters[name][layer] if name in LAYER_NORMS else parameters[name]
        return normalize(x, saturate(weight + perturb(name, layer, x)))

    def bias(name: str, layer: int, x: np.ndarray) -> np.ndarray:
        value = saturate(parameters[name][layer] + perturb(name, layer, x))
        return value.astype(np.int32) << shift

    state = np.where((tokens == SEPARATOR)[..., None, None], np.int8(0), state)
    after = np.empty_like(state)
    x = saturate(parameters["embedding"][tokens] + perturb("embedding", 0, tokens))
    for layer in range(config.layers):
        h = state[..., layer, :]
        u = norm("norm_recurrent", layer, x)
        gate_sum = product("gate_input", layer, u) + product("gate_recurrent", layer, h)
        gate_sum = gate_sum + bias("gate_bias", layer, u)
        gate = activate(saturate(gate_sum >> shift), config.gate)
        remembered = gated(gate, h).astype(np.int8)
        candidate_sum = product("candidate_input", layer, u)
        candidate_sum = candidate_sum + product("candidate_recurrent", layer, remembered)
        candidate_sum = candidate_sum + bias("candidate_bias", layer, u)
        candidate = activate(saturate(candidate_sum >> shift), config.candidate)
        h = (h + gated(gate, candidate.astype(np.int32) - h)).astype(np.int8)
        after[..., layer, :] = h
        x = saturate(x.astype(np.int32) + h)
        v = norm("norm_mlp", layer, x)
        hidden = activate(saturate(product("mlp_in", layer, v) >> shift), config.mlp)
        x = saturate(x + (saturate(product("mlp_out", layer, hidden) >> shift_wide)).astype(np.int32))
    y = norm("norm_output", 0, x)
    head_sum: np.ndarray = matmul(y, parameters["head"]) + perturb("head", 0, y)
    logits = (head_sum >> (shift - 4)) + parameters["head_bias"]
    return np.clip(logits, -fixedpoint.LOGIT_LIMIT, fixedpoint.LOGIT_LIMIT), after


class ReferenceEngine:
    """The engine that defines the result."""

    name = "reference"

    def __init__(self, model: ModelConfig, config: EggrollConfig, chunk: int = 0):
        """Check the bounds of the configuration; `chunk` pairs are evaluated at once (0: all)."""
        check_bounds(model, config)
        self.model, self.config, self.chunk = model, config, chunk

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is."""
        return function

    def advance(
        self, *values: Any
    ) -> tuple[dict[str, np.ndarray], Scales, Whitening, Parameters, np.ndarray]:
        """See `Engine.advance`."""
        return eggroll.advance(self.config, self.model, *values)

    def forward(
        self, parameters: Parameters, tokens_NxT: np.ndarray, state_NxLxD: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The unperturbed model; see `Engine.forward`."""
        tokens, state, logits = np.asarray(tokens_NxT), np.asarray(state_NxLxD), []
        for t in range(tokens.shape[1]):
            step, state = token_step(self.model, parameters, tokens[:, t], state, lambda *_: 0)
            logits.append(step.astype(np.int16))
        return np.stack(logits, axis=1), state

    def score(
        self, parameters: Parameters, tokens_NxT1: np.ndarray, state_NxLxD: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.score`."""
        tokens = np.asarray(tokens_NxT1)
        logits, state = self.forward(parameters, tokens[:, :-1], state_NxLxD)
        return np.asarray(fixedpoint.log_likelihood(logits, tokens[:, 1:])), state

    def population_step(
        self,
        parameters: Parameters,
        key: np.ndarray,
        scales: Scales,
        tokens_PxT1: np.ndarray,
        state_PxLxD: np.ndarray,
        first_pair: int = 0,
        votes: bool = True,
    ) -> tuple[Votes, Statistics, np.ndarray]:
        """See `Engine.population_step`."""
        pairs, state = tokens_PxT1.shape[0], np.array(state_PxLxD)
        chunk = self.chunk or pairs
        evaluate = _activation_slice if self.config.estimator == "activation" else _weight_slice
        total: Votes = {name: np.zeros(parameters[name].shape, np.int32) for name in TRAINED}
        statistics: Statistics = {}
        for start in range(0, pairs, chunk):
            rows = np.arange(start, min(start + chunk, pairs))
            part, counts, state[rows] = evaluate(
                self.model, self.config, parameters, key, scales, tokens_PxT1[rows], state[rows],
                rows + first_pair,
            )  # fmt: skip
            total = {name: total[name] + part[name] for name in total}
            statistics = eggroll.join(statistics, counts) if statistics else counts
        if not votes:
            return {}, eggroll.of_scores(statistics), state
        return total, statistics, state

    def embedding_votes(
        self, key: np.ndarray, fitness_P: np.ndarray, tokens_PxT1: np.ndarray, first_pair: int = 0
    ) -> np.ndarray:
        """See `Engine.embedding_votes`."""
        noise = _weight_noise(self.model, self.config, key, np.arange(len(fitness_P)) + first_pair)
        return _weight_votes(self.model, self.config, fitness_P, *noise, _seen(self.model, tokens_PxT1))[
            "embedding"
        ]

    def fitness_votes(self, key: np.ndarray, fitness_P: np.ndarray, first_pair: int = 0) -> Votes:
        """See `Engine.fitness_votes`."""
        rows = np.arange(len(fitness_P)) + first_pair
        noise = _weight_noise(self.model, self.config, key, rows)
        unseen = np.zeros((len(rows), self.model.vocabulary), np.int32)
        votes = _weight_votes(self.model, self.config, fitness_P, *noise, unseen)
        del votes["embedding"]
        return votes


def _pair_members(x_N: np.ndarray) -> np.ndarray:
    """The same start for both members of each pair: [2, N, ...]."""
    return np.stack([x_N, x_N])


def _average(state_2xN: np.ndarray) -> np.ndarray:
    """A pair goes on from the mean of its two states, rounded down."""
    return ((state_2xN[0].astype(np.int32) + state_2xN[1]) >> 1).astype(np.int8)


def _run(
    model: ModelConfig,
    parameters: Parameters,
    tokens_NxT1: np.ndarray,
    state_NxLxD: np.ndarray,
    perturb: Callable[[int], Perturb],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both members of each pair over the segment: logits int32 [T, 2, N, V], targets [T, 2, N], and states."""
    state = _pair_members(state_NxLxD)
    logits = []
    for t in range(tokens_NxT1.shape[1] - 1):
        tokens = _pair_members(tokens_NxT1[:, t])
        of_token, state = token_step(model, parameters, tokens, state, perturb(t))
        logits.append(of_token)
    targets = np.stack([tokens_NxT1[:, 1:].T] * 2, axis=1)
    return np.stack(logits), targets, _average(state)


def _score_statistics(scores_Tx2xN: np.ndarray, difference: np.ndarray) -> Statistics:
    return {
        "score": np.sum(scores_Tx2xN, dtype=np.int64),
        "difference": np.sum(np.abs(difference), dtype=np.int64),
        "ties": np.sum(difference == 0, dtype=np.int64),
    }


def _vector_noise(
    model: ModelConfig, config: EggrollConfig, key: np.ndarray, rows_N: np.ndarray, names: tuple[str, ...]
) -> dict[tuple[str, int], np.ndarray]:
    """Noise of the vectors: int8 [N, D] for each (name, layer)."""
    return {
        (name, layer): eggroll.draw(config, key, eggroll.output_stream(name), layer, rows_N, model.width)
        for name in names
        for layer in range(1 if name == "norm_output" else model.layers)
    }


def _weight_slice(
    model: ModelConfig,
    config: EggrollConfig,
    parameters: Parameters,
    key: np.ndarray,
    scales: Scales,
    tokens_NxT1: np.ndarray,
    state_NxLxD: np.ndarray,
    rows_N: np.ndarray,
) -> tuple[Votes, Statistics, np.ndarray]:
    """EGGROLL as published: every pair has its own low-rank perturbation of every parameter."""
    rank = config.rank
    vectors, outputs, inputs = _weight_noise(model, config, key, rows_N)

    def perturb(name: str, layer: int, x: np.ndarray) -> np.ndarray:
        if (name, layer) in vectors:
            return _SIGNS * eggroll.vector_perturbation(config, vectors[name, layer])
        a, b = outputs[name, layer], inputs[name, layer]
        total = np.int32(0)
        for r in range(rank):
            if name == "embedding":
                row = np.take_along_axis(a[:, r], x[0][:, None], axis=1)
                total = total + eggroll.embedding_perturbation(config, row, b[:, r])
            else:
                projection = np.sum(x.astype(np.int32) * b[:, r], axis=-1, dtype=np.int32, keepdims=True)
                total = total + eggroll.matrix_perturbation(config, projection, a[:, r])
        return _SIGNS * total

    logits, targets, state = _run(model, parameters, tokens_NxT1, state_NxLxD, lambda t: perturb)
    scores = fixedpoint.log_likelihood(logits, targets)
    difference = np.asarray(np.sum(scores[:, 0] - scores[:, 1], axis=0, dtype=np.int32))
    q = eggroll.fitness(config, difference, scales["difference"])

    seen = _seen(model, tokens_NxT1)
    votes = _weight_votes(model, config, q, vectors, outputs, inputs, seen)
    statistics = _score_statistics(scores, difference) | {
        "square": np.sum(q.astype(np.int64) ** 2),
        "saturated": np.sum(np.abs(q) == 3 * 32, dtype=np.int64),
        "seen": np.sum(seen, dtype=np.int64),
        "fitness": q,
    }
    return votes, statistics, state


def _seen(model: ModelConfig, tokens_NxT1: np.ndarray) -> np.ndarray:
    """1 where a pair's inputs contain a token: int32 [N, V]."""
    pairs = len(tokens_NxT1)
    seen = np.zeros((pairs, model.vocabulary), np.int32)
    for t in range(tokens_NxT1.shape[1] - 1):
        seen[np.arange(pairs), tokens_NxT1[:, t]] = 1
    return seen


WeightNoise = tuple[
    dict[tuple[str, int], np.ndarray], dict[tuple[str, int], np.ndarray], dict[tuple[str, int], np.ndarray]
]
"""By (name, layer): the noise of vectors [N, D]; A [N, r, M] and B [N, r, K] of matrices."""


def _weight_noise(
    model: ModelConfig, config: EggrollConfig, key: np.ndarray, rows_N: np.ndarray
) -> WeightNoise:
    pairs, rank, sizes = len(rows_N), config.rank, shapes(model)
    vectors = _vector_noise(model, config, key, rows_N, (*eggroll.NORMS, *LAYER_BIASES))
    outputs, inputs = {}, {}
    for name in ("embedding", "head", *LAYER_MATRICES):
        for layer in range(model.layers if name in LAYER_MATRICES else 1):
            m, k = sizes[name][-2:]
            a = eggroll.draw(config, key, eggroll.output_stream(name), layer, rows_N, rank * m)
            b = eggroll.draw(config, key, eggroll.input_stream(name), layer, rows_N, rank * k)
            outputs[name, layer] = a.reshape(pairs, rank, m)
            inputs[name, layer] = b.reshape(pairs, rank, k)
    return vectors, outputs, inputs


def _weight_votes(
    model: ModelConfig,
    config: EggrollConfig,
    fitness_N: np.ndarray,
    vectors: dict[tuple[str, int], np.ndarray],
    outputs: dict[tuple[str, int], np.ndarray],
    inputs: dict[tuple[str, int], np.ndarray],
    seen_NxV: np.ndarray,
) -> Votes:
    votes: Votes = {name: np.zeros(shape, np.int32) for name, shape in shapes(model).items()}
    for (name, layer), noise_NxD in vectors.items():
        where = () if name == "norm_output" else layer
        votes[name][where] = np.sum(eggroll.weigh(config, fitness_N, noise_NxD), axis=0, dtype=np.int32)
    for name, layer in outputs:
        weighted = eggroll.weigh(config, fitness_N, outputs[name, layer]).astype(np.int32)
        if name == "embedding":
            # Only a pair whose segment contains a token can say anything about the token's row.
            weighted = weighted * seen_NxV[:, None, :]
        part = np.einsum("nrm,nrk->mk", weighted, inputs[name, layer].astype(np.int32))
        votes[name][layer if name in LAYER_MATRICES else ()] = part
    return votes


def _activation_slice(
    model: ModelConfig,
    config: EggrollConfig,
    parameters: Parameters,
    key: np.ndarray,
    scales: Scales,
    tokens_NxT1: np.ndarray,
    state_NxLxD: np.ndarray,
    rows_N: np.ndarray,
) -> tuple[Votes, Statistics, np.ndarray]:
    """Per-token signs on the sites' sums, credited by the reward to go; the head by the score's slope."""
    pairs, segment = len(rows_N), tokens_NxT1.shape[1] - 1
    directions, signs = {}, {}
    for site in eggroll.PERTURBED_SITES:
        for layer in range(1 if site == "embedding" else model.layers):
            width = 4 * model.width if site == "mlp_in" else model.width
            draw = eggroll.draw
            directions[site, layer] = draw(config, key, eggroll.direction_stream(site), layer, rows_N, width)
            signs[site, layer] = draw(config, key, eggroll.sign_stream(site), layer, rows_N, segment)
    norms = _vector_noise(model, config, key, rows_N, eggroll.NORMS)
    inputs: dict[tuple[str, int], list[np.ndarray]] = {}

    def perturb_at(t: int) -> Perturb:
        def perturb(name: str, layer: int, x: np.ndarray) -> np.ndarray | int:
            if name in eggroll.NORMS:
                return _SIGNS * eggroll.vector_perturbation(config, norms[name, layer])
            if name != "embedding":
                # A bias is a weight on an input of 1 for each member.
                pair_sum = (
                    np.full((pairs, 1), 2, np.int32) if name in LAYER_BIASES else x[0].astype(np.int32) + x[1]
                )
                inputs.setdefault((name, layer), []).append(pair_sum)
            if name in ("gate_recurrent", "candidate_recurrent", *LAYER_BIASES, "head"):
                return 0  # its site is perturbed once, with the input matrix; or not at all
            site = eggroll.SITE_OF[name]
            signed = directions[site, layer].astype(np.int32) * signs[site, layer][:, t, None]
            return (_SIGNS * signed) << eggroll.site_shift(config, site, model.width)

        return perturb

    logits, targets, state = _run(model, parameters, tokens_NxT1, state_NxLxD, perturb_at)
    scores = fixedpoint.log_likelihood(logits, targets)
    credit = eggroll.credit(scores)
    head_stream = eggroll.direction_stream("head")
    head_directions = [
        eggroll.draw(config, key, head_stream + r, 0, rows_N, model.vocabulary)
        for r in range(config.rank_head)
    ]
    total = np.asarray(np.sum(credit, axis=0, dtype=np.int32))

    def rewards(horizon: int) -> np.ndarray:
        """R_t of every pair: int32 [T, N]."""
        reward = np.zeros((segment + 1, pairs), np.int32)
        for t in range(segment - 1, -1, -1):
            reward[t] = eggroll.discount(credit[t], reward[t + 1], horizon)
        return reward[:-1]

    seen = np.zeros((pairs, model.vocabulary), np.int32)
    votes: Votes = {name: np.zeros(parameters[name].shape, np.int32) for name in TRAINED}
    squares: dict[str, Any] = {}
    saturated = np.int64(0)
    for name in TRAINED:
        layered = parameters[name].ndim > 2 or (parameters[name].ndim == 2 and name in _LAYERED)
        squares[name] = np.zeros(model.layers if layered else (), np.int64)
        for layer in range(model.layers if layered else 1):
            where = layer if layered else ()
            if name in eggroll.NORMS:
                left = norms[name, layer]
                accumulator = total[:, None]
            elif name == "head":
                left = np.concatenate(head_directions)
                slopes = fixedpoint.log_likelihood_slopes(logits, targets, head_directions)
                credits_RxTxN = eggroll.head_credit(slopes)
                sums = np.zeros((config.rank_head, pairs, model.width), np.int32)
                for t in range(segment):
                    sums += credits_RxTxN[:, t, :, None] * inputs[name, layer][t]
                accumulator = sums.reshape(-1, model.width)
            else:
                site = eggroll.SITE_OF[name]
                left = directions[site, layer]
                reward = rewards(int(eggroll.horizons(config, model, name)[where]))
                signed_TxN = reward * signs[site, layer].T
                if name == "embedding":
                    accumulator = np.zeros((pairs, model.vocabulary), np.int32)
                    for t in range(segment):
                        accumulator[np.arange(pairs), tokens_NxT1[:, t]] += signed_TxN[t]
                        seen[np.arange(pairs), tokens_NxT1[:, t]] = 1
                else:
                    accumulator = np.zeros(inputs[name, layer][0].shape, np.int32)
                    for t in range(segment):
                        accumulator += signed_TxN[t][:, None] * inputs[name, layer][t]
            b = eggroll.quantize(accumulator, scales[f"shift.{name}"][where])
            squares[name][where] = np.sum(b.astype(np.int64) ** 2)
            saturated += np.sum(np.abs(b) == fixedpoint.WEIGHT_LIMIT, dtype=np.int64)
            part = np.matmul(left.astype(np.int32).T, b.astype(np.int32))
            if name == "embedding":
                part = part.T
            votes[name][where] = part.reshape(votes[name][where].shape)
    statistics = _score_statistics(scores, credit) | {
        "saturated": saturated,
        "seen": np.sum(seen, dtype=np.int64),
    }
    return votes, statistics | {f"square.{name}": value for name, value in squares.items()}, state


_LAYERED = (*LAYER_MATRICES, *LAYER_NORMS, *LAYER_BIASES)
