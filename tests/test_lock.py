"""The lock: one holder at a time, with the system's locks and without, and none left behind by the dead."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from intlm.errors import InputError
from train import lock
from train.lock import is_ours, locked

HOST = socket.gethostname()


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A file system with locks, and one without."""
    if not request.param:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    return bool(request.param)


def test_a_lock_says_who_holds_it_and_is_removed(tmp_path: Path, system: bool) -> None:
    with locked(tmp_path):
        content = json.loads((tmp_path / "lock").read_bytes())
        assert content.keys() == {"pid", "host", "boot", "started"}
        assert (content["pid"], content["host"]) == (os.getpid(), HOST)
        assert is_ours(tmp_path / "lock")
        who = f"process {os.getpid()} on {HOST!r}"
        with pytest.raises(InputError) as raised, locked(tmp_path):
            pass
        assert str(raised.value) == f"{tmp_path}: another process is training this run, {who}"
        assert json.loads((tmp_path / "lock").read_bytes()) == content
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_directories_made_for_a_lock_alone_are_removed(tmp_path: Path, system: bool) -> None:
    with locked(tmp_path / "runs/one"):
        assert (tmp_path / "runs/one/lock").exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), locked(tmp_path / "runs/one"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs/one"):
        (tmp_path / "runs/one/config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file/x: cannot be made: Not a directory"),
        locked(tmp_path / "file/x"),
    ):
        pass
    with pytest.raises(InputError, match="cannot be made: File exists"), locked(tmp_path / "file"):
        pass
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match="lock: cannot be written: Is a directory"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "content", [b"", bytes(100), b'{"pid": 1', b"\xff", b"[]", b'{"pid": 1, "host": "elsewhere"}']
)
def test_the_system_knows_better_than_the_file(tmp_path: Path, content: bytes) -> None:
    said: list[str] = []
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    assert said == []


def dead_process() -> dict[str, object]:
    """What a process would have written that has ended since."""
    script = "import json; from train import lock; print(json.dumps(lock._this_process()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def test_without_locks_the_dead_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    here = lock._this_process()
    dead = dead_process()
    assert dead["host"] == here["host"] and dead["boot"] == here["boot"] and dead["started"]
    for owner in (dead, here | {"started": "1"}, here | {"boot": "before"}):
        (tmp_path / "lock").write_text(json.dumps(owner))
        said: list[str] = []
        with locked(tmp_path, said.append):
            assert json.loads((tmp_path / "lock").read_bytes()) == here
        assert list(tmp_path.iterdir()) == []
        who = f"process {owner['pid']} on {HOST!r}"
        assert said == [f"{tmp_path}/lock: was left by a process that has gone, {who}; taken over"]


def test_without_locks_another_machine_is_not_guessed_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / "lock"
    for content, who in (
        (
            json.dumps({"pid": 7, "host": "elsewhere"}),
            ", process 7 on 'elsewhere'; delete the file if it has gone",
        ),
        ("", " (the file does not say which); delete the file if none does"),
    ):
        path.write_text(content)
        with pytest.raises(InputError) as raised, locked(tmp_path):
            pass
        assert str(raised.value) == f"{path}: another process may be training this run{who}"
        assert path.read_text() == content


def test_a_lock_removed_while_it_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder leaves between our opening the file and our locking it."""
    flock = fcntl.flock
    holder = locked(tmp_path)
    holder.__enter__()
    seen = []

    def late(descriptor: int, how: int) -> None:
        if not seen:
            holder.__exit__(None, None, None)
        seen.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(seen) == 2
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(InputError, match="another process is training"), locked(tmp_path):
            pass


def test_a_lock_that_was_removed_and_taken_by_another(tmp_path: Path, system: bool) -> None:
    with locked(tmp_path) as lock:
        lock.check()
        (tmp_path / "lock").unlink()
        lock.check()  # nobody else has it
        with locked(tmp_path) as other:
            other.check()
            with pytest.raises(OSError, match="has become another process's"):
                lock.check()
            with pytest.raises(InputError, match="another process is training"), locked(tmp_path):
                pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(InputError, match="lock: cannot be written: No space left"),
        locked(tmp_path / "runs/one"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_never_two_at_once(tmp_path: Path, system: bool) -> None:
    inside = most = turns = 0
    until = time.monotonic() + 2

    def contend() -> None:
        nonlocal inside, most, turns
        while time.monotonic() < until and turns < 300:
            try:
                with locked(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    turns += 1
                    time.sleep(0.0005)
                    inside -= 1
            except InputError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns > 10
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_link_in_place_of_a_lock_leads_to_is_not_written_over(tmp_path: Path, system: bool) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(other)
    with pytest.raises(InputError, match=r"run/lock: cannot be written: "), locked(tmp_path / "run"):
        pass
    assert other.read_bytes() == b"mine"


def test_a_pipe_is_no_lock_of_ours(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    assert not is_ours(tmp_path / "lock")
    for content in (
        b'{"pid": 0}',
        b'{"pid": 1e3}',
        b'{"pid": true}',
        b'{"pid": ' + b"9" * 2000 + b"}",
        b"[" * 4096,
    ):
        (tmp_path / "other").write_bytes(content)
        assert not is_ours(tmp_path / "other")
