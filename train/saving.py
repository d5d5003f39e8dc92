"""Checkpoints written in the background, and what becomes of them when the disk does not take them."""

import contextlib
import errno
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from intlm.checkpoint import Checkpoint, encode, replace_file
from intlm.errors import InputError
from intlm.trouble import Trouble, Warn, warn_plainly
from train.run import Run

FULL = {errno.ENOSPC, errno.EDQUOT}
RETRY_SECONDS = 30
"""How long after a failure it is tried again, where no checkpoint is due before."""
CLOSE_SECONDS = 5.0
RESERVE_BYTES = 1 << 20
"""What a checkpoint leaves free on the disk, for the files that tell what happened."""


@dataclass(frozen=True)
class _Order:
    """A checkpoint to write: the state after `step`, which `make` puts into arrays; `scores` by step."""

    step: int
    make: Callable[[], Checkpoint]
    scores: Mapping[int, float]
    announced: bool


class Saver:
    """Writes the checkpoints of a run in a thread of its own, one after the other, and drops old ones.

    At most one is being written and one waits; `save` waits where that is not enough. One that cannot be written
    (a full disk, a directory that has gone) is said once, and training goes on: the next one is tried instead,
    and `due` asks for one after `RETRY_SECONDS`. Nothing old is dropped before something newer is on disk. In
    `with`, all that was saved is written at the end, or `InputError` tells that the last one could not be.
    """

    def __init__(
        self,
        run: Run,
        keep: int,
        keep_every: int = 0,
        warn: Warn = warn_plainly,
        before: Sequence[Callable[[], None]] = (),
        last: int | None = None,
    ):
        """keep, keep_every: see `Run.prune`.

        before: called, in the thread, when a checkpoint is on disk and right before it becomes visible; a
        checkpoint is not to be seen without what these put on disk, and an `OSError` of theirs is its failure.
        last: the step of the newest checkpoint on disk.
        """
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._warn, self._before, self.last = warn, before, last
        self._trouble, self._removal = Trouble(warn), Trouble(warn)
        self._changed = threading.Condition()
        self._waiting: _Order | None = None
        self._writing = self._closing = False
        self._failure: InputError | None = None
        self._error: BaseException | None = None
        self._tried = 0.0
        # A daemon, so that a disk that does not answer cannot keep a process that is told to leave at once.
        self._thread = threading.Thread(target=self._work, name="intlm-saver", daemon=True)
        self._thread.start()

    @property
    def due(self) -> bool:
        """Whether the disk has failed, and it is time to try it again with the state as it is by now."""
        if not self._trouble.now:
            return False
        with self._changed:
            idle = self._waiting is None and not self._writing
        return idle and abs(time.monotonic() - self._tried) >= RETRY_SECONDS

    def save(
        self, step: int, make: Callable[[], Checkpoint], scores: Mapping[int, float], announced: bool = False
    ) -> None:
        """Have the state after `step` written. It must not change any more; `announced` says when it is there.

        scores: held-out bits per byte by step, which tell the best checkpoint.
        """
        order = _Order(step, make, dict(scores), announced)
        with self._changed:
            while self._waiting is not None and not self._trouble.now and self._error is None:
                self._changed.wait()
            self._raise()
            if self._waiting is not None:
                # Of two that wait for a disk that fails, the newer one is all that a run needs.
                order = replace(order, announced=announced or self._waiting.announced)
            self._waiting = order
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is written. Raises `InputError` where the last one cannot be."""
        with self._changed:
            while (self._waiting is not None or self._writing) and self._error is None:
                self._changed.wait()
            self._raise()
            if self._failure is not None:
                start = f"step {self.last}" if self.last is not None else "its start"
                raise InputError(f"{self._failure}; the same command will go on from {start}")

    def __enter__(self) -> "Saver":
        """Return the saver itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish, and end the thread. Another error than the saver's own is not hidden by it."""
        try:
            self.finish()
        except InputError as failure:
            if error is None:
                raise
            self._warn(str(failure))
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join(CLOSE_SECONDS)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    if self._closing:
                        return
                    self._changed.wait()
                order, self._waiting, self._writing = self._waiting, None, True
            try:
                self._attempt(order)
            except BaseException as error:
                self._error = error  # a bug, which belongs to the thread that trains
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _attempt(self, order: _Order) -> None:
        """Write a checkpoint, or say why that cannot be done."""
        path = self._run.checkpoint_path(order.step)
        try:
            self._write(path, order)
        except (InputError, MemoryError) as error:
            failure = error if isinstance(error, InputError) else InputError(f"{path}: not enough memory")
            self._failure, self._tried = failure, time.monotonic()
            kept = (
                f"the checkpoint of step {self.last} stays" if self.last is not None else "there is none yet"
            )
            self._trouble.begins(
                f"{failure}; {kept}, training goes on and tries again every {RETRY_SECONDS} seconds"
            )
            return
        self._failure, self.last = None, order.step
        self._trouble.ends(f"{path}: written; checkpoints can be written again")
        if order.announced:
            self._warn(f"{path}: written")
        try:
            self._run.prune(self._keep, self._keep_every, order.scores)
        except InputError as error:
            self._removal.begins(f"{error}; training goes on, and checkpoints pile up")

    def _write(self, path: Path, order: _Order) -> None:
        chunks = encode(order.make())
        size = sum(len(chunk) for chunk in chunks)
        free = _free_bytes(path.parent)
        room = f"{size:,} bytes are needed, and {RESERVE_BYTES:,} to spare; {free or 0:,} are free"
        if free is not None and free < size + RESERVE_BYTES:
            raise InputError(f"{path}: cannot be written: {room}")
        try:
            replace_file(path, chunks, self._call_before)
        except InputError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise InputError(f"{error}: {size:,} bytes are needed") from error
            raise

    def _call_before(self) -> None:
        for call in self._before:
            call()


def _free_bytes(directory: Path) -> int | None:
    """Bytes that may be written in `directory`; None where the file system cannot say."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(directory)
        if usage.total:
            return usage.free
    return None
