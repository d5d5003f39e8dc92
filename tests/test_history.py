"""The history of a run: every step's weights from its log, whatever happened to the run or to the log."""

import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import extremes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm import checkpoint, history
from intlm.cli import main
from intlm.errors import InputError
from intlm.history import Recorder, apply_changes, decode_fitness, encode_changes, encode_fitness
from intlm.model import TRAINED
from train import report
from train.job import Job

# --- changes ----------------------------------------------------------------------------------------------------

shares = st.sampled_from([0.0, 0.001, 0.1, 0.125, 0.2, 0.9, 1.0])


@settings(max_examples=100)
@given(seed=seeds, share=shares, size=st.sampled_from([1, 7, 254, 255, 256, 511, 512, 1000, 5000]))
def test_changes_lead_from_one_to_the_other(seed, share, size):
    rng = np.random.default_rng(seed)
    before, after = (extremes(rng, (size,)).astype(np.int8) for _ in range(2))
    after = np.where(rng.random(size) < share, after, before)
    kept = before.copy()
    np.testing.assert_array_equal(apply_changes(encode_changes(before, after), before), after)
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("size", [1, 255, 256, 510, 511, 765, 766])
def test_every_single_change(size):
    before = np.zeros(size, np.int8)
    for place, move in itertools.product(range(size), (-127, -1, 1, 127)):
        after = before.copy()
        after[place] = move
        np.testing.assert_array_equal(apply_changes(encode_changes(before, after), before), after)


@settings(max_examples=300)
@given(seed=seeds, share=shares, cut=st.integers(0, 3))
def test_a_payload_that_is_damaged_is_refused_or_gives_weights(seed, share, cut):
    """No checksum stands before it here. What a payload claims takes no memory and no time."""
    rng = np.random.default_rng(seed)
    before, after = (rng.integers(-127, 128, 300).astype(np.int8) for _ in range(2))
    after = np.where(rng.random(300) < share, after, before)
    payload = bytearray(encode_changes(before, after))
    for _ in range(rng.integers(1, 4)):
        payload[rng.integers(len(payload))] = rng.choice([0, 1, 127, 128, 255])
    payload = payload[: len(payload) - rng.integers(len(payload))] if cut == 0 else payload
    try:
        weights = apply_changes(bytes(payload), before)
    except ValueError:
        return
    assert weights.dtype == np.int8 and weights.shape == (300,) and weights.min() >= -127


@pytest.mark.parametrize(
    "counts",
    [(2**32 - 1,) * 4, (301, 0, 301, 0), (301, 0, 38, 0), (2, 3, 2, 3), (1, 0, 2**31, 0), (1, 0, 0, 0),
     (38, 0, 37, 0), (38, 0, 39, 0), (37, 0, 36, 0), (38, 0, 38, 2**31)],
)  # fmt: skip
def test_counts_that_do_not_fit_are_refused(counts):
    payload = history.COUNTS.pack(*counts) + bytes(50)
    with pytest.raises(ValueError, match="counts do not fit"):
        apply_changes(payload, np.zeros(300, np.int8))


def test_more_unpacked_than_announced_is_refused():
    zeros = np.zeros(1 << 16, np.int8)
    changes = encode_changes(zeros, zeros)
    bomb = changes[: history.COUNTS.size] + history.zstd.compress(bytes(1 << 26))
    with pytest.raises(ValueError, match="not as long as it says"):
        apply_changes(bomb, zeros)
    with pytest.raises(ValueError, match="not the fitness"):
        decode_fitness(len(bomb[16:]).to_bytes(4, "little") + bomb[16:], 100)


@given(seed=seeds, pairs=st.sampled_from([1, 2, 512]))
def test_fitness_comes_back(seed, pairs):
    fitness = extremes(np.random.default_rng(seed), (pairs,), -96, 96).astype(np.int8)
    found, rest = decode_fitness(encode_fitness(fitness) + b"rest", pairs)
    np.testing.assert_array_equal(found, fitness)
    assert rest == b"rest"
    with pytest.raises(ValueError, match="has not the fitness"):
        decode_fitness(encode_fitness(fitness), pairs + 1)


# --- runs -------------------------------------------------------------------------------------------------------

STEPS = 12
TRAIN = ["train", "tiny", "--data", "text.txt", "--set", "population=16", "--set", "segment=8", "--keep", "9",
         "--steps", str(STEPS), "--checkpoint-every", "3", "--evaluate-every", "12"]  # fmt: skip
ESTIMATORS = {
    "activation": [],
    "weight": ["--set", "estimator=weight"],
    "published": ["--set", "estimator=weight", "--set", "noise=gaussian", "--set", "fitness=sign",
                  "--set", "update=threshold", "--set", "rank=2"],
}  # fmt: skip


class Killed(BaseException):
    """The end of the process, for which nothing is written."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a text; a segment of the log ends with every checkpoint."""
    monkeypatch.chdir(tmp_path)
    source = random.Random(1)
    lines = (" ".join(source.choices(("one", "two", "três"), k=9)) for _ in range(99))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 1)
    monkeypatch.setattr(history, "SEGMENT_BYTES", 0)
    monkeypatch.setattr(history, "BASES", 0)
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "tiny"


@pytest.fixture
def finished(here, kept):
    """A copy of a run of all steps."""
    if not kept.exists():
        assert train() == 0
        shutil.copytree("runs/tiny", kept)
    elif not Path("runs").exists():
        shutil.copytree(kept, "runs/tiny")
    return here


@pytest.fixture
def taken(monkeypatch):
    """The weights after each step that the loop took; and the number of steps after which the process ends."""
    weights, limit = {}, [None]
    original = Job.record

    def record(self, state, statistics):
        original(self, state, statistics)
        weights[state.step] = {name: np.asarray(value) for name, value in self.weights(state).items()}
        if state.step == limit[0]:
            self.history.close()
            raise Killed

    monkeypatch.setattr(Job, "record", record)
    return weights, limit


def train(*words):
    return main([*TRAIN, "--engine", "reference", *words])


def files(run="tiny"):
    return sorted(Path(f"runs/{run}/history").iterdir())


def verdict(capsys, code=0):
    capsys.readouterr()
    assert main(["verify", "tiny", "--engine", "reference", "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("segments", ["one", "many"])
def test_the_weights_of_every_step_come_back(here, taken, capsys, monkeypatch, estimator, segments):
    if segments == "one":
        monkeypatch.setattr(history, "SEGMENT_BYTES", 1 << 30)
    assert train(*ESTIMATORS[estimator]) == 0
    names = [path.name for path in files()]
    assert names == [f"step-{step:08d}.history" for step in (range(0, 13, 3) if segments == "many" else [0])]
    for step in range(1, STEPS + 1):
        assert main(["checkout", "tiny", "--engine", "reference", "--step", str(step)]) == 0
        arrays = checkpoint.read(Path(f"runs/tiny/checkouts/step-{step:08d}.safetensors")).arrays
        for name in TRAINED:
            np.testing.assert_array_equal(arrays[f"weight.{name}"], taken[0][step][name])
        np.testing.assert_array_equal(arrays["head_bias"], taken[0][step]["head_bias"])
    found = verdict(capsys)
    assert found["from_seed"] and found["faults"] == []
    assert (found["first"], found["last"], found["steps"]) == (0, STEPS, STEPS)
    assert found["checkpoints"] == [3, 6, 9, 12]
    assert main(["verify", "tiny"]) == 0
    assert "replayed from the weights that the seed gives" in capsys.readouterr().out
    # What was checked out can be used like a checkpoint, and the last step's is what the checkpoint gives.
    samples = []
    for path in ("checkouts/step-00000012.safetensors", "checkpoints/step-00000012.safetensors"):
        assert main(["sample", f"runs/tiny/{path}", "--engine", "reference", "--tokens", "9"]) == 0
        samples.append(capsys.readouterr().out)
        assert main(["eval", f"runs/tiny/{path}", "--engine", "reference"]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[:2] == samples[2:]


def test_a_killed_run_has_the_same_log(here, taken, capsys):
    assert train("--run", "whole") == 0
    for steps in (2, 5, 8, 9, 11):
        taken[1][0] = steps
        with pytest.raises(Killed):
            train()
        # A record that was cut short, and one of which nothing but zeros arrived.
        with files()[-1].open("ab") as file:
            file.write(random.Random(steps).choice([b"", b"\1\0\0", bytes(40), b"\xff" * 30]))
    taken[1][0] = None
    assert train() == 0
    assert [path.read_bytes() for path in files()] == [path.read_bytes() for path in files("whole")]
    assert verdict(capsys)["checkpoints"] == [3, 6, 9, 12]


def test_steps_after_the_last_checkpoint_are_there_too(here, taken, capsys):
    taken[1][0] = 5
    with pytest.raises(Killed):
        train()
    with files()[-1].open("ab") as file:
        file.write(b"torn")
    assert main(["checkout", "tiny", "--step", "5"]) == 0
    capsys.readouterr()
    assert main(["check", "tiny"]) == 0
    assert "note     steps 3 to 5, the next one torn" in capsys.readouterr().out
    assert verdict(capsys)["last"] == 5
    assert main(["checkout", "tiny", "--step", "6"]) == 2
    assert "--step 6: is not in the run's history, which has 0 to 5" in capsys.readouterr().err


def test_the_log_does_not_change_the_run(finished):
    assert train("--run", "without", "--history", "0") == 0
    assert not Path("runs/without/history").exists()
    one, other = (Path(f"runs/{run}/checkpoints/step-00000012.safetensors") for run in ("tiny", "without"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_flipped_byte_is_found(finished, capsys, place):
    path = files()[place % 4]
    content = bytearray(path.read_bytes())
    content[len(content) * place // 100] ^= 1 << place % 8
    path.write_bytes(content)
    found = verdict(capsys, 1)
    assert path.name in found["faults"][0]
    assert main(["check", "tiny"]) == 1
    assert re.search(rf"history/{path.name} +damaged ", capsys.readouterr().out)


def test_what_is_missing_or_false_is_told(finished, capsys):
    assert train("--run", "other", "--set", "seed=1") == 0
    capsys.readouterr()
    third = files()[2]
    content = third.read_bytes()
    third.unlink()
    assert verdict(capsys, 1)["faults"][0].endswith("no record leads from step 6 to 9, where it starts")
    assert main(["checkout", "tiny", "--step", "8"]) == 2
    assert "which has 0 to 6, 9 to 12" in capsys.readouterr().err
    third.write_bytes(files("other")[2].read_bytes())
    assert "eggroll.seed" in verdict(capsys, 1)["faults"][0]
    third.write_bytes(content)
    last = Path("runs/tiny/checkpoints/step-00000012.safetensors")
    saved = checkpoint.read(last)
    saved.arrays["master.head"][0, 0] += 256
    checkpoint.write(last, saved)
    found = verdict(capsys, 1)
    assert found["faults"] == [f"{last}: the log leads to other weights at step 12"]
    assert found["checkpoints"] == [3, 6, 9]
    # A run that claims another seed than the one that made its weights.
    config = Path("runs/tiny/config.json")
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 5'))
    assert "eggroll.seed" in verdict(capsys, 1)["faults"][0]


def test_no_history_is_said(here, capsys):
    assert train("--history", "0") == 0
    for words in (["verify", "tiny"], ["checkout", "tiny", "--step", "3"]):
        capsys.readouterr()
        assert main(words) == 2
        assert "has no history; `intlm train` with --history above 0 keeps one" in capsys.readouterr().err
    assert main([*TRAIN, "--run", "x", "--history", "-1"]) == 2
    assert main(["checkout", "tiny", "--step", "13"]) == 2
    assert "--step 13: must be from 0 to 12" in capsys.readouterr().err


def test_the_oldest_steps_make_room(finished, monkeypatch, capsys):
    sizes = [path.stat().st_size for path in files()]
    monkeypatch.setattr(Recorder, "__init__", _limited(Recorder.__init__, sum(sizes[:3])))
    assert train("--run", "limited") == 0
    assert [path.name for path in files("limited")] == [path.name for path in files()][-3:]
    capsys.readouterr()
    assert main(["verify", "limited", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["steps"], found["checkpoints"]) == (6, 6, [6, 9, 12])
    assert main(["checkout", "limited", "--step", "7"]) == 0


def _limited(init, size):
    def with_limit(self, *values):
        init(self, *values[:4], size, *values[5:])

    return with_limit


@pytest.mark.parametrize("failing", [2, 5, 9, 14])
def test_a_full_disk_stops_the_log_but_not_the_run(here, taken, monkeypatch, capsys, failing):
    """Writes fail from one on, for some steps; from the next checkpoint that finds room the log goes on."""
    original, calls = Recorder._write, itertools.count(1)

    def write(self, content):
        if next(calls) == failing:
            self._file.write(content[: len(content) // 2])
            self._file.truncate(self._size)
            raise OSError(28, os.strerror(28))
        original(self, content)

    monkeypatch.setattr(Recorder, "_write", write)
    assert train() == 0
    told = capsys.readouterr().err
    if failing <= STEPS:
        assert told.count("the history cannot be written: No space left on device") == 1
    assert told.count("the history is written again, from step ") == (failing <= STEPS)
    found = verdict(capsys, failing <= STEPS)
    assert found["last"] == STEPS
    assert len(found["faults"]) == (failing <= STEPS)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with np.errstate(all="raise"):
        assert main(["checkout", "tiny", "--step", "12"]) == 0


def test_a_log_that_cannot_be_made_does_not_stop_the_run(here, taken, capsys):
    taken[1][0] = 5
    with pytest.raises(Killed):
        train()
    taken[1][0] = None
    for path in files():
        path.unlink()
    Path("runs/tiny/history").rmdir()
    Path("runs/tiny/history").write_text("no directory")
    assert train() == 0
    assert capsys.readouterr().err.count("the history cannot be written: File exists") == 1
    assert main(["verify", "tiny"]) == 2
    assert "history: cannot be read: Not a directory" in capsys.readouterr().err


def test_a_base_out_of_range_is_refused(finished, capsys):
    path = files()[0]
    records = list(history.records(path, 1 << 24))
    saved = checkpoint.decode(records[0].payload, path)
    for name, value in (("weight.head", -128), ("head_bias", None), ("weight.x", 1)):
        arrays = dict(saved.arrays)
        if value is None:
            del arrays[name]
        else:
            arrays[name] = np.full_like(arrays["weight.head"], value)
        content = b"".join(checkpoint.encode(checkpoint.Checkpoint(arrays, saved.meta)))
        path.write_bytes(history.frame(0, content))
        assert path.name in verdict(capsys, 1)["faults"][0]


def test_records_name_what_is_wrong(tmp_path):
    path = tmp_path / "step-00000000.history"
    first, second = history.frame(0, b"base"), history.frame(1, b"changes")
    path.write_bytes(first + second)
    assert [record.step for record in history.records(path, 100)] == [0, 1]
    for cut in range(1, len(second)):
        path.write_bytes((first + second)[:-cut])
        with pytest.raises(history.TornError, match="cut short"):
            list(history.records(path, 100))
    with pytest.raises(InputError, match="record 0, at byte 0, says that it has 4 bytes"):
        path.write_bytes(first + second)
        list(history.records(path, 3))
    with pytest.raises(InputError, match="cannot be read"):
        list(history.records(tmp_path / "none", 100))
    with pytest.raises(InputError, match="is a directory"):
        list(history.records(tmp_path, 100))
