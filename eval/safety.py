"""What checkpoints and the history cost a run."""

import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.throughput import Case, limited_threads
from eval.trial import try_out
from intlm.errors import InputError
from intlm.evolution import EvolutionState
from train.job import Job, Request
from train.saving import Saver

ROUNDS = 9
RUN_STEPS = 10_000
"""The run's planned length. Step sizes are largest at its start, and so is what changes in a step."""


@dataclass(frozen=True)
class SafetyCost:
    """Seconds of a step with a history and a checkpoint for every block, over those without either, less one.

    Blocks of `steps` steps in turn, with and without, of the same run. cost: the median over rounds; lowest and
    highest: of the rounds. own_share: what the threads of the history and of the checkpoints, and the handing
    over of a checkpoint, took of the processor's seconds in the blocks with both, which other work on the machine
    does not disturb. history_bytes: bytes of a step.
    """

    engine: str
    estimator: str
    threads: int
    population: int
    segment: int
    steps: int
    block_seconds: float
    cost: float
    lowest: float
    highest: float
    own_share: float
    checkpoint_bytes: int
    history_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def line(self) -> str:
        """For a terminal."""
        return (
            f"safety, {self.engine}, {self.estimator}, population {self.population:,}, segment {self.segment}: "
            f"history ({self.history_bytes:,} bytes a step) and a checkpoint ({self.checkpoint_bytes:,} bytes) "
            f"every {self.steps:,} steps ({self.block_seconds:.1f} s) cost {self.cost:.2%} "
            f"(median of {ROUNDS} rounds, {self.lowest:.2%} to {self.highest:.2%}), and "
            f"{self.own_share:.2%} of the processor's time went to them"
        )


def measure_safety(preset: str, settings: tuple[str, ...], case: Case, seconds: float) -> SafetyCost:
    """Train in a directory of its own, on the standard library, in blocks of about `seconds`.

    preset, settings: those that `case.config` was made of. Raises InputError where the system does not tell the
    processor time of single threads (macOS).
    """
    if not hasattr(time, "pthread_getcpuclockid"):
        raise InputError("--safety: this system does not tell the processor time of single threads")
    with tempfile.TemporaryDirectory() as home, limited_threads(case.threads, case.engine):
        request = Request(
            preset,
            f"{home}/run",
            steps=RUN_STEPS,
            engine=case.engine,
            settings=settings,
            threads=case.threads,
        )
        job, _, step = try_out(request)
        steps = max(10, int(seconds / step))
        ratios, with_both = [], 0.0
        own = whole = 0.0
        safe = bare = job.state
        history = job.history
        assert history is not None
        with job.recording(), Saver(job.run, keep=3, before=[history.sync]) as saver:
            for _ in range(ROUNDS):
                # The first step of a block takes what the other block has left behind.
                safe, _ = _block(job, safe, 1, recorded=True)
                started, own_before, whole_before = time.perf_counter(), _own_seconds(), time.process_time()
                called = time.thread_time()
                history.seal()
                make = job.snapshot(safe)
                assert make is not None
                saver.save(safe.step, make, {})
                own += time.thread_time() - called
                safe, _ = _block(job, safe, steps, recorded=True)
                history.seal()
                history.sync()
                with_both = time.perf_counter() - started
                saver.finish()
                own += _own_seconds() - own_before
                whole += time.process_time() - whole_before
                bare, _ = _block(job, bare, 1, recorded=False)
                bare, without = _block(job, bare, steps, recorded=False)
                ratios.append(with_both / without - 1)
            size = job.run.checkpoint_path(saver.last or 0).stat().st_size
        log = sum(path.stat().st_size for path in Path(job.run.history_directory).iterdir())
        job.lanes.close()
    config = case.config
    return SafetyCost(
        case.engine, config.estimator, case.threads, config.population, config.segment, steps, with_both,
        statistics.median(ratios), min(ratios), max(ratios), own / whole, size, log // safe.step,
    )  # fmt: skip


def _own_seconds() -> float:
    """Processor seconds that the threads of the history and of the checkpoints have had."""
    mine = [thread for thread in threading.enumerate() if thread.name in ("intlm-history", "intlm-saver")]
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in mine if thread.ident
    )


def _block(job: Job, state: EvolutionState, steps: int, recorded: bool) -> tuple[EvolutionState, float]:
    """Some steps, and the seconds that they took."""
    started = time.perf_counter()
    for _ in range(steps):
        state, found = job.evolution.step(state, job.lanes.next_segment())
        if recorded:
            job.record(state, found)
        np.asarray(found["score"])
    return state, time.perf_counter() - started
