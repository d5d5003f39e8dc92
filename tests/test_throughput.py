"""What `intlm bench` measures: that the figures are there and of the right things, not how large they are."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same
from test_engines import CASES, inputs

from eval import full_rank, safety, sampling_speed, scaling, throughput
from eval.host import measure_host
from eval.safety import measure_safety
from intlm import cli, eggroll, fixedpoint
from intlm.cli import main
from intlm.config import EggrollConfig, ModelConfig
from intlm.engine import native
from intlm.engine.engine import check_threads, make_engine, usable_cores
from intlm.engine.reference import ReferenceEngine
from intlm.errors import InputError

ISAS = native.available_isas()
FASTEST = "native" if ISAS else "xla"
needs_native = pytest.mark.skipif(not ISAS, reason="installed without a native engine")
BENCH = ["bench", "tiny", "--set", "segment=4", "--seconds", "0", "--population", "8"]


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [-1, 0, 1025])
def test_a_number_of_threads_out_of_range(threads):
    config, eggroll_config, _ = CASES["activation"]
    with pytest.raises(InputError, match=f"^--threads {threads}: must be from 1 to 1024$"):
        make_engine("reference", config, eggroll_config, threads=threads)


def test_the_ends_of_the_range():
    assert (check_threads(1), check_threads(1024)) == (1, 1024)


@needs_native
@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_threads_change_no_bit(estimator):
    config = ModelConfig(layers=1, vocabulary=40)
    eggroll_config = EggrollConfig(estimator=estimator, population=150, segment=5)
    CASES["threads"] = (config, eggroll_config, 0)
    try:
        arguments = inputs("threads", 7, 0)
    finally:
        del CASES["threads"]
    found = [
        make_engine("native", config, eggroll_config, threads=threads).population_step(*arguments)
        for threads in (1, 2, 3, 5)
    ]
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_xla_makes_as_many_threads_as_asked_for(threads):
    program = (
        "import os, sys; from intlm.engine.engine import limit_xla_threads\n"
        f"limit_xla_threads({threads})\n"
        "import jax.numpy as jnp; jnp.zeros(3).block_until_ready()\n"
        "names = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]\n"
        "print(sum('XLAEigen' in name for name in names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_a_benchmark_is_held_to_its_cores_and_then_let_go():
    before = os.sched_getaffinity(0)
    with throughput.limited_threads(1, "xla"):
        assert usable_cores() == 1
    with pytest.raises(ZeroDivisionError), throughput.limited_threads(1, "xla"):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


# --- peak ---------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_peak_counts_what_every_thread_does(isa, threads):
    assert native.measured_peak(isa, threads, seconds=0.001) > 0
    run = getattr(native.library(), f"intlm_peak_{isa}")
    one = run(1000, 1)
    assert one % 1000 == 0 and one > 0
    assert run(3000, threads) == 3 * threads * one


# --- full rank ----------------------------------------------------------------------------------------------


def test_full_rank_scores_and_votes_are_those_of_each_members_weights():
    config, eggroll_config, _ = CASES["paper"]
    parameters, key, scales, tokens, state = inputs("paper", 2, 0)
    rows = np.arange(len(tokens), dtype=np.int32)
    noise = full_rank.member_noise(eggroll_config, config, key, rows)
    layers, own = full_rank.member_weights(eggroll_config, parameters, noise)
    reference = ReferenceEngine(config, eggroll_config)
    expected = np.zeros((2, len(rows)), np.int32)
    for sign in range(2):
        for pair in rows:
            weights = {name: np.asarray(value)[:, sign, pair] for name, value in layers.items()}
            weights |= {name: np.asarray(value)[sign, pair] for name, value in own.items()}
            for name, weight in weights.items():
                change = weight.astype(int) - parameters[name]
                assert change.any() and np.all(np.abs(weight.astype(int)) <= 127), name
            weights["head_bias"] = parameters["head_bias"]
            logits, _ = reference.forward(weights, tokens[[pair], :-1], state[[pair]])
            expected[sign, pair] = fixedpoint.log_likelihood(logits, tokens[[pair], 1:]).sum()
    mean = scales["difference"]
    q = eggroll.fitness(eggroll_config, expected[0] - expected[1], mean).astype(int)
    votes = {name: np.tensordot(q, np.asarray(value).astype(int), 1) for name, value in noise.items()}
    for at_once in (True, False):
        run = full_rank.evaluator(config, eggroll_config, at_once)
        scores, made = run(parameters, key, mean, tokens, state, rows)
        np.testing.assert_array_equal(scores, expected)
        for name, value in votes.items():
            np.testing.assert_array_equal(made[name], value, name)


# --- the command --------------------------------------------------------------------------------------------


def bench(capsys, *words):
    assert main([*BENCH, *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_every_figure_of_every_case(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "ROUNDS", 2)
    rows = json.loads(
        bench(capsys, "--json", "--threads", "1", "--threads", "2", "--set", "estimator=weight")
    )
    engines = (["native"] if ISAS else []) + ["xla"]
    cases = [(row["engine"], row["estimator"], row["threads"], row["population"]) for row in rows]
    assert cases == [(engine, "weight", threads, 8) for engine in engines for threads in (1, 2)]
    ranged = ("training", "evaluation", "inference", "update_share", "evaluation_over_inference")
    for row in rows:
        names = [*ranged, *(("scoring", "scoring_over_inference") if row["engine"] == "xla" else ())]
        for name in names:
            low, high = row[f"{name}_range"]
            assert low <= row[name] <= high
            assert name == "update_share" or low > 0
        gmacs = row["training"] * (12 * 64**2 + 256 * 64) / 1e9
        assert row["gmacs"] == pytest.approx(gmacs)
        assert (row["peak"] is None) == (not ISAS)
        if ISAS:
            low, high = row["peak_share_range"]
            assert 0 < low <= row["peak_share"] <= high


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["small"],
            [("activation", n) for n in (1024, 4096, 16384)] + [("weight", n) for n in (1024, 4096, 16384)],
        ),
        (["paper"], [("weight", 1024)]),
        (["small", "--set", "estimator=weight", "--population", "6"], [("weight", 6)]),
        (["small", "--full-rank"], [("activation", 1024)]),
        (["small", "--host"], [("activation", 1024), ("weight", 1024)]),
        (["small", "--safety"], [("activation", 1024), ("weight", 1024)]),
    ],
)
def test_what_is_measured_by_default(words, expected):
    cases, _ = cli._bench_cases(cli._parse(["bench", *words, "--engine", "xla"]))
    assert [(case.config.estimator, case.config.population) for case in cases] == expected
    assert {case.threads for case in cases} == {usable_cores()}


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "ROUNDS", 1)
    words = ["--engine", FASTEST, "--set", "estimator=activation", "--population", "4", "--threads", "1"]
    lines = bench(capsys, *words).splitlines()
    assert len(lines) == 2 + 2 + bool(ISAS)
    assert all(len(line) < 160 for line in lines)
    for line, population in zip(lines[2:], (8, 4), strict=False):
        assert re.match(rf"{FASTEST} +activation +1 +{population} +[\d,]+ ", line)
        assert line.endswith("1.0x")
    if ISAS:
        assert re.search(r"^int8 peak of \w+ on 1 thread, measured in this run: [\d,.]+ GMAC/s", lines[-1])


def test_full_rank(capsys, monkeypatch):
    monkeypatch.setattr(full_rank, "ROUNDS", 1)
    [row] = json.loads(bench(capsys, "--full-rank", "--json", "--engine", FASTEST))
    for name in ("eggroll", "at_once", "by_token", "over_at_once", "over_by_token"):
        assert row[name]["lowest"] > 0
    assert (row["floor"] is None) == (not ISAS)


def test_sampling(capsys, monkeypatch):
    monkeypatch.setattr(sampling_speed, "ROUNDS", 1)
    monkeypatch.setattr(sampling_speed, "SAMPLES", (1, 2))
    words = ["bench", "tiny", "--sampling", "--engine", FASTEST, "--seconds", "0"]
    assert main(words) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        [FASTEST, "1"], [FASTEST, "2"]
    ]  # fmt: skip
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert shown.err == "" and [row["samples"] for row in rows] == [1, 2]
    assert all(row["rate"] > 0 for row in rows)


def test_host(capsys):
    config = EggrollConfig(population=8, segment=4)
    settings = ("population=8", "segment=4")
    cost = measure_host("tiny", settings, throughput.Case(FASTEST, 1, config), 0.0)
    assert cost.evaluation > 0 and cost.update > 0
    assert cost.step == pytest.approx(cost.evaluation + cost.update + cost.host)
    assert cost.host_share == pytest.approx(cost.host / cost.step)
    assert "segment 4" in cost.line() and set(cost.as_dict()) >= {f.name for f in dataclasses.fields(cost)}
    assert capsys.readouterr().err == ""


def test_safety_where_threads_have_no_clock(monkeypatch):
    monkeypatch.delattr("time.pthread_getcpuclockid", raising=False)
    with pytest.raises(InputError, match="--safety: this system does not tell the processor time"):
        measure_safety("tiny", (), throughput.Case("reference", 1, EggrollConfig()), 0.0)


def test_safety(capsys, monkeypatch):
    monkeypatch.setattr(safety, "ROUNDS", 2)
    config = EggrollConfig(population=8, segment=4)
    case = throughput.Case(FASTEST, 1, config)
    cost = measure_safety("tiny", ("population=8", "segment=4"), case, 0.0)
    assert cost.lowest <= cost.cost <= cost.highest
    assert cost.checkpoint_bytes > 2 * 45_000 and cost.history_bytes > 0
    assert "segment 4" in cost.line() and set(cost.as_dict()) >= {f.name for f in dataclasses.fields(cost)}
    assert capsys.readouterr().err == ""


def test_processes(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    (row,) = json.loads(bench(
        capsys, "--json", "--engine", FASTEST, "--processes", "2", "--threads", "1",
        "--set", "estimator=activation",
    ))  # fmt: skip
    assert (row["processes"], row["threads"], row["population"]) == (2, 1, 8)
    assert row["one"] > 0 and row["by_threads"] > 0
    assert row["by_processes_range"] == [row["by_processes"]] * 2


def test_a_run_of_processes_that_fails(tmp_path):
    expected = "^--processes 1: a run failed: intlm: preset: unknown 'none'"
    with pytest.raises(InputError, match=expected):
        scaling._train(str(tmp_path), ["train", "none"], "name", 1, 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--processes", "1"], "--processes 1: must be from 2 to 256"),
        (["--processes", "2", "--host"], "--host and --processes: give one of them"),
        (["--threads", "0"], "--threads 0: must be from 1 to 1024"),
        (["--threads", "x"], "--threads x: expected an integer"),
        (["--seconds", "-1"], "--seconds -1: must be a number from 0 to 3600"),
        (["--seconds", "nan"], "--seconds nan: must be a number from 0 to 3600"),
        (["--seconds", "x"], "--seconds x: must be a number from 0 to 3600"),
        (["--engine", "gpu"], "--engine: unknown 'gpu'"),
        (["--population", "7"], "population=7: must be an even number"),
        (["--set", "estimator=none"], "estimator: unknown 'none'"),
        (["--full-rank", "--host"], "--full-rank and --host: give one of them"),
        (["--sampling", "--host"], "--host and --sampling: give one of them"),
        (["--sampling", "--safety"], "--safety and --sampling: give one of them"),
        (["--sampling", "--threads", "1"], "--threads: not with --sampling"),
    ],
)
def test_bad_input(capsys, words, expected):
    assert main([*BENCH, *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("intlm: ") and expected in shown.err
    assert len(shown.err.splitlines()) == 1
