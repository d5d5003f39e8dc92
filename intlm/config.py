"""Configuration of the model and of the optimiser: frozen, validated, with the overflow bounds.

Every number is an integer. `__post_init__` refuses what cannot run exactly: an accumulator that could pass
31 bits is an error here, not a surprise later.
"""

from dataclasses import dataclass

from intlm import fixedpoint
from intlm.errors import InputError, shown, unknown

ESTIMATORS = ("activation", "weight")
NOISES = ("rademacher", "gaussian")
FITNESSES = ("graded", "sign")
UPDATES = ("linear", "threshold")

ACCUMULATOR_LIMIT = (1 << 31) - 1
CREDIT_LIMIT = 512
"""A token's credit is clipped to +-512 (2 bits of log-likelihood in 1/256 bit)."""

STEP_SIZE_LIMIT = 1 << 12
"""No step size is larger: 16 int8 steps for a vote of one standard deviation."""

FITNESS_UNIT = 32
"""A graded fitness of 32 is one mean |d|; it is clipped at three."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and activations of an EGG model."""

    width: int = 64
    """Width D of the residual stream and the recurrent state; a multiple of 64."""
    layers: int = 1
    """Number of layers L."""
    vocabulary: int = 256
    """Number of tokens V; set by the tokenizer."""
    gate: str = "identity"
    """Activation of the gate."""
    candidate: str = "identity"
    """Activation of the candidate state."""
    mlp: str = "relu2"
    """Activation of the MLP's hidden layer."""

    def __post_init__(self) -> None:
        """Raise InputError for a shape or an activation that no engine computes exactly."""
        if self.width < 64 or self.width % 64 or self.width > 8192:
            raise InputError(f"width={shown(self.width)}: must be a multiple of 64, from 64 to 8192")
        _within("layers", self.layers, 1, 256)
        _within("vocabulary", self.vocabulary, 2, 1 << 16)
        for site in ("gate", "candidate", "mlp"):
            if getattr(self, site) not in fixedpoint.ACTIVATIONS:
                raise unknown(f"{site} (activation)", getattr(self, site), fixedpoint.ACTIVATIONS)

    @property
    def weights(self) -> int:
        """The number of trained weights."""
        layer = 12 * self.width**2 + 4 * self.width
        return 2 * self.vocabulary * self.width + self.layers * layer + self.width


@dataclass(frozen=True)
class EggrollConfig:
    """The evolution strategy: population, perturbations, fitness, update."""

    estimator: str = "activation"
    """`activation` (per-token signs on the units' sums) or `weight` (EGGROLL as published)."""
    population: int = 1024
    """Members evaluated a step; antithetic pairs, so an even number."""
    segment: int = 32
    """Tokens T that every member reads a step."""
    pairs_per_lane: int = 1
    """Antithetic pairs that read the same lane of text."""
    rank: int = 1
    """Rank of each pair's perturbation of a matrix (estimator `weight`)."""
    rank_head: int = 4
    """Directions of the logits along which each pair measures its scores' slope (estimator `activation`)."""
    noise: str = "rademacher"
    """`rademacher` (-1 or +1) or `gaussian` (rounded, Q4; estimator `weight`)."""
    fitness: str = "graded"
    """`graded` (difference over its mean magnitude, clipped at 3) or `sign` (estimator `weight`)."""
    update: str = "linear"
    """`linear` (masters move by votes) or `threshold` (a weight moves by 1 where votes are large)."""
    step_size: int = 0
    """First step size in 1/256 of an int8 weight step, for a vote of one standard deviation; 0 chooses it by
    the length of the run, the population, the segment and the width."""
    step_head: int = 2
    """The head's step size, as a multiple of `step_size`."""
    step_embedding: int = 3
    """The embedding's step size, as a multiple of `step_size`."""
    step_norm: int = 1
    """The norm weights' step size, as a multiple of `step_size`."""
    whitening: int = 1
    """1: votes of matrices are multiplied by the inverse of their inputs' covariance (estimator `activation`); 0:
    they are taken as they are."""
    alpha: int = 3277
    """First fraction of the weights that the threshold update moves, in 1/65536."""
    horizon: int = 1
    """k: a token's reward to go keeps 1 - 2**-k of the next token's (estimator `activation`); 0 keeps none."""
    horizon_recurrent: int = 1
    """k of the recurrent matrices."""
    sigma_weight: int = 0
    """Perturbation of a weight: 2**this int8 steps (estimator `weight`)."""
    sigma_norm: int = 0
    """Perturbation of a norm weight or a bias: 2**this int8 steps."""
    sigma_embedding: int = 0
    """Perturbation of the embedding's output: 2**this int8 steps (estimator `activation`)."""
    sigma_gate: int = 4
    """Perturbation of the gate's sum: 2**this steps of the gate."""
    sigma_candidate: int = 3
    """Perturbation of the candidate's sum: 2**this steps of the candidate."""
    sigma_mlp: int = 2
    """Perturbation of the MLP's hidden and output sums: 2**this steps of their int8 outputs."""
    seed: int = 0
    """Seed of initialisation, noise and the order of the text."""

    def __post_init__(self) -> None:
        """Raise InputError for values out of range and for combinations that have no meaning."""
        _one_of("estimator", self.estimator, ESTIMATORS)
        _one_of("noise", self.noise, NOISES)
        _one_of("fitness", self.fitness, FITNESSES)
        _one_of("update", self.update, UPDATES)
        if self.population < 2 or self.population % 2 or self.population > 1 << 24:
            raise InputError(
                f"population={shown(self.population)}: must be an even number from 2 to {1 << 24} "
                "(antithetic pairs of members)"
            )
        if self.pairs_per_lane < 1 or self.pairs % self.pairs_per_lane:
            raise InputError(
                f"pairs_per_lane={shown(self.pairs_per_lane)}: must divide the {self.pairs} pairs of the "
                "population"
            )
        _within("segment", self.segment, 1, 4096)
        for name in ("rank", "rank_head"):
            _within(name, getattr(self, name), 1, 16)
        _within("step_size", self.step_size, 0, STEP_SIZE_LIMIT)
        for name in ("step_head", "step_embedding", "step_norm"):
            _within(name, getattr(self, name), 0, 64)
        _within("whitening", self.whitening, 0, 1)
        _within("alpha", self.alpha, 0, 1 << 16)
        for name in ("horizon", "horizon_recurrent"):
            _within(name, getattr(self, name), 0, 6)
        for name in self.__dataclass_fields__:
            if name.startswith("sigma_"):
                _within(name, getattr(self, name), 0, 5)
        _within("seed", self.seed, 0, (1 << 64) - 1)
        if self.estimator == "activation":
            for name, only in (("noise", "rademacher"), ("rank", 1), ("fitness", "graded")):
                if getattr(self, name) != only:
                    raise InputError(
                        f"{name}={getattr(self, name)}: estimator=activation takes {name}={only} alone; "
                        "set estimator=weight to vary it"
                    )

    @property
    def pairs(self) -> int:
        """Antithetic pairs in the population."""
        return self.population // 2

    @property
    def whitens(self) -> bool:
        """Whether votes are whitened: under `weight` their noise is white by itself."""
        return self.estimator == "activation" and self.whitening == 1

    @property
    def lanes(self) -> int:
        """Lanes of text that the population reads."""
        return self.pairs // self.pairs_per_lane


def check_bounds(model: ModelConfig, eggroll: EggrollConfig) -> None:
    """Raise InputError where an int32 accumulator of this configuration could overflow.

    The bounds are derived in docs/numerics.md; each line here is one of them.
    """
    limit = fixedpoint.WEIGHT_LIMIT
    square = limit * limit
    widest = 4 * model.width
    recurrent = 2 * square * model.width + (limit << fixedpoint.matmul_shift(model.width))
    if eggroll.estimator == "activation":
        # One site's perturbation: 2**sigma steps of the output after the widest shift.
        site = 1 << (fixedpoint.matmul_shift(widest) + 5)
        sums = {
            "matmul over the MLP (4 * width)": square * widest + site,
            "gate and candidate (two matmuls of width)": recurrent + site,
            # Rounding B adds half of 2**shift, and the shift is at most 30.
            "credit times inputs over a segment": eggroll.segment * reward_limit(eggroll) * 2 * limit
            + (1 << 29),
            "votes over the population": eggroll.pairs * eggroll.rank_head * limit,
        }
    else:
        unit = 1 if eggroll.noise == "rademacher" else fixedpoint.GAUSSIAN_LIMIT

        def perturbation(width: int) -> int:
            projection = limit * unit * width
            if eggroll.noise == "gaussian":
                return eggroll.rank * ((projection >> 4) + 1) * unit << eggroll.sigma_weight
            return eggroll.rank * projection << eggroll.sigma_weight

        sums = {
            "matmul over the MLP (4 * width), perturbed": square * widest + perturbation(widest),
            "gate and candidate, perturbed": recurrent + 2 * perturbation(model.width),
            "votes over the population": eggroll.pairs * eggroll.rank * limit * unit,
            "score differences over a segment": eggroll.segment * 16 * 1024,
        }
    for what, bound in sums.items():
        if bound > ACCUMULATOR_LIMIT:
            raise InputError(
                f"this configuration can overflow 32 bits: {what} can reach {bound}, the limit is "
                f"{ACCUMULATOR_LIMIT} (lower width, segment, population, rank, horizon or sigma_weight)"
            )


def reward_limit(eggroll: EggrollConfig) -> int:
    """The largest magnitude of a token's reward to go: its fixed point is below (credit + 1) * 2**k."""
    return (CREDIT_LIMIT + 1) << max(eggroll.horizon, eggroll.horizon_recurrent)


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{name}={shown(value)}: must be from {low} to {high}")


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise unknown(name, value, accepted)
