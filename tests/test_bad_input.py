"""Bad input: one line that names what is wrong and what is accepted, exit code 2, nothing on disk touched."""

import gzip
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from intlm import checkpoint
from intlm.checkpoint import Checkpoint
from intlm.cli import main
from train import job
from train.lock import locked

SMALL = ["--engine", "reference", "--set", "population=4", "--set", "segment=8"]
TRAIN = ["train", "tiny", "--data", "text.txt", "--steps", "2", *SMALL]
GOOD = [*TRAIN, "--run", "good"]
NEW = [*TRAIN, "--run", "new"]
SAMPLE = ["sample", "good", "--engine", "reference", "--tokens", "3"]
LAST = "runs/good/checkpoints/step-00000002.safetensors"


def words(seed: int) -> str:
    """About 6 KB of text."""
    source = random.Random(seed)
    lines = [" ".join(source.choices(("one", "two", "three", "four", "five"), k=8)) for _ in range(160)]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts, a run and things that are neither."""
    home = tmp_path_factory.mktemp("bad_input")
    for name, content in {
        "text.txt": words(1).encode(),
        "empty.txt": b"",
        "short.txt": b"ab",
        "zeros.txt": bytes(5000),
        "latin.jsonl": b'{"text": "fine"}\n{"text": "\xff"}\n',
        "no_json.jsonl": b"nope\n",
        "no_field.jsonl": b'{"body": "x"}\n',
        "number.jsonl": b'{"text": 5}\n',
        "broken.parquet": b"PAR1 and no more",
        "broken.arrow": b"no Arrow",
        "broken.jsonl.gz": gzip.compress(b'{"text": "fine"}\n')[:-4],
    }.items():
        (home / name).write_bytes(content)
    (home / "empty").mkdir()
    (home / "runs" / "stranger").mkdir(parents=True)
    (home / "runs" / "stranger" / "tokenizer.json").write_text("not ours")
    (home / "runs" / "file").write_text("a file")
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(GOOD) == 0
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of `trained`, which no test may change."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line with which `command` is refused."""
    before = contents(Path.cwd())
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert shown.out == ""
    assert shown.err.startswith("intlm")
    assert shown.err.endswith("\n")
    assert len(shown.err.splitlines()) == 1, shown.err
    assert contents(Path.cwd()) == before
    return shown.err


COMMAND_LINES: list[tuple[list[str], str]] = [
    # the command line itself
    ([], "COMMAND"),
    (["trian"], "command: unknown 'trian'; did you mean 'train'? (accepted: audit"),
    (["train", "tini"], "preset: unknown 'tini'; did you mean 'tiny'?"),
    (["train", "tiny", "tiny"], "one argument too many: 'tiny'"),
    ([*NEW, "--threads", "0"], "--threads 0: must be from 1 to 1024"),
    ([*NEW, "--threads", "1025"], "--threads 1025: must be from 1 to 1024"),
    ([*NEW, "--threads", "two"], "--threads two: expected an integer"),
    ([*SAMPLE, "--threads", "-1"], "--threads -1: must be from 1 to 1024"),
    (["eval", "good", "--threads", "0"], "--threads 0: must be from 1 to 1024"),
    (["train", "--step", "5"], "flag: unknown '--step'; did you mean '--steps'?"),
    (["sample", "good", "--temprature=1"], "flag: unknown '--temprature'; did you mean '--temperature'?"),
    (["train", "--steps"], "--steps: expected one argument"),
    (["sample"], "RUN"),
    # the corpus
    ([*NEW, "--data", "nowhere"], "--data: 'nowhere' does not exist (accepted: 'stdlib', or a file"),
    ([*NEW, "--data", "stdlb"], "did you mean 'stdlib'?"),
    ([*NEW, "--data", ""], "--data: the name is empty"),
    ([*NEW, "--data", "x" * 300], "name too long"),
    ([*NEW, "--data", "text.txt/x"], "--data: 'text.txt/x' does not exist"),
    ([*NEW, "--data", "empty.txt"], "--data: 'empty.txt' is empty"),
    ([*NEW, "--data", "empty"], "--data: no text in directory 'empty'"),
    ([*NEW, "--data", "*.none"], "--data: no file matches '*.none'"),
    ([*NEW, "--data", "/dev/null"], "neither a file nor a directory"),
    ([*NEW, "--data", "latin.jsonl"], "--data: 'latin.jsonl' line 2: not UTF-8 at byte 11"),
    (
        [*NEW, "--data", "no_json.jsonl"],
        "--data: 'no_json.jsonl' line 1: not JSON (accepted: one JSON object",
    ),
    ([*NEW, "--data", "no_field.jsonl"], "line 1: no field 'text' (the fields are: 'body')"),
    ([*NEW, "--data", "no_field.jsonl", "--text-field", "bodi"], "no field 'bodi'"),
    ([*NEW, "--data", "number.jsonl"], "field 'text' is of type int (accepted: a string)"),
    ([*NEW, "--data", "broken.parquet"], "--data: 'broken.parquet' row 1: damaged Parquet: "),
    ([*NEW, "--data", "broken.arrow"], "--data: 'broken.arrow' record batch 1 row 1: damaged Arrow: "),
    ([*NEW, "--data", "broken.jsonl.gz"], "--data: 'broken.jsonl.gz' line 2: damaged gz: "),
    ([*NEW, "--data", "http://"], "--data: 'http://' is no URL (accepted: http://HOST/FILE"),
    ([*NEW, "--data", "hf:"], "--data: 'hf:': is no dataset (accepted: hf:NAME[:CONFIG[:SPLIT]][@REVISION])"),
    ([*NEW, "--data", "short.txt"], "--data: 'short.txt' is too short to hold out text: 2"),
    ([*NEW, "--data", "text.txt=3"], "--data text.txt: given twice (give it a weight instead, text.txt=2)"),
    *(
        (
            [*NEW, "--data", f"latin.jsonl={weight}"],
            f"--data latin.jsonl={weight}: the weight {weight} must be an",
        )
        for weight in ("0", "-1", "+1", "1.5", ".5", "1e3", "1000001", "٣1", "1_0")
    ),
    ([*NEW, "--data", "latin.jsonl=" + "9" * 5000], f"the weight {'9' * 100}… must be an integer from 1 to"),
    ([*NEW, "--data", "nowhere=2"], "--data: 'nowhere' does not exist"),
    ([*NEW, "--data", "nowhere=2=1"], "--data: 'nowhere=2' does not exist"),
    ([*NEW, "--data", "=2"], "--data: the name is empty"),
    ([*NEW, "--max-documents", "-1"], "--max-documents -1: must be 0 or more"),
    ([*NEW, "--max-documents", "many"], "--max-documents many: expected an integer"),
    ([*NEW, "--held-out", "empty.txt"], "--held-out: 'empty.txt' is empty"),
    ([*NEW, "--held-out", "zeros.txt"], "the held-out text is nothing but separators"),
    ([*NEW, "--held-out", "nowhere"], "--held-out: 'nowhere' does not exist"),
    # --set
    ([*NEW, "--set", "widht=64"], "--set: unknown 'widht'; did you mean 'width'? (accepted: alpha"),
    ([*NEW, "--set", "vocabulary=9"], "--set: unknown 'vocabulary'"),
    ([*NEW, "--set", "width"], "--set width: expected key=value"),
    ([*NEW, "--set", ""], "expected key=value"),
    ([*NEW, "--set", "width=1.5"], "--set width=1.5: width takes an integer"),
    ([*NEW, "--set", "width="], "width takes an integer"),
    ([*NEW, "--set", "a\nb=1"], "unknown 'a\\nb'"),
    ([*NEW, "--set", "width=96"], "width=96: must be a multiple of 64, from 64 to 8192"),
    ([*NEW, "--set", "width=0"], "width=0: must be a multiple of 64"),
    ([*NEW, "--set", "population=3"], "population=3: must be an even number from 2"),
    ([*NEW, "--set", "population=0"], "population=0: must be an even number from 2"),
    ([*NEW, "--set", "population=" + "9" * 40], "must be an even number from 2"),
    ([*NEW, "--set", "pairs_per_lane=3"], "pairs_per_lane=3: must divide the 2 pairs"),
    ([*NEW, "--set", "seed=-1"], "seed=-1: must be from 0 to 18446744073709551615"),
    ([*NEW, "--set", "seed=18446744073709551616"], "must be from 0 to 18446744073709551615"),
    ([*NEW, "--set", "rank=2"], "rank=2: estimator=activation takes rank=1 alone; set estimator=weight"),
    ([*NEW, "--set", "mlp=rely"], "unknown 'rely'; did you mean 'relu'?"),
    ([*NEW, "--set", "segment=4096", "--set", "horizon=6"], "can overflow 32 bits: credit times inputs"),
    # other flags of train
    ([*NEW, "--engine", "xlaa"], "--engine: unknown 'xlaa'; did you mean 'xla'?"),
    ([*NEW, "--chunk", "-1"], "--chunk -1: must be 0 or more"),
    ([*NEW, "--keep", "0"], "--keep 0: must be 1 or more"),
    ([*NEW, "--evaluate-every", "-1"], "--evaluate-every -1: must be 0 or more"),
    ([*NEW, "--checkpoint-every", "x"], "--checkpoint-every x: expected an integer"),
    ([*NEW, "--steps", "0"], "--steps 0: must be from 1 to 2147483647"),
    ([*NEW, "--steps", "2147483648"], "--steps 2147483648: must be from 1 to 2147483647"),
    ([*NEW, "--steps", "1e3"], "--steps 1e3: expected an integer"),
    ([*NEW, "--minutes", "1"], "--steps and --minutes: give one of the two"),
    *(
        (
            ["train", "tiny", "--data", "text.txt", "--run", "new", "--minutes", value],
            f"--minutes {value}: must be",
        )
        for value in ("0", "-1", "abc", "nan", "1e9", "")
    ),
    # --run
    *(([*TRAIN, "--run", name], f"--run {name!r}: is no name") for name in ("", ".", "..")),
    ([*TRAIN, "--run", "./"], "--run .: exists and is no run (no config.json); choose another name"),
    ([*TRAIN, "--run", "file"], "--run runs/file: exists and is no run"),
    ([*TRAIN, "--run", "stranger"], "--run runs/stranger: exists and is no run"),
    ([*TRAIN, "--run", "./text.txt"], "--run text.txt: exists and is no run"),
    ([*TRAIN, "--run", "./text.txt/x"], "--run text.txt/x: cannot be made: Not a directory"),
    ([*TRAIN, "--run", "text.txt/a\nb"], "--run text.txt/a b: cannot be made: Not a directory"),
    ([*TRAIN, "--run", "x" * 300], "name too long"),
    # resuming
    (
        [*GOOD, "--set", "seed=1", "--set", "layers=2"],
        "eggroll.seed: run has 0, command line says 1; mod",
    ),
    ([*GOOD[:-2], "--steps", "3", "--run", "good"], "steps: run has 2, command line says 3"),
    (["train", "--run", "good", "--minutes", "3"], 'minutes: run has "", command line says "3"'),
    ([*GOOD, "--data", "a"], 'text.data: run has ["text.txt"], command line says ["text.txt", "a"]'),
    ([*GOOD, "--max-documents", "9"], "text.max_documents: run has 0, command line says 9"),
    # sample
    *(
        ([*SAMPLE, flag, value], f"{flag} {value}: {expected}")
        for flag, value, expected in (
            ("--temperature", "-0.1", "must be a number from 0 to 256"),
            ("--temperature", "300", "must be a number from 0 to 256"),
            ("--temperature", "hot", "must be a number from 0 to 256"),
            ("--temperature", "nan", "must be a number from 0 to 256"),
            ("--temperature", "", "must be a number from 0 to 256"),
            ("--top-p", "1.1", "must be a number from 0 to 1"),
            ("--top-p", "-0.000001", "must be a number from 0 to 1"),
            ("--min-p", "2", "must be a number from 0 to 1"),
            ("--top-k", "-1", "must be from 0 to 65536"),
            ("--top-k", "1.5", "expected an integer"),
            ("--tokens", "0", "must be from 1 to 2147483647"),
            ("--count", "0", "must be from 1 to 65536"),
            ("--count", "1" + "0" * 12, "must be from 1 to 65536"),
            ("--seed", "-1", "must be from 0 to 18446744073709551615"),
            ("--seed", "18446744073709551616", "must be from 0 to 18446744073709551615"),
            ("--prompt-file", "nowhere", "No such file"),
            ("--prompt-file", "empty", "Is a directory"),
            ("--prompt-file", "", "Is a directory"),
        )
    ),
    (
        [*SAMPLE, "--prompt", "a", "--prompt-file", "text.txt"],
        "--prompt and --prompt-file: give one of the two",
    ),
    ([*SAMPLE, "--engine", "refrence"], "--engine: unknown 'refrence'; did you mean 'reference'?"),
    # runs that are none
    *(
        ([command, name], expected)
        for command in ("sample", "eval", "audit", "check")
        for name, expected in (
            ("god", "RUN: no run 'god'; did you mean good?"),
            ("", "RUN: no run ''"),
            (".", "RUN: 'runs' has no config.json"),
            ("stranger", "RUN: 'runs/stranger' has no config.json"),
            ("text.txt", "RUN: 'text.txt' is not a checkpoint of a run"),
            ("x" * 300, "name too long"),
        )
    ),
    (["check", "good", "--jsn"], "did you mean '--json'?"),
    ([*NEW, "--keep-every", "-1"], "--keep-every -1: must be 0 or more"),
    ([*SAMPLE[:1], "good@7", *SAMPLE[2:]], "RUN: 'good@7': no checkpoint of step 7 (there are 1, 2)"),
    (["audit", "tyni"], "(or a preset: tiny, small, medium, paper)"),
    (["eval", "good", "--engine", "reference", "--data", "empty.txt"], "--data: 'empty.txt' is empty"),
    (["eval", "good", "--data", "nowhere"], "--data: 'nowhere' does not exist"),
]


@pytest.mark.parametrize(
    ("command", "expected"), COMMAND_LINES, ids=[" ".join(command)[-60:] for command, _ in COMMAND_LINES]
)
def test_a_bad_command_line(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str], expected: str
) -> None:
    assert expected.lower() in refused(capsys, command).lower()


def test_a_directory_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, which not even root can write to")
    assert "--run /proc/x: cannot be made" in refused(capsys, [*TRAIN, "--run", "/proc/x"])


def test_a_run_that_another_process_trains(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The run is made to look unfinished, since a finished one is not trained.
    for path in sorted((copy / "runs/good/checkpoints").iterdir())[1:]:
        path.unlink()
    with locked(Path("runs/good")):
        owner = f"process {os.getpid()} on {socket.gethostname()!r}"
        for command in (GOOD, [*TRAIN, "--run", "good", "--set", "seed=1"]):
            assert f"runs/good: another process is training this run, {owner}" in refused(capsys, command)
    assert main(GOOD) == 0


def change_config(run: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((run / "config.json").read_bytes())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


CONFIGS: list[tuple[Callable[[dict], object], str]] = [
    (lambda config: config.update(layers=3), "config.json: key: unknown 'layers'"),
    (lambda config: config["eggroll"].update(sead=3), "key of eggroll: unknown 'sead'; did you mean 'seed'?"),
    (lambda config: config["model"].pop("width"), "config.json: key model.width is missing"),
    (lambda config: config.pop("text"), "config.json: key text is missing"),
    (lambda config: config["model"].update(width="64"), "key model.width='64' must be of type int"),
    (lambda config: config["model"].update(width=64.0), "key model.width=64.0 must be of type int"),
    (lambda config: config["model"].update(width=True), "key model.width=True must be of type int"),
    (lambda config: config["model"].update(width=65), "config.json: width=65: must be a multiple of 64"),
    (lambda config: config["model"].update(vocabulary=300), "the run's tokenizer (bytes) has 256 tokens"),
    (lambda config: config.update(text=[]), "config.json: text must be an object"),
    (lambda config: config.update(steps=0), "config.json: key steps=0: must be from 1"),
    (lambda config: config.update(steps=1 << 40), "key steps=1099511627776: must be from 1 to 2147483647"),
    (
        lambda config: config["eggroll"].update(seed=9),
        "is of another configuration than the run's config.json",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CONFIGS, ids=[expected for _, expected in CONFIGS])
def test_a_changed_configuration(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict], object],
    expected: str,
) -> None:
    change_config(copy / "runs/good", change)
    for command in (["train", "--run", "good"], ["sample", "good"], ["eval", "good"]):
        assert expected in refused(capsys, command)


def rewrite(path: Path, change: Callable[[Checkpoint], object]) -> None:
    """Change a checkpoint with its checksum put right."""
    content = checkpoint.read(path)
    change(content)
    checkpoint.write(path, content)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def later_version(path: Path) -> None:
    content = path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
    path.write_bytes(content.replace(b'"sha256":"', b'"sha":"      '))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink() or path.mkdir(), "is a directory; a checkpoint is a file"),
    (lambda path: truncate(path, 0), "truncated"),
    (lambda path: truncate(path, 100), "truncated"),
    (lambda path: truncate(path, -1), "truncated"),
    (lambda path: flip(path, -1), "damaged: its content does not match its SHA-256"),
    (lambda path: flip(path, 0), "step-00000002.safetensors"),
    (lambda path: path.write_text(words(2)), "not a safetensors file"),
]
OTHERS: list[tuple[Callable[[Path], object], str]] = [
    (later_version, "is of format version 2; this intlm reads up to 1: update intlm"),
    (
        lambda path: rewrite(path, lambda saved: saved.meta.update(tokenizer="0" * 64)),
        "was written with another tokenizer than the run's (bytes)",
    ),
    (lambda path: rewrite(path, lambda saved: saved.meta.clear()), "another tokenizer"),
    (lambda path: rewrite(path, lambda saved: saved.meta.pop("config")), "its meta lacks the config"),
    (lambda path: rewrite(path, lambda saved: saved.meta.update(config=[1])), "its meta lacks the config"),
    (lambda path: rewrite(path, lambda saved: saved.meta.pop("text")), "its meta lacks the text"),
    (lambda path: rewrite(path, lambda saved: saved.meta.pop("step")), "its step, None, is no count"),
    (lambda path: rewrite(path, lambda saved: saved.meta.update(step=True)), "its step, True, is no count"),
    (
        lambda path: rewrite(path, lambda saved: saved.meta.update(step=3)),
        "its step, 3, is past the run's 2 steps",
    ),
    *(
        (
            lambda path, name=name, value=value: rewrite(
                path, lambda saved: saved.arrays[name].reshape(-1).__setitem__(-1, value)
            ),
            f"array {name!r} holds {value} (accepted: {accepted})",
        )
        for name, value, accepted in (
            ("master.embedding", 32513, "-32512 to 32512"),
            ("master.mlp_out", -32513, "-32512 to 32512"),
            ("head_bias", 2048, "-2047 to 2047"),
            ("recurrent", -128, "-127 to 127"),
            ("scale.shift.head", 31, "0 to 30"),
            ("scale.shift.gate_input", -1, "0 to 30"),
        )
    ),
    (
        lambda path: rewrite(path, lambda saved: saved.meta.update(position=-1)),
        "its meta lacks the position",
    ),
    (
        lambda path: rewrite(path, lambda saved: saved.arrays.pop("head_bias")),
        "array 'head_bias' is missing",
    ),
    (
        lambda path: rewrite(path, lambda saved: saved.arrays.update(more=np.zeros(1, np.int8))),
        "array 'more' is not one of this model's",
    ),
    (
        lambda path: rewrite(path, lambda saved: saved.arrays.update(head_bias=np.zeros(9, np.int16))),
        "array 'head_bias' is int16 (9,); this model takes int16 (256,)",
    ),
]


@pytest.mark.parametrize(("change", "expected"), OTHERS, ids=[expected for _, expected in OTHERS])
def test_a_checkpoint_of_something_else(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], expected: str
) -> None:
    """It is not damaged, so that no older one is taken in its place."""
    change(copy / LAST)
    for command in (GOOD, ["train", "--run", "good"], ["sample", "good"], ["eval", "good"], ["sample", LAST]):
        line = refused(capsys, command)
        assert "step-00000002.safetensors" in line
        assert expected in line


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=[expected for _, expected in DAMAGES])
def test_a_damaged_checkpoint(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], expected: str
) -> None:
    """The one before is taken, which one line says; where there is none, the command is refused."""
    whole = (copy / LAST).read_bytes()
    first = LAST.replace("2.safe", "1.safe")
    damage(copy / LAST)
    for command in (SAMPLE, ["eval", "good", "--engine", "reference"], GOOD):
        assert main(command) == 0
        line = capsys.readouterr().err
        assert expected in line
        assert line.startswith(f"intlm: {LAST}: ")
        assert line.count("\n") == 1
        assert f"{first} " in line
    assert (copy / LAST).read_bytes() == whole
    aside = copy / (LAST + ".damaged")
    assert aside.exists()
    assert main(GOOD) == 0
    assert capsys.readouterr().err == ""
    for path in (LAST, first):
        damage(copy / path)
    for command in (GOOD, ["train", "--run", "good"], SAMPLE, ["eval", "good"]):
        line = refused(capsys, command)
        assert LAST in line
        assert first in line
    if (copy / LAST).is_file():
        for name in (LAST, "good@2"):
            assert expected in refused(capsys, ["sample", name])
    assert aside.exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "config.json: damaged: not JSON"),
        ("config.json", "[]", "config.json: damaged: not a JSON object"),
        ("tokenizer.json", "{", "tokenizer.json': damaged: not JSON"),
        ("tokenizer.json", "{}", "tokenizer.json': damaged: no 'kind' in it (accepted: "),
        ("tokenizer.json", '{"kind": "byte"}', "kind: unknown 'byte'; did you mean 'bytes'?"),
        ("tokenizer.json", None, "tokenizer.json': no tokenizer can be read here: No such file"),
    ],
)
def test_a_damaged_file_of_a_run(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, expected: str
) -> None:
    path = copy / "runs/good" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    for command in (GOOD, ["sample", "good"], ["eval", "good"]):
        assert expected in refused(capsys, command)


def test_a_damaged_metrics_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "runs/good/metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"nonsense\n" + whole)
    assert "metrics.jsonl: line 1 is damaged" in refused(capsys, ["sample", "good@best"])
    (copy / LAST).unlink()
    assert main(GOOD) == 0
    _, err = capsys.readouterr()
    assert "metrics.jsonl: line 1 is damaged, and left out from now on; " in err
    assert b"nonsense" not in path.read_bytes()
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == b"nonsense\n" + whole
    assert main(["check", "good"]) == 0
    assert "metrics.jsonl.damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"column": 256}, "column: 256 (accepted: 0 to 255)"),
        ({"column": -1}, "column: -1 (accepted: 0 or more)"),
        ({"offset": None}, "offset: None (accepted: 0 or more)"),
        ({"offset": 1.5}, "offset: 1.5 (accepted: 0 or more)"),
        ({"column": True}, "column: True (accepted: 0 or more)"),
        ({"column": 10**900}, "column: 1000"),
        ({"sources": []}, "no place in the text: "),
        ({"sources": [{}]}, "no place in the text: a place has other keys"),
        ({"sources": 3}, "no place in the text: "),
    ],
)
def test_a_damaged_position(
    copy: Path, capsys: pytest.CaptureFixture[str], change: dict, expected: str
) -> None:
    rewrite(copy / LAST, lambda saved: saved.meta["position"].update(change))
    line = refused(capsys, GOOD)
    assert f"{LAST}: its position is damaged: " in line
    assert expected in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"epoch": 1 << 63}, "epoch is 9223372036854775808"),
        ({"epoch": 10**900}, "epoch is 1000"),
        ({"skip": -1}, "skip is -1"),
        ({"documents": 0.5}, "documents is 0.5"),
        ({"bytes": True}, "bytes is True"),
        ({"cursor": [0]}, "cursor is [0]"),
        ({"cursor": {"offset": "0"}}, "cursor: 'offset' is '0'"),
        ({"cursor": {"offset": 1 << 63}}, "cursor: 'offset' is 9223372036854775808"),
        ({"cursor": {"file": {"a": 1}}}, "cursor: 'file' is {'a': 1}"),
        ({"cursor": {"commit": 1}}, "cursor: 'commit' is 1"),
        ({"cursor": {"commit": "x" * 257}}, "cursor: 'commit' is 'xxx"),
        ({"cursor": {"given": None}}, "cursor: 'given' is None"),
    ],
)
def test_a_damaged_place(copy: Path, capsys: pytest.CaptureFixture[str], change: dict, expected: str) -> None:
    rewrite(copy / LAST, lambda saved: saved.meta["position"]["sources"][0].update(change))
    line = refused(capsys, GOOD)
    assert f"{LAST}: its position is damaged: no place in the text: {expected}" in line
    assert len(line) < 400


@pytest.mark.parametrize(
    "content",
    [b"", b"5", b"[]", b"[" * 100_000, b'{"gzip": "x"}', b'{"gzip": 1e400}', b'{"gzip": NaN}', b'{"gzip": -1}',
     b'{"gzip": true}', b'{"gzip": 1, "gzip": 2}', b'{"x": 1.0}', b'{"gzip": 9223372036854775808}'],
)  # fmt: skip
def test_damaged_baselines_are_not_drawn(copy: Path, content: bytes) -> None:
    """They are for people: training goes on without them."""
    path = copy / "runs/good/baselines.json"
    assert set(job._read_baselines(path)) >= {"gzip", "xz", "unigram", "bytes"}
    path.write_bytes(content)
    assert job._read_baselines(path) == {}


def test_more_corpora_than_there_may_be(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [word for number in range(1025) for word in ("--data", f"{number}.txt")]
    line = refused(capsys, ["train", "tiny", *data, "--steps", "2", "--run", "new"])
    assert "--data: given 1025 times (accepted: up to 1024 corpora)" in line


def test_a_changed_corpus(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / "text.txt").read_text()
    changed = (
        f"--data text.txt: the text has changed (files.text.txt.bytes: was {len(text)}, is {len(text) + 1}"
    )
    (copy / "text.txt").write_text(text + "!")
    line = refused(capsys, GOOD)
    assert changed in line
    assert f"since {LAST} was written; restore it, go on all the same with --accept-changed-data, or" in line
    line = refused(capsys, ["eval", "good", *SMALL[:2]])
    assert changed in line
    assert "since the run good was trained; restore it, or name another with --data" in line
    # Accepted once, and said once.
    assert main([*GOOD, "--accept-changed-data"]) == 0
    assert f"intlm: {changed}" in capsys.readouterr().err
    assert (
        json.loads((copy / "runs/good/data.json").read_bytes())["text.txt"]["files"]["text.txt"]["bytes"]
        == len(text) + 1
    )


@pytest.mark.parametrize("content", [None, "", "[]"])
def test_a_run_that_does_not_know_its_corpus(
    copy: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    (copy / "runs/good/data.json").unlink()
    if content is not None:
        (copy / "runs/good/data.json").write_text(content)
    for command in (GOOD, ["eval", "good"]):
        assert "--data: the text may have changed (data.json of the run is" in refused(capsys, command)


def test_a_changed_held_out_corpus(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "other.txt").write_text(words(4))
    assert main([*TRAIN, "--run", "other", "--held-out", "other.txt"]) == 0
    (copy / "other.txt").write_text(words(5))
    for command in (["train", "--run", "other"], ["eval", "other", *SMALL[:2]]):
        assert "--held-out: the text has changed since" in refused(capsys, command)


def test_a_run_without_a_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "runs/good/checkpoints")
    for command in ("sample", "eval"):
        assert "RUN: 'good' has no checkpoint yet" in refused(capsys, [command, "good"])


def test_what_is_left_of_a_run_cut_short_while_it_was_made(copy: Path) -> None:
    left = copy / "runs/half"
    (left / "checkpoints").mkdir(parents=True)
    (left / "tokenizer.json").write_bytes(b"")
    (left / "config.json.tmp").write_bytes(b"{")
    assert main([*TRAIN, "--run", "half"]) == 0


def test_check_finds_what_is_damaged(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(code: int) -> dict[str, tuple[str, str]]:
        before = contents(copy)
        assert main(["check", "good", "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert main(["check", "runs/good"]) == code
        lines = capsys.readouterr().out.splitlines()
        assert contents(copy) == before
        assert len(lines) == len(found["files"]) + 1
        assert found["damaged"] == sum(each["status"] == "damaged" for each in found["files"])
        assert (found["damaged"] > 0) == (code == 1)
        return {each["file"]: (each["status"], each["detail"]) for each in found["files"]}

    home = copy / "runs/good"
    metrics, last = home / "metrics.jsonl", "checkpoints/step-00000002.safetensors"
    whole = check(0)
    assert {status for status, _ in whole.values()} == {"ok"}
    assert set(whole) == {"config.json", "tokenizer.json", "data.json", "baselines.json", "metrics.jsonl", last,
                          "history/step-00000000.history",
                          "checkpoints/step-00000001.safetensors"}  # fmt: skip
    content = metrics.read_bytes()
    metrics.write_bytes(content + b'{"step": 2, "tra')
    (home / f"{last}.tmp").write_bytes(b"half")
    (home / f"{last}.damaged").write_bytes(b"half")
    found = check(0)
    assert found["metrics.jsonl"][0] == found[f"{last}.tmp"][0] == found[f"{last}.damaged"][0] == "note"
    for changed, expected in (
        (b"nonsense\n" + content, "line 1 is damaged: not a JSON object"),
        (content + content, "is damaged: step 0 comes after 2"),
    ):
        metrics.write_bytes(changed)
        status, detail = check(1)["metrics.jsonl"]
        assert (status, expected in detail) == ("damaged", True)
    metrics.write_bytes(content)
    (home / "data.json").unlink()
    assert check(1)["data.json"][0] == "damaged"
    shutil.copy(copy / "runs/good" / last, home / "checkpoints/step-00000009.safetensors")
    assert "is of step 2" in check(1)["checkpoints/step-00000009.safetensors"][1]
    change_config(home, lambda config: config["eggroll"].update(seed=9))
    assert "of another configuration" in check(1)[last][1]
    (home / "config.json").write_text("{")
    assert set(check(1)) == {"config.json"}


def run(command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """A shell command in which `intlm` is the command line."""
    line = f'intlm() {{ "{sys.executable}" -m intlm "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "command", ["--help", "sample good --engine reference", "eval good --engine reference"]
)
def test_a_full_device(here: Path, command: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = run(f"intlm {command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == b"intlm: standard output: No space left on device\n"


@pytest.mark.parametrize("command", ["--help", "sample good --engine reference --tokens 3000"])
def test_a_reader_that_goes_away(here: Path, command: str) -> None:
    done = run(f"intlm {command} | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_streams(here: Path) -> None:
    done = run("intlm sample good --engine reference --tokens 3 --prompt - <&- >&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert run("intlm train --run good <&- >&- 2>&-").returncode == 0
    assert run("intlm sample none <&- >&- 2>&-").returncode == 2


def test_a_terminal_that_lacks_the_characters(here: Path) -> None:
    done = run("PYTHONIOENCODING=ascii intlm sample good --engine reference --prompt é")
    assert done.returncode == 0
    assert done.stdout.startswith(b"?")


def test_too_little_memory(here: Path) -> None:
    done = run(
        "ulimit -v 4000000; intlm train tiny --engine reference --data text.txt --run new "
        "--set width=8192 --set layers=200"
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"intlm: not enough memory: ")
    assert done.stderr.count(b"\n") == 1
