"""The file of metrics: one JSON object a line, each with the step that it belongs to."""

import errno
import json
import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from intlm.checkpoint import replace_file
from intlm.errors import InputError
from intlm.untrusted import parse_json, read_file

LARGEST_FILE = 1 << 30
"""Bytes of metrics that are read: those of a run of months."""
LARGEST_STEP = (1 << 31) - 1


class MetricsFile:
    """An append-only file of metrics. Open one with `MetricsFile.open`; close it or use it in `with`."""

    def __init__(self, path: Path, file: FileIO) -> None:
        """Take over `file`, opened at `path` for appending without a buffer: a line written is a line out."""
        self.path = path
        self._file = file

    @classmethod
    def open(cls, path: Path, from_step: int) -> "MetricsFile":
        """The file at `path`, made if need be, without what comes after `from_step`.

        `from_step` is the step of the checkpoint to go on from. Lines of later steps, which will be repeated,
        and a last line torn by a crash are removed; a new run, which repeats step 0 too, passes -1. Raises
        `InputError` for a file that is damaged or cannot be written.
        """
        old = _read(path) if path.exists() else b""
        kept = [line for line, values in _lines(old, path) if values["step"] <= from_step]
        new = b"".join(line + b"\n" for line in kept)
        if new != old:
            replace_file(path, [new])
        try:
            return cls(path, path.open("ab", buffering=0))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error

    def append(self, step: int, **values: Any) -> None:
        """Add one line for `step` and hand it to the operating system.

        `values`: anything JSON can hold, or NumPy scalars. Raises `InputError` where the file cannot be
        written.
        """
        line = json.dumps({"step": step} | values, allow_nan=False, default=_plain).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

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


def _read(path: Path) -> bytes:
    try:
        return read_file(path, LARGEST_FILE)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _lines(content: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line of the `content` of `path`, without its end, and what it says."""
    lines = content.splitlines()
    whole = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and _is_step(values.get("step")):
            whole.append((line, values))
        elif number < len(lines):
            raise InputError(f"{path}: line {number} is damaged: not a JSON object with a step")
    return whole


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_STEP


def _plain(value: object) -> int | float | bool:
    """A NumPy scalar as Python has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a metric is {type(value).__name__}; JSON cannot hold it")
