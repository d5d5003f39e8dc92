"""Throughput of the engines, measured in one run, so that ratios hold where absolute times are noise."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intlm import model
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import Engine, make_engine, usable_cores
from intlm.engine.native import available_isas, choose_isa, measured_peak
from intlm.errors import InputError
from intlm.evolution import Evolution, EvolutionState, initial

ROUNDS = 5
INFERENCE_ROWS = 1024
"""Rows of plain inference in one call: as many as suit the caches, whatever the population."""

Task = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What is timed: an engine, on so many threads, with a population of one of the estimators."""

    engine: str
    threads: int
    config: EggrollConfig


@dataclass(frozen=True)
class Figure:
    """A median over rounds, with the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """From the figures of all rounds."""
        every = list(values)
        return cls(float(np.median(every)), min(every), max(every))


@dataclass(frozen=True)
class Throughput:
    """What one case came to. docs/performance.md explains every figure.

    training, evaluation: member-tokens/s of whole steps, and of the population's evaluation and votes;
    scoring: of its evaluation without votes (None: this engine cannot leave them out); inference: tokens/s of the
    unperturbed model. Ratios are taken round by round. gmacs: 10^9 multiply-adds of the model's matrices a
    second of training; peak: the processor's own on as many threads, and the share of it (None: no native engine
    to measure it with).
    """

    case: Case
    training: Figure
    evaluation: Figure
    scoring: Figure | None
    inference: Figure
    update_share: Figure
    evaluation_over_inference: Figure
    scoring_over_inference: Figure | None
    gmacs: float
    peak: Figure | None
    peak_share: Figure | None

    def as_dict(self) -> dict[str, Any]:
        """For --json: medians by name, and the rounds' range under `<name>_range`."""
        config = self.case.config
        values: dict[str, Any] = {
            "engine": self.case.engine,
            "estimator": config.estimator,
            "threads": self.case.threads,
            "population": config.population,
            "segment": config.segment,
        }
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Figure):
                values |= {item.name: value.median, f"{item.name}_range": [value.lowest, value.highest]}
            elif item.name != "case":
                values[item.name] = value
        return values


def multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of the model's matrices for one token."""
    return config.layers * 12 * config.width**2 + config.vocabulary * config.width


def measure(
    model_config: ModelConfig, cases: Sequence[Case], seconds: float, progress: Callable[[str], None]
) -> list[Throughput]:
    """Time every case, about `seconds` for each figure and round.

    Rounds go over all cases in turn, so that a drift of the machine's speed meets all of them. `progress` is told
    `count_of_figures` times what comes next. Raises InputError for an engine that is unknown, or
    that cannot be held to as many threads here.
    """
    timed: list[dict[str, Task]] = []
    for case in cases:
        progress(f"preparing {_named(case)}")
        with limited_threads(case.threads, case.engine):
            timed.append(_tasks(model_config, case))
            for task in timed[-1].values():
                task()
    rates: list[dict[str, list[float]]] = [{name: [] for name in tasks} for tasks in timed]
    for number in range(ROUNDS):
        for case, tasks, rate in zip(cases, timed, rates, strict=True):
            progress(f"round {number + 1} of {ROUNDS}, {_named(case)}")
            with limited_threads(case.threads, case.engine):
                if available_isas():
                    peak = measured_peak(choose_isa(), case.threads, seconds=0.05)
                    rate.setdefault("peak", []).append(peak / 1e9)
                for name, task in tasks.items():
                    count = case.config.population * case.config.segment
                    rate[name].append(count / seconds_of(task, seconds))
    return [_result(model_config, case, rate) for case, rate in zip(cases, rates, strict=True)]


def count_of_figures(cases: Sequence[Case]) -> int:
    """How often `measure` tells of its progress."""
    return len(cases) * (ROUNDS + 1)


def _named(case: Case) -> str:
    return f"{case.engine}, {case.config.estimator}, population {case.config.population:,}"


def _result(model_config: ModelConfig, case: Case, rates: dict[str, list[float]]) -> Throughput:
    rates["gmacs"] = [rate * multiply_adds(model_config) / 1e9 for rate in rates["training"]]

    def ratio(one: str, other: str) -> Figure:
        return Figure.of(a / b for a, b in zip(rates[one], rates[other], strict=True))

    figure = {name: Figure.of(values) for name, values in rates.items()}
    training = ratio("training", "evaluation")
    return Throughput(
        case,
        figure["training"],
        figure["evaluation"],
        figure.get("scoring"),
        figure["inference"],
        Figure(1 - training.median, 1 - training.highest, 1 - training.lowest),
        ratio("evaluation", "inference"),
        ratio("scoring", "inference") if "scoring" in rates else None,
        figure["gmacs"].median,
        figure.get("peak"),
        ratio("gmacs", "peak") if "peak" in rates else None,
    )


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: a state after its first step, and what the step after it reads."""

    engine: Engine
    evolution: Evolution
    state: EvolutionState
    tokens_PxT1: np.ndarray


def prepare(model_config: ModelConfig, case: Case) -> Prepared:
    """The engine of `case`, compiled and warm, on random text."""
    config = case.config
    engine = make_engine(case.engine, model_config, config, threads=case.threads)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, model_config.vocabulary, (config.lanes, config.segment + 1)).astype(np.int32)
    evolution = Evolution(engine, model_config, config, 1 << 20)
    state = initial(model_config, config, np.ones(model_config.vocabulary, np.int64))
    state, _ = evolution.step(state, tokens)
    return Prepared(engine, evolution, state, tokens)


def _tasks(model_config: ModelConfig, case: Case) -> dict[str, Task]:
    """What is timed, each on population x segment tokens."""
    ready = prepare(model_config, case)
    engine, evolution, state, tokens = ready.engine, ready.evolution, ready.state, ready.tokens_PxT1
    parameters = evolution.parameters(state.masters, state.head_bias)
    key = np.array([1, 2], np.uint32)
    rows = np.repeat(tokens[:, :-1], 2, axis=0)
    start = model.initial_state(model_config, case.config.population)

    def train() -> None:
        after, statistics = evolution.step(state, tokens)
        np.asarray(statistics["score"])
        np.asarray(after.masters["head"])

    def evaluate() -> None:
        votes, _, _ = engine.population_step(parameters, key, state.scales, tokens, state.recurrent)
        np.asarray(votes["head"])

    def score() -> None:
        _, statistics, _ = engine.population_step(
            parameters, key, state.scales, tokens, state.recurrent, votes=False
        )
        np.asarray(statistics["score"])

    def infer() -> None:
        for at in range(0, len(rows), INFERENCE_ROWS):
            part = np.s_[at : at + INFERENCE_ROWS]
            np.asarray(engine.forward(parameters, rows[part], start[part])[1])

    return {"training": train, "evaluation": evaluate, "inference": infer, "scoring": score}


def seconds_of(task: Task, seconds: float) -> float:
    """Seconds of one call, from as many as fill the time."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        task()
        calls += 1
    return (time.perf_counter() - started) / calls


# --- threads ------------------------------------------------------------------------------------------------


@contextmanager
def limited_threads(threads: int, engine: str) -> Iterator[None]:
    """Hold the whole process, XLA's threads included, to as many cores.

    XLA makes its threads once, when it starts; cores can be changed at any time. Raises InputError where they
    cannot be on this system.
    """
    if not hasattr(os, "sched_setaffinity"):
        if engine != "native" and threads != usable_cores():
            raise InputError(f"--threads {threads}: engine {engine} cannot be held to it on this system")
        yield
        return
    cores = os.sched_getaffinity(0)
    _move_to(set(sorted(cores)[:threads]))
    try:
        yield
    finally:
        _move_to(cores)


def _move_to(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue  # it has ended meanwhile


# --- output -------------------------------------------------------------------------------------------------


def table(results: Sequence[Throughput]) -> str:
    """For a terminal; speeds relative to the slowest engine, and to the fewest threads, come last."""
    several = len({result.case.threads for result in results}) > 1
    lines = [
        f"{'engine':9s} {'estimator':10s} {'threads':>7s} {'population':>10s} {'training':>12s} {'lowest':>7s} "
        f"{'highest':>7s} {'GMAC/s':>7s} {'of int8':>7s} {'update':>6s} {'inference':>11s} "
        f"{'evaluation':>10s} {'without':>7s} {'relative':>8s}",
        f"{'':9s} {'':10s} {'':>7s} {'':>10s} {'member-tok/s':>12s} {'':>7s} "
        f"{'':>7s} {'':>7s} {'peak':>7s} {'share':>6s} {'tokens/s':>11s} "
        f"{'/inference':>10s} {'votes':>7s} {'training':>8s}",
    ]
    if several:
        lines = [lines[0] + f" {'of more':>8s}", lines[1] + f" {'threads':>8s}"]

    def speed(result: Throughput, *same: str) -> float:
        """Training over the slowest of the cases that are the same in these."""
        rows = [
            other.training.median
            for other in results
            if all(other.as_dict()[name] == result.as_dict()[name] for name in same)
        ]
        return result.training.median / min(rows)

    for result in results:
        case, training = result.case, result.training
        share, scoring = result.peak_share, result.scoring_over_inference
        lines.append(
            f"{case.engine:9s} {case.config.estimator:10s} {case.threads:7d} {case.config.population:10,d} "
            f"{training.median:12,.0f} {training.lowest / training.median - 1:7.0%} "
            f"{training.highest / training.median - 1:+7.0%} {result.gmacs:7.1f} "
            f"{f'{share.median:.1%}' if share else '-':>7s} {result.update_share.median:6.1%} "
            f"{result.inference.median:11,.0f} {result.evaluation_over_inference.median:10.2f} "
            f"{f'{scoring.median:.2f}' if scoring else '-':>7s} "
            f"{speed(result, 'estimator', 'threads', 'population'):7.1f}x"
            + (f" {speed(result, 'engine', 'estimator', 'population'):7.2f}x" if several else "")
        )
    peaks = {result.case.threads: result.peak for result in results if result.peak}
    for threads, peak in sorted(peaks.items()):
        lines.append(
            f"int8 peak of {choose_isa()} on {threads} thread{'s' * (threads > 1)}, measured in this run: "
            f"{peak.median:,.1f} GMAC/s ({peak.lowest:,.1f} to {peak.highest:,.1f})"
        )
    return "\n".join(lines)
