"""The native engine: a fused evaluator in C++ for CPUs, with the instruction set chosen at run time.

The library is compiled when the package is installed, where there is a C++ compiler, and loaded through ctypes.
It evaluates the population, votes and the plain model, makes the update, scores text and samples, without JAX.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from intlm import eggroll, fixedpoint, whitening
from intlm.config import EggrollConfig, ModelConfig, check_bounds
from intlm.eggroll import Scales, Statistics, Votes
from intlm.engine.engine import DrawRule, usable_cores
from intlm.errors import InputError, unknown
from intlm.model import LAYER, TRAINED, Parameters, initial_state, shapes
from intlm.whitening import Whitening

ISAS = {"scalar": 1, "avx2": 2, "avx512": 4, "amx": 8}
"""Instruction sets, slowest first, with their bits in `intlm_isas`."""

SLICE_PAIRS = 4096
"""Pairs evaluated in one call; a larger population takes several, and its memory stays flat."""

CALL_TOKENS = 64
"""Tokens sampled or read in one call at most; between calls they are shown, and Ctrl-C is heard."""

CALL_SECONDS = 0.02
"""Calls grow while they take less."""

SAMPLES_TOGETHER = 32
"""From so many samples on, which fill a block of lanes, `forward` takes all of them through the model at once;
fewer go by themselves, one after another."""

_PLAIN, _ACTIVATION, _WEIGHT = range(3)
_POINTER = ctypes.c_void_p
_COUNTS = ("score", "difference", "ties", "saturated", "seen")


class _ModelJob(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int32) for name in ("width", "layers", "vocabulary")],
        ("kind", ctypes.c_int32 * 3),
        ("activation", _POINTER * 3),
        *[(name, _POINTER) for name in ("exp2", "log2", "reciprocal", "gaussian")],
        ("parameter", _POINTER * len(TRAINED)),
        ("head_bias", _POINTER),
    )


class _StepJob(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int32) for name in ("estimator", "rows", "tokens", "rank", "gaussian_noise")],
        *[(name, ctypes.c_int32) for name in ("sign_fitness", "sigma_weight", "sigma_norm")],
        *[(name, ctypes.c_int32) for name in ("mean_difference", "threads")],
        ("site_shift", ctypes.c_int32 * len(eggroll.PERTURBED_SITES)),
        ("first_pair", ctypes.c_uint32),
        ("key", ctypes.c_uint32 * 2),
        *[(name, _POINTER) for name in ("horizon", "shift", "text", "state", "state_after")],
        ("votes", _POINTER * len(TRAINED)),
        *[(name, _POINTER) for name in ("voters", "square", "counts", "fitness", "logits", "likelihood")],
    )


class _UpdateJob(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int32) for name in ("threshold", "threads", "stride")],
        ("layers", ctypes.c_int32 * len(TRAINED)),
        ("root", ctypes.c_uint32 * 2),
        ("step", ctypes.c_uint32),
        ("key", _POINTER),
        ("size", ctypes.c_int64 * len(TRAINED)),
        ("white_inputs", ctypes.c_int64 * len(TRAINED)),
        *[(name, _POINTER) for name in ("multiple", "unit", "covariance", "covariance_after")],
        *[(name, _POINTER) for name in ("inverse", "inverse_after", "votes", "master", "after", "weight")],
    )


class _SampleJob(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        *[(name, ctypes.c_int32) for name in ("top_k", "top_p")],
        ("key", ctypes.c_uint32 * 2),
        *[(name, ctypes.c_uint32) for name in ("sample", "position")],
        ("text", _POINTER),
        *[(name, ctypes.c_int32) for name in ("tokens", "count")],
        *[(name, _POINTER) for name in ("state", "drawn", "logits")],
    )


_JOBS = {"": _StepJob, "sampler_": _SampleJob}
"""What a handle runs, by the prefix of its entry points."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where the package was installed without one."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    loaded.intlm_layout.restype = ctypes.c_int64
    layout = 0
    for job in (_ModelJob, _StepJob, _UpdateJob, _SampleJob):
        layout = layout << 12 | ctypes.sizeof(job)
    if loaded.intlm_layout() != layout:
        raise InputError(f"{found[0]}: was built from another version of intlm; install the package again")
    for isa in _isas(loaded):
        getattr(loaded, f"intlm_update_{isa}").argtypes = (ctypes.POINTER(_UpdateJob),)
        for what, kind in _JOBS.items():
            getattr(loaded, f"intlm_{what}new_{isa}").restype = _POINTER
            getattr(loaded, f"intlm_{what}free_{isa}").argtypes = (_POINTER,)
            getattr(loaded, f"intlm_{what}read_{isa}").argtypes = (_POINTER, ctypes.POINTER(_ModelJob))
            getattr(loaded, f"intlm_{what}run_{isa}").argtypes = (_POINTER, ctypes.POINTER(kind))
        getattr(loaded, f"intlm_peak_{isa}").restype = ctypes.c_int64
        getattr(loaded, f"intlm_peak_{isa}").argtypes = (ctypes.c_int64, ctypes.c_int)
    return loaded


def _isas(loaded: ctypes.CDLL) -> list[str]:
    """What the processor has and the build contains."""
    return [
        name
        for name, bit in ISAS.items()
        if loaded.intlm_isas() & bit and hasattr(loaded, f"intlm_new_{name}")
    ]


def available_isas() -> list[str]:
    """The instruction sets that this processor and this build have, slowest first; empty without a library."""
    found = library()
    return [] if found is None else _isas(found)


def choose_isa() -> str:
    """The instruction set to use: INTLM_ISA where it is set, else the fastest. Raises InputError."""
    have = available_isas()
    if not have:
        raise InputError(
            "--engine native: this installation has no native engine (no C++ compiler was found)"
        )
    asked = os.environ.get("INTLM_ISA")
    if asked is None:
        return have[-1]
    if asked not in have:
        raise unknown("INTLM_ISA", asked, have)
    return asked


def is_fast() -> bool:
    """Whether this processor has an instruction set with which the native engine outruns XLA."""
    return len(available_isas()) > 1


def why_not_fast() -> str:
    """What to tell a person for whom XLA is used because the native engine is missing or slow here."""
    if not available_isas():
        return (
            "using XLA, at about a sixth of the native engine's speed: that one was not built, for want of a "
            "C++ compiler; install one (g++ or clang) and then this package again"
        )
    return "using XLA: this processor has no vector unit (AVX2 or AVX512) that the native engine is fast with"


def measured_peak(isa: str, threads: int, seconds: float = 0.1) -> float:
    """Int8 multiply-adds a second of an instruction set, on so many threads at once, from registers alone.

    A multiply-add is one product of two bytes, added into a 32-bit sum. `seconds`: about how long to measure.
    """
    loaded = library()
    assert loaded is not None
    run, iterations = getattr(loaded, f"intlm_peak_{isa}"), 1 << 16
    while True:
        started = time.perf_counter()
        multiply_adds = run(iterations, threads)
        took = time.perf_counter() - started
        if took >= seconds / 2:
            return float(multiply_adds / took)
        iterations *= 2 if took < seconds / 16 else max(2, int(seconds / took))


class _Evaluator:
    """The evaluator of an instruction set: a model, and memory for calls. Frees itself.

    With the prefix "sampler_" its sampler, which is used in the same way.
    """

    def __init__(self, loaded: ctypes.CDLL, isa: str, model: ModelConfig, prefix: str = ""):
        self._model = model
        self._read, self._run, self._free, new = (
            getattr(loaded, f"intlm_{prefix}{what}_{isa}") for what in ("read", "run", "free", "new")
        )
        self._parameters: Parameters | None = None
        self._sites = [getattr(model, site) for site in ("gate", "candidate", "mlp")]
        self._tables = [
            *[_array(fixedpoint.activation_table(name), np.int8) for name in self._sites],
            *[_array(t, np.int32) for t in (fixedpoint.exp2_table(), fixedpoint.log2_table())],
            _array(fixedpoint.reciprocal_table(), np.int32),
            _array(fixedpoint.gaussian_table(), np.int8),
        ]
        self._handle = new()
        if not self._handle:
            raise MemoryError("the native engine could not be started")

    def run(self, parameters: Parameters | None, job: ctypes.Structure) -> None:
        """Do `job` on the model of these parameters, which are read where they are other ones than before.

        None: the job reads no parameters.
        """
        if parameters is None:
            sizes = {**shapes(self._model), "head_bias": self._model.vocabulary}
            parameters = self._parameters or {name: np.zeros(size, np.int8) for name, size in sizes.items()}
        if self._parameters is not parameters:
            self._parameters = None
            self._take(parameters)
            self._parameters = parameters
        if self._run(self._handle, ctypes.byref(job)):
            raise MemoryError("the native engine ran out of memory; lower --chunk")

    def _take(self, parameters: Parameters) -> None:
        arrays = [_array(parameters[name], np.int8) for name in TRAINED]
        arrays.append(_array(parameters["head_bias"], np.int16))
        # The embedding, norms and biases are read where they are.
        self._kept = arrays
        tables, values = ([array.ctypes.data for array in part] for part in (self._tables, arrays))
        job = _ModelJob(
            self._model.width,
            self._model.layers,
            self._model.vocabulary,
            (ctypes.c_int32 * 3)(*[{"identity": 1, "relu2": 2}.get(name, 0) for name in self._sites]),
            (_POINTER * 3)(*tables[:3]),
            *tables[3:],
            (_POINTER * len(TRAINED))(*values[:-1]),
            values[-1],
        )
        if self._read(self._handle, ctypes.byref(job)):
            raise MemoryError("the native engine could not allocate the model")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(self._handle)


class _Pace:
    """How many tokens the next call takes: more while calls take little time."""

    tokens = 1

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        quick = time.perf_counter() - self._since < CALL_SECONDS
        self.tokens = min(2 * self.tokens, CALL_TOKENS) if quick else max(1, self.tokens // 2)


class NativeEngine:
    """C++ on all cores that the process may use."""

    name = "native"

    def __init__(self, model: ModelConfig, config: EggrollConfig, chunk: int = 0, threads: int = 0):
        """Check the bounds. `chunk` pairs are evaluated in a call (0: chosen); `threads`: 0 takes all cores."""
        check_bounds(model, config)
        self.model, self.config = model, config
        self.isa = choose_isa()
        loaded = library()
        assert loaded is not None
        self.threads = threads or usable_cores()
        self.chunk = chunk or SLICE_PAIRS
        self._library = loaded
        self._evaluator = _Evaluator(loaded, self.isa, model)
        self._update = getattr(loaded, f"intlm_update_{self.isa}")
        self._sampler: _Evaluator | None = None  # holds the weights once more, packed for one stream
        # What of a step's job stays the same.
        self._shapes = {name: shapes(model)[name] for name in TRAINED}
        self._votes, self._masters, self._weights = (
            _Bundle(self._shapes, dtype) for dtype in (np.int32, np.int16, np.int8)
        )
        layers = [model.layers if name in LAYER else 1 for name in TRAINED]
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._layers = (ctypes.c_int32 * len(TRAINED))(*layers)
        self._sizes = (ctypes.c_int64 * len(TRAINED))(*[s // n for s, n in zip(sizes, layers, strict=True)])
        self._white_inputs = (ctypes.c_int64 * len(TRAINED))(
            *[shape[-1] if name in whitening.NAMES else 0 for name, shape in self._shapes.items()]
        )
        self._entries = sum(sizes)
        self._sums = len(_COUNTS) + len(TRAINED) * model.layers
        self._shift = np.zeros((len(TRAINED), model.layers), np.int32)
        self._horizon = np.zeros((len(TRAINED), model.layers), np.int32)
        for row, name in enumerate(TRAINED):
            if config.estimator == "activation" and name in eggroll.SITE_OF:
                self._horizon[row] = eggroll.horizons(config, model, name)
        self._site_shift = [eggroll.site_shift(config, site, model.width) for site in eggroll.PERTURBED_SITES]

    def advance(
        self,
        masters: dict[str, Any],
        head_bias: Any,
        votes: Votes,
        statistics: Statistics,
        scales: Scales,
        known: Whitening,
        step_size: Any,
        quantile: Any,
        root: Any,
        step: Any,
    ) -> tuple[dict[str, np.ndarray], Scales, Whitening, Parameters, np.ndarray]:
        """See `Engine.advance`. The few numbers that a layer shares are NumPy's work."""
        config, model = self.config, self.model
        statistics = {name: np.asarray(value) for name, value in statistics.items()}
        scales = {name: np.asarray(value) for name, value in scales.items()}
        deviation = eggroll.deviations(config, model, TRAINED, statistics)
        multiple = eggroll.multiples(config, TRAINED, deviation, np.int64(step_size), np.int64(quantile))
        key = np.empty(2, np.uint32)
        master, taken = self._masters.vector(masters), self._votes.vector(votes)
        after, weights = np.empty(master.shape, np.int16), np.empty(master.shape, np.int8)
        job = _UpdateJob(
            threshold=config.update == "threshold",
            threads=self.threads,
            stride=model.layers,
            step=int(step),
            key=key.ctypes.data,
            layers=self._layers,
            size=self._sizes,
            white_inputs=self._white_inputs,
            multiple=multiple.ctypes.data,
            votes=taken.ctypes.data,
            master=master.ctypes.data,
            after=after.ctypes.data,
            weight=weights.ctypes.data,
        )
        job.root[:] = np.asarray(root).tolist()
        if known:
            unit = eggroll.units(deviation)
            before = {
                name: _array(known[name], dtype) for name, (_, dtype) in whitening.arrays(model).items()
            }
            due = bool(whitening.is_due(np.uint32(step)))
            known = before | {"covariance": np.empty_like(before["covariance"])}
            if due:
                known["inverse"] = np.empty_like(before["inverse"])
            job.unit = unit.ctypes.data
            job.covariance, job.inverse = (before[name].ctypes.data for name in ("covariance", "inverse"))
            job.covariance_after = known["covariance"].ctypes.data
            job.inverse_after = known["inverse"].ctypes.data if due else None
        if self._update(ctypes.byref(job)):
            raise MemoryError("the native engine ran out of memory")
        parameters = self._weights.named(weights)
        parameters["head_bias"] = head_bias
        next_scales = eggroll.next_scales(config, model, scales, statistics)
        return self._masters.named(after), next_scales, known, parameters, key

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is, in NumPy: what costs time is in C++."""
        return function

    def fitness_votes(self, key: Any, fitness_P: Any, first_pair: int = 0) -> Votes:
        """See `Engine.fitness_votes`."""
        names = [name for name in TRAINED if name != "embedding"]
        return self._votes_of(names, key, fitness_P, None, first_pair)

    def embedding_votes(self, key: Any, fitness_P: Any, tokens_PxT1: Any, first_pair: int = 0) -> np.ndarray:
        """See `Engine.embedding_votes`."""
        tokens = _array(tokens_PxT1, np.int32)
        return self._votes_of(["embedding"], key, fitness_P, tokens, first_pair)["embedding"]

    def _votes_of(
        self, names: list[str], key: Any, fitness_P: Any, tokens: np.ndarray | None, first_pair: int
    ) -> dict[str, np.ndarray]:
        """The votes of some parameters, from the fitness of the pairs."""
        fitness = _array(fitness_P, np.int8)
        job = self._job(key, 0 if tokens is None else tokens.shape[1] - 1)
        sums = np.zeros(self._sums, np.int64)
        job.counts, job.square = sums.ctypes.data, sums[len(_COUNTS) :].ctypes.data
        total: dict[str, np.ndarray] = {}
        for start in range(0, fitness.size, self.chunk):
            rows = np.s_[start : start + self.chunk]
            part = {name: np.empty(self._shapes[name], np.int32) for name in names}
            for name, votes in part.items():
                job.votes[TRAINED.index(name)] = votes.ctypes.data
            job.rows, job.first_pair = fitness[rows].size, first_pair + start
            job.voters = fitness[rows].ctypes.data
            if tokens is not None:
                job.text = tokens[rows].ctypes.data
            self._evaluator.run(None, job)
            total = {name: total[name] + votes for name, votes in part.items()} if start else part
        return total

    def forward(self, parameters: Parameters, tokens_NxT: Any, state_NxLxD: Any) -> tuple[Any, Any]:
        """The unperturbed model; see `Engine.forward`."""
        tokens = _array(tokens_NxT, np.int32)
        logits = np.empty((*tokens.shape, self.model.vocabulary), np.int16)
        return logits, self._plain(
            parameters, tokens, state_NxLxD, tokens.shape[1], logits=logits.ctypes.data
        )

    def score(self, parameters: Parameters, tokens_NxT1: Any, state_NxLxD: Any) -> tuple[Any, Any]:
        """See `Engine.score`."""
        tokens = _array(tokens_NxT1, np.int32)
        rows, count = tokens.shape[0], tokens.shape[1] - 1
        scores = np.empty((rows, count), np.int32)
        return scores, self._plain(parameters, tokens, state_NxLxD, count, likelihood=scores.ctypes.data)

    def _plain(
        self, parameters: Parameters, text: np.ndarray, state_NxLxD: Any, count: int, **output: int
    ) -> np.ndarray:
        """Take `count` tokens of each row through the model; the states after them. output: where it goes."""
        state = _array(state_NxLxD, np.int8)
        after = np.empty_like(state)
        job = _StepJob(
            estimator=_PLAIN,
            rows=text.shape[0],
            tokens=count,
            rank=1,
            threads=self.threads,
            text=text.ctypes.data,
            state=state.ctypes.data,
            state_after=after.ctypes.data,
            **output,
        )
        self._evaluator.run(parameters, job)
        return after

    def sample(
        self, parameters: Parameters, prompt_T: np.ndarray, rule: DrawRule, count: int, length: int
    ) -> Iterator[np.ndarray]:
        """See `SamplingEngine.sample`."""
        sampler = self._sampler = self._sampler or _Evaluator(self._library, self.isa, self.model, "sampler_")
        weights, prompt = _array(rule.weights, np.int32), _array(prompt_T, np.int32)
        if not prompt.size or prompt.min() < 0 or prompt.max() >= self.model.vocabulary:
            raise ValueError(f"a prompt holds one or more of the tokens 0 to {self.model.vocabulary - 1}")
        job = _SampleJob(weight=weights.ctypes.data, top_k=rule.top_k, top_p=rule.top_p)
        job.key[:] = np.asarray(rule.key).tolist()

        def run(drawn: np.ndarray, text: np.ndarray, state_LxD: np.ndarray) -> None:
            """Read `text`, then draw as many tokens as `drawn` holds."""
            job.text, job.tokens, job.state = text.ctypes.data, text.size, state_LxD.ctypes.data
            job.drawn, job.count = drawn.ctypes.data, drawn.size
            sampler.run(parameters, job)

        pace, none = _Pace(), np.empty(0, np.int32)
        states = initial_state(self.model, 1)
        read = 0
        while read < prompt.size - 1:
            with pace:
                piece = prompt[read : min(read + pace.tokens, prompt.size - 1)]
                run(none, piece, states[0])
                read += piece.size
        states = np.repeat(states, count, axis=0)
        last_Nx1 = np.repeat(prompt[None, -1:], count, axis=0)
        together = count >= SAMPLES_TOGETHER
        while job.position < length:
            with pace:
                size = 1 if together else min(pace.tokens, length - job.position)
                drawn_NxT = np.empty((count, size), np.int32)
                if together:
                    logits, states = self.forward(parameters, last_Nx1, states)
                    job.logits, job.drawn, job.count = logits.ctypes.data, drawn_NxT.ctypes.data, count
                    sampler.run(parameters, job)
                else:
                    for sample in range(count):
                        job.sample = sample
                        run(drawn_NxT[sample], last_Nx1[sample], states[sample])
            yield drawn_NxT
            job.position += size
            last_Nx1 = drawn_NxT[:, -1:]

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
        tokens, state = _array(tokens_PxT1, np.int32), _array(state_PxLxD, np.int8)
        after = np.empty_like(state)
        job = self._job(key, tokens.shape[1] - 1)
        self._take_scales(job, scales)
        entries = self._entries if votes else 0
        total, sums = np.empty(entries, np.int32), np.zeros(self._sums, np.int64)
        fitness = np.empty(tokens.shape[0] if self.config.estimator == "weight" else 0, np.int8)
        for start in range(0, tokens.shape[0], self.chunk):
            part = np.empty(entries, np.int32) if start else total
            rows = np.s_[start : start + self.chunk]
            job.fitness = fitness[rows].ctypes.data
            self._slice(
                job, parameters, tokens[rows], state[rows], after[rows], first_pair + start, part, sums
            )
            if start:
                total += part
        return *self._outcome(total, sums, fitness, votes), after

    def _job(self, key: Any, segment: int) -> _StepJob:
        """What all slices of a step share, but for its scales."""
        config = self.config
        job = _StepJob(
            estimator=_ACTIVATION if config.estimator == "activation" else _WEIGHT,
            tokens=segment,
            rank=config.rank if config.estimator == "weight" else config.rank_head,
            gaussian_noise=config.noise == "gaussian",
            sign_fitness=config.fitness == "sign",
            sigma_weight=config.sigma_weight,
            sigma_norm=config.sigma_norm,
            threads=self.threads,
            horizon=self._horizon.ctypes.data,
            shift=self._shift.ctypes.data,
        )
        job.key[:] = np.asarray(key).tolist()
        job.site_shift[:] = self._site_shift
        return job

    def _take_scales(self, job: _StepJob, scales: Scales) -> None:
        if self.config.estimator == "weight":
            job.mean_difference = int(np.asarray(scales["difference"]))
            return
        for row, name in enumerate(TRAINED):
            self._shift[row] = np.asarray(scales[f"shift.{name}"])

    def _slice(
        self,
        job: _StepJob,
        parameters: Parameters,
        tokens: np.ndarray,
        state: np.ndarray,
        after: np.ndarray,
        first_pair: int,
        votes: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        """Evaluate a slice: its votes, one parameter after the other, and its statistics, added to `sums`."""
        job.rows, job.first_pair = tokens.shape[0], first_pair
        job.text, job.state, job.state_after = (array.ctypes.data for array in (tokens, state, after))
        job.counts = sums.ctypes.data
        job.square = job.counts + sums.itemsize * len(_COUNTS)
        address = votes.ctypes.data
        for row, shape in enumerate(self._shapes.values()):
            job.votes[row] = address if votes.size else None
            address += votes.itemsize * math.prod(shape)
        self._evaluator.run(parameters, job)

    def _outcome(
        self, total: np.ndarray, sums: np.ndarray, fitness: np.ndarray, votes: bool
    ) -> tuple[Votes, Statistics]:
        statistics: Statistics = dict(zip(_COUNTS, sums[: len(_COUNTS)], strict=True))
        if self.config.estimator == "weight":
            statistics["fitness"] = fitness
        if not votes:
            return {}, eggroll.of_scores(statistics)
        square = sums[len(_COUNTS) :].reshape(len(TRAINED), -1)
        if self.config.estimator == "activation":
            for row, name in enumerate(TRAINED):
                statistics[f"square.{name}"] = square[row] if name in LAYER else square[row, 0]
        else:
            statistics["square"] = square[0, 0]
        return self._votes.named(total), statistics


class _Bundle:
    """Arrays of all trained parameters in one vector, one after the other, and by name.

    A vector that was given names is found again by the dictionary of these, without a copy.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: type):
        self._shapes, self._dtype = shapes, dtype
        self._known: tuple[dict[str, Any], np.ndarray] | None = None

    def named(self, vector: np.ndarray) -> dict[str, Any]:
        """The parts of a vector, by name."""
        parts, begin = {}, 0
        for name, shape in self._shapes.items():
            end = begin + math.prod(shape)
            parts[name] = vector[begin:end].reshape(shape)
            begin = end
        self._known = parts, vector
        return parts

    def vector(self, parts: dict[str, Any]) -> np.ndarray:
        """The inverse of `named`."""
        if self._known is not None and self._known[0] is parts:
            return self._known[1]
        return np.concatenate([_array(parts[name], self._dtype).ravel() for name in self._shapes])


def _array(values: Any, dtype: type) -> np.ndarray:
    """A C-contiguous NumPy array of a dtype, without a copy where it is one."""
    return np.ascontiguousarray(np.asarray(values), dtype)
