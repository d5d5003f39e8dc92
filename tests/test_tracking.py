"""TensorBoard events, read back from the file by the format's definition."""

import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2, layout_pb2

from intlm.errors import InputError
from train.tracking import Tracker


def masked(data: bytes) -> int:
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, checksum of the length, data, checksum of the data."""
    position = 0
    while position < len(content):
        length, check = struct.unpack_from("<QI", content, position)
        assert check == masked(content[position : position + 8])
        data = content[position + 12 : position + 12 + length]
        assert struct.unpack_from("<I", content, position + 12 + length) == (masked(data),)
        yield data
        position += 16 + length


def events(directory: Path) -> list[event_pb2.Event]:
    """All events in the order in which TensorBoard reads them: by file name."""
    return [
        event_pb2.Event.FromString(record)
        for path in sorted(directory.glob("*tfevents*"))
        for record in records(path.read_bytes())
    ]


def values(directory: Path) -> list[tuple[int, str, object]]:
    return [(event.step, value.tag, value) for event in events(directory) for value in event.summary.value]


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    return [(step, tag, v.simple_value) for step, tag, v in values(directory) if v.HasField("simple_value")]


def histogram(directory: Path, counts: np.ndarray):
    with Tracker(directory, -1) as tracker:
        tracker.histogram(4, "weights/head", counts)
    return [(step, tag, value.histo) for step, tag, value in values(directory) if value.HasField("histo")]


def test_scalars_and_reference_lines(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, -1)
    tracker.scalars(0, {"bits_per_byte/held_out": 8.0, "saturated": np.int64(3)})
    tracker.reference_lines(0, {"trigram": 3.5})
    tracker.scalars(10, {"bits_per_byte/held_out": 4.25})
    tracker.reference_lines(10, {"trigram": 3.5})
    tracker.close()
    assert scalars(tmp_path) == [
        (0, "bits_per_byte/held_out", 8.0),
        (0, "saturated", 3.0),
        (0, "bits_per_byte/trigram", 3.5),
        (10, "bits_per_byte/held_out", 4.25),
        (10, "bits_per_byte/trigram", 3.5),
    ]


def test_one_chart_has_every_curve_in_bits_per_byte(tmp_path: Path) -> None:
    Tracker(tmp_path, -1).close()
    [layout] = [value for _, tag, value in values(tmp_path) if tag == "custom_scalars__config__"]
    assert layout.metadata.plugin_data.plugin_name == "custom_scalars"
    [category] = layout_pb2.Layout.FromString(layout.tensor.string_val[0]).category
    [chart] = category.chart
    assert chart.title == "bits per byte"
    assert list(chart.multiline.tag) == ["bits_per_byte/.*"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# no *heading*\n<b>\n\nend", "    # no *heading*\n    <b>\n    \n    end"),
        ("größe \ud800", "    größe ?"),
        ("", ""),
    ],
)
def test_text_is_shown_verbatim(tmp_path: Path, text: str, shown: str) -> None:
    tracker = Tracker(tmp_path, -1)
    tracker.text(3, "sample", text)
    tracker.close()
    [(step, value)] = [(step, value) for step, tag, value in values(tmp_path) if tag.startswith("sample")]
    assert step == 3
    assert value.metadata.plugin_data.plugin_name == "text"
    assert value.tensor.string_val[0].decode() == shown


def test_histogram_of_all_values(tmp_path: Path) -> None:
    counts = np.arange(1, 257, dtype=np.int64)
    [(step, tag, found)] = histogram(tmp_path, counts)
    numbers = np.arange(-128, 128)
    assert (step, tag) == (4, "weights/head")
    assert list(found.bucket) == counts.tolist()
    assert list(found.bucket_limit) == (numbers + 0.5).tolist()
    assert (found.min, found.max, found.num) == (-128.5, 127.5, counts.sum())
    assert (found.sum, found.sum_squares) == ((numbers * counts).sum(), (numbers**2 * counts).sum())


def test_histogram_bins_do_not_reach_over_gaps(tmp_path: Path) -> None:
    counts = np.zeros(256, np.int32)
    counts[[128 - 100, 128, 128 + 1, 128 + 127]] = [5, 7, 9, 11]
    [(_, _, found)] = histogram(tmp_path, counts)
    assert list(found.bucket_limit) == [-99.5, -0.5, 0.5, 1.5, 126.5, 127.5]
    assert list(found.bucket) == [5, 0, 7, 9, 0, 11]
    assert (found.min, found.max) == (-100.5, 127.5)


def test_histogram_of_nothing(tmp_path: Path) -> None:
    assert histogram(tmp_path, np.zeros(256, np.int64)) == []
    with pytest.raises(ValueError, match=r"\(255,\)"):
        histogram(tmp_path, np.zeros(255, np.int64))


def test_a_large_histogram_is_exact(tmp_path: Path) -> None:
    counts = np.zeros(256, np.int32)
    counts[0] = 2**31 - 1
    [(_, _, found)] = histogram(tmp_path, counts)
    assert found.sum_squares == (2**31 - 1) * 128**2


def test_a_resumed_run_hides_later_steps_and_keeps_earlier_files(tmp_path: Path) -> None:
    for from_step, steps in ((-1, (0, 10, 20)), (10, (20, 30))):
        # Within one second: the files must not have the same name.
        tracker = Tracker(tmp_path, from_step)
        for step in steps:
            tracker.scalars(step, {"x": step})
        tracker.close()
    assert [step for step, _, _ in scalars(tmp_path)] == [0, 10, 20, 20, 30]
    started = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert started == [0, 11]


def test_many_points_arrive(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, -1)
    for step in range(1000):
        tracker.scalars(step, {"x": step})
    tracker.close()
    assert [step for step, _, _ in scalars(tmp_path)] == list(range(1000))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_reported_and_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 5.0)
    (tmp_path / "events.out.tfevents.0000000005.00000000").symlink_to("/dev/full")
    monkeypatch.setattr("train.tracking.FLUSH_SECONDS", -1)
    message = re.escape(f"{tmp_path}: cannot be written: No space left on device")
    with pytest.raises(InputError, match=message):
        Tracker(tmp_path, -1)


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are dropped, it is said once, and what comes later can be read."""
    said: list[str] = []
    with Tracker(tmp_path, -1, said.append) as tracker:
        tracker.scalars(1, {"x": 1})
        with monkeypatch.context() as patch:
            patch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
            for step in range(2, 5):
                tracker.scalars(step, {"x": step})
            patch.setattr("train.tracking.RETRY_SECONDS", 0)
            patch.setattr("tensorboardX.record_writer.open_file", full)
            tracker.scalars(5, {"x": 5})
        tracker.scalars(6, {"x": 6})  # too early to try again
        monkeypatch.setattr("train.tracking.RETRY_SECONDS", 0)
        tracker.scalars(7, {"x": 7})
        tracker.scalars(8, {"x": 8})
    assert scalars(tmp_path) == [(1, "x", 1), (7, "x", 7), (8, "x", 8)]
    assert said == [
        f"{tmp_path}: cannot be written: No space left on device; training goes on without its events",
        f"{tmp_path}: can be written again",
    ]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_events_are_flushed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path, -1) as tracker:
        tracker.scalars(1, {"x": 1})
        assert scalars(tmp_path) == []
        monkeypatch.setattr("train.tracking.FLUSH_SECONDS", -1)
        tracker.scalars(2, {"x": 2})
        assert scalars(tmp_path) == [(1, "x", 1), (2, "x", 2)]


def test_close_twice(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, -1)
    tracker.close()
    tracker.close()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"below: cannot be written: (Not a directory|File exists)"):
        Tracker(tmp_path / "file" / "below", -1)


def test_importing_is_cheap_and_writing_is_quiet(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from train.tracking import Tracker\n"
        "assert 'tensorboardX' not in sys.modules\n"
        "tracker = Tracker(Path(sys.argv[1]), -1); tracker.scalars(1, {'x': 2}); tracker.close()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(scalars(tmp_path)) == 1
