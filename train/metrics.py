"""The file of metrics: one JSON object a line, each with the step that it belongs to."""

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Iterable
from io import FileIO
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from intlm.checkpoint import replace_file, unused_name
from intlm.errors import InputError
from intlm.trouble import Trouble, Warn, warn_plainly
from intlm.untrusted import parse_json, read_file

HELD_OUT = "held_out_bits_per_byte"
"""The value of an evaluation's line."""
MOST_WAITING = 10_000
"""Lines that are kept in memory while the file cannot be written; then the oldest are dropped."""
LARGEST_FILE = 1 << 30
"""Bytes of metrics that are read: those of a run of months."""
LARGEST_STEP = (1 << 31) - 1


class MetricsFile:
    """An append-only file of metrics. Open one with `MetricsFile.open`; close it or use it in `with`.

    A file that cannot be written any more does not end training: its lines wait, and are written in their order
    when it can be. `scores`: the held-out bits per byte of every step in it that was evaluated; `start`: of step
    0, if it is there.
    """

    def __init__(self, path: Path, file: FileIO, warn: Warn = warn_plainly) -> None:
        """Take over `file`, opened at `path` for appending without a buffer: a line written is a line out."""
        self.path = path
        self.scores: dict[int, float] = {}
        self.start: float | None = None
        self._file = file
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._warn, self._trouble = warn, Trouble(warn)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, from_step: int, warn: Warn = warn_plainly) -> "MetricsFile":
        """The file at `path`, made if need be, without what comes after `from_step`.

        `from_step` is the step of the checkpoint to go on from. Lines of later steps, which will be repeated,
        and a last line torn by a crash are removed; a new run, which repeats step 0 too, passes -1. Lines that
        are damaged are left out, with a warning that names the copy which keeps them. Raises `InputError` for a
        file that cannot be read or written.
        """
        old = _read(path) if path.exists() else b""
        whole, damaged = _parse(old)
        kept = [(line, values) for line, values in whole if values["step"] <= from_step]
        new = b"".join(line + b"\n" for line, _ in kept)
        if damaged:
            aside = unused_name(path, ".damaged")
            replace_file(aside, [old])
            what = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged):,} lines are"
            warn(f"{path}: {what} damaged, and left out from now on; the file as it was is {aside}")
        if new != old:
            replace_file(path, [new])
        try:
            made = cls(path, path.open("ab", buffering=0), warn)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        for _, values in kept:
            made._learn(values)
        return made

    def append(self, step: int, **values: Any) -> None:
        """Add one line for `step` and hand it to the operating system, as soon as that takes it.

        `values`: anything JSON can hold, or NumPy scalars.
        """
        line = json.dumps({"step": step} | values, allow_nan=False, default=_plain).encode() + b"\n"
        self._learn({"step": step} | values)
        with self._lock:
            self._waiting.append(line)
            self._write()
            while len(self._waiting) > MOST_WAITING:
                # Not the first: a part of it may be in the file.
                del self._waiting[1]
                self._dropped += 1

    def _learn(self, values: dict[str, Any]) -> None:
        self.scores |= scores_of([values])
        if values["step"] == 0 and _is_score(values.get(HELD_OUT)):
            self.start = values[HELD_OUT]

    def sync(self) -> None:
        """Have the disk keep what has been written; from any thread."""
        with self._lock:
            self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            with self._lock:
                self._fails(error)

    def _write(self) -> None:
        try:
            while self._waiting:
                line = self._waiting[0]
                written = self._file.write(line) or 0
                if written < len(line):
                    # The rest follows where the line was torn.
                    self._waiting[0] = line[written:]
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.popleft()
        except OSError as error:
            self._fails(error)
            return
        dropped = f"; {self._dropped:,} lines are lost" if self._dropped else ""
        self._trouble.ends(f"{self.path}: can be written again{dropped}")
        self._dropped = 0

    def _fails(self, error: OSError) -> None:
        self._trouble.begins(
            f"{self.path}: cannot be written: {error.strerror or error}; training goes on, and its lines wait"
        )

    def close(self) -> None:
        """Close the file, after one more attempt at the lines that wait."""
        if self._file.closed:
            return
        with self._lock:
            self._write()
            self._dropped += len(self._waiting)
            try:
                self._file.close()
            except OSError as error:
                self._fails(error)
        if self._dropped:
            self._warn(f"{self.path}: {self._dropped:,} lines could not be written and are lost")

    def __enter__(self) -> "MetricsFile":
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of the metrics at `path`, in the file's order, each a dict with an integer `step`.

    A last line torn by a crash is left out. Raises `InputError` for a file that is missing or damaged.
    """
    return [values for _, values in _lines(_read(path), path)]


def check_metrics(path: Path) -> tuple[int, bool]:
    """How many whole lines `path` has, and whether a torn one follows.

    Raises `InputError` for a file that is missing or damaged, or whose steps fall.
    """
    content = _read(path)
    lines = [values["step"] for _, values in _lines(content, path)]
    for number, (before, after) in enumerate(pairwise(lines), 2):
        if after < before:
            raise InputError(f"{path}: line {number} is damaged: step {after} comes after {before}")
    return len(lines), len(lines) < len(content.splitlines())


def scores_of(lines: Iterable[dict[str, Any]]) -> dict[int, float]:
    """The held-out bits per byte in `lines` of metrics, by step; none of step 0, which nothing was learnt by."""
    return {
        line["step"]: line[HELD_OUT] for line in lines if line["step"] > 0 and _is_score(line.get(HELD_OUT))
    }


def _read(path: Path) -> bytes:
    try:
        return read_file(path, LARGEST_FILE)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(content: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line of the `content` of `path`, see `_parse`. Raises `InputError` where others are damaged."""
    whole, damaged = _parse(content)
    if damaged:
        raise InputError(f"{path}: line {damaged[0]} is damaged: not a JSON object with a step")
    return whole


def _parse(content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """Every whole line, without its end, and what it says; the numbers of those that are damaged, not torn."""
    lines = content.splitlines()
    whole, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and _is_step(values.get("step")):
            whole.append((line, values))
        elif number < len(lines):
            damaged.append(number)
    return whole, damaged


def _is_score(value: object) -> bool:
    # Of a file, it may be any number: what is no score is not compared with one.
    return type(value) in (int, float) and abs(value) < LARGEST_STEP  # type: ignore[arg-type]


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_STEP


def _plain(value: object) -> int | float | bool:
    """A NumPy scalar as Python has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a metric is {type(value).__name__}; JSON cannot hold it")
