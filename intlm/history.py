"""The history of a run: a log from which the weights after every step can be rebuilt.

A log is a directory of segments. A segment is a file of records, each with its length and a CRC-32. The first is
the base: the weights after the step that the segment starts with, as a checkpoint (`intlm.checkpoint`). Each
further record leads to the weights of the next step. What it holds depends on the estimator:

* `activation`: the changes of the int8 weights: the distances from one changed weight to the next, and by how
  much each has changed.
* `weight`: the fitness of each pair. Votes follow from fitness and noise, and masters from votes. Only the
  embedding's votes depend on the text too: of it the changes are kept.

docs/numerics.md has the format. A record that a crash has cut short at the end of the last segment is no damage:
its step is repeated.
"""

import errno
import os
import queue
import re
import shutil
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from intlm import checkpoint, eggroll, model, noise
from intlm.checkpoint import Checkpoint
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine.engine import Engine
from intlm.errors import InputError
from intlm.model import TRAINED, Parameters
from intlm.trouble import Trouble, Warn, warn_plainly
from intlm.untrusted import refuse_holes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NAME = re.compile(r"step-([0-9]{8,10})\.history")
FRAME = struct.Struct("<IIQ")  # bytes of the payload; CRC-32 of step and payload; step
COUNTS = struct.Struct("<IIII")  # changes; those by more than 1; bytes of their distances each
LEVEL = 1
SEGMENT_BYTES = 8 << 20
BASES = 8
"""A segment ends with the checkpoint that finds it so large, and so many times as large as its base."""
SPARE_BYTES = 32 << 20
"""What the log leaves free on the disk for checkpoints."""
WAITING = 4
"""Steps that may wait to be written."""


# --- changes of int8 weights ----------------------------------------------------------------------------------


def encode_changes(before_W: np.ndarray, after_W: np.ndarray) -> bytes:
    """What leads from the int8 weights `before_W` to `after_W`.

    Four counts (`COUNTS`); a bit for each change, the lowest first, set where it is upwards; then, compressed by
    Zstandard: the distances to the changed weights, or a bit for each weight where many change; the distances
    (in changes) to the changes by more than 1; and these changes' magnitudes less 1.
    """
    changed_W = before_W != after_W
    places = np.flatnonzero(changed_W)
    moves = after_W[places].astype(np.int16) - before_W[places]
    large = np.flatnonzero(np.abs(moves) > 1)
    many = _many(len(places), changed_W.size)
    near = np.packbits(changed_W, bitorder="little") if many else _distances(places)
    far = _distances(large)
    magnitudes = (np.abs(moves[large]) - 1).astype(np.uint8)
    signs = np.packbits(moves > 0, bitorder="little")
    counts = COUNTS.pack(len(places), len(large), len(near), len(far))
    return (
        counts + signs.tobytes() + zstd.compress(near.tobytes() + far.tobytes() + magnitudes.tobytes(), LEVEL)
    )


def apply_changes(payload: bytes, weights_W: np.ndarray) -> np.ndarray:
    """The weights after the changes. Raises `ValueError` for a payload that fits no such weights.

    Takes memory in proportion to the number of weights, whatever the payload says.
    """
    if len(payload) < COUNTS.size:
        raise ValueError("it is too short")
    changes, larges, near_size, far_size = COUNTS.unpack_from(payload)
    many, bitmap = _many(changes, weights_W.size), (weights_W.size + 7) // 8
    # Every 255 weights that are passed over cost a byte at most.
    least, most = (bitmap, bitmap) if many else (changes, changes + weights_W.size // 255)
    if not (larges <= changes <= weights_W.size and least <= near_size <= most):
        raise ValueError("its counts do not fit")
    if not larges <= far_size <= larges + changes // 255:
        raise ValueError("its counts do not fit")
    start = COUNTS.size + (changes + 7) // 8
    size = near_size + far_size + larges
    try:
        decompressor = zstd.ZstdDecompressor()
        stream = decompressor.decompress(payload[start:], max_length=size + 1)
    except (zstd.ZstdError, EOFError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    if len(stream) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError("it is not as long as it says")
    values = np.frombuffer(stream, np.uint8)
    places = (_marked if many else _places)(values[:near_size], changes, weights_W.size)
    large = _places(values[near_size : near_size + far_size], larges, changes)
    signs = np.frombuffer(payload, np.uint8, (changes + 7) // 8, COUNTS.size)
    moves = np.where(np.unpackbits(signs, count=changes, bitorder="little"), 1, -1).astype(np.int16)
    moves[large] *= 1 + values[near_size + far_size :].astype(np.int16)
    after = weights_W[places] + moves
    if np.abs(after, out=after).max(initial=0) > 127:
        raise ValueError("a weight leaves its range")
    changed = weights_W.copy()
    changed[places] += moves.astype(np.int8)
    return changed


def _many(changes: int, weights: int) -> bool:
    """Whether a bit for each weight takes less than a byte for each change."""
    return 8 * changes > weights


def _marked(bits: np.ndarray, count: int, limit: int) -> np.ndarray:
    """Which of `limit` bits are set. Raises `ValueError` where they are not `count`, or where more follow."""
    marks = np.unpackbits(bits, bitorder="little")
    places = np.flatnonzero(marks[:limit])
    if len(places) != count or marks[limit:].any():
        raise ValueError("its changes are not as many as it says")
    return places


def _distances(places: np.ndarray) -> np.ndarray:
    """How many entries lie between each place and the one before: uint8; 255 stands for 255 and more to come."""
    gaps = np.diff(places, prepend=-1) - 1
    if gaps.size == 0 or gaps.max() < 255:
        return gaps.astype(np.uint8)
    spread = np.full(len(gaps) + int((gaps // 255).sum()), 255, np.uint8)
    spread[np.cumsum(gaps // 255 + 1) - 1] = gaps % 255
    return spread


def _places(distances: np.ndarray, count: int, limit: int) -> np.ndarray:
    """The inverse of `_distances`. Raises `ValueError` where they are not `count` places below `limit`."""
    ends = np.flatnonzero(distances != 255)
    if len(ends) != count or (distances.size and distances[-1] == 255):
        raise ValueError("its distances are not as many as it says")
    places = np.cumsum(distances, dtype=np.int64)[ends] + np.arange(count)
    if count and places[-1] >= limit:
        raise ValueError("a change lies beyond the last weight")
    return places


# --- what a record leads from and to ----------------------------------------------------------------------------


class Track:
    """Follows the weights of a run from step to step, as its log has them.

    `arrays`: what a base holds: `weight.<name>` int8, or, where the estimator rebuilds masters, `master.<name>`
    int16; and `head_bias` int16. `meta`: that of the base.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EggrollConfig,
        steps: int,
        arrays: dict[str, Any],
        meta: dict[str, Any],
    ):
        """Start from a base of a run of so many steps."""
        self.model, self.config, self.steps, self.arrays, self.meta = (
            model_config,
            config,
            steps,
            arrays,
            meta,
        )
        self._root = noise.seed_key(config.seed)
        self._shapes = model.shapes(model_config)

    @staticmethod
    def keeps_masters(config: EggrollConfig, name: str) -> bool:
        """Whether the log follows a parameter's masters instead of its weights."""
        return config.estimator == "weight" and name != "embedding"

    @classmethod
    def base(cls, config: EggrollConfig, masters: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
        """The arrays of a base, of a state's masters and weights."""
        arrays = {"head_bias": np.asarray(parameters["head_bias"])}
        for name in TRAINED:
            if cls.keeps_masters(config, name):
                arrays[f"master.{name}"] = np.asarray(masters[name])
            else:
                arrays[f"weight.{name}"] = np.asarray(parameters[name])
        return arrays

    @classmethod
    def expected(
        cls, model_config: ModelConfig, config: EggrollConfig
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of the arrays, for `checkpoint.expect`."""
        arrays = {
            (f"master.{name}" if cls.keeps_masters(config, name) else f"weight.{name}"): (
                shape,
                np.dtype(np.int16 if cls.keeps_masters(config, name) else np.int8),
            )
            for name, shape in model.shapes(model_config).items()
        }
        return arrays | {"head_bias": ((model_config.vocabulary,), np.dtype(np.int16))}

    def parameters(self) -> Parameters:
        """The int8 weights and the head bias."""
        masters = {
            name: self.arrays[f"master.{name}"] for name in TRAINED if self.keeps_masters(self.config, name)
        }
        weights = model.parameters(masters, self.arrays["head_bias"])
        return weights | {name: self.arrays[f"weight.{name}"] for name in TRAINED if name not in weights}

    def flat(self) -> np.ndarray:
        """The weights whose changes are kept, one parameter after the other: int8."""
        return flatten(self.arrays[f"weight.{name}"] for name in self._followed)

    @property
    def _followed(self) -> list[str]:
        return [name for name in TRAINED if not self.keeps_masters(self.config, name)]

    def advance(self, step: int, payload: bytes, engine: Engine) -> None:
        """Go on to the weights after `step` steps. Raises `ValueError` for a payload that does not fit.

        engine: makes votes of fitness.
        """
        if self.config.estimator == "weight":
            payload = self._advance_masters(step, payload, engine)
        weights, begin = apply_changes(payload, self.flat()), 0
        for name in self._followed:
            shape = self._shapes[name]
            end = begin + int(np.prod(shape))
            self.arrays[f"weight.{name}"] = weights[begin:end].reshape(shape)
            begin = end

    def _advance_masters(self, step: int, payload: bytes, engine: Engine) -> bytes:
        """All but the embedding, from the pairs' fitness; returns the rest of the payload."""
        fitness, rest = decode_fitness(payload, self.config.pairs)
        wide = fitness.astype(np.int64)
        names = [name for name in TRAINED if name != "embedding"]
        masters = {name: self.arrays[f"master.{name}"] for name in names}
        key = eggroll.step_key(self._root, np.uint32(step - 1))
        votes = {name: np.asarray(value) for name, value in engine.fitness_votes(key, fitness).items()}
        size, quantile = eggroll.schedule(self.config, self.model, step - 1, self.steps)
        statistics = {"square": np.sum(wide * wide)}
        updated = eggroll.update(
            self.config, self.model, masters, votes, statistics, np.int64(size), np.int64(quantile)
        )
        self.arrays |= {f"master.{name}": value for name, value in updated.items()}
        return rest


def flatten(arrays: Any) -> np.ndarray:
    """Arrays as one vector, one after the other."""
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


def encode_fitness(fitness_P: np.ndarray) -> bytes:
    """The fitness of all pairs, int8 [P], behind its length."""
    packed = zstd.compress(fitness_P.tobytes(), LEVEL)
    return struct.pack("<I", len(packed)) + packed


def decode_fitness(payload: bytes, pairs: int) -> tuple[np.ndarray, bytes]:
    """The fitness of `pairs` pairs, and the payload behind it. Raises `ValueError` for anything else."""
    if len(payload) < 4:
        raise ValueError("it is too short")
    (size,) = struct.unpack_from("<I", payload)
    try:
        decompressor = zstd.ZstdDecompressor()
        stream = decompressor.decompress(payload[4 : 4 + size], max_length=pairs + 1)
    except (zstd.ZstdError, EOFError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    if len(stream) != pairs or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"it has not the fitness of {pairs} pairs")
    fitness = np.frombuffer(stream, np.int8)
    if fitness.min() < -96 or fitness.max() > 96:
        raise ValueError("a fitness is out of range")
    return fitness, payload[4 + size :]


# --- segments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A record as it lies in its file. step: the steps done after it. The base's payload is a checkpoint."""

    step: int
    payload: bytes
    start: int
    end: int


class TornError(InputError):
    """A segment whose last record was cut short, which a crash does."""


def frame(step: int, payload: bytes) -> bytes:
    """A record: what stands before a payload, and the payload."""
    checksum = zlib.crc32(payload, zlib.crc32(step.to_bytes(8, "little")))
    return FRAME.pack(len(payload), checksum, step) + payload


def records(path: Path, largest: int) -> Iterator[Record]:
    """The records of the segment at `path`, the base first, each read when it is asked for.

    largest: bytes that a payload may have. Raises `TornError` where the file ends within a record, and
    `InputError` where a record is damaged or the file cannot be read. Both name the file.
    """
    try:
        checkpoint.refuse_what_is_no_file(path)
        with path.open("rb") as file:
            yield from _records(file, refuse_holes(file, path), path, largest)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _records(file: BinaryIO, size: int, path: Path, largest: int) -> Iterator[Record]:
    at, number = 0, 0
    while at < size:
        # A base becomes visible as a whole.
        cut_short: type[InputError] = TornError if number else InputError
        head = file.read(FRAME.size)
        if len(head) < FRAME.size:
            raise cut_short(f"{path}: its last record, at byte {at}, is cut short")
        length, checksum, step = FRAME.unpack(head)
        end = at + FRAME.size + length
        if length > largest and end <= size:
            raise InputError(
                f"{path}: damaged: record {number}, at byte {at}, says that it has {length} bytes"
            )
        if end > size:
            raise cut_short(f"{path}: its last record, at byte {at}, is cut short")
        payload = file.read(length)
        if zlib.crc32(payload, zlib.crc32(step.to_bytes(8, "little"))) != checksum:
            error = cut_short if end == size else InputError
            raise error(f"{path}: damaged: record {number}, at byte {at}, does not match its checksum")
        yield Record(step, payload, at, end)
        at, number = end, number + 1
    if number == 0:
        raise InputError(f"{path}: damaged: it is empty")


def largest_payload(model_config: ModelConfig, config: EggrollConfig) -> int:
    """Bytes that a payload has at most: a base, or changes of all weights with their fitness."""
    # Zstandard leaves what it cannot compress as it is, with a few bytes for each block.
    changes = 3 * model_config.weights + config.pairs
    return 2 * changes + 2 * model_config.vocabulary + checkpoint.HEADER_LIMIT + (1 << 16)


def segments(directory: Path) -> list[tuple[int, Path]]:
    """First step and path of the segments in `directory`, the oldest first; none where there is no such."""
    try:
        found = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{directory}: cannot be read: {error.strerror or error}") from error
    return sorted((int(match[1]), path) for match, path in found if match)


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    number: int
    masters: dict[str, Any]
    parameters: Parameters
    fitness: Any


class Recorder:
    """Appends every step of a run to the log in a directory, in a thread of its own.

    A log that cannot be written, as on a full disk, stops; the checkpoint after that starts it again with a new
    segment, and the steps in between are missing in it. `warn` is told when it stops and when it starts again.
    """

    def __init__(
        self,
        directory: Path,
        model_config: ModelConfig,
        config: EggrollConfig,
        meta: dict[str, Any],
        limit: int,
        warn: Warn = warn_plainly,
    ):
        """meta: what identifies the run, for each base. limit: bytes of the whole log, beyond which the oldest
        segments are dropped."""
        self.directory, self.meta, self.limit = directory, meta, limit
        self._model, self._config, self._trouble = model_config, config, Trouble(warn)
        self._followed = [name for name in TRAINED if not Track.keeps_masters(config, name)]
        self._queue: queue.Queue[Any] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._sealed = threading.Event()
        self._sealed.set()
        self._file: BinaryIO | None = None
        self._size = self._base_size = 0
        self._flat: np.ndarray | None = None

    def start(self, step: int, masters: dict[str, Any], parameters: Parameters) -> None:
        """Go on from the state after `step` steps: drop what the log has of later ones."""
        before = _Step(step, masters, parameters, None)
        try:
            self.directory.mkdir(exist_ok=True)
            self._go_on(before)
        except (OSError, InputError) as error:
            self._stop(error)
        self._thread = threading.Thread(target=self._work, name="intlm-history", daemon=True)
        self._thread.start()

    def append(self, step: int, masters: dict[str, Any], parameters: Parameters, fitness: Any) -> None:
        """Take in the state after step number `step`; fitness: int8 [P], of the estimator `weight`.

        The arrays must not change afterwards. Waits where the thread is `WAITING` steps behind.
        """
        self._put(_Step(step, masters, parameters, fitness))

    def seal(self) -> None:
        """Have the log put on disk as far as it was appended, for a checkpoint that is going to be written."""
        self._sealed = threading.Event()
        self._put(self._sealed)

    def sync(self) -> None:
        """Wait until the log is on disk that was sealed. Called before the checkpoint becomes visible."""
        self._sealed.wait()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _put(self, item: Any) -> None:
        if self._thread is None:
            raise RuntimeError("the recorder has not been started")
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    # The thread's part, one step after the other.

    def _work(self) -> None:
        last: _Step | None = None
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, _Step):
                    last = item
                    if self._file is not None:
                        self._write_step(item)
                else:
                    self._finish(last)
            except (OSError, InputError) as error:
                self._stop(error)
            except BaseException as error:
                self._error = error  # a bug, which belongs to the thread that trains
                self._file = None
            finally:
                if isinstance(item, threading.Event):
                    item.set()
        if self._file is not None:
            self._file.close()

    def _write_step(self, step: _Step) -> None:
        flat = flatten(step.parameters[name] for name in self._followed)
        payload = encode_changes(self._flat, flat)  # type: ignore[arg-type]
        if self._config.estimator == "weight":
            payload = encode_fitness(np.asarray(step.fitness)) + payload
        self._write(frame(step.number, payload))
        self._flat = flat

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        try:
            if self._file.write(content) < len(content):  # unbuffered, so that it may be a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(content)

    def _finish(self, last: _Step | None) -> None:
        """What a checkpoint wants of the log: all of it on disk, and a new segment where it is time."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._look_for_room()
            if last is None or self._size < max(SEGMENT_BYTES, BASES * self._base_size):
                return
        if last is not None:
            self._begin(last)
            self._trouble.ends(f"{self.directory}: the history is written again, from step {last.number} on")
            self._drop()

    def _look_for_room(self) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < SPARE_BYTES:
            raise InputError(
                f"{free:,} bytes are free on the disk, of which it leaves {SPARE_BYTES:,} to checkpoints"
            )

    def _begin(self, state: _Step) -> None:
        """A new segment, whose base is this state."""
        self._look_for_room()
        arrays = Track.base(self._config, state.masters, state.parameters)
        meta = self.meta | {"step": state.number}
        content = frame(state.number, b"".join(checkpoint.encode(Checkpoint(arrays, meta))))
        path = self.directory / f"step-{state.number:08d}.history"
        if self._file is not None:
            self._file.close()
            self._file = None
        checkpoint.replace_file(path, [content])
        self._open(path, len(content))
        self._base_size = len(content)
        self._flat = flatten(state.parameters[name] for name in self._followed)

    def _open(self, path: Path, size: int) -> None:
        self._file, self._size = path.open("r+b", buffering=0), size
        self._file.seek(size)

    def _go_on(self, state: _Step) -> None:
        """Cut the log to the records up to this state's step; a new segment, where it does not reach that far."""
        largest = largest_payload(self._model, self._config)
        found = segments(self.directory)
        for first, path in found:
            if first > state.number:
                path.unlink()
        kept = [(first, path) for first, path in found if first <= state.number]
        if kept:
            first, path = kept[-1]
            base = reached = None
            try:
                for record in records(path, largest):
                    base = record.end if base is None else base
                    if record.step > state.number:
                        break
                    reached = record
            except InputError:
                pass  # it is as long as it is; a new segment starts behind a damaged record
            if base is not None and reached is not None and reached.step == state.number:
                os.truncate(path, reached.end)
                self._open(path, reached.end)
                self._base_size = base
                self._flat = flatten(state.parameters[name] for name in self._followed)
                return
        self._begin(state)

    def _drop(self) -> None:
        found = segments(self.directory)
        sizes = [path.stat().st_size for _, path in found]
        total = sum(sizes)
        for (_, path), size in zip(found[:-1], sizes, strict=False):
            if total <= self.limit:
                break
            path.unlink()
            total -= size

    def _stop(self, error: Exception) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        self._trouble.begins(
            f"{self.directory}: the history cannot be written: {reason}; training goes on, and the history "
            "from the next checkpoint on that finds it can"
        )
