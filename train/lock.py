"""One process trains a run: the file `lock` in its directory, held while it does.

Where the file system has locks, the system lets go of this one when the process ends, however it ends, and what
the file says is for people. Elsewhere (some network file systems) what it says decides.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intlm.checkpoint import sync_directory
from intlm.errors import InputError
from intlm.trouble import Warn, warn_plainly
from intlm.untrusted import parse_json, read_file

LOCK = "lock"
LARGEST = 4096
"""Bytes of the file."""
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""What `flock` fails with where there are none."""


class Lock:
    """A lock that is held. `made`: the directories that were made for it, the innermost first."""

    def __init__(self, directory: Path, descriptor: int, made: list[Path]):
        self._directory, self._descriptor, self._made = directory, descriptor, made

    def check(self) -> None:
        """Raise `OSError` where another process has got the lock after all: where the directory, or the file in
        it, was removed in between."""
        path = self._directory / LOCK
        if path.exists() and not _is_at(self._descriptor, path):
            raise OSError(errno.ESTALE, "the directory has become another process's")

    def release(self) -> None:
        """Remove the lock, and the directories that were made for it alone. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        # Still held: whoever opened the file before this sees that it is not the one in the directory.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, self._directory / LOCK):
                (self._directory / LOCK).unlink()
        os.close(descriptor)
        _remove(self._made)


@contextlib.contextmanager
def locked(directory: Path, warn: Warn = warn_plainly) -> Iterator[Lock]:
    """Keep other processes from training the run in `directory`, which is made if need be.

    Raises `InputError` where one does, or where the directory cannot be made or written. The lock is released in
    the end.
    """
    made = _make(directory)
    try:
        lock = Lock(directory, _take(directory, warn), made)
    except BaseException:
        _remove(made)
        raise
    try:
        yield lock
    finally:
        lock.release()


def _remove(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: it has become a run
        for path in directories:
            path.rmdir()


def is_ours(path: Path) -> bool:
    """Whether the file at `path` is such a lock, or what a power cut may leave of one."""
    try:
        content = read_file(path, LARGEST)
    except InputError:
        return False
    return not content.strip(b"\0") or bool(_parsed(content))


def _make(directory: Path) -> list[Path]:
    """Make the directory; those that were made, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"--run {directory}: cannot be made: {error.strerror or error}") from error
    return missing


def _take(directory: Path, warn: Warn) -> int:
    """The descriptor of the lock file, which is ours now."""
    path = directory / LOCK
    try:
        while True:
            descriptor, new = _open(path)
            ours = False
            try:
                held = _flock(descriptor)
                if held is False:
                    raise InputError(f"{directory}: another process is training this run{_who(descriptor)}")
                if held is None and not new:
                    _judge(path, descriptor, warn)
                elif held is None or _is_at(descriptor, path):  # else its owner has removed it meanwhile
                    ours = True
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_this_process()).encode() + b"\n", 0)
                    return descriptor
                os.close(descriptor)
            except BaseException:
                if ours:
                    with contextlib.suppress(OSError):
                        path.unlink()
                os.close(descriptor)
                raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _open(path: Path) -> tuple[int, bool]:
    """The lock file opened, and whether it was made for that."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed in between
                # What a link leads to is no lock, and would be written over.
                return os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), False


def _flock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def _judge(path: Path, descriptor: int, warn: Warn) -> None:
    """Remove a lock whose process has gone. Raises `InputError` for one whose process may be there."""
    content = os.pread(descriptor, LARGEST, 0)
    owner, here = _parsed(content), _this_process()
    if not owner:
        raise InputError(
            f"{path}: another process may be training this run (the file does not say which); "
            "delete the file if none does"
        )
    who = _described(owner)
    if owner.get("host") != here["host"]:
        raise InputError(
            f"{path}: another process may be training this run, {who}; delete the file if it has gone"
        )
    if owner.get("boot") == here["boot"] and owner.get("started") == _started(owner["pid"]) != "":
        raise InputError(f"{path.parent}: another process is training this run, {who}")
    # Two may come to this point at once: what is taken away must be what was judged.
    taken = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(taken)
        if taken.read_bytes() != content:
            with contextlib.suppress(FileExistsError):
                os.link(taken, path)
        else:
            warn(f"{path}: was left by a process that has gone, {who}; taken over")
        taken.unlink()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, Any]:
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot": boot, "started": _started(pid)}


def _started(pid: int) -> str:
    """When a process of this machine started, in its clock ticks; empty where there is none, or no telling."""
    try:
        # The name before the last parenthesis may have spaces in it. Field 22 of the line.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lock says; empty where that is not a process."""
    try:
        values = parse_json(content)
    except ValueError:
        return {}
    known = isinstance(values, dict) and type(values.get("pid")) is int and 0 < values["pid"] < 1 << 32
    return values if known else {}


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {str(owner.get('host'))[:80]!r}"


def _who(descriptor: int) -> str:
    owner = _parsed(os.pread(descriptor, LARGEST, 0))
    return f", {_described(owner)}" if owner else ""
