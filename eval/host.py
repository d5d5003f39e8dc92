"""What a training step costs on the host: all that is neither the population's evaluation nor the update."""

import dataclasses
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from eval.throughput import Case, limited_threads, seconds_of
from eval.trial import try_out
from intlm.engine.engine import Engine
from intlm.evolution import EvolutionState
from train.job import Job, Request
from train.loop import train
from train.report import Report
from train.stop import StopSignal

TEXT_BYTES = 1 << 20
WARM_STEPS = 5


@dataclass(frozen=True)
class HostCost:
    """Milliseconds of a mean step of `intlm train`, with metrics, TensorBoard and history, between evaluations.

    evaluation: inside of the engine; update: its arithmetic, timed alone, on arrays that XLA need not convert;
    host: the rest (text, keys and schedules, conversions and calls, metrics, logging), `host_share` of the step.
    """

    engine: str
    estimator: str
    threads: int
    population: int
    segment: int
    steps: int
    step: float
    evaluation: float
    update: float
    host: float
    host_share: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def line(self) -> str:
        """For a terminal."""
        return (
            f"host, {self.engine}, {self.estimator}, population {self.population:,}, segment {self.segment}: "
            f"a step takes {self.step:.2f} ms: evaluation {self.evaluation:.2f}, update {self.update:.2f}, "
            f"all else {self.host:.2f} ms = {self.host_share:.1%} (mean of {self.steps:,} steps)"
        )


class _Timed:
    """An engine that keeps when each evaluation of the population began, and how long it took."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.advance = engine.advance
        self.calls: list[tuple[float, float]] = []

    def population_step(self, *values: Any) -> Any:
        """See `Engine.population_step`; waits for the result, since a device may be at work for longer."""
        started = time.perf_counter()
        result = jax.block_until_ready(self._engine.population_step(*values))
        self.calls.append((started, time.perf_counter() - started))
        return result


class _TrainingReport(Report):
    """Metrics and TensorBoard as ever, but no evaluation of held-out text."""

    def evaluate(self, job: Job, state: EvolutionState) -> None:
        """Leave it out."""


def measure_host(preset: str, settings: tuple[str, ...], case: Case, seconds: float) -> HostCost:
    """Train for about `seconds` in a directory of its own, on random text, and see where the time went.

    preset, settings: those that `case.config` was made of.
    """
    with tempfile.TemporaryDirectory() as home, limited_threads(case.threads, case.engine):
        text = Path(home) / "text"
        letters = np.random.default_rng(0).integers(97, 123, TEXT_BYTES).astype(np.uint8)
        letters[:: 1 << 10] = ord("\n")
        text.write_bytes(letters.tobytes())
        request = Request(
            preset, f"{home}/run", (str(text),), steps=1 << 20, engine=case.engine, settings=settings,
            threads=case.threads, checkpoint_every=1 << 20,
        )  # fmt: skip
        job, state, step = try_out(request)
        update = _update_seconds(job, state)
        steps = WARM_STEPS + max(10, int(seconds / step))
        job.config = dataclasses.replace(job.config, steps=steps)
        timed = _Timed(job.engine)
        job.evolution.engine, job.state = cast(Engine, timed), state
        with _TrainingReport(job, quiet=True) as report, job.recording():
            train(job, report, StopSignal())
    calls = timed.calls[WARM_STEPS:]
    count = len(calls) - 1
    whole = (calls[-1][0] - calls[0][0]) / count
    evaluation = sum(took for _, took in calls[:-1]) / count
    host = whole - evaluation - update
    config = case.config
    return HostCost(
        case.engine, config.estimator, case.threads, config.population, config.segment, count,
        1e3 * whole, 1e3 * evaluation, 1e3 * update, 1e3 * host, host / whole,
    )  # fmt: skip


def _update_seconds(job: Job, state: EvolutionState) -> float:
    """Seconds of the compiled update, from arrays that XLA need not convert."""
    evolution = job.evolution
    votes, statistics, _ = job.engine.population_step(
        evolution.parameters(state.masters, state.head_bias), np.array([1, 2], np.uint32), state.scales,
        np.repeat(job.lanes.next_segment(), job.config.eggroll.pairs_per_lane, axis=0), state.recurrent,
    )  # fmt: skip
    values = (
        state.masters, state.head_bias, votes, statistics, state.scales, state.whitening, np.int64(1 << 16),
        np.int64(256), np.array([1, 2], np.uint32), np.uint32(3),
    )  # fmt: skip
    with jax.enable_x64(True):
        ready = jax.tree.map(jax.numpy.asarray, values)
    jax.block_until_ready(job.engine.advance(*ready))  # compiles
    return seconds_of(lambda: jax.block_until_ready(job.engine.advance(*ready)), 0.5)
