"""The run directory: what a training run leaves on disk, and how a command finds it.

runs/<name>/config.json                           the resolved configuration; its presence makes it a run
runs/<name>/tokenizer.*                           the tokenizer's files
runs/<name>/data.json                             what tells whether a corpus has changed, see `train.text`
runs/<name>/metrics.jsonl                         see `train.metrics`
runs/<name>/tensorboard/                          see `train.tracking`
runs/<name>/checkpoints/step-00001000.safetensors see `intlm.checkpoint`
runs/<name>/history/step-00000000.history         see `intlm.history`
runs/<name>/lock                                  while a process trains, see `train.lock`
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from intlm.checkpoint import replace_file
from intlm.errors import LONGEST_SHOWN, DamagedError, InputError, brief
from intlm.untrusted import parse_json, read_file
from train.metrics import read_metrics, scores_of

RUNS = Path("runs")  # below the current directory
CHECKPOINT_NAME = re.compile(r"step-([0-9]+)\.safetensors")


DATA = "data.json"
LARGEST_CONFIG = 1 << 20
LARGEST_DATA = 256 << 20
"""Bytes of `data.json`: the fingerprints of about two million files."""
CHECKOUTS = "checkouts"

Read = TypeVar("Read")


def encode_fingerprints(fingerprints: dict[str, Any]) -> bytes:
    """The content of `data.json`."""
    return (json.dumps(fingerprints, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Run:
    """A run directory with its configuration. Made by `Run.create` or `Run.open`.

    `directory`: the run's own directory, `runs/<name>`.
    `config`: the resolved configuration, as read from JSON (lists, no tuples); nested dicts.
    """

    directory: Path
    config: dict[str, Any]

    @classmethod
    def create(
        cls, directory: Path, config: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> "Run":
        """Make the run `directory` with `config` (JSON-able) and further `files` (name -> content).

        `config.json` is written last: a directory that has one has everything else too. Raises `InputError`
        where the directory is a run already or cannot be written.
        """
        config_path = directory / "config.json"
        if config_path.exists():
            raise InputError(f"{directory}: is a run already; choose another name or resume it")
        try:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{directory}: cannot be made a run: {error.strerror or error}") from error
        for name, content in (files or {}).items():
            replace_file(directory / name, [content])
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        replace_file(config_path, [text.encode()])
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """The run at `directory`. Raises `InputError` where there is none or its `config.json` is damaged."""
        config_path = directory / "config.json"
        if not directory.is_dir():
            raise InputError(f"{directory}: no such run directory; `intlm train` makes a run")
        try:
            config = parse_json(read_file(config_path, LARGEST_CONFIG))
        except FileNotFoundError:
            raise InputError(f"{directory}: no config.json; `intlm train` makes a run") from None
        except OSError as error:
            raise InputError(f"{config_path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise InputError(f"{config_path}: damaged: {error}") from error
        if not isinstance(config, dict):
            raise InputError(f"{config_path}: damaged: not a JSON object")
        return cls(directory, config)

    @property
    def name(self) -> str:
        """The directory's last part."""
        return self.directory.resolve().name

    @property
    def fingerprints(self) -> Any:
        """What `data.json` holds; None where it is missing or damaged."""
        try:
            return parse_json(read_file(self.directory / DATA, LARGEST_DATA))
        except (InputError, OSError, ValueError):
            return None

    def keep_fingerprints(self, fingerprints: dict[str, Any]) -> None:
        """Write `data.json`. Raises `InputError` where that cannot be done."""
        replace_file(self.directory / DATA, [encode_fingerprints(fingerprints)])

    @property
    def metrics_path(self) -> Path:
        """The file for `train.metrics.MetricsFile`."""
        return self.directory / "metrics.jsonl"

    @property
    def tensorboard_directory(self) -> Path:
        """The directory for `train.tracking.Tracker`."""
        return self.directory / "tensorboard"

    @property
    def history_directory(self) -> Path:
        """The directory for `intlm.history.Recorder`."""
        return self.directory / "history"

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` training steps belongs."""
        return self.directory / "checkpoints" / f"step-{step:08d}.safetensors"

    def checkout_path(self, step: int) -> Path:
        """Where the weights after `step` steps belong that were rebuilt from the history."""
        return self.directory / CHECKOUTS / f"step-{step:08d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, oldest step first; empty where there are none."""
        found = []
        for path in (self.directory / "checkpoints").glob("step-*.safetensors"):
            if match := CHECKPOINT_NAME.fullmatch(path.name):
                found.append((int(match[1]), path))
        return [path for _, path in sorted(found)]

    def prune(self, keep: int, keep_every: int = 0, scores: Mapping[int, float] | None = None) -> None:
        """Delete all checkpoints but the newest `keep`, every `keep_every`-th step's (0: none), and the best.

        `scores`: held-out bits per byte by step, see `best_step`. The newest stays even where `keep` is less
        than 1. Raises `InputError` where one cannot be removed.
        """
        paths = self.checkpoints()
        best = best_step(scores or {}, map(step_of, paths))
        for path in paths[: -max(keep, 1)]:
            step = step_of(path)
            if step == best or (keep_every and step % keep_every == 0):
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{path}: cannot be removed: {error.strerror or error}") from error


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its file's name. Raises `ValueError` for another name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} has no name of a checkpoint")
    return int(match[1])


def best_step(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """Of `steps`, the one with the lowest score, the earliest of equals; None where none has a score."""
    found = [(scores[step], step) for step in steps if step in scores]
    return min(found)[1] if found else None


def read_newest(paths: Iterable[Path], read: Callable[[Path], Read]) -> tuple[Path, Read, list[DamagedError]]:
    """The first of `paths` (checkpoints, the newest first) that `read` finds whole, and what it makes of it.

    Also the damages of those before it. Raises `DamagedError` where all are damaged, and whatever else `read`
    raises: what is not damaged, but does not fit, is not passed over.
    """
    damages: list[DamagedError] = []
    for path in paths:
        try:
            return path, read(path), damages
        except DamagedError as error:
            damages.append(error)
    raise DamagedError("; ".join(map(str, damages)))


def resolve(name: str) -> Path:
    """The run directory that `name` means: a name in `runs`, a run directory or one of its checkpoint files.

    A name in `runs` comes first; write `./NAME` for a directory here. Raises `InputError`, with the nearest
    names, where there is no such run.
    """
    try:
        return _resolve(name)
    except OSError as error:  # such as a name that is too long
        raise InputError(f"RUN: {name!r}: {error.strerror}") from error


def _resolve(name: str) -> Path:
    for path in (RUNS / name, Path(name)):
        if (path / "config.json").is_file():
            return path
    path = Path(name)
    if path.is_file():
        directory = path.absolute().parent.parent
        if (
            path.absolute().parent.name in ("checkpoints", CHECKOUTS)
            and (directory / "config.json").is_file()
        ):
            return directory
        raise InputError(
            f"RUN: {name!r} is not a checkpoint of a run (runs/NAME/checkpoints/step-*.safetensors)"
        )
    for directory in (RUNS / name, path):
        if name and directory.is_dir():
            raise InputError(f"RUN: {str(directory)!r} has no config.json; `intlm train` makes a run")
    names = [config.parent.name for config in RUNS.glob("*/config.json")]
    if not names:
        raise InputError(f"RUN: no run {name!r}, and no other in {RUNS}/; `intlm train` makes one")
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"{RUNS}/ has {len(names)}, {min(names)} for one"
    raise InputError(f"RUN: no run {name!r}; {hint}")


def find_checkpoint(name: str) -> tuple[Run, list[Path]]:
    """The run that `name` means (see `resolve`) and the checkpoints to take, the first that is whole.

    These are the checkpoint that `name` is, or that RUN@best or RUN@STEP names, or else all of the run's, the
    newest first. Raises `InputError` where there is none.
    """
    directory, mark = _marked(name)
    run = Run.open(directory)
    paths = run.checkpoints()
    steps = [step_of(path) for path in paths]
    path = Path(name).absolute()
    if not mark and path.is_file() and path.parent.parent == run.directory:
        return run, [path]
    if not paths:
        raise InputError(f"RUN: {name!r} has no checkpoint yet; `intlm train` writes one")
    if not mark:
        return run, paths[::-1]
    step = best_step(scores_of(read_metrics(run.metrics_path)), steps) if mark == "best" else int(mark)
    if step not in steps:
        what = "whose step has been evaluated" if mark == "best" else f"of step {mark}"
        raise InputError(f"RUN: {name!r}: no checkpoint {what} (there are {', '.join(map(str, steps))})")
    return run, [paths[steps.index(step)]]


def _marked(name: str) -> tuple[Path, str]:
    """The run directory that `name` means, and what follows its last @: `best`, a step, or nothing."""
    run, _, mark = name.rpartition("@")
    if run and re.fullmatch("best|[0-9]{1,20}", mark):
        try:
            return resolve(name), ""  # a name that happens to have an @
        except InputError:
            return resolve(run), mark
    return resolve(name), ""


def differences(
    old: dict[str, Any], new: dict[str, Any], has: str = "run has", says: str = "command line says"
) -> list[str]:
    """One line for each key in which the run's configuration `old` and the command line's `new` differ.

    Keys of nested dicts are joined by dots. Values are compared as JSON has them: a tuple is a list, but true
    is not 1. Empty where the two agree. What is long is cut.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{brief('.'.join(part[:LONGEST_SHOWN] for part in path))}: {has} {brief(before.get(path, 'nothing'))}, "
        f"{says} {brief(after.get(path, 'nothing'))}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _leaves(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every value in nested dicts that is no dict (or an empty one), as (keys from the outermost in, JSON)."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), json.dumps(value)
