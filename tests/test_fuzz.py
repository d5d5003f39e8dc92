"""Hostile files: every loader takes them or refuses them in one line, quickly and in little memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from fuzzing import CHECKPOINT, LOADERS, PLACES, SECONDS, header_of, make_home, signed

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc, to see and to bound what memory is used"
)
SHORT = 40
LONG = 100_000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    before = Path.cwd()
    os.chdir(directory)
    try:
        make_home(directory)
    finally:
        os.chdir(before)
    return directory


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


def fuzz(home: Path, names: Iterable[str], first: int = 0, count: int = 0) -> dict[str, dict]:
    """What came of inputs, by loader; fails where one was not treated as it should be."""
    program = Path(__file__).with_name("fuzzing.py")
    # One heap for all threads: each of its own would take room that is never used.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, program, home, str(first), str(count), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1] if lines else "the start"
    assert done.returncode == 0, f"the process ended in {last} (over {SECONDS} s, or a crash): {done.stderr}"
    told = {name: found for kind, name, found in lines if kind == "done"}
    for name, found in told.items():
        for what, failure in found["failures"]:
            pytest.fail(f"{name}, input {what}: {failure}", pytrace=False)
    assert told.keys() == set(names)
    return told


def test_hostile_files(copy: Path) -> None:
    for name, found in fuzz(copy, LOADERS, 0, SHORT).items():
        assert found["accepted"] + found["refused"] == SHORT + len(PLACES), name
    # Had they not come past the digest, nothing behind it would have been tried.
    told = fuzz(copy, ["checkpoint, signed again", "its numbers"], SHORT, SHORT)
    assert all(found["accepted"] > SHORT // 4 for found in told.values())


@pytest.mark.long
def test_a_hundred_thousand_hostile_files(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for name in LOADERS:
        told |= fuzz(copy, [name])
    rows = [("loader", "inputs", "accepted", "refused", "slowest ms", "peak MiB")]
    for name, found in told.items():
        accepted, refused = found["accepted"], found["refused"]
        milliseconds, peak = found["slowest"][0] * 1000, found["peak"] / (1 << 20)
        counts = (f"{count:,}" for count in (accepted + refused, accepted, refused))
        rows.append((name, *counts, f"{milliseconds:.0f}", f"{peak:.1f}"))
    with capsys.disabled():
        print()
        for row in rows:
            print(f"{row[0]:28s}" + "".join(f"{cell:>12s}" for cell in row[1:]))
    assert sum(found["accepted"] + found["refused"] for found in told.values()) >= LONG


def test_a_mutation_depends_on_its_number_alone(home: Path) -> None:
    from fuzzing import input_of

    for name, loader in LOADERS.items():
        valid = [(home / path).read_bytes() for path in (loader.path, *loader.valid)]
        made = [input_of(name, number, valid) for number in range(20)]
        assert made == [input_of(name, number, valid) for number in range(20)]
        assert len(set(made)) > 10 and not set(made) >= set(valid), name


def test_what_is_caught(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a loader that is wrong is told of."""
    import fuzzing

    def raise_(error: BaseException):  # type: ignore[no-untyped-def]
        def load(path: Path) -> None:
            raise error

        return load

    path = Path("config.json")
    for error, found in (
        (fuzzing.InputError("config.json: no"), "refused"),
        (fuzzing.InputError("no"), "said: 'no'"),
        (fuzzing.InputError("config.json: a\nb"), "said: "),
        (fuzzing.InputError("config.json: " + "x" * 2000), "said: "),
        (ValueError("no"), "Traceback"),
        (RecursionError(), "Traceback"),
        (MemoryError(), "Traceback"),
    ):
        monkeypatch.setitem(
            fuzzing.LOADERS, "wrong", fuzzing.Loader(path, fuzzing.mutated_json, raise_(error), 1)
        )
        assert fuzzing.complaint("wrong", path).startswith(found)


# On the command line.


def intlm(home: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "intlm", *words], cwd=home, capture_output=True, timeout=120)


def write_checkpoint(home: Path, content: bytes) -> None:
    (home / CHECKPOINT).write_bytes(content)


def out_of_range(home: Path) -> None:
    """Every weight of the embedding -128: the mean magnitude of a row would be looked up beyond its table."""
    header, data = header_of((home / CHECKPOINT).read_bytes())
    start, end = header["master.embedding"]["data_offsets"]
    write_checkpoint(home, signed(header, data[:start] + b"\x00\x80" * ((end - start) // 2) + data[end:]))


def past_the_end(home: Path) -> None:
    header, data = header_of((home / CHECKPOINT).read_bytes())
    meta = json.loads(header["__metadata__"]["meta"]) | {"step": 3}
    header["__metadata__"]["meta"] = json.dumps(meta)
    write_checkpoint(home, signed(header, data))


def pipe(*paths: str):  # type: ignore[no-untyped-def]
    def put(home: Path) -> None:
        for path in paths:
            (home / path).unlink()
            os.mkfifo(home / path)

    return put


def enlarge(home: Path) -> None:
    path = home / "runs/good/config.json"
    config = json.loads(path.read_bytes())
    config["model"] |= {"width": 8192, "layers": 256}
    config["eggroll"]["population"] = 1 << 24
    path.write_text(json.dumps(config))


COMMANDS = [
    (
        out_of_range,
        ["sample", str(CHECKPOINT)],
        "'master.embedding' holds -32768 (accepted: -32512 to 32512)",
    ),
    (past_the_end, ["eval", "good"], "its step, 3, is past the run's 2 steps"),
    (
        pipe(str(CHECKPOINT), str(CHECKPOINT.with_name("step-00000001.safetensors"))),
        ["sample", "good"],
        "step-00000002.safetensors: is not a regular file",
    ),
    (pipe("runs/good/config.json"), ["train", "--run", "good"], "config.json: is not a regular file"),
    (pipe("runs/good/tokenizer.json"), ["eval", "good"], "tokenizer.json: is not a regular file"),
    (pipe("pieces.model"), ["tokenizer", "inspect", "pieces.model"], "pieces.model: is not a regular file"),
    (enlarge, ["sample", "good"], "of another configuration than the run's config.json (eggroll.population"),
    (
        lambda home: (home / "pieces.model").write_bytes(b"\x1b]0;x\x07"),
        ["tokenizer", "inspect", "pieces.model"],
        "pieces.model: damaged, or no SentencePiece model",
    ),
    (
        lambda home: (home / "runs/good/config.json").write_bytes(b"[" * 100_000),
        ["audit", "good"],
        "config.json: damaged: not JSON of ours (nested deeper than 32)",
    ),
]


@pytest.mark.parametrize(("damage", "words", "expected"), COMMANDS, ids=[words for _, _, words in COMMANDS])
def test_hostile_files_on_the_command_line(copy: Path, damage, words: list[str], expected: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    done = intlm(copy, *words)
    assert (done.returncode, done.stdout) == (2, b""), done.stderr.decode()
    said = done.stderr.decode()
    assert said.count("\n") == 1 and said.isprintable() is False and said[:-1].isprintable()
    assert said.startswith("intlm: ") and expected in said
