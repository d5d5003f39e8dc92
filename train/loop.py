"""The training loop."""

import contextlib
from collections.abc import Iterator

from intlm.eggroll import Statistics
from intlm.errors import InputError
from intlm.evolution import EvolutionState
from train.job import Job
from train.report import Report
from train.run import best_step
from train.saving import Saver
from train.stop import GroupStop, StopSignal
from train.together import Silent


def train(job: Job, report: Report | Silent, stop: StopSignal) -> EvolutionState:
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
        make = job.snapshot(state)
        if saver is None or make is None:
            return  # another process writes it
        if job.history:
            job.history.seal()
        saver.save(state.step, make, report.scores, announced)

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
            report.taken()
            job.record(state, statistics)
            if pending:
                report.step(job, *pending)
            pending = (state.step, statistics)
            best = False
            if state.step % evaluate_every == 0 or state.step == steps:
                report.step(job, *pending)
                pending = None
                report.evaluate(job, state)
                best = job.agreed(best_step(report.scores, report.scores) == state.step)
            asked, due = stop.take_save(), saver is not None and saver.due
            if due and isinstance(stop, GroupStop):
                stop.ask_save()  # the others have to take part, and learn so with the next step
                due = False
            if state.step % checkpoint_every == 0 or state.step == steps or best or asked or due:
                save(asked)
        if stop.requested and state.step < steps:
            save()
        elif pending:
            report.step(job, *pending)
    return state


@contextlib.contextmanager
def make_saver(job: Job, report: Report | Silent) -> Iterator[Saver | None]:
    """What writes the job's checkpoints, each after the metrics that lead up to it; None where another process
    does."""
    if isinstance(report, Silent):
        yield None
        return
    last = job.state.step if job.resumed else None
    request = job.request
    before = [*job.before_checkpoint, report.metrics.sync]
    with Saver(job.run, request.keep, request.keep_every, report.warn, before, last) as saver:
        if job.cluster is not None:
            job.cluster.say_saved(lambda: job.run.checkpoint_path(saver.last) if saver.last else None)
        yield saver
