"""A training job: everything that the loop needs, from what a person asked for."""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from eval.baselines import Baselines, baselines
from eval.bits import Evaluator
from intlm import checkpoint, fixedpoint, model, whitening
from intlm.checkpoint import Checkpoint, unused_name
from intlm.eggroll import Statistics
from intlm.engine.distributed import DistributedEngine
from intlm.engine.engine import Engine, make_engine
from intlm.errors import DamagedError, InputError, brief, shown
from intlm.evolution import Evolution, EvolutionState, initial, zeros
from intlm.history import Recorder
from intlm.trouble import Warn, warn_plainly
from intlm.untrusted import parse_json, read_file
from tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, open_tokenizer
from train import together
from train.cluster import Cluster
from train.config import RunConfig, TextConfig, format_data, parse_data, resolve_config
from train.corpus import SourceUnavailable
from train.lanes import Lanes
from train.lock import LOCK, Lock, is_ours, locked
from train.run import CHECKOUTS, DATA, RUNS, Run, differences, encode_fingerprints, read_newest
from train.text import Text, evaluated, load_text

DEFAULT_PRESET = "small"
DEFAULT_MINUTES = "5"
DEFAULT_HISTORY = 1000
"""Disk for the history, in units of 10^6 bytes."""
CALIBRATION_SECONDS = 3
LONGEST_RUN = (1 << 31) - 1
"""Steps in a run at most: the step is a 32-bit counter of the noise."""
EVALUATIONS = 20
"""Evaluations and checkpoints in a run, where nothing else is asked for."""

LARGEST_BASELINES = 1 << 16
"""Bytes of `baselines.json`."""
LARGEST_BASELINE = 1 << 62

RUN_FILES = {"baselines.json", "checkpoints", "config.json", DATA, "tokenizer.json", "tokenizer.model"}
"""What a run is made of before its first step."""


@dataclass(frozen=True)
class Request:
    """What a person asked of `intlm train`; None and empty where nothing was said."""

    preset: str | None = None
    run: str | None = None
    data: tuple[str, ...] = ()
    held_out: str | None = None
    text_field: str | None = None
    max_documents: int | None = None
    accept_changed_data: bool = False
    tokenizer: str | None = None
    steps: int | None = None
    minutes: str | None = None
    engine: str = "auto"
    chunk: int = 0
    threads: int | None = None
    settings: tuple[str, ...] = ()
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 3
    keep_every: int = 0
    history: int = DEFAULT_HISTORY

    def __post_init__(self) -> None:
        """Raise InputError for counts out of range and for steps and minutes at once."""
        if self.steps is not None and self.minutes is not None:
            raise InputError("--steps and --minutes: give one of the two")
        if self.run in ("", ".", ".."):
            raise InputError(f"--run {self.run!r}: is no name (a directory of yours is given with a slash)")
        if self.steps is not None and not 1 <= self.steps <= LONGEST_RUN:
            raise InputError(f"--steps {self.steps}: must be from 1 to {LONGEST_RUN}")
        if self.minutes is not None:
            _minutes(self.minutes)
        for name in ("chunk", "evaluate_every", "checkpoint_every", "keep_every"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        if self.keep < 1:
            raise InputError(f"--keep {self.keep}: must be 1 or more")
        if self.history < 0:
            raise InputError(f"--history {self.history}: must be 0 (none) or more")

    @property
    def directory(self) -> Path:
        """The run directory: a name below `runs`, or a path as it is."""
        name = self.run or self.preset or DEFAULT_PRESET
        return Path(name) if "/" in name else RUNS / name

    @property
    def decides(self) -> bool:
        """Whether anything was said that decides the run's bits."""
        said = (
            self.preset,
            self.held_out,
            self.text_field,
            self.max_documents,
            self.tokenizer,
            self.steps,
            self.minutes,
        )
        return bool(self.settings or self.data) or any(value is not None for value in said)


@dataclass
class Job:
    """A run ready to go on. `state` and `lanes` are where it stands; `notes` are for a person to read once.

    `before_checkpoint`: called when a checkpoint is on disk, right before it is seen; see `Saver`.
    """

    request: Request
    run: Run
    config: RunConfig
    tokenizer: Tokenizer
    text: str
    digests: dict[str, str]
    engine: Engine
    evolution: Evolution
    evaluator: Evaluator
    lanes: Lanes
    state: EvolutionState
    baselines: dict[str, float]
    resumed: bool
    notes: list[str]
    history: Recorder | None
    before_checkpoint: list[Callable[[], None]] = field(default_factory=list)
    cluster: Cluster | None = None

    def every(self, asked: int) -> int:
        """Steps between two events that happen every `asked` steps, or `EVALUATIONS` times a run."""
        return asked or -(-self.config.steps // EVALUATIONS)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the history of the steps that are taken inside."""
        if self.history is None:
            yield
            return
        self.history.start(self.state.step, self.state.masters, self.weights(self.state))
        try:
            yield
        finally:
            self.history.close()

    def record(self, state: EvolutionState, statistics: Statistics) -> None:
        """Take a step into the history; `statistics` are its own."""
        if self.history is not None:
            fitness = statistics.get("fitness")
            self.history.append(state.step, state.masters, self.weights(state), fitness)

    def agreed(self, said: bool) -> bool:
        """What the process that writes the run says; all of several have to ask."""
        return bool(self.cluster.tell(said)) if self.cluster is not None else said

    def weights(self, state: EvolutionState) -> model.Parameters:
        """The int8 weights of a state, and the head bias."""
        return self.evolution.parameters(state.masters, state.head_bias)

    def snapshot(self, state: EvolutionState) -> Callable[[], Checkpoint] | None:
        """What makes the checkpoint of `state`, which the lanes stand behind: now or later, in any thread.

        Of several processes all have to call this; None in those that do not write.
        """
        if self.cluster is not None:
            whole = together.collected(self.cluster, self.config.eggroll, state)
            if whole is None:
                return None
            state = whole
        meta = {
            "config": self.config.shown(),
            "step": state.step,
            "position": copy.deepcopy(self.lanes.position),
            "tokenizer": self.tokenizer.digest,
            "text": self.digests,
        }

        def make() -> Checkpoint:
            # No step writes to the arrays of another.
            arrays = {f"master.{name}": np.asarray(value) for name, value in state.masters.items()}
            arrays |= {f"scale.{name}": np.asarray(value) for name, value in state.scales.items()}
            arrays |= {f"whitening.{name}": np.asarray(value) for name, value in state.whitening.items()}
            arrays |= {
                "head_bias": np.asarray(state.head_bias),
                "recurrent": np.asarray(state.recurrent),
            }
            return Checkpoint(arrays, meta)

        return make


@contextlib.contextmanager
def claimed(request: Request) -> Iterator[Lock]:
    """Hold the lock of the run that `request` names, from before anything is read or written; see `locked`.

    Raises InputError where another process trains it, or where the directory is neither a run nor to become one.
    """
    _existing_run(request.directory)
    with locked(request.directory) as lock:
        yield lock


def prepare(request: Request, say: Any, cluster: Cluster | None = None) -> Job:
    """Open the run that `request` names (see `claimed`) and restore it, or make it. `say` tells a person a line.

    cluster: the processes that train it together, of which this is the first; see `train.together.join` for the
    others. A newest checkpoint that is damaged is set aside, and the one before is taken. Raises InputError; a
    run on disk is then as it was.
    """
    directory = request.directory
    run = _existing_run(directory)
    asked = open_tokenizer(request.tokenizer or ByteTokenizer.name)
    tokenizer = load_tokenizer(directory) if run else asked
    config = _configuration(request, run, tokenizer, asked.name)
    if cluster:
        together.lead(cluster, request, config, tokenizer)
    text = load_text(config.text)
    if cluster:
        together.agree(cluster, text)
    engine = make_engine(request.engine, config.model, config.eggroll, request.chunk, request.threads)
    evaluator = Evaluator(engine, config.model, evaluated(text, tokenizer))
    lanes = make_lanes(config, text, tokenizer, None, cluster)
    resumed = run is not None
    found = run.checkpoints()[::-1] if run else []
    if found:
        state = zeros(config.model, config.eggroll)  # a checkpoint has the values, and may lack the shapes
    else:
        state = initial(config.model, config.eggroll, text.counts(tokenizer))
    if not config.steps:
        steps = plan_steps(config, engine, evaluator, state, lanes.next_segment(), say, cluster)
        config = dataclasses.replace(config, steps=steps)
        lanes.rewind()
        if cluster:
            # At the same place as the others', who have none yet: before a chunk.
            lanes.close()
            lanes = make_lanes(config, text, tokenizer, None, cluster)
    if run:
        figures = _read_baselines(directory / "baselines.json")
    else:
        run, figures = _new_run(directory, config, text, tokenizer)
    _check_writable(directory)
    notes: list[str] = []
    if found:
        latest, state, lanes, notes = _restored(request, run, found, config, text, tokenizer, state, cluster)
    elif resumed:
        # Nothing has been made of the text yet.
        run.keep_fingerprints(text.fingerprints())
    if cluster:
        saved = str(latest) if found else None
        cluster.say_saved(lambda: saved)
        cluster.tell({"steps": config.steps, "step": state.step, "position": lanes.position, "saved": saved})
        state = together.handed_out(cluster, config.eggroll, state)
    evolution = make_evolution(engine, config, config.steps, cluster)
    history = None
    if request.history:
        meta = {"config": config.shown(), "tokenizer": tokenizer.digest, "text": text.digests}
        limit = request.history * 10**6
        history = Recorder(run.history_directory, config.model, config.eggroll, meta, limit)
    return Job(
        request=request,
        run=run,
        config=config,
        tokenizer=tokenizer,
        text=text.summary(),
        digests=text.digests,
        engine=engine,
        evolution=evolution,
        evaluator=evaluator,
        lanes=lanes,
        state=state,
        baselines=figures,
        resumed=bool(found),
        notes=notes,
        history=history,
        before_checkpoint=[] if history is None else [history.sync],
        cluster=cluster,
    )


def _new_run(
    directory: Path, config: RunConfig, text: Text, tokenizer: Tokenizer
) -> tuple[Run, dict[str, Any]]:
    """A directory of all that a run is made of before its first step, and its baselines."""
    figures = dataclasses.asdict(baselines(text.train, text.held_out))
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory)
    except OSError as error:
        raise InputError(f"--run {directory}: cannot be made: {error.strerror or error}") from error
    files = {
        "baselines.json": (json.dumps(figures, indent=2) + "\n").encode(),
        DATA: encode_fingerprints(text.fingerprints()),
    }
    return Run.create(directory, config.as_dict(), files), figures


def _restored(
    request: Request,
    run: Run,
    found: list[Path],
    config: RunConfig,
    text: Text,
    tokenizer: Tokenizer,
    like: EvolutionState,
    cluster: Cluster | None,
) -> tuple[Path, EvolutionState, Lanes, list[str]]:
    """The newest whole checkpoint, its state, lanes at its position, and what a person is told about it.

    found: all checkpoints, the newest first; like: a state of the same configuration. Damaged ones are set aside,
    once it is sure that the run goes on.
    """
    try:
        latest, (state, meta), damages = read_newest(
            found, lambda path: restore(path, config, tokenizer, like)
        )
    except DamagedError as error:
        raise InputError(
            f"{error}; no whole checkpoint is left to go on from: restore one, or name a new run with --run"
        ) from error
    position, notes = meta["position"], []
    changed = text.changes(run.fingerprints, meta["text"])
    if changed and not request.accept_changed_data:
        raise InputError(
            f"{changed[0]} since {latest} was written; restore it, go on all the same with "
            "--accept-changed-data, or start another run with --run"
        )
    try:
        if changed:
            notes += [f"{change}; going on, to other bits and scores of another text" for change in changed]
            position["sources"], lost = text.settled(position["sources"])
            notes += lost
        lanes = make_lanes(config, text, tokenizer, position, cluster)
    except SourceUnavailable:
        raise
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{latest}: its position is damaged: {error}") from error
    if changed:
        run.keep_fingerprints(text.fingerprints())
    if damages:
        notes.append(f"{'; '.join(map(str, damages))}; going on from {latest} instead")
    for path in found[: len(damages)]:
        _set_aside(path)
    return latest, state, lanes, notes


def _check_writable(directory: Path) -> None:
    """Make sure that checkpoints can be written. Raises InputError."""
    checkpoints = directory / "checkpoints"
    try:
        checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{checkpoints}: cannot be made: {error.strerror or error}") from error
    if not os.access(checkpoints, os.W_OK | os.X_OK):
        raise InputError(f"{checkpoints}: cannot be written: {os.strerror(errno.EACCES)}")


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is not kept in place of a good one. Raises InputError."""
    try:
        path.rename(unused_name(path, ".damaged"))
    except OSError as error:
        raise InputError(f"{path}: is damaged and cannot be renamed: {error.strerror or error}") from error


def _existing_run(directory: Path) -> Run | None:
    """The run at `directory`, or None where one can be made. Raises InputError where neither holds."""
    try:
        if (directory / "config.json").exists():
            return Run.open(directory)
        usable = not directory.exists() or (directory.is_dir() and _is_half_made(directory))
    except OSError as error:
        raise InputError(f"--run {directory}: {error.strerror or error}") from error
    if not usable:
        raise InputError(f"--run {directory}: exists and is no run (no config.json); choose another name")
    return None


def _is_half_made(directory: Path) -> bool:
    """Whether `directory` is empty, or what is left of a run that was cut short while it was made."""
    lock = directory / LOCK
    if lock.exists() and not is_ours(lock):
        return False
    names = {path.name.removesuffix(".tmp") for path in directory.iterdir()} - {LOCK}
    checkpoints = directory / "checkpoints"
    return not names or (names <= RUN_FILES and checkpoints.is_dir() and not any(checkpoints.iterdir()))


def make_lanes(
    config: RunConfig,
    text: Text,
    tokenizer: Tokenizer,
    position: dict[str, Any] | None,
    cluster: Cluster | None = None,
) -> Lanes:
    """Lanes at the start, or at a `Lanes.position`; of several processes, this one's."""
    eggroll = config.eggroll
    place = position or {"sources": None, "offset": 0, "column": 0}
    stream = text.stream(eggroll.seed, place["sources"])
    values = (stream, tokenizer, eggroll.lanes, eggroll.segment, place["offset"], place["column"])
    return Lanes(*values) if cluster is None else together.own_lanes(cluster, eggroll, *values)


def make_evolution(engine: Engine, config: RunConfig, steps: int, cluster: Cluster | None) -> Evolution:
    """Steps of a run of `steps`; of several processes, this one's part of them."""
    if cluster is not None:
        first = together.own_pairs(cluster, config.eggroll).start
        pairs, exchange = config.eggroll.pairs, cluster.exchange
        engine = DistributedEngine(engine, cluster.total, first, pairs, exchange)
        cluster.exchange = together.settled_exchange(cluster, engine, config)
        engine.exchange = cluster.exchange
    return Evolution(engine, config.model, config.eggroll, steps)


def restore(
    path: Path, config: RunConfig, tokenizer: Tokenizer, like: EvolutionState
) -> tuple[EvolutionState, dict[str, Any]]:
    """The state in a checkpoint, and its checked meta: `step`, `position` of the lanes, identity of the `text`.

    like: a state of the same configuration.

    Raises InputError, naming the file, where it is damaged, or of another configuration or tokenizer.
    """
    saved = _read_of_run(path, config, tokenizer, ("config", "text", "position"))
    meta = saved.meta
    wanted = {f"master.{name}": (value.shape, value.dtype) for name, value in like.masters.items()}
    wanted |= {f"scale.{name}": (value.shape, value.dtype) for name, value in like.scales.items()}
    wanted |= {f"whitening.{name}": (value.shape, value.dtype) for name, value in like.whitening.items()}
    for name in ("head_bias", "recurrent"):
        wanted[name] = (getattr(like, name).shape, getattr(like, name).dtype)
    checkpoint.expect(saved, wanted, path)
    arrays = saved.arrays
    for name, values in arrays.items():
        _check_range(name, values, path)
    state = EvolutionState(
        {name: arrays[f"master.{name}"] for name in like.masters},
        arrays["head_bias"],
        arrays["recurrent"],
        {name: arrays[f"scale.{name}"] for name in like.scales},
        {name: arrays[f"whitening.{name}"] for name in like.whitening},
        meta["step"],
    )
    return state, meta


RANGES = {
    "master": (-fixedpoint.MASTER_LIMIT, fixedpoint.MASTER_LIMIT),
    "head_bias": (-fixedpoint.LOGIT_LIMIT, fixedpoint.LOGIT_LIMIT),
    "recurrent": (-fixedpoint.WEIGHT_LIMIT, fixedpoint.WEIGHT_LIMIT),
    "scale.shift": (0, 30),
    "scale.difference": (1, 1 << 28),
    "whitening.covariance": (-whitening.COVARIANCE_LIMIT, whitening.COVARIANCE_LIMIT),
    "whitening.inverse": (-whitening.INVERSE_LIMIT, whitening.INVERSE_LIMIT),
}
"""What training can reach. Engines rely on it: a weight of -128 would be looked up beyond the end of a table."""


def _check_range(name: str, values: np.ndarray, path: Path) -> None:
    """Raise InputError where an array of a checkpoint holds a number that training cannot reach."""
    low, high = next(limits for kind, limits in RANGES.items() if name == kind or name.startswith(f"{kind}."))
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        raise InputError(
            f"{path}: array {name!r} holds {least if least < low else most} (accepted: {low} to {high})"
        )


def _read_of_run(path: Path, config: RunConfig, tokenizer: Tokenizer, parts: tuple[str, ...]) -> Checkpoint:
    """A file of a run with this configuration and tokenizer, whose meta has a step and these parts."""
    saved = checkpoint.read(path)
    meta = saved.meta
    if meta.get("tokenizer") != tokenizer.digest:
        raise InputError(f"{path}: was written with another tokenizer than the run's ({tokenizer.name})")
    for name in parts:
        if not isinstance(meta.get(name), dict):
            raise InputError(f"{path}: its meta lacks the {name}")
    if changed := differences(meta["config"], config.shown()):
        raise InputError(f"{path}: is of another configuration than the run's config.json ({changed[0]})")
    if type(meta.get("step")) is not int or meta["step"] < 0:
        raise InputError(f"{path}: its step, {shown(meta.get('step'))}, is no count")
    if meta["step"] > config.steps:
        raise InputError(f"{path}: its step, {shown(meta['step'])}, is past the run's {config.steps} steps")
    return saved


def write_checkout(path: Path, weights: model.Parameters, meta: dict[str, Any]) -> None:
    """Write the weights after a step, int8, with the meta of the history that they are from."""
    arrays = {name if name == "head_bias" else f"weight.{name}": value for name, value in weights.items()}
    checkpoint.write(path, Checkpoint(arrays, meta))


def _read_checkout(
    path: Path, config: RunConfig, tokenizer: Tokenizer
) -> tuple[model.Parameters, dict[str, Any]]:
    saved = _read_of_run(path, config, tokenizer, ("config", "text"))
    shapes = model.shapes(config.model)
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        f"weight.{name}": (shape, np.dtype(np.int8)) for name, shape in shapes.items()
    }
    wanted["head_bias"] = ((config.model.vocabulary,), np.dtype(np.int16))
    checkpoint.expect(saved, wanted, path)
    checkpoint.within(
        saved, {np.dtype(np.int8): fixedpoint.WEIGHT_LIMIT, np.dtype(np.int16): fixedpoint.LOGIT_LIMIT}, path
    )
    weights = {name.removeprefix("weight."): array for name, array in saved.arrays.items()}
    return weights, saved.meta


def load_model(
    run: Run, paths: list[Path], warn: Warn = warn_plainly
) -> tuple[RunConfig, Tokenizer, model.Parameters, dict[str, Any]]:
    """Configuration, tokenizer, int8 weights and meta of a checkpoint, or of a checkout of the history.

    paths: as `find_checkpoint` has them; the first that is not damaged is taken.
    """
    tokenizer, config = kept_config(run)
    if paths[0].parent.name == CHECKOUTS:
        weights, meta = _read_checkout(paths[0], config, tokenizer)
        return config, tokenizer, weights, meta
    like = zeros(config.model, config.eggroll)
    path, (state, meta), damages = read_newest(paths, lambda path: restore(path, config, tokenizer, like))
    if damages:
        warn(f"{'; '.join(map(str, damages))}; {path} is taken instead")
    return config, tokenizer, model.parameters(state.masters, state.head_bias), meta


def kept_config(run: Run) -> tuple[Tokenizer, RunConfig]:
    """The tokenizer and the configuration that a run has on disk. Raises InputError, naming the file."""
    tokenizer = load_tokenizer(run.directory)
    return tokenizer, _kept(run, tokenizer)


def _kept(run: Run, tokenizer: Tokenizer) -> RunConfig:
    """The configuration in a run's config.json. Raises InputError where nothing could be run with it."""
    path = run.directory / "config.json"
    config = RunConfig.from_dict(run.config, str(path))
    if not 1 <= config.steps <= LONGEST_RUN:
        raise InputError(f"{path}: key steps={shown(config.steps)}: must be from 1 to {LONGEST_RUN}")
    if config.model.vocabulary != tokenizer.vocabulary:
        raise InputError(
            f"{path}: key model.vocabulary={config.model.vocabulary}: "
            f"the run's tokenizer ({tokenizer.name}) has {tokenizer.vocabulary} tokens"
        )
    if config.tokenizer != tokenizer.name:
        said = brief(config.tokenizer)
        raise InputError(f"{path}: key tokenizer={said}: the run's tokenizer is {tokenizer.name}")
    return config


def _configuration(request: Request, run: Run | None, tokenizer: Tokenizer, asked: str) -> RunConfig:
    """The run's own configuration, checked against what was asked; or a new one. `asked`: for a tokenizer."""
    return configuration(request, _kept(run, tokenizer) if run else None, tokenizer, asked)


def configuration(request: Request, kept: RunConfig | None, tokenizer: Tokenizer, asked: str) -> RunConfig:
    """`kept`, the run's configuration, checked against what was asked; or a new one. `asked`: for a tokenizer."""
    if kept and not request.decides:
        return kept
    said: dict[str, Any] = {
        name: value
        for name in ("held_out", "text_field", "max_documents")
        if (value := getattr(request, name)) is not None
    }
    if request.data:
        said["data"] = tuple(format_data(*parse_data(data)) for data in request.data)
    text = TextConfig(**said)
    preset = request.preset or DEFAULT_PRESET
    config = resolve_config(preset, request.settings, text, tokenizer.vocabulary)
    config = dataclasses.replace(config, tokenizer=asked)
    if request.steps is not None:
        config = dataclasses.replace(config, steps=request.steps)
    else:
        config = dataclasses.replace(config, minutes=request.minutes or DEFAULT_MINUTES)
    if not kept:
        return config
    # The steps that minutes came to were measured once, and so were a run's length where none is asked for.
    if request.minutes is not None:
        config = dataclasses.replace(config, steps=kept.steps)
    elif request.steps is None:
        config = dataclasses.replace(config, steps=kept.steps, minutes=kept.minutes)
    if changed := differences(kept.shown(), config.shown()):
        raise InputError(
            f"{request.directory}: the run has another configuration: {'; '.join(changed)} "
            "(leave the flags out to resume it, or name a new run with --run)"
        )
    return config  # the same, but for passwords and signatures in URLs, which may have been renewed


def _minutes(text: str) -> Decimal:
    try:
        value = Decimal(text)
        if value.is_finite() and 0 < value <= 100_000:
            return value
    except InvalidOperation:
        pass
    raise InputError(f"--minutes {text}: must be a number above 0, up to 100000")


def plan_steps(
    config: RunConfig,
    engine: Engine,
    evaluator: Evaluator | None,
    state: EvolutionState,
    tokens: np.ndarray,
    say: Any,
    cluster: Cluster | None = None,
) -> int:
    """How many steps fill the minutes that were asked for, measured on this machine.

    This is the one place where a clock decides anything; the answer goes into the configuration, and the run
    is as repeatable as one with --steps. Of several processes it is the clock of the first; the others take part
    in the steps, have no `evaluator`, and their answer is of no use.
    """
    evolution = make_evolution(engine, config, 1 << 20, cluster)
    begun = time.perf_counter()
    if cluster:
        state = together.handed_out(cluster, config.eggroll, state)
    after, _ = evolution.step(state, tokens)  # compiles
    parameters = evolution.parameters(after.masters, after.head_bias)
    started = time.perf_counter()
    if evaluator:
        evaluator.score(parameters)
        started = time.perf_counter()
        evaluator.score(parameters)
    evaluation = time.perf_counter() - started
    if cluster:
        cluster.tell()  # waits until all are there
    steps, batch, started = 0, 1, time.perf_counter()
    while True:
        more = steps < 3 or time.perf_counter() - started < CALIBRATION_SECONDS
        if not (cluster.tell(more) if cluster else more):
            break
        for _ in range(batch):
            after, statistics = evolution.step(after, tokens)
            np.asarray(statistics["score"])
        steps += batch
        batch = 2 * batch if cluster else 1  # so that few of the seconds go into asking
    step = (time.perf_counter() - started) / steps
    left = float(_minutes(config.minutes)) * 60 - (time.perf_counter() - begun) - evaluation * EVALUATIONS
    planned = min(max(1, int(left / step)), LONGEST_RUN)
    rate = config.eggroll.population * config.eggroll.segment / step
    say(f"{config.minutes} minutes are about {planned} steps here ({rate:,.0f} member-tokens/s)")
    return planned


def _read_baselines(path: Path) -> dict[str, float]:
    """The baselines stored with the run; they are for people, so that a missing or damaged file is no error."""
    try:
        values = parse_json(read_file(path, LARGEST_BASELINES))
    except (InputError, OSError, ValueError):
        return {}
    known = {item.name for item in dataclasses.fields(Baselines)}
    if not isinstance(values, dict) or not known >= values.keys():
        return {}
    fits = all(type(value) in (int, float) and 0 <= value <= LARGEST_BASELINE for value in values.values())
    return values if fits else {}
