"""The training loop."""

import os
import signal
import time
from types import FrameType

from intlm.eggroll import Statistics
from intlm.errors import InputError
from intlm.evolution import EvolutionState
from train.job import Job
from train.report import Report
from train.run import best_step
from train.saving import Saver

PATIENCE = 1.0

STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")
SAVES = "SIGUSR1"


class StopSignal:
    """Turns signals into flags that the loop looks at after each step.

    `requested`: SIGINT, SIGTERM, SIGUSR2 (what a batch system can be told to send before it takes the machine
    away) or SIGHUP, unless that is ignored, has come: the run is to be saved and left. `save_requested`: SIGUSR1
    has come: it is to be saved. A second SIGINT ends the process at once, and so does a second one of the others,
    `PATIENCE` seconds later or more: the first may wait for a network.
    """

    def __init__(self) -> None:
        self.requested = self.save_requested = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Take the signals over."""
        for name in (*STOPS, SAVES):
            number = getattr(signal, name, None)  # not every system has all of them
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # started by nohup, to outlive its terminal
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was called last."""
        asked, self.save_requested = self.save_requested, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == SAVES:
            self.save_requested = True
            return
        if self.requested and (number == signal.SIGINT or time.monotonic() - self._since >= PATIENCE):
            os._exit(130)
        if not self.requested:
            self._since = time.monotonic()
        self.requested = True


def train(job: Job, report: Report, stop: StopSignal) -> EvolutionState:
    """Step the job to its end, or until a stop is requested; a checkpoint is written either way.

    The statistics of a step are read while the next one runs, and checkpoints are written meanwhile. Raises
    InputError where the text has failed, and where the last checkpoint cannot be written.
    """
    state, steps = job.state, job.config.steps
    evaluate_every = job.every(job.request.evaluate_every)
    checkpoint_every = job.every(job.request.checkpoint_every)
    pending: tuple[int, Statistics] | None = None

    def save(announced: bool = False) -> None:
        nonlocal pending
        if pending:
            report.step(job, *pending)
            pending = None
        report.log(job, state.step)
        if job.history:
            job.history.seal()
        saver.save(state.step, job.snapshot(state), report.metrics.scores, announced)

    with make_saver(job, report) as saver:
        if state.step == 0 and not stop.requested:
            report.evaluate(job, state)
        while state.step < steps and job.lanes.wait(lambda: stop.requested):
            try:
                tokens = job.lanes.next_segment()
            except InputError:
                # The text has failed: keep what was made of it.
                save()
                raise
            state, statistics = job.evolution.step(state, tokens)
            job.record(state, statistics)
            if pending:
                report.step(job, *pending)
            pending = (state.step, statistics)
            best = False
            if state.step % evaluate_every == 0 or state.step == steps:
                report.step(job, *pending)
                pending = None
                report.evaluate(job, state)
                scores = report.metrics.scores
                best = best_step(scores, scores) == state.step
            asked = stop.take_save()
            if state.step % checkpoint_every == 0 or state.step == steps or best or asked or saver.due:
                save(asked)
        if stop.requested and state.step < steps:
            save()
        elif pending:
            report.step(job, *pending)
    return state


def make_saver(job: Job, report: Report) -> Saver:
    """What writes the job's checkpoints, each after the metrics that lead up to it."""
    last = job.state.step if job.resumed else None
    request = job.request
    before = [*job.before_checkpoint, report.metrics.sync]
    return Saver(job.run, request.keep, request.keep_every, report.warn, before, last)
