"""The command line from end to end, as people run it: in a process of its own, on a small text."""

import errno
import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from intlm import checkpoint
from intlm.engine.engine import has_accelerators
from intlm.engine.native import available_isas
from train.metrics import read_metrics

STEPS = 80
EVERY = 20
SMALL = ["--set", "population=16", "--set", "segment=8"]
TRAIN = [
    "train",
    "tiny",
    "--data",
    "text.txt",
    *SMALL,
    "--evaluate-every",
    str(EVERY),
    "--checkpoint-every",
    "10",
]
SHORT = ["train", "tiny", "--data", "text.txt", *SMALL, "--evaluate-every", "6", "--steps", "6"]
REFERENCE = ["--engine", "reference"]
XLA = ["--engine", "xla"]
NATIVE = ["--engine", "native"]
WEIGHT = ["--set", "estimator=weight"]
GAUSSIAN = [*WEIGHT, "--set", "noise=gaussian", "--set", "fitness=sign", "--set", "update=threshold"]
LONG = [*TRAIN, *REFERENCE, "--steps", str(STEPS)]


def start(home: Path, words: list[str], **options: object) -> subprocess.Popen[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen([sys.executable, "-m", "intlm", *words], cwd=home, **options)  # type: ignore[call-overload, no-any-return]


def run(home: Path, *words: str, code: int = 0, prompt: bytes = b"") -> bytes:
    """The output of a command, which shows nothing but that."""
    process = start(home, list(words), stdin=subprocess.PIPE)
    out, err = process.communicate(prompt, timeout=300)
    assert process.returncode == code, err.decode()
    assert code or err == b""
    return out


def last(home: Path, name: str) -> bytes:
    """The newest checkpoint."""
    return max((home / "runs" / name / "checkpoints").iterdir()).read_bytes()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a text and one finished run, `whole`."""
    home = tmp_path_factory.mktemp("cli")
    source = random.Random(1)
    vocabulary = ["zebra", "apple", "naïve", "house", "of", "the", "on", "stone", "running", "42"]
    lines = (" ".join(source.choices(vocabulary, k=8)) for _ in range(300))
    (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    out = run(home, *LONG, "--run", "whole")
    assert re.fullmatch(
        r"runs/whole: step 80 of 80; \d\.\d{3} bits per byte held out; try: intlm sample whole\n",
        out.decode(),
    )
    return home


@pytest.fixture(scope="session")
def short(home: Path) -> bytes:
    """The checkpoint that SHORT ends with, on the reference engine."""
    run(home, *SHORT, *REFERENCE, "--run", "short")
    return last(home, "short")


def test_a_run_on_disk(home: Path) -> None:
    directory = home / "runs/whole"
    assert sorted(path.name for path in directory.iterdir()) == [
        "baselines.json",
        "checkpoints",
        "config.json",
        "data.json",
        "history",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        f"step-{step:08d}.safetensors" for step in (60, 70, 80)
    ]
    (events,) = (directory / "tensorboard").iterdir()
    for tag in (b"bits_per_byte/held_out", b"bits_per_byte/trigram", b"speed/", b"weights/", b"sample"):
        assert tag in events.read_bytes()


def test_the_model_learns(home: Path) -> None:
    held_out = [
        line["held_out_bits_per_byte"]
        for line in read_metrics(home / "runs/whole/metrics.jsonl")
        if "held_out_bits_per_byte" in line
    ]
    assert held_out[-1] < held_out[0]


def check_metrics(home: Path, name: str) -> None:
    """Every evaluation is there once, and no step is counted twice."""
    lines = read_metrics(home / "runs" / name / "metrics.jsonl")
    evaluated = [line["step"] for line in lines if "held_out_bits_per_byte" in line]
    assert evaluated == list(range(0, STEPS + 1, EVERY))
    trained = [line["step"] for line in lines if "train_bits_per_byte" in line]
    assert trained == sorted(set(trained))
    assert set(range(EVERY, STEPS + 1, EVERY)) <= set(trained)


def test_metrics(home: Path) -> None:
    check_metrics(home, "whole")


def test_the_same_command_gives_the_same_bytes(home: Path) -> None:
    run(home, *LONG, "--run", "again")
    assert last(home, "again") == last(home, "whole")


def test_a_finished_run_is_left_alone(home: Path) -> None:
    before = last(home, "whole")
    for words in (["train", "--run", "whole"], [*LONG, "--run", "whole"]):
        assert b"done already, 80 steps" in run(home, *words)
    assert last(home, "whole") == before
    check_metrics(home, "whole")


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(home: Path, number: signal.Signals) -> None:
    name = number.name.lower()
    # Stopped twice, some steps behind a checkpoint.
    for step in (10, 40):
        process = start(home, [*LONG, "--run", name])
        path = home / f"runs/{name}/checkpoints/step-{step:08d}.safetensors"
        wait_for(path.exists, process)
        time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert out == b""
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130
            line = r"runs/\w+: step \d+ of 80; interrupted, and resumed by the same command\n"
            assert re.fullmatch(line, err.decode())
    run(home, *LONG, "--run", name)
    assert last(home, name) == last(home, "whole")
    check_metrics(home, name)


def catches_signals(process: subprocess.Popen[bytes]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_that_was_stopped_before_its_first_step(home: Path, delay: float) -> None:
    """While the steps of --minutes are being measured, at the latest."""
    name = f"early{delay}"
    words = [*TRAIN, *REFERENCE, "--minutes", "0.06", "--run", name]
    process = start(home, words)
    wait_for(lambda: catches_signals(process), process)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    config = json.loads((home / f"runs/{name}/config.json").read_bytes())
    assert process.returncode == 130
    assert err.decode() == (
        f"runs/{name}: step 0 of {config['steps']}; interrupted, and resumed by the same command\n"
    )
    assert config["minutes"] == "0.06"
    run(home, *words)
    # Minutes came to steps once, and the run is the one that these steps make.
    run(home, *TRAIN, *REFERENCE, "--steps", str(config["steps"]), "--run", f"{name}-steps")
    arrays = [
        checkpoint.read(home / f"runs/{each}/checkpoints/step-{config['steps']:08d}.safetensors").arrays
        for each in (name, f"{name}-steps")
    ]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][key], arrays[1][key]) for key in arrays[0])
    evaluated = [
        [
            line["step"]
            for line in read_metrics(home / f"runs/{each}/metrics.jsonl")
            if "held_out_bits_per_byte" in line
        ]
        for each in (name, f"{name}-steps")
    ]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("chunk", ["1", "7"])
def test_chunks_change_no_bit(home: Path, short: bytes, chunk: str) -> None:
    run(home, *SHORT, *REFERENCE, "--chunk", chunk, "--run", f"chunk{chunk}")
    assert last(home, f"chunk{chunk}") == short


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_change_no_bit(home: Path, short: bytes, threads: str) -> None:
    engine = ["--engine", "native" if available_isas() else "xla"]
    run(home, *SHORT, *engine, "--threads", threads, "--run", f"threads{threads}")
    assert last(home, f"threads{threads}") == short


def test_engines_agree(home: Path, short: bytes) -> None:
    words = [*SHORT, "--checkpoint-every", "2", "--run", "xla"]
    run(home, *words, *XLA, "--chunk", "4")
    assert last(home, "xla") == short
    # What one engine began another resumes, to the same bytes.
    for step in (4, 6):
        (home / f"runs/xla/checkpoints/step-{step:08d}.safetensors").unlink()
    run(home, *words, *REFERENCE)
    assert last(home, "xla") == short


@pytest.mark.skipif(len(available_isas()) < 2, reason="the native engine is not what auto takes here")
def test_a_gpu_that_is_not_used_is_told_of(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jax_plugins").mkdir()
    words = [*SHORT[:-2], "--steps", "1", "--run", "plugin"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = start(home, words, env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": ""})
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert err == b"intlm: computing on the CPU; --engine xla computes on JAX's other devices\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert has_accelerators()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not has_accelerators()


def test_engines_agree_on_the_weight_estimator(home: Path) -> None:
    run(home, *SHORT, *WEIGHT, *REFERENCE, "--run", "weight-reference")
    run(home, *SHORT, *WEIGHT, *XLA, "--run", "weight-xla")
    assert last(home, "weight-reference") == last(home, "weight-xla")


@pytest.mark.parametrize("settings", [WEIGHT, GAUSSIAN], ids=["weight", "gaussian"])
def test_chunks_change_no_bit_of_the_weight_estimator(home: Path, settings: list[str]) -> None:
    name = settings[-1]
    run(home, *SHORT, *settings, *REFERENCE, "--run", name)
    run(home, *SHORT, *settings, *REFERENCE, "--chunk", "3", "--run", f"{name}-3")
    assert last(home, name) == last(home, f"{name}-3")


def sample(home: Path, *words: str, prompt: bytes = b"", engine: list[str] = REFERENCE) -> str:
    return run(home, "sample", "whole", *engine, "--tokens", "40", *words, prompt=prompt).decode("utf-8")


@pytest.fixture(scope="session")
def sampled(home: Path) -> str:
    return sample(home, "--seed", "3", "--prompt", "the naïve ")


def test_a_seed_gives_one_text(home: Path, sampled: str) -> None:
    assert sampled.startswith("the naïve ")
    assert sampled.endswith("\n")
    assert sample(home, "--seed", "3", "--prompt", "the naïve ") == sampled
    assert sample(home, "--seed", "4", "--prompt", "the naïve ") != sampled


def test_engines_sample_the_same(home: Path, sampled: str) -> None:
    assert sample(home, "--seed", "3", "--prompt", "the naïve ", engine=XLA) == sampled


needs_native = pytest.mark.skipif(not available_isas(), reason="installed without a native engine")


@needs_native
@pytest.mark.parametrize(
    "words", [["--temperature", "0"], ["--top-k", "9", "--count", "2"], ["--count", "40"]]
)
def test_the_native_engine_samples_the_same(home: Path, words: list[str]) -> None:
    words = [*words, "--seed", "3", "--prompt", "-"]
    prompt = b"before \0 after" * 10
    assert sample(home, *words, prompt=prompt, engine=NATIVE) == sample(home, *words, prompt=prompt)


@needs_native
def test_the_native_engine_samples_without_jax(home: Path, sampled: str) -> None:
    words = ["sample", "whole", *NATIVE, "--tokens", "40", "--seed", "3", "--prompt", "the naïve "]
    script = f"import sys; from intlm.cli import main; main({words!r}); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=home, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode("utf-8"), done.stderr) == (0, sampled, b"")


def test_a_prompt_from_a_file_and_from_standard_input(home: Path, sampled: str) -> None:
    (home / "prompt").write_text("the naïve ", encoding="utf-8")
    assert sample(home, "--seed", "3", "--prompt-file", "prompt") == sampled
    assert sample(home, "--seed", "3", "--prompt", "-", prompt="the naïve ".encode()) == sampled


def test_a_prompt_of_any_bytes(home: Path) -> None:
    prompt = b"\xff zero \0 half \xc3" + bytes(range(256))
    text = sample(home, "--prompt", "-", prompt=prompt)
    assert text.startswith("\ufffd zero \0 half \ufffd\0\1\2")


def test_several_samples(home: Path, sampled: str) -> None:
    text = sample(home, "--seed", "3", "--prompt", "the naïve ", "--count", "3")
    pieces = re.split(r"--- sample \d of 3 ---\n", text)
    assert pieces[0] == ""
    assert pieces[1] == sampled
    assert len(set(pieces[1:])) == 3


def test_the_likeliest_tokens(home: Path) -> None:
    greedy = sample(home, "--temperature", "0")
    for words in (["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1", "--temperature", "0.01"]):
        assert sample(home, *words, "--seed", "9") == greedy


def test_a_checkpoint_is_a_run_too(home: Path) -> None:
    newest = run(home, "sample", "runs/whole/checkpoints/step-00000080.safetensors", *REFERENCE)
    older = run(home, "sample", "runs/whole/checkpoints/step-00000060.safetensors", *REFERENCE)
    assert newest == run(home, "sample", "runs/whole", *REFERENCE) != older


def test_a_checkpoint_by_its_step_and_the_best(home: Path) -> None:
    assert sample_of(home, "whole@60") == sample_of(home, "runs/whole/checkpoints/step-00000060.safetensors")
    scores = {
        line["step"]: line["held_out_bits_per_byte"]
        for line in read_metrics(home / "runs/whole/metrics.jsonl")
        if line["step"] and "held_out_bits_per_byte" in line
    }
    best = min(scores, key=lambda step: scores[step])
    assert sample_of(home, "whole@best") == sample_of(home, f"whole@{best}")


def sample_of(home: Path, name: str) -> bytes:
    return run(home, "sample", name, *REFERENCE, "--tokens", "40")


@pytest.mark.parametrize("delay", [1, 2])
def test_an_interrupted_command_ends_at_once(home: Path, delay: float) -> None:
    process = start(home, ["sample", "whole", *XLA, "--tokens", "1000000000"])
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 130


@pytest.mark.parametrize("engine", [REFERENCE, pytest.param(NATIVE, marks=needs_native)])
def test_text_is_shown_as_it_comes(home: Path, engine: list[str]) -> None:
    process = start(home, ["sample", "whole", *engine, "--tokens", "1000000000"])
    assert process.stdout is not None
    try:
        assert len(process.stdout.read(100)) == 100
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


NAMES = ("unigram", "bigram", "trigram", "own_unigram", "own_bigram", "own_trigram", "gzip", "xz")


def test_eval(home: Path) -> None:
    table = run(home, "eval", "whole", *REFERENCE).decode()
    result = json.loads(run(home, "eval", "whole", *REFERENCE, "--json"))
    assert tuple(result["baselines"]) == NAMES
    assert result["step"] == STEPS
    assert result["member_tokens"] == STEPS * 16 * 8
    for figure in (result["bits_per_byte"], *result["baselines"].values()):
        assert f"{figure:.3f}" in table
    for label in (
        "intlm whole, step 80",
        "trigram, counted on the training text",
        "gzip -9",
        "xz of this text",
    ):
        assert label in table
    # The held-out text is short enough for training to have scored all of it.
    lines = read_metrics(home / "runs/whole/metrics.jsonl")
    assert lines[-1]["held_out_bits_per_byte"] == result["bits_per_byte"]


def test_eval_of_another_text(home: Path) -> None:
    (home / "other.txt").write_text("a stone house\n" * 20)
    words = ["eval", "whole", "--data", "other.txt", "--json"]
    result = json.loads(run(home, *words, *REFERENCE))
    assert (result["text"], result["bytes"]) == ("other.txt", 280)
    assert json.loads(run(home, *words, *XLA)) == result


def test_audit(home: Path) -> None:
    table = run(home, "audit", "tiny").decode()
    for stage in ("population step", "update", "forward", "sampling"):
        assert re.search(rf"^{stage} +\w+ +\d+  .*int", table, re.MULTILINE)
    assert re.search(r"^[\d,]+ operations, 0 with a float$", table, re.MULTILINE)


def test_audit_of_a_run(home: Path) -> None:
    result = json.loads(run(home, "audit", "whole", "--json"))
    assert result["floats"] == 0
    assert sum(operation["count"] for operation in result["operations"]) > 1000


@pytest.mark.parametrize(
    "command", [[], ["train"], ["sample"], ["eval"], ["check"], ["data"], ["audit"], ["bench"]]
)
def test_help(home: Path, command: list[str]) -> None:
    text = run(home, *command, "--help").decode()
    assert text.startswith("usage: intlm")
    assert "None" not in text
    assert max(map(len, text.splitlines())) < 120
    if command == ["train"]:
        assert re.search(r"^  step_size=\d+ +First step size in 1/256", text, re.MULTILINE)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 24 lines and 140 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))
    yield ours, theirs
    os.close(ours)


def read_all(descriptor: int) -> str:
    """What is written to a terminal until its other end is closed."""
    content = b""
    while True:
        try:
            content += os.read(descriptor, 1 << 16)
        except OSError as error:
            assert error.errno == errno.EIO
            return content.decode()


def test_progress_on_a_terminal(home: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    process = start(home, [*LONG, "--run", "shown"], stderr=theirs)
    os.close(theirs)
    text = read_all(ours)
    assert process.communicate(timeout=60)[0].startswith(b"runs/shown: step 80 of 80")
    assert process.returncode == 0
    assert "training runs/shown: " in text
    assert "bits per byte held out; a sample:" in text
    # Done, of all, time spent and left, speed, and how good the model is.
    assert re.search(
        r"\d+/80 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, [\d,]+ member-tokens/s, bits/byte train \d", text
    )
    assert "100%" in text
    assert last(home, "shown") == last(home, "whole")
