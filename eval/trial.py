"""A run that is made to be measured."""

from eval.throughput import seconds_of
from intlm.evolution import EvolutionState
from train.job import Job, Request, prepare


def try_out(request: Request) -> tuple[Job, EvolutionState, float]:
    """The job of a request, its state after a step, with which all is compiled, and the seconds of a step."""
    job = prepare(request, lambda line: None)
    state, _ = job.evolution.step(job.state, job.lanes.next_segment())
    return job, state, seconds_of(lambda: job.evolution.step(state, job.lanes.next_segment()), 0.5)
