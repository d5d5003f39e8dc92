"""The training loop."""

import os
import signal
import time
from types import FrameType

from intlm.errors import InputError
from intlm.evolution import EvolutionState
from train.job import Job
from train.report import Report
from train.together import Silent

PATIENCE = 1.0


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at after each step.

    A second one, `PATIENCE` seconds later or more, ends the process at once: the first may wait for a network.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._since >= PATIENCE:
            os._exit(130)
        if not self.requested:
            self._since = time.monotonic()
        self.requested = True


class GroupStop(StopSignal):
    """Of several processes: `asked` where somebody asked one of them, `requested` when all have agreed to stop.

    A second signal is the business of `train.cluster`, which hears it also while this thread waits for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def train(job: Job, report: Report | Silent, stop: StopSignal) -> EvolutionState:
    """Step the job to its end, or until a stop is requested; a checkpoint is written either way.

    The statistics of a step are read while the next one runs.
    """
    state, steps = job.state, job.config.steps
    evaluate_every = job.every(job.request.evaluate_every)
    checkpoint_every = job.every(job.request.checkpoint_every)
    pending = None
    if state.step == 0 and not stop.requested:
        report.evaluate(job, state)
    while state.step < steps and job.lanes.wait(lambda: stop.requested):
        try:
            tokens = job.lanes.next_segment()
        except InputError:
            # The text has failed: keep what was made of it.
            if pending:
                report.step(job, *pending)
            report.log(job, state.step)
            job.save(state)
            raise
        state, statistics = job.evolution.step(state, tokens)
        if pending:
            report.step(job, *pending)
        pending = (state.step, statistics)
        if state.step % evaluate_every == 0 or state.step == steps:
            report.step(job, *pending)
            pending = None
            report.evaluate(job, state)
        if state.step % checkpoint_every == 0 or state.step == steps:
            job.save(state)
    if pending:
        report.step(job, *pending)
    if stop.requested and state.step < steps:
        report.log(job, state.step)
        job.save(state)
    return state
