"""The history of a run read again: the weights after any step, and whether the log leads to the checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intlm import checkpoint, fixedpoint, model, noise
from intlm.engine.engine import Engine
from intlm.errors import InputError, shown
from intlm.history import Record, TornError, Track, largest_payload, records, segments
from intlm.model import Parameters
from train.config import RunConfig
from train.run import Run, differences


def tracks(
    path: Path, config: RunConfig, engine: Engine, seen: Callable[[int], None] = lambda size: None
) -> Iterator[tuple[int, Track]]:
    """The steps of a segment and the weights after each, the base first. The track is the same one, going on.

    seen: told the bytes of each record. Raises InputError as `intlm.history.records` does, and for a record that
    is out of order, does not fit the model, or a base of another configuration.
    """
    track: Track | None = None
    before = 0
    for number, record in enumerate(records(path, largest_payload(config.model, config.eggroll))):
        if track is None:
            track = _base(path, record, config)
        elif record.step != before + 1:
            raise InputError(f"{path}: damaged: record {number} is of step {record.step}, not {before + 1}")
        else:
            try:
                track.advance(record.step, record.payload, engine)
            except ValueError as error:
                raise InputError(f"{path}: damaged: record {number} does not fit: {error}") from error
        before = record.step
        seen(record.end - record.start)
        yield record.step, track


def _base(path: Path, record: Record, config: RunConfig) -> Track:
    saved = checkpoint.decode(record.payload, path)
    if saved.meta.get("step") != record.step or path.name != f"step-{record.step:08d}.history":
        raise InputError(f"{path}: damaged: its base is of step {shown(saved.meta.get('step'))}")
    if not isinstance(saved.meta.get("config"), dict):
        raise InputError(f"{path}: its base lacks the configuration")
    if changed := differences(saved.meta["config"], config.shown()):
        raise InputError(f"{path}: is of another configuration than the run's config.json ({changed[0]})")
    checkpoint.expect(saved, Track.expected(config.model, config.eggroll), path)
    checkpoint.within(
        saved,
        {np.dtype(np.int8): fixedpoint.WEIGHT_LIMIT, np.dtype(np.int16): fixedpoint.MASTER_LIMIT},
        path,
    )
    return Track(config.model, config.eggroll, config.steps, saved.arrays, saved.meta)


def weights_at(run: Run, config: RunConfig, step: int, engine: Engine) -> tuple[Parameters, dict[str, Any]]:
    """The weights after `step` steps, and the meta of the history with that step.

    Raises InputError where the history does not have them.
    """
    history = segments(run.history_directory)
    for first, path in reversed(history):
        if first > step:
            continue
        try:
            for reached, track in tracks(path, config, engine):
                if reached == step:
                    return track.parameters(), track.meta | {"step": step}
        except TornError:
            pass  # the steps after its last whole record are missing, as at any end
        break
    if not history:
        raise InputError(f"{run.directory}: has no history; `intlm train` with --history above 0 keeps one")
    raise InputError(f"--step {step}: is not in the run's history, which has {_ranges(run, config)}")


def _ranges(run: Run, config: RunConfig) -> str:
    """The steps that the history has, for a message."""
    spans: list[list[int]] = []
    largest = largest_payload(config.model, config.eggroll)
    for first, path in segments(run.history_directory):
        last = first
        try:
            for record in records(path, largest):
                last = record.step
        except InputError:
            pass  # so far it goes
        if spans and spans[-1][1] >= first:
            spans[-1][1] = max(last, spans[-1][1])
        else:
            spans.append([first, last])
    return ", ".join(f"{first} to {last}" for first, last in spans)


@dataclass
class Verdict:
    """What `verify` found. Steps are counted after the base of the first segment."""

    steps: int = 0
    bytes: int = 0
    first: int | None = None
    last: int = 0
    from_seed: bool = False
    checkpoints: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self)

    def lines(self, name: str) -> str:
        """For people."""
        begin = "the weights that the seed gives" if self.from_seed else "weights as the log has them"
        mean = self.bytes / max(1, self.steps)
        told = [
            f"{name}: steps {self.first} to {self.last}, {self.steps:,} replayed from {begin}; "
            f"{self.bytes:,} bytes, {mean:,.0f} a step",
            f"checkpoints that the log leads to, bit for bit: {', '.join(map(str, self.checkpoints)) or 'none'}",
            *(f"FAULT: {fault}" for fault in self.faults),
        ]
        return "\n".join(told)


def verify(
    run: Run, config: RunConfig, engine: Engine, seen: Callable[[int], None] = lambda size: None
) -> Verdict:
    """Replay the whole history and compare it with the seed's first weights and with each checkpoint.

    Raises InputError where there is no history; everything else that is wrong is a fault of the verdict.
    """
    verdict, before = Verdict(), None
    history = segments(run.history_directory)
    if not history:
        raise InputError(f"{run.directory}: has no history; `intlm train` with --history above 0 keeps one")
    paths = {int(path.stem.removeprefix("step-")): path for path in run.checkpoints()}
    for number, (first, path) in enumerate(history):
        start = verdict.steps
        try:
            for step, track in tracks(path, config, engine, seen):
                if step == first:
                    _compare_base(verdict, config, path, step, track, before)
                else:
                    verdict.steps += 1
                verdict.last, before = step, track
                if step in paths:
                    _compare_checkpoint(verdict, paths.pop(step), step, track)
        except InputError as error:
            if not (isinstance(error, TornError) and number == len(history) - 1):
                verdict.faults.append(str(error))
            if verdict.steps == start and number < len(history) - 1:
                before = None
        verdict.bytes += path.stat().st_size
    for step, path in paths.items():
        if verdict.first is not None and verdict.first <= step <= verdict.last:
            verdict.faults.append(f"{path}: the log has no step {step}")
    return verdict


def _compare_base(
    verdict: Verdict, config: RunConfig, path: Path, step: int, track: Track, before: Track | None
) -> None:
    """A segment's base against the end of the segment before, or what the seed gives."""
    if verdict.first is None:
        verdict.first = step
        if step == 0:
            masters = model.initial_masters(config.model, noise.seed_key(config.eggroll.seed))
            bias = track.arrays["head_bias"]
            fresh = model.parameters({name: np.asarray(m) for name, m in masters.items()}, bias)
            verdict.from_seed = _same(fresh, track.parameters())
            if not verdict.from_seed:
                verdict.faults.append(f"{path}: does not start with the weights that the run's seed gives")
    elif step != verdict.last:
        verdict.faults.append(f"{path}: no record leads from step {verdict.last} to {step}, where it starts")
    elif before is not None and not _same(before.arrays, track.arrays):
        verdict.faults.append(f"{path}: its base is not what the log before it leads to")


def _compare_checkpoint(verdict: Verdict, path: Path, step: int, track: Track) -> None:
    try:
        arrays = checkpoint.read(path).arrays
        masters = {name: arrays[f"master.{name}"] for name in model.TRAINED}
        same = _same(model.parameters(masters, arrays["head_bias"]), track.parameters())
        same = same and all(
            _equal(array, arrays[name]) for name, array in track.arrays.items() if name in arrays
        )
    except InputError as error:
        verdict.faults.append(str(error))
    except KeyError as error:
        verdict.faults.append(f"{path}: array {error} is missing")
    else:
        if same:
            verdict.checkpoints.append(step)
        else:
            verdict.faults.append(f"{path}: the log leads to other weights at step {step}")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))
