"""Whether everything that a run has on disk is what was written."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intlm.errors import DamagedError, InputError
from intlm.evolution import zeros
from intlm.history import TornError, largest_payload, records, segments
from intlm.untrusted import parse_json, read_file
from train.job import kept_config, restore
from train.metrics import check_metrics
from train.run import DATA, LARGEST_DATA, Run

OK, NOTE, DAMAGED = "ok", "note", "damaged"


@dataclass(frozen=True)
class Finding:
    """What was found in one file. status: `ok`, `note` (odd, but no harm to the run) or `damaged`."""

    file: str
    status: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """What was found in a run."""

    run: str
    files: tuple[Finding, ...]

    @property
    def damaged(self) -> int:
        """How many files are."""
        return sum(each.status == DAMAGED for each in self.files)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"run": self.run, "damaged": self.damaged, "files": [asdict(each) for each in self.files]}

    def table(self) -> str:
        """For a terminal."""
        width = max(len(each.file) for each in self.files)
        lines = [f"{each.file:{width}s}  {each.status:7s}  {each.detail}" for each in self.files]
        return "\n".join([*lines, f"{self.run}: {len(self.files)} files, {self.damaged} damaged"])


def check(directory: Path) -> Findings:
    """Read all files of the run in `directory`, and change none.

    A run may be trained meanwhile. Raises InputError where the directory is no run.
    """
    if not (directory / "config.json").exists():
        raise InputError(f"{directory}: no config.json; `intlm train` makes a run")
    return Findings(str(directory), tuple(_files(directory)))


def _files(directory: Path) -> Iterator[Finding]:
    def found(path: Path, read: Callable[[], str]) -> Finding:
        name = str(path.relative_to(directory))
        try:
            return Finding(name, OK, read())
        except InputError as error:
            return Finding(name, DAMAGED, " ".join(str(error).splitlines()))

    config_path = directory / "config.json"
    try:
        run = Run.open(directory)
        tokenizer, config = kept_config(run)
    except InputError as error:
        # Which of the two it is, the message says. Without them nothing can be said of checkpoints.
        damaged = "tokenizer" if "tokenizer" in str(error) and "config.json" not in str(error) else "config"
        yield Finding(f"{damaged}.json", DAMAGED, " ".join(str(error).splitlines()))
        return
    yield Finding(config_path.name, OK, f"{config.steps:,} steps")
    yield Finding("tokenizer.json", OK, f"{tokenizer.name}, {tokenizer.vocabulary:,} tokens")
    yield found(directory / DATA, lambda: _objects(directory / DATA, "fingerprint of {} corpora"))
    baselines = directory / "baselines.json"
    yield found(baselines, lambda: _objects(baselines, "{} figures"))
    if run.metrics_path.exists():
        name = run.metrics_path.name
        try:
            lines, torn = check_metrics(run.metrics_path)
            status, detail = (
                (NOTE, ", the last one torn (left out by the next `intlm train`)") if torn else (OK, "")
            )
            yield Finding(name, status, f"{lines:,} lines{detail}")
        except InputError as error:
            yield Finding(name, DAMAGED, str(error))
    like = zeros(config.model, config.eggroll)

    def whole(path: Path) -> str:
        try:
            _, meta = restore(path, config, tokenizer, like)
        except DamagedError:
            if not path.exists():
                return "dropped while this was read"  # a process trains
            raise
        if run.checkpoint_path(meta["step"]).name != path.name:
            raise InputError(f"{path}: is of step {meta['step']}")
        return f"step {meta['step']:,}, {path.stat().st_size:,} bytes"

    for path in run.checkpoints():
        yield found(path, lambda path=path: whole(path))  # type: ignore[misc]
    largest = largest_payload(config.model, config.eggroll)
    history = segments(run.history_directory)
    for number, (_, path) in enumerate(history):
        yield _segment(path, str(path.relative_to(directory)), largest, number == len(history) - 1)
    for path in sorted([*directory.glob("*.damaged*"), *(directory / "checkpoints").glob("*.damaged*")]):
        yield Finding(str(path.relative_to(directory)), NOTE, "was set aside as damaged; not used")
    for path in sorted(directory.rglob("*.tmp")):
        yield Finding(str(path.relative_to(directory)), NOTE, "was being written; not used")


def _segment(path: Path, name: str, largest: int, last: bool) -> Finding:
    """The records of a segment of the history against their checksums; `verify` replays them as well."""
    first, reached = None, 0
    try:
        for record in records(path, largest):
            if first is not None and record.step != reached + 1:
                raise InputError(f"{path}: damaged: step {record.step} follows on step {reached}")
            first, reached = record.step if first is None else first, record.step
    except TornError as error:
        if last:
            detail = f"steps {first:,} to {reached:,}, the next one torn (left out by the next `intlm train`)"
            return Finding(name, NOTE, detail)
        return Finding(name, DAMAGED, str(error))
    except InputError as error:
        return Finding(name, DAMAGED, str(error))
    return Finding(name, OK, f"steps {first:,} to {reached:,}, {path.stat().st_size:,} bytes")


def _objects(path: Path, what: str) -> str:
    """The number of keys of a JSON object. Raises InputError."""
    try:
        values = parse_json(read_file(path, LARGEST_DATA))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: damaged: not a JSON object")
    return what.format(len(values))
