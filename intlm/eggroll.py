"""EGGROLL: sites, noise streams, credit, fitness, scales and the update. What every engine shares.

Sarkar et al., *Evolution Strategies at the Hyperscale*, arXiv 2511.16652, is the estimator `weight`. The
estimator `activation` perturbs the units' sums instead of the weights and credits each token with the
losses that follow it closely; docs/algorithm.md derives both.

The functions on arrays are written once, against the array API that NumPy and JAX share.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from intlm import fixedpoint, noise, whitening
from intlm.config import CREDIT_LIMIT, FITNESS_UNIT, STEP_SIZE_LIMIT, EggrollConfig, ModelConfig
from intlm.fixedpoint import Array, namespace, rounding_shift, saturate
from intlm.model import LAYER, LAYER_MATRICES, LAYER_NORMS, TRAINED, Parameters, parameters
from intlm.whitening import Whitening

Votes = dict[str, Array]
"""int32 by parameter name, of the parameter's shape: the sum over pairs of fitness times direction."""

Statistics = dict[str, Array]
"""int64 sums over the population: slices add up. Keys: `score` (of all members' tokens, 1/256 bit),
`difference` (sum of |d|), `ties` (pairs, or tokens of pairs, with d = 0), `saturated` (factors at +-127),
`seen` (rows of the embedding seen, summed over pairs), and `square` or `square.<parameter>`. Under the estimator
`weight` also `fitness`: int8, q of each pair, of which those of slices stand one after another."""

SCORE_STATISTICS = ("score", "difference", "ties", "fitness")
"""The statistics that members' scores give without votes."""

Scales = dict[str, Array]
"""int32: `difference` (mean |d| of the step before; estimator `weight`) or `shift.<parameter>`."""

NORMS = ("norm_output", *LAYER_NORMS)

SITE_OF = {
    "embedding": "embedding",
    "gate_input": "gate",
    "gate_recurrent": "gate",
    "gate_bias": "gate",
    "candidate_input": "candidate",
    "candidate_recurrent": "candidate",
    "candidate_bias": "candidate",
    "mlp_in": "mlp_in",
    "mlp_out": "mlp_out",
    "head": "head",
}
"""Estimator `activation`: the site whose perturbation trains a parameter. Norm weights have none: they are
perturbed themselves, once a segment."""

PERTURBED_SITES = ("embedding", "gate", "candidate", "mlp_in", "mlp_out")

SITES = (*PERTURBED_SITES, "head")
"""Nothing is added to the head's: what its perturbation does to the loss follows from the logits."""


def join(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of two slices, the pairs of the second after those of the first."""
    together = {name: value + other[name] for name, value in one.items() if name != "fitness"}
    if "fitness" in one:
        xp = namespace(one["fitness"])
        together["fitness"] = xp.concatenate([one["fitness"], other["fitness"]])
    return together


def of_scores(statistics: Statistics) -> Statistics:
    """Those of `SCORE_STATISTICS`."""
    return {name: statistics[name] for name in SCORE_STATISTICS if name in statistics}


# --- noise streams ------------------------------------------------------------------------------------


def step_key(root: Array, step: Array) -> Array:
    """The key (uint32 [2]) of one step: `root` is `noise.seed_key(seed)`, `step` an integer from 0 up."""
    return noise.fold(root, step, 0)


def output_stream(name: str) -> int:
    """The stream of A (one number an output) of a parameter's perturbation, or of a vector's own."""
    return 2 * TRAINED.index(name)


def input_stream(name: str) -> int:
    """The stream of B (one number an input) of a parameter's perturbation."""
    return 2 * TRAINED.index(name) + 1


def direction_stream(site: str) -> int:
    """The stream of A_s (one sign a unit, held for the segment) of a site. The head's directions have this stream
    and those that follow."""
    return 64 + 2 * SITES.index(site)


def sign_stream(site: str) -> int:
    """The stream of the per-token signs of a site."""
    return 65 + 2 * SITES.index(site)


def draw(config: EggrollConfig, key: Array, stream: Array, layer: Array, rows_N: Array, count: int) -> Array:
    """Noise of the configured kind from a stream of a layer (0 for what has none): int8 [N, count].

    key: the step's.
    """
    kind = noise.rademacher if config.noise == "rademacher" else noise.gaussian
    return kind(noise.fold(key, stream, layer), rows_N, count)


# --- perturbations ------------------------------------------------------------------------------------


def vector_perturbation(config: EggrollConfig, a: Array) -> Array:
    """What a vector's noise `a` (int8) adds to the vector, for the + member: int32, same shape."""
    xp = namespace(a)
    wide = a.astype(xp.int32) << config.sigma_norm
    return wide if config.noise == "rademacher" else rounding_shift(wide, 4)


def matrix_perturbation(config: EggrollConfig, projection: Array, a: Array) -> Array:
    """What a pair's rank-1 term adds to an accumulator, for the + member, before the shift.

    projection: x.B, int32 [..., 1]; a: A, int8 [..., M]. Returns int32 [..., M]. Gaussian A and B are Q4, so
    that A.B is Q8 of a weight step; the projection is shifted by 4 first, to stay inside 32 bits.
    """
    xp = namespace(a)
    if config.noise == "rademacher":
        return (projection * a.astype(xp.int32)) << config.sigma_weight
    return rounding_shift((projection >> 4) * a.astype(xp.int32), 4) << config.sigma_weight


def embedding_perturbation(config: EggrollConfig, a: Array, b: Array) -> Array:
    """What a rank-1 term adds to rows of the embedding, for the + member: a [..., 1], b [..., D]; int32."""
    xp = namespace(a)
    product = a.astype(xp.int32) * b.astype(xp.int32)
    if config.noise == "gaussian":
        product = rounding_shift(product, 8)
    return product << config.sigma_weight


def site_shift(config: EggrollConfig, site: str, width: int) -> int:
    """log2 of a site's perturbation in units of its accumulator (the embedding's: of its int8 output).

    width: the width D of the model. One step of the output after the shift is 2**shift of the accumulator.
    """
    if site == "embedding":
        return config.sigma_embedding
    sigma = {
        "gate": config.sigma_gate,
        "candidate": config.sigma_candidate,
        "mlp_in": config.sigma_mlp,
        "mlp_out": config.sigma_mlp,
    }[site]
    return sigma + fixedpoint.matmul_shift(4 * width if site == "mlp_out" else width)


# --- credit (estimator `activation`) --------------------------------------------------------------------


def credit(scores_Tx2xN: Array) -> Array:
    """Each token's clipped score difference, d_t = score+ - score-: int32 [T, N] from int32 [T, 2, N]."""
    xp = namespace(scores_Tx2xN)
    return xp.clip(scores_Tx2xN[:, 0] - scores_Tx2xN[:, 1], -CREDIT_LIMIT, CREDIT_LIMIT)


def head_credit(slopes_RxTx2xN: Array) -> Array:
    """Each token's credit of the head, both members' slopes along each direction of the pair: int32 [R, T, N].

    Within +-512. slopes: int32 [R, T, 2, N], from `fixedpoint.log_likelihood_slopes`.
    """
    return slopes_RxTx2xN[:, :, 0] + slopes_RxTx2xN[:, :, 1]


def discount(credit_N: Array, next_reward_N: Array, horizon: Array) -> Array:
    """One step of the reward to go: R_t = d_t + R_{t+1} - (R_{t+1} >> k). int32; k = 0 keeps d_t alone."""
    return credit_N + next_reward_N - (next_reward_N >> horizon)


def horizons(config: EggrollConfig, model: ModelConfig, name: str) -> np.ndarray:
    """k of a parameter with a site: int32 [L], or [] for the embedding and the head.

    A perturbation behind the last recurrence acts on its own token alone: there k = 0 is exact.
    """
    if name == "head":
        return np.array(0, np.int32)
    if name == "embedding":
        return np.array(config.horizon, np.int32)
    recurrent = name in ("gate_recurrent", "candidate_recurrent")
    k = np.full(model.layers, config.horizon_recurrent if recurrent else config.horizon, np.int32)
    if name in ("mlp_in", "mlp_out"):
        k[-1] = 0
    return k


def quantize(accumulator: Array, shift: Array) -> Array:
    """B of a pair from its int32 accumulator: int8, rounded after a right shift, saturated."""
    return saturate(rounding_shift(accumulator, shift))


# --- fitness (estimator `weight`) ---------------------------------------------------------------------


def fitness(config: EggrollConfig, difference_N: Array, mean: Array) -> Array:
    """Fitness q of each pair from its score difference d over the segment: int8 [N].

    difference_N: int32 [N]; mean: int32, the mean |d| of the step before, at least 1. `sign`: -1, 0 or 1.
    `graded`: d * floor(2**21 / mean) / 2**16, which is 32 d / mean as
    long as the mean is far below 2**21, clipped to +-96.
    """
    xp = namespace(difference_N)
    if config.fitness == "sign":
        return xp.sign(difference_N).astype(xp.int8)
    clipped = xp.clip(difference_N, -3 * mean, 3 * mean)
    # |clipped * (2**21 // mean)| <= 3 * 2**21: inside 32 bits.
    return rounding_shift(clipped * ((FITNESS_UNIT << 16) // mean), 16).astype(xp.int8)


def weigh(config: EggrollConfig, fitness_N: Array, a: Array) -> Array:
    """q A as int8 [N, ...], the left operand of the votes' matmul; a: int8 [N, ...].

    Rademacher and sign fitness need no rounding; graded fitness on Gaussian noise is taken back to Q4.
    """
    xp = namespace(a)
    q = fitness_N.astype(xp.int32).reshape(-1, *([1] * (a.ndim - 1)))
    product = q * a.astype(xp.int32)
    if config.noise == "gaussian" and config.fitness == "graded":
        product = rounding_shift(product, 5)
    return saturate(product)


# --- scales -------------------------------------------------------------------------------------------


def first_scales(config: EggrollConfig, model: ModelConfig) -> Scales:
    """Scales before anything has been measured; a dry evaluation of the first segment replaces them."""
    if config.estimator == "weight":
        return {"difference": np.array(1, np.int32)}
    return {
        f"shift.{name}": np.full(
            (model.layers,) if name in LAYER_MATRICES or name in _LAYERED else (), 10, np.int32
        )
        for name in TRAINED
    }


_LAYERED = (*LAYER_NORMS, "gate_bias", "candidate_bias")


def next_scales(config: EggrollConfig, model: ModelConfig, scales: Scales, statistics: Statistics) -> Scales:
    """The scales that this step's statistics give to the next: mean |d|, or shifts that bring the root mean
    square of each B to 16 to 32 (estimators `weight` and `activation`)."""
    xp = namespace(statistics["score"])
    if config.estimator == "weight":
        mean = statistics["difference"] // config.pairs
        return {"difference": xp.clip(mean, 1, 1 << 28).astype(xp.int32)}
    entries = {name: config.pairs * _inputs(model, name) for name in TRAINED}
    entries["head"] *= config.rank_head
    entries["embedding"] = statistics["seen"]
    square = _rows(xp, model, {name: statistics[f"square.{name}"] for name in TRAINED})
    mean_square = xp.maximum(square // _rows(xp, model, entries), 1).astype(xp.int32)
    # 2**8 to 2**10 is the window of one power of two in B around 24**2 = 576.
    correction = (fixedpoint.floor_log2(mean_square) - 8) >> 1
    shifts = _rows(xp, model, {name: scales[f"shift.{name}"] for name in TRAINED}) + correction
    return {
        f"shift.{name}": row for name, row in _named(TRAINED, xp.clip(shifts, 0, 30).astype(xp.int32)).items()
    }


def _rows(xp: Any, model: ModelConfig, values: dict[str, Any]) -> Array:
    """One row for each parameter, so that an operation is one for all: [parameters, L]."""
    zero = xp.zeros(model.layers, xp.int64)
    return xp.stack([zero + value for value in values.values()])


def _named(names: Iterable[str], rows: Array) -> dict[str, Array]:
    """The inverse of `_rows`."""
    return {name: rows[i] if name in LAYER else rows[i, 0] for i, name in enumerate(names)}


def _inputs(model: ModelConfig, name: str) -> int:
    """Inputs of a parameter's matrix: the length of B. Vectors have one."""
    if name in ("mlp_out",):
        return 4 * model.width
    return model.width if name in LAYER_MATRICES or name == "head" else 1


# --- update -------------------------------------------------------------------------------------------


STEP_SIZE = {"activation": 154, "weight": 127}
"""The step size, in 1/256 of an int8 step, that suits 10 million member-tokens, 32,768 a step, at width 64."""


def first_step_size(config: EggrollConfig, model: ModelConfig, steps: int) -> int:
    """The step size at the start of a run of `steps` steps, in 2**-16 of an int8 weight step.

    Where the configuration leaves it open: proportional to the square root of the member-tokens of a step (the
    signal of a vote), to the fourth root of 64 over the width, and to 10 million over the member-tokens of the
    run, to the power of 3/8 with whitened votes and of 1/4 with others (fitted to runs; docs/experiments.md).
    """
    if config.step_size:
        return config.step_size << 8
    tokens, eighths = config.population * config.segment, 3 if config.whitens else 2
    eighth_power = (STEP_SIZE[config.estimator] << 8) ** 8 * tokens ** (4 - eighths)
    eighth_power = eighth_power * 10 ** (7 * eighths) * 64**2 // (32768**4 * steps**eighths * model.width**2)
    return min(math.isqrt(math.isqrt(math.isqrt(eighth_power))), STEP_SIZE_LIMIT << 8)


def schedule(config: EggrollConfig, model: ModelConfig, step: int, steps: int) -> tuple[int, int]:
    """(step size in 2**-16 of an int8 weight step, threshold quantile in Q8) at a step of a run of `steps`.

    The step size, and the threshold update's alpha, fall linearly to 0 over the run. The update `linear` has no
    quantile: it gets 0.
    """
    left = max(0, steps - step)
    size = first_step_size(config, model, steps) * left // steps
    if config.update == "linear":
        return size, 0
    return size, fixedpoint.normal_tail_quantile(config.alpha * left // steps)


def update(
    config: EggrollConfig,
    model: ModelConfig,
    masters: dict[str, Array],
    votes: Votes,
    statistics: Statistics,
    step_size: Array,
    quantile: Array,
) -> dict[str, Array]:
    """Masters after one step: int16, by name.

    votes: int32, whitened where the configuration says so (see `whitened`); step_size, quantile: int64
    scalars, from `schedule`. `linear`: `master += (votes * m + half) >> 24`, m from `multiples`; `threshold`: a
    weight moves by one int8 step where |votes| passes m. The product stays below 2**63 (docs/numerics.md).
    """
    limit = fixedpoint.MASTER_LIMIT
    rows = multiples(
        config, list(masters), deviations(config, model, masters, statistics), step_size, quantile
    )
    multiple, updated = _named(masters, rows), {}
    for name, master in masters.items():
        xp = namespace(step_size)
        m, wide = multiple[name], votes[name].astype(xp.int64)
        if m.ndim:
            m = m.reshape(-1, *([1] * (master.ndim - 1)))
        if config.update == "threshold":
            delta = xp.where(xp.abs(wide) > m, xp.sign(wide) << fixedpoint.MASTER_FRACTION_BITS, 0)
        else:
            delta = rounding_shift(wide * m, MULTIPLE_FRACTION_BITS)
        updated[name] = xp.clip(master + delta, -limit, limit).astype(xp.int16)
    return updated


MULTIPLE_FRACTION_BITS = 24


def deviations(
    config: EggrollConfig, model: ModelConfig, names: Iterable[str], statistics: Statistics
) -> Array:
    """The standard deviation that each parameter's votes would have if fitness were noise: int64 [names, L], Q8.

    At least 1.0, so that quotients are bounded.
    """
    xp = namespace(next(iter(statistics.values())))
    variance = _rows(xp, model, {name: _variance(config, model, name, statistics) for name in names})
    return xp.maximum(fixedpoint.integer_sqrt(xp.minimum(variance, 1 << 45) << 16), 1 << 8)


def multiples(
    config: EggrollConfig, names: Sequence[str], deviation: Array, step_size: Array, quantile: Array
) -> Array:
    """What votes are multiplied by, in 2**-24 of a master's step (`linear`), or have to pass (`threshold`).

    int64 [names, L]: step size * 2**16 / deviation, or quantile * deviation. deviation: from `deviations`; of
    whitened votes it is 4/5.
    """
    xp = namespace(deviation)
    whitens = xp.asarray([[config.whitens and name in whitening.NAMES] for name in names])
    if config.update == "threshold":
        white = (quantile << (whitening.WHITENED_FRACTION_BITS - 8 + 2)) // 5
        return xp.where(whitens, white, (quantile * deviation) >> 16)
    own = {"head": config.step_head, "embedding": config.step_embedding}
    times = [[own.get(name, config.step_norm if name in NORMS else 1)] for name in names]
    step = xp.asarray(times) * step_size
    return xp.where(whitens, (5 * step) >> 3, (step << MULTIPLE_FRACTION_BITS) // deviation)


def units(deviation: Array) -> Array:
    """What votes are multiplied by to be Q30 of their deviation: int64, as `deviation`, which is Q8."""
    return (1 << (24 + whitening.NORMAL_FRACTION_BITS + 8)) // deviation


def whitened(
    config: EggrollConfig, model: ModelConfig, votes: Votes, statistics: Statistics, known: Whitening
) -> tuple[Votes, Whitening]:
    """Votes as `update` takes them where they are whitened, and the whitening that has seen them."""
    unit = units(deviations(config, model, votes, statistics))
    return whitening.whiten(votes, _named(votes, unit), known)


def advance(
    config: EggrollConfig,
    model_config: ModelConfig,
    masters: dict[str, Array],
    head_bias: Array,
    votes: Votes,
    statistics: Statistics,
    scales: Scales,
    known: Whitening,
    step_size: Array,
    quantile: Array,
    root: Array,
    step: Array,
) -> tuple[dict[str, Array], Scales, Whitening, Parameters, Array]:
    """All that lies between two evaluations.

    Returns the masters, scales and whitening after the step, and the weights and the key that step number `step`
    uses.
    """
    if known:
        votes, known = whitened(config, model_config, votes, statistics, known)
        known = whitening.renewed(known, step)
    updated = update(config, model_config, masters, votes, statistics, step_size, quantile)
    scales = next_scales(config, model_config, scales, statistics)
    return updated, scales, known, parameters(updated, head_bias), step_key(root, step)


def _variance(config: EggrollConfig, model: ModelConfig, name: str, statistics: Statistics) -> Array:
    """The variance of an element of the votes if fitness were pure noise: int64, [L] or []."""
    if config.estimator == "activation":
        square = statistics[f"square.{name}"]
        if name == "embedding":
            # As if every pair had seen the row: rare rows then move less than frequent ones.
            xp = namespace(square)
            return ((square << 8) // xp.maximum(statistics["seen"], 1) * config.pairs) >> 8
        return square // _inputs(model, name)
    square = statistics["square"]
    vector = name in NORMS or name.endswith("bias")
    if not vector:
        square = square * config.rank
    if config.noise == "gaussian":
        square = square << (8 if vector else 16)
        if config.fitness == "graded":
            square = square >> 10
    return square
