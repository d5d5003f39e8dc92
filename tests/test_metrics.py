"""The metrics file: whatever a crash leaves, a resumed run has every step once."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from intlm.errors import InputError
from train.metrics import HELD_OUT, MetricsFile, read_metrics, scores_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The metrics of steps 0 to 4, with an evaluation at steps 0 and 2."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile.open(path, -1) as metrics:
        for step in range(5):
            metrics.append(step, train=100 - step)
            if step in (0, 2):
                metrics.append(step, held_out=200 - step)
    return path


def steps(path: Path) -> list[int]:
    return [values["step"] for values in read_metrics(path)]


def test_lines(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 0, "train": 100}', '{"step": 0, "held_out": 200}']
    assert read_metrics(path) == [json.loads(line) for line in lines]
    assert steps(path) == [0, 0, 1, 2, 2, 3, 4]


def test_a_line_is_out_at_once(tmp_path: Path) -> None:
    metrics = MetricsFile.open(tmp_path / "m", -1)
    metrics.append(3, tokens=5)
    assert read_metrics(tmp_path / "m") == [{"step": 3, "tokens": 5}]
    metrics.close()


def test_numpy_scalars(tmp_path: Path) -> None:
    with MetricsFile.open(tmp_path / "m", -1) as metrics:
        metrics.append(1, a=np.int64(2), b=np.float32(0.5), c=np.bool_(True))
        for bad in (np.zeros(2), float("nan"), object()):
            with pytest.raises((TypeError, ValueError)):
                metrics.append(1, bad=bad)
    assert read_metrics(tmp_path / "m") == [{"step": 1, "a": 2, "b": 0.5, "c": True}]


@pytest.mark.parametrize(
    ("from_step", "left"),
    [(-1, []), (0, [0, 0]), (1, [0, 0, 1]), (2, [0, 0, 1, 2, 2]), (9, [0, 0, 1, 2, 2, 3, 4])],
)
def test_resuming_drops_later_steps(path: Path, from_step: int, left: list[int]) -> None:
    MetricsFile.open(path, from_step).close()
    assert steps(path) == left
    assert list(path.parent.iterdir()) == [path]


def test_a_resumed_run_has_the_same_file(path: Path) -> None:
    whole = path.read_bytes()
    with MetricsFile.open(path, 2) as metrics:
        for step in (3, 4):
            metrics.append(step, train=100 - step)
    assert path.read_bytes() == whole


def test_every_tear_is_tolerated(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n") + (whole[length : length + 1] == b"\n")
        assert len(read_metrics(path)) == complete
        with MetricsFile.open(path, 9) as metrics:
            metrics.append(7, train=1)
        assert len(read_metrics(path)) == complete + 1
        assert whole.startswith(path.read_bytes().removesuffix(b'{"step": 7, "train": 1}\n'))


def test_zeros_after_a_power_cut_are_a_torn_line(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    MetricsFile.open(path, 9).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "5", '{"train": 1}', '{"step": "1"}', "[" * 100_000, '{"step": true}', '{"step": -1}',
     '{"step": 1e400}', '{"step": 2147483648}', '{"step": 1, "step": 1}', '{"step": 1, "train": NaN}'],
)  # fmt: skip
def test_damage_inside_is_noticed_and_mended(path: Path, line: str) -> None:
    whole = path.read_bytes()
    for number, damaged in (("", [line]), ("2", [line, line])):
        lines = whole.decode().splitlines()
        path.write_text("\n".join([lines[0], *damaged, *lines[1:]]) + "\n")
        content = path.read_bytes()
        with pytest.raises(InputError) as raised:
            read_metrics(path)
        assert str(raised.value) == f"{path}: line 2 is damaged: not a JSON object with a step"
        assert path.read_bytes() == content
        said = []
        MetricsFile.open(path, 9, said.append).close()
        assert path.read_bytes() == whole
        aside = path.with_name(f"{path.name}.damaged{number}")
        assert aside.read_bytes() == content
        what = "2 lines are" if number else "line 2 is"
        assert said == [f"{path}: {what} damaged, and left out from now on; the file as it was is {aside}"]


def test_what_is_no_score_is_compared_with_none() -> None:
    lines = [
        {"step": step, HELD_OUT: value} for step, value in enumerate([9, 2.5, True, "1", 10**400, None, 3])
    ]
    assert scores_of(lines) == {1: 2.5, 6: 3}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for read in (read_metrics, lambda path: MetricsFile.open(path, 2)):
        with pytest.raises(InputError, match=r"pipe: is not a regular file$"):
            read(tmp_path / "pipe")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_metrics(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        MetricsFile.open(tmp_path / "none" / "m", 0)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        MetricsFile.open(tmp_path, 0)


def test_a_failed_rewrite_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = path.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        MetricsFile.open(path, 2)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


class Disk(io.FileIO):
    """A file on a disk that takes `room` bytes."""

    room = 10**9

    def write(self, data: bytes) -> int:  # type: ignore[override]
        taken = data[: self.room]
        if data and not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(taken)
        return super().write(taken)


def test_lines_wait_while_the_disk_is_full(path: Path) -> None:
    """However much of a line fits: it is never torn in the middle of the file, and nothing is lost."""
    whole = path.read_bytes()
    for room in range(1, 60, 7):
        path.write_bytes(b"")
        said: list[str] = []
        disk = Disk(path, "ab")
        with MetricsFile(path, disk, said.append) as metrics:
            disk.room = room
            for step in range(5):
                metrics.append(step, train=100 - step)
                if step in (0, 2):
                    metrics.append(step, held_out=200 - step)
                metrics.sync()
                assert whole.startswith(path.read_bytes())
                assert steps(path) == [0, 0, 1, 2, 2, 3, 4][: len(steps(path))]
            assert len(path.read_bytes()) == room
            disk.room = 10**9
            metrics.sync()
            assert path.read_bytes() == whole
        assert said == [
            f"{path}: cannot be written: No space left on device; training goes on, and its lines wait",
            f"{path}: can be written again",
        ]


def test_lines_that_wait_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.metrics.MOST_WAITING", 3)
    said: list[str] = []
    disk = Disk(path, "ab")
    with MetricsFile(path, disk, said.append) as metrics:
        disk.room = 5
        for step in range(10, 20):
            metrics.append(step)
        disk.room = 10**9
        metrics.append(20)
        disk.room = 0
        metrics.append(21)
    assert steps(path)[7:] == [10, 18, 19, 20]
    assert said[1] == f"{path}: can be written again; 7 lines are lost"
    assert said[3] == f"{path}: 1 lines could not be written and are lost"


def test_scores(path: Path) -> None:
    with MetricsFile.open(path, 9) as metrics:
        assert metrics.scores == {}
        metrics.append(5, held_out_bits_per_byte=2.5)
        metrics.append(6, held_out_bits_per_byte=3.5)
        assert metrics.scores == {5: 2.5, 6: 3.5}
    with MetricsFile.open(path, 5) as metrics:
        assert metrics.scores == {5: 2.5}
