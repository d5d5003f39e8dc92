"""The seam between what is evaluated and how: the protocol of an engine, and the choice of one."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from intlm.config import EggrollConfig, ModelConfig
from intlm.eggroll import Scales, Statistics, Votes
from intlm.errors import InputError, unknown
from intlm.fixedpoint import Array
from intlm.model import Parameters
from intlm.whitening import Whitening


class Engine(Protocol):
    """Evaluates a population, or the model itself. Every engine gives the same bits.

    Arrays go in and come out as the engine keeps them (NumPy's or JAX's); both convert with `numpy.asarray`.
    """

    name: str

    def population_step(
        self,
        parameters: Parameters,
        key: Array,
        scales: Scales,
        tokens_PxT1: Array,
        state_PxLxD: Array,
        first_pair: int = 0,
        votes: bool = True,
    ) -> tuple[Votes, Statistics, Array]:
        """Evaluate the antithetic pairs `first_pair`, `first_pair + 1`, ... on one segment.

        key: uint32 [2], `eggroll.step_key`; tokens: int32 [P, T + 1], inputs and, one later, targets; state:
        int8 [P, L, D]. Returns this slice's votes, its statistics and the pairs' states after the segment.
        Votes and statistics of slices add up to those of the population. Where `votes` is false the members are
        scored alone: no votes, and only `eggroll.SCORE_STATISTICS`.
        """
        ...

    def embedding_votes(self, key: Array, fitness_P: Array, tokens_PxT1: Array, first_pair: int = 0) -> Array:
        """The embedding's votes from the pairs' fitness and what they read (estimator `weight`): int32 [V, D]."""
        ...

    def fitness_votes(self, key: Array, fitness_P: Array, first_pair: int = 0) -> Votes:
        """The votes of all parameters but the embedding, from the pairs' fitness alone (estimator `weight`).

        key, first_pair: as of the `population_step` that gave the fitness, int8 [P]. The embedding's votes depend
        on the text as well: only pairs that read a token vote for its row.
        """
        ...

    def advance(
        self,
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
        """The update, and all else between two evaluations, in one call; see `eggroll.advance`.

        masters: int16 by name; step_size, quantile: int64, `eggroll.schedule`; root: uint32 [2]; step: uint32.
        """
        ...

    def forward(self, parameters: Parameters, tokens_NxT: Array, state_NxLxD: Array) -> tuple[Array, Array]:
        """The unperturbed model: logits int16 [N, T, V] in 1/256 bit, and the states after the tokens."""
        ...

    def score(self, parameters: Parameters, tokens_NxT1: Array, state_NxLxD: Array) -> tuple[Array, Array]:
        """The unperturbed model on int32 [N, T + 1], inputs and, one later, targets.

        Returns `fixedpoint.log_likelihood` of the targets, int32 [N, T] in 1/256 bit, and the states after.
        """
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, written on arrays, as this engine runs it: traced and compiled, or as it is."""
        ...


@dataclass(frozen=True)
class DrawRule:
    """How a token is drawn from logits, in integers.

    Tokens stand in order of their logits, the largest first, equal ones by number. The first `top_k` (1 to
    65536) weigh `weights[l]` (int32, [4095], not rising, 0 to 2**24, the first one above 0), where l is the
    distance of the logit below the largest; the others 0. With all their sum S, those before which the
    weights reach S * top_p / 2**16 (top_p: 0 to 65536) weigh 0 as well, but for the first. With the sum S of
    what is left, the token is the first up to which the sum passes r * S >> 31, r being the upper 31 bits of
    the random word.

    key: uint32 [2]; the word of token t of sample i is number t % 64 of row i of `noise.words` with the key
    `noise.fold(key, t - t % 64)`.
    """

    weights: np.ndarray
    top_k: int
    top_p: int
    key: np.ndarray


@runtime_checkable
class SamplingEngine(Engine, Protocol):
    """An engine that has a way of its own to draw tokens, faster than `forward` token by token."""

    def sample(
        self, parameters: Parameters, prompt_T: np.ndarray, rule: DrawRule, count: int, length: int
    ) -> Iterator[np.ndarray]:
        """`length` tokens of each of `count` samples that go on from a prompt, a few at a time: int32 [count, n].

        prompt_T: int32, at least one token.
        """
        ...


ENGINES = {"reference": "ReferenceEngine", "xla": "XlaEngine", "native": "NativeEngine"}


LARGEST_THREADS = 1024


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> int:
    """`threads` as it is, or InputError where no engine can be given as many."""
    if not 1 <= threads <= LARGEST_THREADS:
        raise InputError(f"--threads {threads}: must be from 1 to {LARGEST_THREADS}")
    return threads


def limit_xla_threads(threads: int) -> None:
    """Give XLA's CPU backend so many threads.

    It makes them when JAX first computes, once for the process, so that this has to come before. An environment
    variable is the one way there is.
    """
    os.environ["NPROC"] = str(threads)


def has_accelerators() -> bool:
    """Whether JAX is installed here with a plugin for devices other than the CPU, and may use it.

    Looked up without starting JAX. Whether the machine has such a device only JAX can tell.
    """
    return os.environ.get("JAX_PLATFORMS") != "cpu" and importlib.util.find_spec("jax_plugins") is not None


def make_engine(
    name: str, model: ModelConfig, eggroll: EggrollConfig, chunk: int = 0, threads: int | None = None
) -> Engine:
    """The engine `name` ("auto": the fastest one here) for a configuration.

    chunk: pairs evaluated at once, which bounds memory and changes no bit; 0 lets the engine choose. threads: how
    many the native engine evaluates on, from 1 to 1024 (None: one for each usable core), which changes no bit
    either. XLA makes its threads once for the process, see `limit_xla_threads`; the reference has one. Raises
    InputError for a name that is unknown or a number out of range.
    """
    threads = usable_cores() if threads is None else check_threads(threads)
    if name == "auto":
        from intlm.engine.native import is_fast

        name = "native" if is_fast() else "xla"
    if name not in ENGINES:
        raise unknown("--engine", name, ["auto", *ENGINES])
    module = importlib.import_module(f"intlm.engine.{name}")
    options = {"threads": threads} if name == "native" else {}
    engine: Engine = getattr(module, ENGINES[name])(model, eggroll, chunk, **options)
    return engine
