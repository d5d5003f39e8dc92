"""One run on any number of processes: the same bytes, stopped together, and none left behind a lost one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_same
from test_cli import EVERY, last, run, start, wait_for

from intlm import checkpoint
from intlm.engine.native import available_isas
from train.metrics import read_metrics
from train.run import step_of

SMALL = ["--set", "population=22", "--set", "segment=8", "--threads", "1"]
TRAIN = [
    "train",
    "tiny",
    "--data",
    "text.txt",
    *SMALL,
    "--evaluate-every",
    str(EVERY),
    "--checkpoint-every",
    "5",
]
SHORT = [*TRAIN, "--steps", "20"]
LONG = [*TRAIN, "--steps", "200"]
WEIGHT = ["--set", "estimator=weight", "--set", "pairs_per_lane=1"]
SHARED = ["--set", "population=36", "--set", "pairs_per_lane=3"]
NATIVE = ["--engine", "native" if available_isas() else "reference"]
XLA = ["--engine", "xla"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(home, words, processes, *more, each=(), **options):
    """All processes of a run; `each`: further words of every process."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    own = list(each) or [[]] * processes
    return [
        start(home, [*words, *more, *where, "--process", str(process), *own[process]], **options)
        for process in range(processes)
    ]


def ends(started, timeout=120):
    """(exit code, standard output, standard error) of each."""
    results = []
    for process in started:
        out, err = process.communicate(timeout=timeout)
        results.append((process.returncode, out.decode(), err.decode()))
    return results


def trained(home, words, processes, *more, each=()):
    """A run to its end: nothing is said but one line, by the first process."""
    results = ends(launch(home, words, processes, *more, each=each))
    assert [code for code, _, _ in results] == [0] * processes, results
    assert [err for _, _, err in results] == [""] * processes
    assert [bool(out) for _, out, _ in results] == [True] + [False] * (processes - 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a text."""
    home = tmp_path_factory.mktemp("cluster")
    write_text(home)
    return home


def write_text(home, seed=1):
    source = random.Random(seed)
    vocabulary = ["zebra", "apple", "naïve", "house", "of", "the", "on", "stone", "running", "42"]
    lines = (" ".join(source.choices(vocabulary, k=8)) for _ in range(300))
    (home / "text.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(home):
    """The last checkpoint of SHORT, trained by one process."""
    run(home, *SHORT, *NATIVE, "--run", "whole")
    return last(home, "whole")


@pytest.fixture(scope="module")
def long(home):
    """The same of LONG."""
    run(home, *LONG, *NATIVE, "--run", "long")
    return last(home, "long")


# --- the same bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_change_no_bit(home, whole, processes):
    name = f"processes{processes}"
    trained(home, SHORT, processes, *NATIVE, "--run", name)
    assert last(home, name) == whole
    kept = [sorted(path.name for path in (home / "runs" / run).rglob("*")) for run in (name, "whole")]
    assert len(kept[0]) == len(kept[1])  # events are named after the time
    scores = [
        [
            line
            for line in read_metrics(home / f"runs/{each}/metrics.jsonl")
            if "held_out_bits_per_byte" in line
        ]
        for each in (name, "whole")
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "settings", [WEIGHT, pytest.param(SHARED, marks=pytest.mark.long), [*SHARED, "--set", "estimator=weight"]]
)
def test_estimators_and_shared_lanes(home, settings):
    name = "-".join(word.split("=")[-1] for word in settings if "=" in word)
    run(home, *SHORT, *settings, *NATIVE, "--run", f"one-{name}")
    trained(home, SHORT, 3, *settings, *NATIVE, "--run", f"three-{name}")
    assert last(home, f"three-{name}") == last(home, f"one-{name}")


def test_fitness_in_place_of_votes(home):
    """The processes make the others' votes themselves; the log of the run has the fitness of all pairs."""
    run(home, *SHORT, *WEIGHT, *NATIVE, "--run", "one-votes")
    trained(home, SHORT, 2, *WEIGHT, *NATIVE, "--run", "two-fitness", "--exchange", "fitness")
    assert last(home, "two-fitness") == last(home, "one-votes")
    for name in ("one-votes", "two-fitness"):
        run(home, "verify", name)


def test_engines_and_devices_of_any_kind_train_together(home, whole):
    """One process evaluates on XLA, on two devices, the other on one and in its own way."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--run", "mixed", "--process"]
    devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    started = [
        start(home, [*SHORT, *XLA, *where, "0"], env=os.environ | devices),
        start(home, [*SHORT, *NATIVE, *where, "1"]),
    ]
    assert [code for code, _, _ in ends(started)] == [0, 0]
    assert last(home, "mixed") == whole


def test_a_run_goes_on_in_any_other_layout(home, whole):
    """One process, then three, then two: each makes the steps that the one before is made to lose."""
    words, directory = [*SHORT, *NATIVE, "--run", "elastic", "--keep", "9"], home / "runs/elastic/checkpoints"
    run(home, *words)
    for kept, processes in ((5, 3), (10, 2)):
        for path in directory.iterdir():
            if path.name > f"step-{kept:08d}.safetensors":
                path.unlink()
        trained(home, words, processes)
        assert last(home, "elastic") == whole


@pytest.mark.long
def test_minutes_are_measured_by_the_first_process(home):
    words = [*TRAIN, *NATIVE, "--minutes", "0.05"]
    trained(home, words, 2, "--run", "minutes")
    steps = json.loads((home / "runs/minutes/config.json").read_bytes())["steps"]
    run(home, *TRAIN, *NATIVE, "--steps", str(steps), "--run", "counted")
    found = [
        checkpoint.read(home / f"runs/{name}/checkpoints/step-{steps:08d}.safetensors").arrays
        for name in ("minutes", "counted")
    ]
    assert_same(*found)


def test_only_the_first_process_needs_the_run(home, whole, tmp_path):
    """The others stand in another directory, with nothing but the text in it."""
    (tmp_path / "text.txt").write_bytes((home / "text.txt").read_bytes())
    words = [*SHORT, *NATIVE, "--run", "elsewhere"]
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    results = ends([start(home, [*words, *where, "0"]), start(tmp_path, [*words, *where, "1"])])
    assert [code for code, _, _ in results] == [0, 0], results
    assert last(home, "elsewhere") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# --- stopping -----------------------------------------------------------------------------------------------


def checkpoint_of(home, name, step):
    return home / f"runs/{name}/checkpoints/step-{step:08d}.safetensors"


def newest_step(home, name):
    paths = (home / f"runs/{name}/checkpoints").glob("step-*.safetensors")
    return max(map(step_of, paths), default=0)


@pytest.mark.parametrize(
    ("process", "number"), [(1, signal.SIGTERM), pytest.param(0, signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_to_any_process_stops_all(home, long, process, number):
    name = f"stopped{process}"
    started = launch(home, LONG, 2, *NATIVE, "--run", name)
    wait_for(checkpoint_of(home, name, 5).exists, started[0])
    started[process].send_signal(number)
    results = ends(started)
    assert [code for code, _, _ in results] == [130, 130], results
    assert "interrupted, and resumed by the same command" in results[0][2]
    assert results[1][1:] == ("", "")
    trained(home, LONG, 2, *NATIVE, "--run", name)
    assert last(home, name) == long


# --- failure ------------------------------------------------------------------------------------------------


def test_a_killed_process_ends_the_others(home, long):
    step = 0
    for victim in (1, 0):
        started = launch(home, LONG, 2, *NATIVE, "--run", "killed")
        wait_for(lambda before=step: newest_step(home, "killed") > before, started[0])
        started[victim].kill()
        began = time.monotonic()
        code, out, err = ends([started[1 - victim]], 60)[0]
        assert time.monotonic() - began < 30
        assert (code, out) == (3, "")
        assert len(err.splitlines()) == 1, err
        assert f"intlm: process {victim} (" in err
        assert f"pid {started[victim].pid}) is lost" in err
        assert "last checkpoint: runs/killed/checkpoints/step-" in err
        ends([started[victim]])
        step = newest_step(home, "killed")
    trained(home, LONG, 2, *NATIVE, "--run", "killed")
    assert last(home, "killed") == long


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_hanging_process_ends_the_others(home, long, victim):
    name = f"hanging{victim}"
    started = launch(home, LONG, 3, *NATIVE, "--run", name)
    wait_for(checkpoint_of(home, name, 5).exists, started[0])
    started[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [process for process in range(3) if process != victim]
    results = ends([started[process] for process in others], 60)
    assert time.monotonic() - began < 30
    for code, out, err in results:
        assert (code, out) == (3, "")
        assert len(err.splitlines()) == 1, err
        assert f"intlm: process {victim} (" in err
    started[victim].kill()
    ends([started[victim]])
    trained(home, LONG, 3, *NATIVE, "--run", name)
    assert last(home, name) == long


@pytest.mark.long
def test_a_process_that_is_held_up_for_a_while_is_waited_for(home, long):
    started = launch(home, LONG, 2, *NATIVE, "--run", "pause")
    for number, process in enumerate(started, 1):
        wait_for(checkpoint_of(home, "pause", 50 * number).exists, started[0])
        process.send_signal(signal.SIGSTOP)
        time.sleep(10)
        process.send_signal(signal.SIGCONT)
    assert [code for code, _, _ in ends(started)] == [0, 0]
    assert last(home, "pause") == long


# --- hosts --------------------------------------------------------------------------------------------------


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two hosts, as network namespaces, and the link between them, which takes 20 ms and loses 1% of its packets.

    Their names and the link's process; the first one's address is 10.213.7.1.
    """
    names = [f"intlm-{os.getpid()}-{host}" for host in (1, 2)]
    made, link = [], None
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            words = [sys.executable, str(Path(__file__).with_name("bad_link.py")), *names, "20", "1"]
            link = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if link.stdout.readline() != b"ready\n":
                pytest.skip(f"no devices can be made here: {link.communicate()[1].decode()}")
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "intlm0")
                for device in ("lo", "intlm0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield names, link
    finally:
        if link is not None:
            link.kill()
            link.communicate()
        for name in made:
            ip("netns", "delete", name)


@pytest.mark.long
def test_two_hosts_with_a_bad_link_between_them(home, hosts):
    """Also while the link is down for ten seconds."""
    names, link = hosts
    alone = [*TRAIN, *NATIVE, "--steps", "40", "--run"]
    run(home, *alone, "one-host")
    words = [*alone, "hosts", "--coordinator", "10.213.7.1:41213", "--processes", "2"]
    python = [sys.executable, "-m", "intlm", *words]
    pipes = {"cwd": home, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen(["ip", "netns", "exec", name, *python, "--process", str(number)], **pipes)
        for number, name in enumerate(names)
    ]
    try:
        wait_for(checkpoint_of(home, "hosts", 5).exists, started[0])
        link.send_signal(signal.SIGUSR1)
        time.sleep(10)
        assert not checkpoint_of(home, "hosts", 40).exists()
        link.send_signal(signal.SIGUSR1)
        results = ends(started, 400)
    finally:
        for process in started:
            process.kill()
    assert link.poll() is None
    assert [(code, err) for code, _, err in results] == [(0, "")] * 2, results
    assert last(home, "hosts") == last(home, "one-host")


# --- refusal ------------------------------------------------------------------------------------------------


def refused(results, *words):
    """Every process says the same, in one line, and leaves with exit code 2."""
    for code, out, err in results:
        assert (code, out) == (2, ""), results
        assert len(err.splitlines()) == 1, err
        for word in words:
            assert word in err


def test_another_configuration_is_refused(home):
    each = [[], ["--set", "width=128"]]
    results = ends(launch(home, SHORT, 2, *NATIVE, "--run", "refused", each=each))
    refused(results, "another configuration", "model.width", "64", "128")
    assert "process 1 (" in results[0][2]
    assert not (home / "runs/refused").exists()


def test_another_text_is_refused(home, tmp_path):
    write_text(tmp_path, seed=2)
    words = [*SHORT, *NATIVE, "--run", "refused"]
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    results = ends([start(home, [*words, *where, "0"]), start(tmp_path, [*words, *where, "1"])])
    refused(results, "--data: not the text of process 0", "text.txt")
    assert "process 1 (" in results[0][2]
    assert not (home / "runs/refused").exists()


def test_another_version_is_refused(home):
    script = (
        "import sys, train.together as t; t.code_digests = lambda: {'train/loop.py': 'changed'};"
        "from intlm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        *SHORT,
        *NATIVE,
        "--run",
        "refused",
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        "2",
    ]
    first = start(home, [*words, "--process", "0"])
    other = subprocess.Popen(
        [sys.executable, "-c", script, *words, "--process", "1"],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    refused(ends([first, other]), "another version of intlm than process 0", "differs")
    assert not (home / "runs/refused").exists()


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_wrong_in_one_process_ends_all(home, tmp_path, process):
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    homes = [home, home]
    homes[process] = tmp_path
    results = ends([start(homes[i], [*SHORT, "--run", "refused", *where, str(i)]) for i in range(2)])
    refused(results, "'text.txt' does not exist")
    assert f"process {process} (" in results[1 - process][2]
    assert not (home / "runs/refused").exists()


def test_more_processes_than_lanes_are_refused(home):
    words = ["train", "tiny", "--data", "text.txt", "--set", "population=4", "--run", "refused"]
    refused(ends(launch(home, words, 3)), "--processes 3: must be at most 2, the lanes")


def test_a_coordinator_that_does_not_answer(home):
    ports = [free_port(), free_port()]
    results = ends([
        start(home, [*SHORT, "--run", f"refused{process}", "--wait", "2", "--coordinator", f"127.0.0.1:{port}",
                     "--processes", "2", "--process", str(process)])
        for process, port in enumerate(ports)
    ])  # fmt: skip
    for result, port, expected in zip(results, ports, ("not all processes came", "no answer"), strict=True):
        refused([result], f"--coordinator 127.0.0.1:{port}: {expected} within 2 seconds (--wait)")


ALL = {"--coordinator": "localhost:1234", "--processes": "2", "--process": "0"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--process": "1"}, ["--process", "--coordinator is missing"]),
        ({"--coordinator": "a:1", "--process": "1"}, ["--processes is missing"]),
        (ALL | {"--process": "2"}, ["--process 2", "from 0 to 1"]),
        (ALL | {"--process": "-1"}, ["--process -1"]),
        (ALL | {"--processes": "0"}, ["--processes 0"]),
        (ALL | {"--process": "x"}, ["--process x"]),
        (ALL | {"--coordinator": "localhost"}, ["--coordinator localhost", "HOST:PORT"]),
        (ALL | {"--coordinator": "localhost:0"}, ["--coordinator localhost:0", "1 to 65535"]),
        (ALL | {"--coordinator": "localhost:65536"}, ["1 to 65535"]),
        (ALL | {"--coordinator": ":1"}, ["HOST:PORT"]),
        (ALL | {"--lost-after": "1"}, ["--lost-after 1", "from 5"]),
        (ALL | {"--wait": "0"}, ["--wait 0"]),
        (ALL | {"--cluster": "slurm"}, ["--cluster and --coordinator"]),
        (ALL | {"--exchange": "vote"}, ["--exchange", "did you mean 'votes'"]),
        ({"--cluster": "slurn"}, ["--cluster", "did you mean 'slurm'"]),
        ({"--cluster": "slurm"}, ["--cluster slurm: no such cluster here"]),
        ({"--cluster": "auto"}, ["--cluster auto: no such cluster here"]),
    ],
)
def test_bad_flags(flags, words, capsys, monkeypatch, tmp_path):
    from intlm.cli import main

    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    assert main(["train", "tiny", *(word for pair in flags.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert not list(Path.cwd().iterdir())


def test_one_process_is_no_cluster(home, whole):
    run(home, *SHORT, *NATIVE, "--run", "single", "--coordinator", "127.0.0.1:1", "--processes", "1", "--process", "0")  # fmt: skip  # noqa: E501
    assert last(home, "single") == whole


def test_what_slurm_says_of_itself_is_taken(home, whole, monkeypatch):
    """The variables of `srun`, as its manual has them."""
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    for name, value in {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    started = []
    for process in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", process)
        monkeypatch.setenv("SLURM_LOCALID", process)
        started.append(start(home, [*SHORT, *NATIVE, "--run", "slurm", "--cluster", "slurm"]))
    assert [code for code, _, _ in ends(started)] == [0, 0]
    assert last(home, "slurm") == whole
