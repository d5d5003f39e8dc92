"""The saver: in the background, one after the other, and past any failure of the disk."""

import errno
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from intlm import checkpoint
from intlm.checkpoint import Checkpoint
from intlm.errors import InputError
from train.run import Run
from train.saving import Saver


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "one", {})


def snapshot(step: int) -> Callable[[], Checkpoint]:
    return lambda: Checkpoint({"master": np.full(1000, step, np.int16)}, {"step": step})


def save(saver: Saver, step: int, announced: bool = False) -> None:
    saver.save(step, snapshot(step), {}, announced)


def steps(run: Run) -> list[int]:
    return [checkpoint.read(path).meta["step"] for path in run.checkpoints()]


class Disk:
    """Fails with `error` where that is set; `free` bytes are free."""

    error = 0
    free = 10**12

    def __init__(self, patch: pytest.MonkeyPatch):
        fsync, usage = os.fsync, namedtuple("usage", "total used free")

        def failing(descriptor: int) -> None:
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            fsync(descriptor)

        patch.setattr(os, "fsync", failing)
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**13, 0, self.free))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_all_that_is_saved_is_on_disk_in_the_end(run: Run) -> None:
    said: list[str] = []
    with Saver(run, keep=2, keep_every=4, warn=said.append) as saver:
        for step in range(1, 10):
            saver.save(step, snapshot(step), {2: 1.0, 5: 2.0}, announced=step == 7)
        assert not saver.due
    assert steps(run) == [2, 4, 8, 9]
    assert saver.last == 9
    assert said == [f"{run.checkpoint_path(7)}: written"]
    assert not any(thread.name == "intlm-saver" and thread.is_alive() for thread in threading.enumerate())


def test_training_goes_on_while_one_is_written_and_one_waits(run: Run) -> None:
    gate, begun, third = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Checkpoint:
        begun.set()
        assert gate.wait(30)
        return snapshot(1)()

    with Saver(run, 9) as saver:
        saver.save(1, slow, {})
        assert begun.wait(30)
        save(saver, 2)
        assert steps(run) == []
        thread = threading.Thread(target=lambda: (save(saver, 3), third.set()))
        thread.start()
        assert not third.wait(0.2)
        gate.set()
        thread.join()
    assert steps(run) == [1, 2, 3]


def test_what_comes_before_a_checkpoint_is_seen(run: Run, disk: Disk) -> None:
    seen = []
    path = run.checkpoint_path(5)

    def before() -> None:
        seen.append((path.exists(), len(checkpoint.read(path.with_name(path.name + ".tmp")).arrays)))
        if len(seen) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    said: list[str] = []
    with (
        pytest.raises(InputError, match="Input/output error"),
        Saver(run, 9, 0, said.append, [before]) as saver,
    ):
        save(saver, 5)
        saver.finish()
        path = run.checkpoint_path(6)
        save(saver, 6)
    assert seen == [(False, 1), (False, 1)]
    assert steps(run) == [5]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_for_a_while(
    run: Run, disk: Disk, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    said: list[str] = []
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    with Saver(run, 1, 0, said.append) as saver:
        save(saver, 1)
        saver.finish()
        disk.error = code
        for step in (2, 3, 4):
            save(saver, step)
            with pytest.raises(InputError) as raised:
                saver.finish()
            assert steps(run) == [1]
        full = ": 5,4" in str(raised.value) or "bytes are needed" in str(raised.value)
        assert full == (code in (errno.ENOSPC, errno.EDQUOT))
        assert str(raised.value).endswith("; the same command will go on from step 1")
        assert str(raised.value).startswith(
            f"{run.checkpoint_path(4)}: cannot be written: {os.strerror(code)}"
        )
        assert not saver.due
        clock += 31
        assert saver.due
        clock -= 200  # a clock that jumps delays nothing for ever
        assert saver.due
        disk.error = 0
        save(saver, 5)
        saver.finish()
        assert not saver.due
        save(saver, 6)
    assert steps(run) == [6]
    assert [line.partition(": ")[0] for line in said] == [str(run.checkpoint_path(step)) for step in (2, 5)]
    assert said[0].endswith(
        "; the checkpoint of step 1 stays, training goes on and tries again every 30 seconds"
    )
    assert said[1].endswith(": written; checkpoints can be written again")


def test_room_is_looked_for_before_anything_is_written(run: Run, disk: Disk) -> None:
    said: list[str] = []
    disk.free = 1000
    with pytest.raises(InputError, match="will go on from its start"), Saver(run, 1, 0, said.append) as saver:
        save(saver, 1)
    size = sum(map(len, checkpoint.encode(snapshot(1)())))
    assert said == [
        f"{run.checkpoint_path(1)}: cannot be written: {size:,} bytes are needed, and 1,048,576 to spare; "
        "1,000 are free; there is none yet, training goes on and tries again every 30 seconds"
    ]
    assert list((run.directory / "checkpoints").iterdir()) == []


def test_the_newest_state_is_what_waits_for_a_disk(run: Run, disk: Disk) -> None:
    gate = threading.Event()
    said: list[str] = []
    with Saver(run, 9, 0, said.append) as saver:
        disk.error = errno.ENOSPC
        save(saver, 1)
        with pytest.raises(InputError):
            saver.finish()
        disk.error = 0
        begun = threading.Event()
        saver.save(2, lambda: (begun.set(), gate.wait(30), snapshot(2)())[2], {})
        assert begun.wait(30)
        save(saver, 3, announced=True)
        save(saver, 4)
        gate.set()
    assert steps(run) == [2, 4]
    assert said[-1] == f"{run.checkpoint_path(4)}: written"


def test_a_directory_that_goes_away_and_comes_back(run: Run) -> None:
    said: list[str] = []
    with Saver(run, 9, 0, said.append) as saver:
        save(saver, 1)
        saver.finish()
        run.directory.rename(run.directory.with_name("two"))
        save(saver, 2)
        with pytest.raises(
            InputError, match="No such file or directory; the same command will go on from step 1"
        ):
            saver.finish()
        assert not run.directory.exists()
        run.directory.with_name("two").rename(run.directory)
        save(saver, 3)
    assert steps(run) == [1, 3]
    assert len(said) == 2


def test_an_old_one_that_cannot_be_removed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch, Saver(run, 1, 0, said.append) as saver:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

        patch.setattr(os, "unlink", refuse)
        for step in (1, 2, 3):
            save(saver, step)
        saver.finish()
    assert steps(run) == [1, 2, 3]
    refused = f"{run.checkpoint_path(1)}: cannot be removed: Permission denied"
    assert said == [f"{refused}; training goes on, and checkpoints pile up"]


def test_too_little_memory_is_a_failure_like_another(run: Run) -> None:
    def large() -> Checkpoint:
        raise MemoryError

    said: list[str] = []
    with Saver(run, 1, 0, said.append) as saver:
        saver.save(1, large, {})
        save(saver, 2)
    assert steps(run) == [2]
    assert "not enough memory" in said[0]


def test_a_bug_is_not_kept_quiet(run: Run) -> None:
    with pytest.raises(TypeError, match="integers only"), Saver(run, 1) as saver:
        saver.save(1, lambda: Checkpoint({"x": np.zeros(3)}, {}), {})
        while True:
            save(saver, 2)


def test_another_error_is_not_hidden(run: Run, disk: Disk) -> None:
    said: list[str] = []
    disk.error = errno.ENOSPC
    with pytest.raises(InputError, match="the text has failed"), Saver(run, 1, 0, said.append) as saver:
        save(saver, 1)
        raise InputError("the text has failed")
    assert said[-1].endswith("; the same command will go on from its start")
