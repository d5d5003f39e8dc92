"""What the processes of a run do together before and between its steps.

Process 0 is `train.job.prepare`, which has the run's directory; the others (`join`) need the text and what
process 0 tells them. Each keeps the tokens and the recurrent states of its own pairs, and everything else whole.
"""

import base64
import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from intlm.config import EggrollConfig
from intlm.engine.distributed import EXCHANGES, DistributedEngine, share
from intlm.engine.engine import make_engine
from intlm.errors import InputError
from intlm.evolution import EvolutionState, zeros
from tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from train.cluster import Cluster, GroupLanes, code_digests
from train.config import RunConfig
from train.run import Run, differences
from train.stream import Stream
from train.text import Text, load_text

if TYPE_CHECKING:
    from train.job import Job, Request

EXCHANGE_TRIALS = 3

# --- shares -------------------------------------------------------------------------------------------------


def own_pairs(cluster: Cluster, config: EggrollConfig, process: int | None = None) -> slice:
    """The pairs of a process, this one by default: those that read its lanes."""
    number = cluster.process if process is None else process
    first, count = share(config.lanes, cluster.processes, number)
    return slice(first * config.pairs_per_lane, (first + count) * config.pairs_per_lane)


def own_lanes(
    cluster: Cluster,
    config: EggrollConfig,
    stream: Stream,
    tokenizer: Tokenizer,
    lanes: int,
    segment: int,
    offset: int,
    column: int,
) -> GroupLanes:
    """The lanes of this process; see `Lanes`."""
    own = share(config.lanes, cluster.processes, cluster.process)
    made = GroupLanes(stream, tokenizer, lanes, segment, offset, column, own)
    made.cluster = cluster
    return made


def handed_out(cluster: Cluster, config: EggrollConfig, state: EvolutionState) -> EvolutionState:
    """Process 0's state, with the recurrent states of this process's pairs alone."""
    arrays = {name: cluster.hand_out(np.asarray(state.masters[name])) for name in sorted(state.masters)}
    scales = {name: cluster.hand_out(np.asarray(state.scales[name])) for name in sorted(state.scales)}
    whitening = {name: cluster.hand_out(np.asarray(value)) for name, value in sorted(state.whitening.items())}
    head_bias = cluster.hand_out(np.asarray(state.head_bias))
    own = own_pairs(cluster, config)
    recurrent = np.asarray(state.recurrent)[own].copy()
    if state.step:
        # Each process's in turn, so that nobody has to hold all of them.
        for process in range(1, cluster.processes):
            whole = np.asarray(state.recurrent)[own_pairs(cluster, config, process)]
            rows = cluster.hand_out(whole)
            if process == cluster.process:
                recurrent = rows
    return EvolutionState(
        {name: arrays[name] for name in state.masters},
        head_bias,
        recurrent,
        {name: scales[name] for name in state.scales},
        whitening,
        state.step,
    )


def collected(cluster: Cluster, config: EggrollConfig, state: EvolutionState) -> EvolutionState | None:
    """The state with the recurrent states of all pairs, in process 0; None in the others."""
    pairs = [own_pairs(cluster, config, process) for process in range(cluster.processes)]
    rows = cluster.collect(np.asarray(state.recurrent), [part.stop - part.start for part in pairs])
    return None if rows is None else dataclasses.replace(state, recurrent=rows)


# --- what is exchanged ----------------------------------------------------------------------------------------


def settled_exchange(cluster: Cluster, engine: DistributedEngine, config: RunConfig) -> str:
    """What to exchange, where it was left open: what takes less time here, by process 0's clock.

    It decides about speed alone: the result is the same to the last bit.
    """
    if cluster.exchange != "auto":
        return cluster.exchange
    if config.eggroll.estimator != "weight":
        return "votes"
    key, size = np.zeros(2, np.uint32), config.model.weights
    embedding = config.model.vocabulary * config.model.width
    fitness = np.zeros(config.eggroll.pairs, np.int8)

    def recompute() -> None:
        for votes in engine.fitness_votes(key, fitness).values():
            np.asarray(votes)
        cluster.total([np.zeros(embedding + config.eggroll.pairs, np.int32)])

    seconds = []
    for work in (lambda: cluster.total([np.zeros(size, np.int32)]), recompute):
        work()  # what it needs is made: memory, on XLA the compiled program
        cluster.tell()  # waits until all are there
        started = time.perf_counter()
        for _ in range(EXCHANGE_TRIALS):
            work()
        seconds.append(time.perf_counter() - started)
    chosen = str(cluster.tell(EXCHANGES[seconds.index(min(seconds))]))
    by_votes, by_fitness = (1e3 * each / EXCHANGE_TRIALS for each in seconds)
    cluster.note = (
        f"processes exchange {chosen}: a sum of votes takes {by_votes:.1f} ms here; one of fitness, "
        f"with the votes made of it, {by_fitness:.1f} ms"
    )
    return chosen


# --- agreement ----------------------------------------------------------------------------------------------


def lead(cluster: Cluster, request: "Request", config: RunConfig, tokenizer: Tokenizer) -> None:
    """Process 0: tell the others what is trained, before anything is made."""
    _check_lanes(cluster, config.eggroll)
    if cluster.exchange == "fitness" and config.eggroll.estimator != "weight":
        raise InputError(
            f"--exchange fitness: takes estimator=weight, this run has estimator={config.eggroll.estimator} "
            "(accepted: votes, auto)"
        )
    with tempfile.TemporaryDirectory() as home:
        tokenizer.save(Path(home))
        files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in Path(home).iterdir()}
    cluster.tell(
        {
            "code": code_digests(),
            "config": config.as_dict(),
            "tokenizer": files,
            "directory": str(request.directory),
            "exchange": cluster.exchange,
            "evaluate_every": request.evaluate_every,
            "checkpoint_every": request.checkpoint_every,
        }
    )


def agree(cluster: Cluster, text: Text) -> None:
    """All have the text of process 0, or InputError; returns when all have said so."""
    mine = {"digests": text.digests, "files": _without_times(text.fingerprints())}
    first = cluster.tell(mine)
    if found := differences(first, mine, "process 0 has", "this process has"):
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(f"--data: not the text of process 0: {'; '.join(found[:3])}{more}")
    cluster.gather(None)


def join(request: "Request", say: Any, cluster: Cluster) -> "Job":
    """The job of a process that is not the first. Raises InputError."""
    from eval.bits import Evaluator
    from train.job import Job, configuration, make_evolution, make_lanes, plan_steps
    from train.text import evaluated

    first = cluster.tell()
    _check_code(first["code"])
    with tempfile.TemporaryDirectory() as home:
        for name, content in first["tokenizer"].items():
            (Path(home) / name).write_bytes(base64.b64decode(content))
        tokenizer = load_tokenizer(Path(home))
    kept = RunConfig.from_dict(first["config"], "the configuration of process 0")
    asked = kept.tokenizer if request.tokenizer is None else open_tokenizer(request.tokenizer).name
    config = configuration(request, kept, tokenizer, asked)
    _check_lanes(cluster, config.eggroll)
    cluster.exchange = first["exchange"]
    request = dataclasses.replace(
        request, evaluate_every=first["evaluate_every"], checkpoint_every=first["checkpoint_every"]
    )
    text = load_text(config.text)
    agree(cluster, text)
    engine = make_engine(request.engine, config.model, config.eggroll, request.chunk, request.threads)
    state = zeros(config.model, config.eggroll)
    if not config.steps:
        lanes = make_lanes(config, text, tokenizer, None, cluster)
        plan_steps(config, engine, None, state, lanes.next_segment(), say, cluster)
        lanes.close()
    start = cluster.tell()
    cluster.say_saved(lambda: start["saved"])
    config = dataclasses.replace(config, steps=start["steps"])
    lanes = make_lanes(config, text, tokenizer, start["position"], cluster)
    state = handed_out(cluster, config.eggroll, dataclasses.replace(state, step=start["step"]))
    return Job(
        request=request,
        run=Run(Path(first["directory"]), config.as_dict()),
        config=config,
        tokenizer=tokenizer,
        text=text.summary(),
        digests=text.digests,
        engine=engine,
        evolution=make_evolution(engine, config, config.steps, cluster),
        evaluator=Evaluator(engine, config.model, evaluated(text, tokenizer)),
        lanes=lanes,
        state=state,
        baselines={},
        resumed=start["step"] > 0,
        notes=[],
        history=None,
        cluster=cluster,
    )


def follow(request: "Request", stop: Any, cluster: Cluster) -> bool:
    """Train as a process that is not the first; whether the run is done."""
    from train.loop import train

    job = join(request, lambda line: None, cluster)
    with contextlib.closing(job.lanes):
        state = train(job, Silent(), stop) if job.state.step < job.config.steps else job.state
    return state.step >= job.config.steps


class Silent:
    """What the other processes report: nothing."""

    held_out = None
    scores: ClassVar[dict[int, float]] = {}

    def taken(self) -> None:
        """See `Report.taken`."""

    def step(self, *values: Any) -> None:
        """See `Report.step`."""

    def log(self, *values: Any) -> None:
        """See `Report.log`."""

    def evaluate(self, *values: Any) -> None:
        """See `Report.evaluate`."""

    def __enter__(self) -> "Silent":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""


def _check_lanes(cluster: Cluster, config: EggrollConfig) -> None:
    if cluster.processes > config.lanes:
        raise InputError(
            f"--processes {cluster.processes}: must be at most {config.lanes}, the lanes of text of a population "
            f"of {config.population} (pairs_per_lane={config.pairs_per_lane})"
        )


def _check_code(theirs: dict[str, str]) -> None:
    mine = code_digests()
    for name in sorted(theirs.keys() | mine.keys()):
        if theirs.get(name) != mine.get(name):
            raise InputError(f"this process has another version of intlm than process 0: {name} differs")


def _without_times(value: Any) -> Any:
    """A fingerprint without the times at which files were changed: copies on other hosts have others."""
    if not isinstance(value, dict):
        return value
    return {name: _without_times(inner) for name, inner in value.items() if name != "modified_ns"}
