"""The run directory: made once, found by name or path, never taken for what it is not."""

import errno
import json
import os
from pathlib import Path

import pytest

from intlm.errors import DamagedError, InputError
from train.run import Run, differences, find_checkpoint, read_newest, resolve

CONFIG = {"model": {"width": 64, "layers": [1, 2]}, "data": "stdlib", "seed": 7}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_checkpoints(run: Run, *steps: int) -> None:
    for step in steps:
        run.checkpoint_path(step).write_bytes(b"")


def steps(run: Run) -> list[str]:
    return [path.name for path in run.checkpoints()]


def test_create_and_open(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one"
    made = Run.create(directory, CONFIG, {"tokenizer.model": b"\x00\x01"})
    opened = Run.open(directory)
    assert made == opened
    assert opened.config == CONFIG
    assert opened.name == "one"
    assert (directory / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert opened.metrics_path == directory / "metrics.jsonl"
    assert opened.tensorboard_directory == directory / "tensorboard"
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "config.json",
        "tokenizer.model",
    ]


def test_a_run_is_not_made_twice(tmp_path: Path) -> None:
    Run.create(tmp_path / "one", CONFIG)
    with pytest.raises(InputError, match="is a run already"):
        Run.create(tmp_path / "one", {})
    assert Run.open(tmp_path / "one").config == CONFIG


def test_a_half_made_run_is_no_run_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = tmp_path / "one"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written: No space left on device"):
            Run.create(directory, CONFIG)
    with pytest.raises(InputError, match=r"one: no config\.json; `intlm train` makes a run"):
        Run.open(directory)
    Run.create(directory, CONFIG)
    assert Run.open(directory).config == CONFIG


def test_create_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a run"):
        Run.create(tmp_path / "file", CONFIG)


def test_open_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: no such run directory; `intlm train` makes a run"):
        Run.open(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    Run.create(tmp_path / "one", CONFIG)
    (tmp_path / "one" / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: damaged: not (JSON .*|a JSON object)$"):
        Run.open(tmp_path / "one")


def test_checkpoints_are_in_the_order_of_steps(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "one", CONFIG)
    assert run.checkpoints() == []
    add_checkpoints(run, 1000, 9, 123_456_789, 99_999_999)
    for stray in ("step-00000010.safetensors.tmp", "step-x.safetensors", "notes"):
        (tmp_path / "one" / "checkpoints" / stray).write_bytes(b"")
    assert steps(run) == [
        "step-00000009.safetensors",
        "step-00001000.safetensors",
        "step-99999999.safetensors",
        "step-123456789.safetensors",
    ]
    assert run.checkpoints()[-1] == run.checkpoint_path(123_456_789)


@pytest.mark.parametrize(("keep", "left"), [(-1, 1), (0, 1), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: int) -> None:
    run = Run.create(tmp_path / "one", CONFIG)
    run.prune(keep)
    add_checkpoints(run, 10, 20, 30)
    newest = run.checkpoints()[-left:]
    run.prune(keep)
    assert run.checkpoints() == newest


@pytest.mark.parametrize(
    ("keep_every", "scores", "left"),
    [
        (0, {}, [50, 60]),
        (20, {}, [20, 40, 50, 60]),
        (0, {10: 2.0, 20: 1.0, 30: 1.0, 50: 3.0}, [20, 50, 60]),
        (0, {60: 0.5, 15: 0.1}, [50, 60]),
        (30, {10: 0.5}, [10, 30, 50, 60]),
    ],
)
def test_prune_keeps_what_is_to_stay_and_the_best(
    tmp_path: Path, keep_every: int, scores: dict[int, float], left: list[int]
) -> None:
    run = Run.create(tmp_path / "one", CONFIG)
    add_checkpoints(run, 10, 20, 30, 40, 50, 60)
    run.prune(2, keep_every, scores)
    assert run.checkpoints() == [run.checkpoint_path(step) for step in left]


def test_the_first_that_is_whole() -> None:
    def read(path: Path) -> str:
        if path.name.startswith("bad"):
            raise DamagedError(f"{path}: bad")
        if path.name.startswith("other"):
            raise InputError(f"{path}: of another configuration")
        return path.name.upper()

    path, value, damages = read_newest([Path("bad1"), Path("bad2"), Path("good"), Path("bad3")], read)
    assert (path, value, [*map(str, damages)]) == (Path("good"), "GOOD", ["bad1: bad", "bad2: bad"])
    with pytest.raises(DamagedError, match=r"^bad1: bad; bad2: bad$"):
        read_newest([Path("bad1"), Path("bad2")], read)
    with pytest.raises(InputError, match=r"^other: of another configuration$"):
        read_newest([Path("bad1"), Path("other"), Path("good")], read)


def test_resolve(here: Path) -> None:
    run = Run.create(Path("runs/one"), CONFIG)
    add_checkpoints(run, 10, 20)
    assert resolve("one") == resolve("runs/one") == resolve("./runs/one/") == Path("runs/one")
    assert resolve(str(here / "runs" / "one")) == here / "runs" / "one"
    assert resolve("runs/one/checkpoints/step-00000010.safetensors") == here / "runs" / "one"


def test_a_name_in_runs_comes_before_a_directory_here(here: Path) -> None:
    Run.create(Path("runs/one"), CONFIG)
    Run.create(Path("one"), CONFIG)
    Run.create(Path("two"), CONFIG)
    Path("runs/two").mkdir()
    assert resolve("one") == Path("runs/one")
    assert resolve("./one") == Path("runs/one")
    assert resolve("two") == Path("two")


def test_find_checkpoint(here: Path) -> None:
    run = Run.create(Path("runs/one"), CONFIG)
    with pytest.raises(InputError, match="RUN: 'one' has no checkpoint yet"):
        find_checkpoint("one")
    add_checkpoints(run, 10, 20)
    Path("one").write_text("a file of the same name")
    assert find_checkpoint("one") == (run, [run.checkpoint_path(20), run.checkpoint_path(10)])
    found, paths = find_checkpoint(str(run.checkpoint_path(10)))
    assert (found.config, paths) == (CONFIG, [here / run.checkpoint_path(10)])


def test_find_a_checkpoint_by_its_step_or_score(here: Path) -> None:
    run = Run.create(Path("runs/one"), CONFIG)
    add_checkpoints(run, 10, 20, 30)
    # Of equal scores the earliest; those of step 0 and of steps whose checkpoint has gone do not count.
    scores = {0: 1.0, 10: 3.0, 20: 2.0, 25: 1.5, 30: 2.0}
    lines = [json.dumps({"step": step, "held_out_bits_per_byte": score}) for step, score in scores.items()]
    for name, step in (("one@10", 10), ("one@best", 20), ("runs/one@030", 30), ("./runs/one@best", 20)):
        run.metrics_path.write_text("\n".join([*lines, '{"step": 30}']) + "\n")
        assert find_checkpoint(name)[1] == [run.checkpoint_path(step)]
    for name, message in (
        ("one@15", "RUN: 'one@15': no checkpoint of step 15 (there are 10, 20, 30)"),
        ("two@15", "RUN: no run 'two'; runs/ has 1, one for one"),
        ("one@worst", "RUN: no run 'one@worst'; did you mean one?"),
    ):
        with pytest.raises(InputError) as raised:
            find_checkpoint(name)
        assert str(raised.value) == message
    run.metrics_path.write_text("")
    with pytest.raises(InputError, match="no checkpoint whose step has been evaluated"):
        find_checkpoint("one@best")
    other = Run.create(Path("runs/one@best"), CONFIG)
    add_checkpoints(other, 1)
    assert find_checkpoint("one@best")[1] == [other.checkpoint_path(1)]


def test_find_checkpoint_from_inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoints(Run.create(Path("runs/one"), CONFIG), 10, 20)
    monkeypatch.chdir("runs/one/checkpoints")
    run, [path] = find_checkpoint("step-00000010.safetensors")
    assert (run.name, path.name) == ("one", "step-00000010.safetensors")
    monkeypatch.chdir("..")
    run, [path, _] = find_checkpoint(".")
    assert (run.name, path.name) == ("one", "step-00000020.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shakespear", "RUN: no run 'shakespear'; did you mean shakespeare?"),
        ("runs/smal", "RUN: no run 'runs/smal'; did you mean small?"),
        ("", "RUN: no run ''; runs/ has 2, shakespeare for one"),
        ("12345", "RUN: no run '12345'; runs/ has 2, shakespeare for one"),
        ("half", "RUN: 'runs/half' has no config.json; `intlm train` makes a run"),
        (".", "RUN: 'runs' has no config.json; `intlm train` makes a run"),
        (
            "notes.txt",
            "RUN: 'notes.txt' is not a checkpoint of a run (runs/NAME/checkpoints/step-*.safetensors)",
        ),
    ],
)
def test_resolve_what_is_no_run(here: Path, name: str, message: str) -> None:
    Run.create(Path("runs/shakespeare"), CONFIG)
    Run.create(Path("runs/small"), CONFIG)
    Path("runs/half").mkdir()
    Path("notes.txt").write_text("")
    with pytest.raises(InputError) as raised:
        resolve(name)
    assert str(raised.value) == message


def test_resolve_without_any_run(here: Path) -> None:
    with pytest.raises(InputError) as raised:
        resolve("one")
    assert str(raised.value) == "RUN: no run 'one', and no other in runs/; `intlm train` makes one"


def test_differences() -> None:
    assert differences(CONFIG, CONFIG | {"model": {"layers": (1, 2), "width": 64}}) == []
    assert differences({}, {}) == []
    old = {"model": {"width": 64, "tied": True}, "data": "stdlib", "gone": None, "shape": {"a": 1}}
    new = {"model": {"width": 128, "tied": 1}, "data": "b.txt", "more": [1], "shape": 5}
    assert differences(old, new) == [
        'data: run has "stdlib", command line says "b.txt"',
        "gone: run has null, command line says nothing",
        "model.tied: run has true, command line says 1",
        "model.width: run has 64, command line says 128",
        "more: run has nothing, command line says [1]",
        "shape: run has nothing, command line says 5",
        "shape.a: run has 1, command line says nothing",
    ]
