"""Whatever kills, starves or damages a run, it goes on to the bytes of one that nothing happened to."""

import errno
import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Faulty

from intlm import checkpoint
from train.metrics import read_metrics

TRAIN = ["train", "tiny", "--data", "text.txt", "--engine", "reference", "--set", "population=4",
         "--set", "segment=8", "--run", "one"]  # fmt: skip
STAGES = [
    r"before open .*step-\d+\.safetensors\.tmp",
    r"write .*step-\d+\.safetensors\.tmp",
    r"half .*step-\d+\.safetensors\.tmp",
    r"written .*step-\d+\.safetensors\.tmp",
    r"before fsync .*step-\d+\.safetensors\.tmp",
    r"after fsync .*step-\d+\.safetensors\.tmp",
    r"before fsync one/metrics\.jsonl",
    r"after fsync one/metrics\.jsonl",
    r"before replace .*step-\d+\.safetensors\.tmp",
    r"after replace .*step-\d+\.safetensors",
    r"before fsync one/checkpoints$",
    r"after fsync one/checkpoints$",
    r"before unlink .*step-\d+\.safetensors",
    r"after unlink .*step-\d+\.safetensors",
]
"""Every stage of a checkpoint's write."""
OTHERS = [r"half one/metrics\.jsonl", r"written one/metrics\.jsonl", r"lock$", r"tfevents"]
BASES = [r"half one/history/", r"before replace one/history/", r"after replace one/history/"]
"""Of the history, when its first segment is begun."""
RECORDS = [
    r"half one/history/.*history$",
    r"written one/history/.*history$",
    r"before fsync one/history/.*history$",
]

MORE_GARBAGE = [b"garbage\n", bytes(64), b"[]", b'{"a": 1']


@pytest.fixture(scope="module")
def faulty() -> Iterator[Faulty]:
    server = Faulty()
    yield server
    server.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(3)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(source.choices(("one", "two", "four"), k=8)) for _ in range(60)))
    return path


@pytest.fixture
def home(tmp_path: Path, text: Path) -> Path:
    (tmp_path / "home").mkdir()
    shutil.copy(text, tmp_path / "home")
    return tmp_path / "home"


def words(steps: int, checkpoints: int = 1, evaluations: int = 5, keep: int = 2) -> list[str]:
    return [*TRAIN, "--steps", str(steps), "--checkpoint-every", str(checkpoints), "--evaluate-every",
            str(evaluations), "--keep", str(keep)]  # fmt: skip


def result(home: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """What a run came to: its last checkpoint and all its evaluations."""
    run = home / "runs/one"
    evaluations = [
        (line["step"], line["held_out_bits_per_byte"])
        for line in read_metrics(run / "metrics.jsonl")
        if "held_out_bits_per_byte" in line
    ]
    return max((run / "checkpoints").glob("step-*.safetensors")).read_bytes(), evaluations


def newest(home: Path) -> int:
    """The step of the newest checkpoint, which must be whole; 0 where there is none."""
    paths = sorted((home / "runs/one/checkpoints").glob("step-*.safetensors"))
    return int(checkpoint.read(paths[-1]).meta["step"]) if paths else 0


def undisturbed(faulty: Faulty, home: Path, command: list[str]) -> tuple[bytes, list[tuple[int, float]]]:
    """What `command` comes to where nothing goes wrong."""
    if tuple(command) not in faulty.whole:
        whole = home.with_name("whole")
        shutil.copytree(home, whole)
        assert faulty.run(whole, command)["code"] == 0
        faulty.whole[tuple(command)] = result(whole)
    return faulty.whole[tuple(command)]


def untraced(done: dict[str, Any]) -> dict[str, Any]:
    """`done`, in which no traceback was shown."""
    assert "Traceback" not in done["err"], done["err"]
    assert done["code"] != 70
    return done


def shake(faulty: Faulty, home: Path, steps: int, faults: Iterator[dict[str, Any]], kills: int) -> None:
    """Kill a run until it has died `kills` times, then let it end; compare it with one that was left alone."""
    command = words(steps)
    expected = undisturbed(faulty, home, command)
    killed = lost = done = step = 0
    while killed < kills:
        tried = untraced(faulty.run(home, command, **next(faults)))
        done += tried["steps"]
        if tried["code"] == 0:
            break
        assert tried["code"] == -signal.SIGKILL
        killed += 1
        at = newest(home)
        lost += max(0, step - at)
        step = at
    last = untraced(faulty.run(home, command))
    assert last["code"] == 0
    assert last["err"] == ""
    done += last["steps"]
    found = result(home)
    differing = sum(one != other for one, other in zip(found[0], expected[0], strict=True))
    print(
        f"{killed} kills, {killed + 1} starts, {done - steps} of {steps} steps repeated, "
        f"{lost} steps of a checkpoint lost, {differing} bytes lost"
    )
    assert killed == kills
    assert (lost, differing) == (0, 0)
    assert found == expected
    for command in ("check", "verify"):
        assert faulty.run(home, [command, "one"])["code"] == 0


def test_a_run_killed_at_every_stage_of_a_checkpoint(faulty: Faulty, home: Path) -> None:
    faults: list[dict[str, Any]] = [{"kill": stage} for stage in BASES]
    faults += [
        {"kill": stage, "count": 1 + number % 2} for number, stage in enumerate(STAGES + OTHERS + RECORDS)
    ]
    shake(faulty, home, 50, iter(faults), len(faults))


def anywhere(seed: int) -> Iterator[dict[str, Any]]:
    source = random.Random(seed)
    while True:
        if source.random() < 0.4:
            yield {"after": source.random() * 0.06}
        else:
            yield {"kill": source.choice(STAGES + OTHERS + RECORDS), "count": source.choice([1, 1, 2, 3])}


@pytest.mark.long
def test_a_run_killed_two_hundred_times(faulty: Faulty, home: Path) -> None:
    shake(faulty, home, 1200, anywhere(1), 220)


def points_of(faulty: Faulty, home: Path, command: list[str]) -> list[tuple[str, int]]:
    """All that a run does to files, each with how often it has done so by then."""
    copy = home.with_name("points")
    shutil.copytree(home, copy)
    seen: dict[str, int] = {}
    found = []
    for point in faulty.run(copy, command, record=True)["points"]:
        seen[point] = seen.get(point, 0) + 1
        found.append((point, seen[point]))
    return found


def pattern(point: str) -> str:
    """What matches exactly this point; the name of a file of events has the time in it."""
    if "tfevents" in point:
        return "^" + point.partition("tensorboard/")[0] + "tensorboard/.*tfevents"
    return "^" + point.replace(".", r"\.") + "$"


@pytest.mark.long
def test_a_run_killed_at_every_point_from_its_first(faulty: Faulty, home: Path) -> None:
    """While it is made, too: a new run each time."""
    command = words(3, 1, 2, 1)
    expected = undisturbed(faulty, home, command)
    points = points_of(faulty, home, command)
    assert any("config.json" in point for point, _ in points)
    for point, count in points:
        shutil.rmtree(home / "runs", ignore_errors=True)
        tried = untraced(faulty.run(home, command, kill=pattern(point), count=count))
        assert tried["code"] in (-signal.SIGKILL, 0), (point, tried)
        last = untraced(faulty.run(home, command))
        assert (last["code"], last["err"]) == (0, ""), (point, last)
        assert result(home) == expected, point
    print(f"{len(points)} kills, each of a new run")


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.long), 36])
@pytest.mark.parametrize("length", [1, 1000])
def test_a_disk_that_is_full_at_any_point(faulty: Faulty, home: Path, length: int, share: int) -> None:
    """For one write, or from then on: what could be written stays, and the same command goes on."""
    command = words(3, 1, 2, 1)
    expected = undisturbed(faulty, home, command)
    points = [
        (point, count)
        for point, count in points_of(faulty, home, command)
        if point.split()[0] in ("write", "half")
        or point.split()[:2] in (["before", "fsync"], ["before", "open"])
    ]
    codes = set()
    for point, count in points[length % 7 :: share]:
        shutil.rmtree(home / "runs", ignore_errors=True)
        where = pattern(point) if length == 1 else "^(write|half|before fsync|before open) (?!.*lock)"
        if length > 1:
            count = points.index((point, count)) + 1
        tried = untraced(
            faulty.run(home, command, fail=where, count=count, length=length, errno=errno.ENOSPC)
        )
        codes.add(tried["code"])
        assert tried["code"] in (0, 2), (point, tried)
        assert tried["code"] == 0 or "No space left on device" in tried["err"]
        last = untraced(faulty.run(home, command))
        assert last["code"] == 0, (point, last)
        assert result(home) == expected, point
    assert 2 in codes or length == 1
    assert len(points) > 30


def test_a_disk_that_is_full_for_some_steps(faulty: Faulty, home: Path) -> None:
    command = words(12, 2, 6)
    expected = undisturbed(faulty, home, command)
    done = faulty.run(home, command, full=7)
    assert done["code"] == 0
    history, again = (line for line in done["err"].splitlines() if "history" in line)
    first, second = (line for line in done["err"].splitlines() if "history" not in line)
    assert "one/history: the history cannot be written: 5,000 bytes are free" in history
    assert "one/history: the history is written again, from step " in again
    assert "step-00000002.safetensors: cannot be written: 414,652 bytes are needed" in first
    assert first.endswith(
        "5,000 are free; there is none yet, training goes on and tries again every 30 seconds"
    )
    assert second.startswith("intlm: runs/one/checkpoints/step-0000000")
    assert second.endswith(": written; checkpoints can be written again")
    assert result(home) == expected


def test_a_disk_that_stays_full(faulty: Faulty, home: Path) -> None:
    command = words(12, 2, 6)
    expected = undisturbed(faulty, home, command)
    done = faulty.run(home, command, full=99)
    assert done["code"] == 2
    history, first, second = done["err"].splitlines()
    assert "one/history: the history cannot be written: 5,000 bytes are free" in history
    assert "step-00000002.safetensors" in first
    assert "step-00000012.safetensors: cannot be written: " in second
    assert second.endswith("; the same command will go on from its start")
    assert untraced(faulty.run(home, command))["code"] == 0
    assert result(home) == expected


@pytest.fixture
def disk(home: Path) -> Iterator[Path]:
    """A file system of a few megabytes with the text on it."""
    path = home.with_name("disk")
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    try:
        shutil.copy(home / "text.txt", path)
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_real_disk_that_is_full_for_some_steps(faulty: Faulty, home: Path, disk: Path) -> None:
    """Evaluations of that time are in the metrics all the same."""
    command = words(30, 1, 2)
    expected = undisturbed(faulty, home, command)
    done = untraced(faulty.run(disk, command, fill=[5, 15]))
    assert done["code"] == 0, done
    assert result(disk) == expected
    lines = done["err"].splitlines()
    assert sum("checkpoints can be written again" in line for line in lines) == 1
    assert len(lines) <= 6  # of checkpoints; of metrics and events, where they had no room left in a page
    assert all("written" in line for line in lines)
    assert faulty.run(disk, ["check", "one"])["code"] == 0


def test_a_directory_that_is_removed_in_mid_run(faulty: Faulty, home: Path) -> None:
    command = words(12, 2, 6)
    expected = undisturbed(faulty, home, command)
    done = untraced(faulty.run(home, command, remove=5))
    assert done["code"] == 2
    assert "No such file or directory" in done["err"]
    assert done["err"].count("\n") <= 3
    assert not (home / "runs/one").exists()
    assert faulty.run(home, command)["code"] == 0
    assert result(home) == expected


def test_clocks_that_jump(faulty: Faulty, home: Path) -> None:
    command = words(12, 2, 6)
    expected = undisturbed(faulty, home, command)
    done = untraced(faulty.run(home, command, clock=[0, 1e6, -1e6, 3, -1e9]))
    assert (done["code"], done["err"]) == (0, "")
    assert result(home) == expected


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGHUP])
def test_signals_that_stop(faulty: Faulty, home: Path, number: signal.Signals) -> None:
    command = words(12, 5, 6)
    expected = undisturbed(faulty, home, command)
    for step in (3, 7):
        done = faulty.run(home, command, signals=[(step, number)])
        line = f"runs/one: step {step + 1} of 12; interrupted, and resumed by the same command\n"
        assert (done["code"], done["err"]) == (130, line)
        assert newest(home) == step + 1
        assert not (home / "runs/one/lock").exists()
    assert faulty.run(home, command)["code"] == 0
    assert result(home) == expected


def test_a_signal_that_saves(faulty: Faulty, home: Path) -> None:
    command = words(12, 5, 6, 9)
    expected = undisturbed(faulty, home, command)
    done = faulty.run(home, command, signals=[(2, signal.SIGUSR1), (7, signal.SIGUSR1)])
    names = [f"runs/one/checkpoints/step-{step:08d}.safetensors" for step in (3, 8)]
    assert (done["code"], done["err"]) == (0, "".join(f"intlm: {name}: written\n" for name in names))
    assert all((home / name).exists() for name in names)
    assert result(home) == expected


def test_a_second_interrupt_leaves_at_once(faulty: Faulty, home: Path) -> None:
    command = words(12, 5, 6)
    expected = undisturbed(faulty, home, command)
    done = faulty.run(home, command, signals=[(7, signal.SIGINT), (7, signal.SIGINT)])
    assert (done["code"], done["err"]) == (130, "")
    assert newest(home) in (5, 6)
    assert faulty.run(home, command)["code"] == 0
    assert result(home) == expected


def regions(content: bytes) -> dict[str, int]:
    """A byte in every region of a checkpoint."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found = {"length": 0, "length's end": 7, "header": 8, "header's end": start - 1}
    for key in header["__metadata__"]:
        found[f"metadata {key}"] = content.index(f'"{key}":"'.encode()) + len(key) + 4
    for name, entry in header.items():
        if name != "__metadata__":
            found[f"name {name}"] = content.index(f'"{name}":'.encode()) + 1
            found[f"array {name}"] = start + entry["data_offsets"][0]
            found[f"array {name}'s end"] = start + entry["data_offsets"][1] - 1
    return found


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.long), 9])
def test_a_flipped_bit_anywhere_or_a_cut_is_noticed_and_gone_past(
    faulty: Faulty, home: Path, share: int
) -> None:
    """By `check` in all places, and by `train` in some."""
    command = words(6, 2, 6)
    assert faulty.run(home, command)["code"] == 0
    expected = result(home)
    path = home / "runs/one/checkpoints/step-00000006.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    damages = {}
    for name, place in regions(content).items():
        damages[name] = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for size in (0, 1, 7, 8, 9, start - 1, start, start + 1, len(content) // 2, len(content) - 1):
        damages[f"{size} bytes"] = content[:size]
    damages |= {
        "garbage": random.Random(1).randbytes(5000),
        "zeros": bytes(len(content)),
        "more": content + b"x",
    }
    assert len(damages) > 60
    for number, (name, damaged) in enumerate(list(damages.items())[::share]):
        path.write_bytes(damaged)
        done = untraced(faulty.run(home, ["check", "one"]))
        assert done["code"] == 1, name
        assert "step-00000006.safetensors  damaged" in done["out"]
        assert "1 damaged" in done["out"]
        if number % 4 == 0:
            done = untraced(faulty.run(home, command))
            assert done["code"] == 0, (name, done)
            assert done["err"].count("\n") == 1
            assert "step-00000006.safetensors" in done["err"] and "step-00000004.safetensors" in done["err"]
            assert result(home) == expected
            assert path.with_name(path.name + ".damaged").read_bytes() == damaged
            path.with_name(path.name + ".damaged").unlink()


@pytest.mark.parametrize(
    "content", [b"", b"{}", *(pytest.param(each, marks=pytest.mark.long) for each in MORE_GARBAGE)]
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "data.json", "metrics.jsonl", "baselines.json"]
)
def test_other_files_that_are_empty_or_garbage(faulty: Faulty, home: Path, name: str, content: bytes) -> None:
    """They are named, and nothing else is touched."""
    command = words(6, 2, 6)
    whole = home.with_name("whole")
    assert faulty.run(home, command)["code"] == 0
    shutil.copytree(home, whole)
    path = home / "runs/one" / name
    path.write_bytes(content)
    checked = untraced(faulty.run(home, ["check", "one"]))
    # A torn last line, and nothing in it, are no damage to metrics or figures.
    torn = name == "metrics.jsonl" and content != b"{}\n"
    assert checked["code"] == (
        0 if torn or (content == b"{}" and name in ("data.json", "baselines.json")) else 1
    )
    for words_ in (command, ["sample", "one", "--tokens", "2", "--engine", "reference"]):
        done = untraced(faulty.run(home, words_))
        assert done["code"] in (0, 2)
        if done["code"]:
            # Fingerprints that are none of this text's are told from a text that has changed by nothing.
            assert name in done["err"] or (name == "data.json" and "the text has changed" in done["err"])
            assert done["err"].count("\n") == 1
    shutil.copy(whole / "runs/one" / name, path)
    assert result(home) == result(whole)
