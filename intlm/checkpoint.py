"""One safetensors file per checkpoint: integer arrays, a JSON description and a SHA-256 over both.

The file can be opened by anything that reads safetensors. Its `__metadata__` holds four strings: `format`,
`version`, `meta` (canonical JSON) and `sha256`. The digest covers content, not layout, so it outlives a
change in how the library orders a file.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from intlm.errors import DamagedError, InputError, brief, shown
from intlm.untrusted import parse_json, refuse_holes

FORMAT = "intlm-checkpoint"
FORMAT_VERSION = 1

# A header describes arrays and a configuration: kilobytes. The limit bounds what parsing a hostile one costs.
HEADER_LIMIT = 4 << 20
MOST_ARRAYS = 4096
INTEGER_CODES = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on, or a model to be used.

    `arrays`: by name, integers only (8 to 64 bits, signed or not), any shape.
    `meta`: anything JSON can hold: the resolved configuration, step, data position, digests.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`; the same content always gives the same bytes.

    A file already at `path` is replaced whole or left untouched. Raises `InputError` where the file cannot be
    written (disk full, read-only), `TypeError` for an array that is not of integers and `ValueError` for a
    name or a `meta` that the format cannot hold.
    """
    replace_file(path, encode(checkpoint))


def read(path: Path) -> Checkpoint:
    """Read the checkpoint at `path` and verify all of it. The arrays are in memory and may be written to.

    Raises `DamagedError` for a file that is missing, truncated, damaged or no checkpoint, and `InputError` for
    one from a later format version. Costs memory in proportion to the size of the file, whatever its header
    claims.
    """
    try:
        refuse_what_is_no_file(path)
        with path.open("rb") as file:
            return _read(file, refuse_holes(file, path), path)
    except FileNotFoundError:
        raise DamagedError(f"{path}: does not exist") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error


def decode(content: bytes, path: Path) -> Checkpoint:
    """The checkpoint whose file would have this content; `path` is where it came from. Raises as `read` does."""
    return _read(io.BytesIO(content), len(content), path)


def _read(file: BinaryIO, size: int, path: Path) -> Checkpoint:
    header = _read_header(file, size, path)
    metadata, version = _read_metadata(header, path)
    if len(header) > MOST_ARRAYS:
        raise DamagedError(f"{path}: {len(header)} arrays (accepted: up to {MOST_ARRAYS})")
    if version == FORMAT_VERSION:
        _check_arrays(header, size - file.tell(), path)
    file.seek(0)
    later = InputError(
        f"{path}: is of format version {version}; this intlm reads up to {FORMAT_VERSION}: update intlm"
    )
    try:
        arrays = load(file.read())
    except MemoryError:
        raise InputError(f"{path}: its {size} bytes do not fit into memory") from None
    except (KeyError, OverflowError, SafetensorError, TypeError, ValueError) as error:
        raise later if version > FORMAT_VERSION else _not_safetensors(path, error) from error
    if _digest(metadata.get("meta"), arrays) != metadata.get("sha256"):
        if version > FORMAT_VERSION:
            raise later
        raise DamagedError(f"{path}: damaged: its content does not match its SHA-256")
    if version > FORMAT_VERSION:
        # The digest, which covers the version, is one of ours.
        raise DamagedError(f"{path}: damaged: its format version is not what was written")
    try:
        meta = parse_json(metadata["meta"])
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise DamagedError(f"{path}: not an intlm checkpoint: its meta is not a JSON object")
    return Checkpoint(arrays, meta)


def expect(
    checkpoint: Checkpoint, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]], path: Path
) -> None:
    """Raise `InputError` unless `checkpoint` has exactly the `arrays`: name -> (shape, dtype).

    `path` is the file that the checkpoint came from, for the message.
    """
    if missing := arrays.keys() - checkpoint.arrays.keys():
        raise InputError(f"{path}: array {shown(min(missing))} is missing")
    if unknown := checkpoint.arrays.keys() - arrays.keys():
        raise InputError(f"{path}: array {shown(min(unknown))} is not one of this model's")
    for name, (shape, dtype) in sorted(arrays.items()):
        found = checkpoint.arrays[name]
        if found.shape != shape or found.dtype != dtype:
            raise InputError(
                f"{path}: array {name!r} is {found.dtype} {found.shape}; this model takes {dtype} {shape}"
            )


def within(checkpoint: Checkpoint, limits: Mapping[np.dtype, int], path: Path) -> None:
    """Raise `InputError` where a number of an array of these dtypes is beyond plus or minus its limit."""
    for name, array in sorted(checkpoint.arrays.items()):
        limit = limits.get(array.dtype)
        if limit is not None and array.size and not -limit <= array.min() <= array.max() <= limit:
            raise InputError(f"{path}: array {name!r} has a number beyond {limit}")


def replace_file(
    path: Path, chunks: Iterable[bytes | memoryview], before: Callable[[], None] | None = None
) -> None:
    """Put `chunks` into a file at `path` atomically: after a crash it holds all the old or all the new bytes.

    `before` is called when the new bytes are safely on disk, right before they become visible at `path`.

    The temporary file stands beside `path` under a fixed name, so that one left by a killed process is
    overwritten by the next write instead of piling up; a path has one writer. Raises `InputError` where the
    file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            if os.path.lexists(temporary):
                temporary.unlink()  # a link there would be written through, and a pipe waited for
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if before is not None:
                before()
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def unused_name(path: Path, ending: str) -> Path:
    """`path` with `ending`, and a number where there is such a file already."""
    aside, number = path.with_name(path.name + ending), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{ending}{number}")
    return aside


def make_directory(path: Path) -> None:
    """The directory at `path`, in one that exists. Raises `InputError` where it cannot be made."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror or error}") from error


def sync_directory(directory: Path) -> None:
    """Make what was renamed, made or removed in `directory` outlast a power cut. Raises `OSError`."""
    if os.name != "posix":
        return  # other systems cannot open a directory
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(checkpoint: Checkpoint) -> list[bytes | memoryview]:
    """The bytes of a checkpoint's file in pieces. Raises `TypeError` and `ValueError` as `write` does."""
    for name, array in checkpoint.arrays.items():
        if array.dtype.kind not in "iu":
            raise TypeError(f"array {name!r} is {array.dtype}; a checkpoint holds integers only")
        if name == "__metadata__":
            raise ValueError("no array may be called '__metadata__': safetensors keeps that name")
    arrays = {
        name: array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        for name, array in sorted(checkpoint.arrays.items())
    }
    meta = json.dumps(checkpoint.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "meta": meta,
        "sha256": _digest(meta, arrays),
    }
    content = memoryview(save(arrays, metadata))
    # The library writes the metadata in the order of a randomly seeded hash map: put it in ours.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"meta and names take {len(text)} bytes; a header holds at most {HEADER_LIMIT}")
    return [len(text).to_bytes(8, "little"), text, content[start:]]


def _digest(meta: object, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, over the version, the meta JSON and every array's name, dtype, shape, bytes.

    The JSON in front gives the length of all that follows it, so no two contents share a serialisation.
    """
    ordered = sorted(arrays.items())
    table = [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in ordered]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, meta, table], separators=(",", ":")).encode())
    for _, array in ordered:
        digest.update(array.tobytes())
    return digest.hexdigest()


def refuse_what_is_no_file(path: Path) -> None:
    """Raise `InputError` for what is no regular file, such as a named pipe, whose opening would wait for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise DamagedError(f"{path}: is a directory; a checkpoint is a file")
    if not stat.S_ISREG(mode):
        raise DamagedError(f"{path}: is not a regular file; a checkpoint is one")


def _read_header(file: BinaryIO, size: int, path: Path) -> dict[str, Any]:
    """The safetensors header of a file of `size` bytes: a JSON object, its entries not yet checked."""
    if size < 8:
        raise DamagedError(f"{path}: truncated: it has {size} bytes, less than any safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_LIMIT:
        raise _not_safetensors(path, f"its first 8 bytes give a header of {length} bytes")
    if length > size - 8:
        raise DamagedError(f"{path}: truncated: it has {size} bytes, its header ends at byte {8 + length}")
    try:
        header = parse_json(file.read(length))
    except ValueError as error:
        raise _not_safetensors(path, error) from error
    if not isinstance(header, dict):
        raise _not_safetensors(path, "its header is not a JSON object")
    return header


def _read_metadata(header: dict[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    """Take the `__metadata__` out of `header`; and its format version, this program's or a later one."""
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DamagedError(f"{path}: not an intlm checkpoint: its metadata lacks format {FORMAT!r}")
    version = metadata.get("version")
    if not (isinstance(version, str) and version.isascii() and version.isdecimal() and len(version) < 10):
        raise DamagedError(f"{path}: not an intlm checkpoint: its format version is not a number")
    if int(version) > FORMAT_VERSION:
        return metadata, int(version)
    if version != str(FORMAT_VERSION):
        raise DamagedError(f"{path}: not an intlm checkpoint: there is no format version {version}")
    for key in ("meta", "sha256"):
        if not isinstance(metadata.get(key), str):
            raise DamagedError(f"{path}: not an intlm checkpoint: its metadata lacks {key!r}")
    return metadata, FORMAT_VERSION


def _check_arrays(header: dict[str, Any], size: int, path: Path) -> None:
    """Refuse arrays that are not integers or that need more than the `size` bytes after the header.

    The library checks the rest: that offsets neither overlap nor leave holes, and that shapes fit them.
    """
    end = 0
    for name, entry in header.items():
        try:
            code = str(entry["dtype"])
            end = max(end, int(entry["data_offsets"][1]))
        except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            raise _not_safetensors(path, f"array {shown(name)} lacks a dtype or offsets") from error
        if code not in INTEGER_CODES:
            array = shorten(ascii(name), 80)
            raise DamagedError(f"{path}: array {array} is {code[:16]!r}; a checkpoint holds integers only")
    if end > size:
        raise DamagedError(
            f"{path}: truncated: it has {size} bytes of arrays, its header announces {brief(str(end))}"
        )


def _not_safetensors(path: Path, why: object) -> DamagedError:
    # One line, whatever a hostile header put into the library's message.
    reason = shorten(ascii(str(why))[1:-1], 160)
    return DamagedError(f"{path}: not a safetensors file, or its header is damaged: {reason}")
