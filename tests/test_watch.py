"""Signs of a run that goes wrong: told once, with a knob that can be turned, and in every place."""

import json
import random
import re
from pathlib import Path

import pytest

from intlm.cli import main
from intlm.config import EggrollConfig, ModelConfig
from train import report
from train.config import TextConfig, resolve_config
from train.watch import Watch

CONFIG = EggrollConfig()
THRESHOLD = EggrollConfig(estimator="weight", update="threshold", segment=16, alpha=900)


def watch(config: EggrollConfig = CONFIG, steps: int = 1000) -> Watch:
    return Watch(config, ModelConfig(), steps)


def settings(line: str) -> list[str]:
    return re.findall(r"--set (\w+=\d+)", line)


def test_a_score_that_explodes() -> None:
    watched = watch()
    told = [watched.scored(bits, 3.0, 5.0) for bits in (3.0, 3.5, 3.6, 4.0, 3.1, 3.6)]
    assert [len(each) for each in told] == [0, 0, 1, 0, 0, 1]
    assert told[2][0].startswith(
        "held-out text takes 3.600 bits per byte, after 3.000 at best: the steps are"
    )
    assert watch().scored(5.05, 5.0, 5.0) == []
    [line] = watch().scored(5.2, 5.0, 5.0)
    assert "5.000 before the first step" in line
    assert watch().scored(9.0, None, None) == []


@pytest.mark.parametrize(
    "config", [CONFIG, THRESHOLD, EggrollConfig(step_size=1), EggrollConfig(step_size=40)]
)
def test_smaller_steps_can_be_set(config: EggrollConfig) -> None:
    [line] = watch(config).scored(9.0, 3.0, 5.0)
    [setting] = settings(line)
    name, value = setting.split("=")
    now = int(re.search(r"this one has (\d+)", line)[1])  # type: ignore[index]
    assert name == ("alpha" if config is THRESHOLD else "step_size")
    assert 1 <= int(value) <= now
    assert int(value) < now or now == 1
    resolve_config("small", [setting], TextConfig(), 256)


def test_weights_that_saturate() -> None:
    watched = watch()
    [line] = watched.weighed({"head": (9, 100), "mlp_in": (10, 100)})
    assert line.startswith("10% of the weights of mlp_in are at -127 or 127")
    assert watched.weighed({"head": (9, 100), "mlp_in": (30, 100)}) == []
    assert len(watched.weighed({"head": (100, 100), "mlp_in": (9, 100)})) == 1
    assert len(watched.weighed({"head": (100, 100), "mlp_in": (10, 100)})) == 1


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (CONFIG, "sigma_mlp=3"),
        (THRESHOLD, "sigma_weight=1"),
        (EggrollConfig(sigma_mlp=5, sigma_candidate=5), "sigma_gate=5"),
    ],
)
def test_comparisons_that_find_nothing(config: EggrollConfig, setting: str) -> None:
    watched = watch(config)
    assert watched.compared(999, 999) == []
    assert watched.compared(989, 1000) == []
    [line] = watched.compared(2000, 2000)
    assert line.startswith("100% of the comparisons find no difference")
    assert settings(line) == [setting]
    assert watched.compared(2000, 2000) == []
    most = EggrollConfig(sigma_mlp=5, sigma_candidate=5, sigma_gate=5, sigma_embedding=5)
    [line] = watch(most).compared(2000, 2000)
    assert line.endswith("another --set seed")


def test_a_run_that_goes_wrong_says_so_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 1)
    source = random.Random(3)
    Path("text.txt").write_text("\n".join(" ".join(source.choices(("one", "two"), k=8)) for _ in range(160)))
    command = ["train", "tiny", "--data", "text.txt", "--engine", "reference", "--set", "population=4",
               "--set", "segment=8", "--steps", "12", "--evaluate-every", "3"]  # fmt: skip
    assert main([*command, "--set", "step_size=4096", "--set", "step_head=64", "--run", "wild"]) == 0
    said = capsys.readouterr().err.splitlines()
    found = [json.loads(line) for line in Path("runs/wild/metrics.jsonl").read_text().splitlines()]
    warnings = [f"intlm: step {line['step']}: {line['warning']}" for line in found if "warning" in line]
    assert said == warnings
    assert any(
        "bits per byte" in line and "--set step_size=2048 (this one has 4096)" in line for line in said
    )
    assert any("are at -127 or 127" in line for line in said)
    [events] = Path("runs/wild/tensorboard").iterdir()
    assert b"warning" in events.read_bytes()
    assert main([*command, "--run", "calm"]) == 0
    assert capsys.readouterr().err == ""
