"""Files that anyone may have made: read within bounds, and JSON that says one thing only."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from intlm.errors import DamagedError, InputError

LONGEST_NUMBER = 1000
"""Digits of an integer in JSON; Python would take as long as the square of them."""
DEEPEST_JSON = 32
"""Lists and objects inside of each other: what walks through them does so by recursion."""
MOSTLY_HOLES = 64
"""A large file of which less than one byte in so many is on disk was never written by a program of ours."""
SMALL_FILE = 16 << 20


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises `InputError`, naming `path`, for a larger one and for what is no regular file (a pipe has no end, and
    opening it waits); `OSError` where it cannot be read.
    """
    refuse_special(path)
    with path.open("rb") as file:
        size = refuse_holes(file, path)
        content = file.read(size + 1) if size <= limit else b""  # room for `limit` would be taken at once
    if max(size, len(content)) > limit:
        raise InputError(f"{path}: too large: {max(size, len(content))} bytes (accepted: up to {limit})")
    return content


def refuse_special(path: Path) -> None:
    """Raise `InputError` where `path` is no regular file, `OSError` where there is nothing.

    To be asked before a file is opened: opening a named pipe waits for its writer for ever.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a directory has an error of its own
        raise InputError(f"{path}: is not a regular file")


def refuse_holes(file: BinaryIO, path: Path) -> int:
    """The size of an open file; `DamagedError` where nearly all of it is holes, which take memory but no disk."""
    state = os.fstat(file.fileno())
    on_disk = getattr(state, "st_blocks", state.st_size) * 512
    # Some network file systems tell no blocks: they tell no holes either.
    if state.st_size > max(SMALL_FILE, on_disk * MOSTLY_HOLES) and hasattr(os, "SEEK_HOLE"):
        try:
            hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        except OSError:
            hole = state.st_size
        if hole < state.st_size:
            raise DamagedError(f"{path}: damaged: {state.st_size} bytes, of which {on_disk} are on disk")
    return state.st_size


def parse_json(content: bytes | str) -> Any:
    """What a JSON text in UTF-8 says. Raises `ValueError`, with the reason in one short line, for any other.

    Stricter than `json.loads`: no key twice in an object, no NaN and no number beyond a float's range, no
    integer of more than `LONGEST_NUMBER` digits, nothing nested deeper than `DEEPEST_JSON`.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON (no UTF-8 at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (at character {error.pos + 1})") from error
    except RecursionError as error:
        raise _too_deep() from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST_JSON):
        if not level:
            return value
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise _too_deep()
    return value


def _too_deep() -> ValueError:
    return ValueError(f"not JSON of ours (nested deeper than {DEEPEST_JSON})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("not JSON of ours (a key stands twice in an object)")
    return made


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"not JSON of ours (a number of {len(text)} digits)")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else float("inf")
    if value in (float("inf"), float("-inf")):
        raise ValueError("not JSON of ours (a number beyond the range of floats)")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"not JSON ({text})")
