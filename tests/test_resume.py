"""Runs that are cut short at any step, or whose text fails, end with the bytes of one that was not."""

import contextlib
import gzip
import json
import random

import pyarrow
import pytest
from pyarrow import parquet
from test_remote import Server, serving

from intlm import checkpoint
from intlm.cli import main
from train import lanes as lanes_module
from train import remote, report
from train import stream as stream_module
from train.lanes import Lanes

STEPS = 12
TRAIN = ["train", "tiny", "--engine", "reference", "--set", "population=16", "--set", "segment=64",
         "--steps", str(STEPS), "--checkpoint-every", "3", "--evaluate-every", "12"]  # fmt: skip


def texts(seed, count=60):
    source = random.Random(seed)
    return [" ".join(source.choices(("one", "two", "três", "four", "\n"), k=30)) for _ in range(count)]


def json_lines(seed, count=60):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts(seed, count)).encode()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Corpora of every kind."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "texts").mkdir()
    for number, text in enumerate(texts(1)):
        (folder / f"texts/{number:02d}.txt").write_text(text)
    (folder / "one.txt").write_text("\n".join(texts(2)))
    (folder / "lines.jsonl").write_bytes(json_lines(3))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(json_lines(4)))
    parquet.write_table(pyarrow.table({"text": texts(5)}), folder / "rows.parquet", row_group_size=13)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory; windows and chunks are so small that a run goes through many of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 400)
    monkeypatch.setattr(stream_module, "FRAGMENT_BYTES", 64)
    monkeypatch.setattr(lanes_module, "MOST_SEGMENTS", 5)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


class Killed(BaseException):
    """The end of the process, for which no checkpoint is written."""


@pytest.fixture
def seen(monkeypatch):
    """Every segment that was handed out since it was emptied; a limit ends the process."""
    tokens = []
    tokens_limit = [None]
    original = Lanes.next_segment

    def next_segment(self):
        if tokens_limit[0] == len(tokens):
            raise Killed
        tokens.append(original(self))
        return tokens[-1]

    monkeypatch.setattr(Lanes, "next_segment", next_segment)
    return tokens, tokens_limit


def last(here, name):
    return checkpoint.read(here / f"runs/{name}/checkpoints/step-{STEPS:08d}.safetensors")


def bytes_of(here, name):
    return (here / f"runs/{name}/checkpoints/step-{STEPS:08d}.safetensors").read_bytes()


MIXTURE = ["texts=2", "one.txt", "lines.jsonl.gz=3", "rows.parquet"]


@pytest.mark.parametrize(
    "names", [["texts"], ["one.txt"], ["lines.jsonl"], ["lines.jsonl.gz"], ["rows.parquet"], MIXTURE]
)
def test_a_run_killed_at_any_step_ends_with_the_same_bytes(here, corpora, seen, names):
    tokens, limit = seen
    data = [word for name in names for word in ("--data", str(corpora / name))]
    assert main([*TRAIN, *data, "--run", "whole"]) == 0
    whole = [segment.tolist() for segment in tokens]
    assert len(whole) == STEPS
    read, step = [], 0
    for steps in random.Random(str(names)).sample(range(1, 9), 2):
        tokens.clear()
        limit[0] = steps
        with contextlib.suppress(Killed):
            main([*TRAIN, *data, "--run", "killed"])
        read[step:] = [segment.tolist() for segment in tokens]
        step = (step + len(tokens)) // 3 * 3  # the last checkpoint
    tokens.clear()
    limit[0] = None
    assert main([*TRAIN, *data, "--run", "killed"]) == 0
    read[step:] = [segment.tolist() for segment in tokens]
    assert read == whole
    assert bytes_of(here, "killed") == bytes_of(here, "whole")
    places = last(here, "whole").meta["position"]["sources"]
    assert any(place["window"] for place in places)
    assert any(place["bytes"] for place in places)


def test_a_source_that_stalls_drops_and_goes_away_loses_nothing(here, corpora, monkeypatch, capsys):
    """Parquet and JSON lines from a server: the run ends as one on the same files that nothing happened to."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote._Patience, "wait", _without_sleep(remote._Patience.wait))
    with serving(Server()) as server:
        server.files["/rows.parquet"] = ((corpora / "rows.parquet").read_bytes(), '"1"')
        server.files["/lines.jsonl"] = (json_lines(3, 8), '"1"')
        words = [*TRAIN, "--data", server.url("/rows.parquet"), "--data", server.url("/lines.jsonl")]
        assert main([*words, "--run", "whole"]) == 0
        server.failures += ["drop", "stall", 503, "hang up", "drop", 500, "stall", "drop"]
        assert main([*words, "--run", "shaken"]) == 0
        assert not server.failures
        assert bytes_of(here, "shaken") == bytes_of(here, "whole")

        # Gone for good in mid-run: one line and exit code 2, and the same command goes on from there.
        original = Lanes._build
        built = []

        def build(self):
            built.append(self)
            if len(built) == 2:
                server.failures += [503] * 1000
            return original(self)

        monkeypatch.setattr(Lanes, "_build", build)
        capsys.readouterr()
        assert main([*words, "--run", "gone"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "no answer after" in message
        steps = [path.name for path in sorted((here / "runs/gone/checkpoints").iterdir())]
        assert steps[-1] == "step-00000005.safetensors"  # a chunk's worth, not the checkpoint at 3
        before = {path.name: path.read_bytes() for path in (here / "runs/gone/checkpoints").iterdir()}
        assert main([*words, "--run", "gone"]) == 2
        assert {path.name: path.read_bytes() for path in (here / "runs/gone/checkpoints").iterdir()} == before
        server.failures.clear()
        monkeypatch.setattr(Lanes, "_build", original)
        assert main([*words, "--run", "gone"]) == 0
        assert bytes_of(here, "gone") == bytes_of(here, "whole")


def _without_sleep(wait):
    def at_once(self, error, at_least=0):
        self.sleep = lambda seconds: None
        wait(self, error, at_least)

    return at_once


def test_a_file_that_is_damaged_in_mid_run_loses_nothing(here, corpora, monkeypatch, capsys):
    path = here / "lines.jsonl"
    content = json_lines(3, 16)
    path.write_bytes(content)
    words = [*TRAIN, "--data", "lines.jsonl"]
    assert main([*words, "--run", "whole"]) == 0
    original = Lanes._build
    built = []

    def build(self):
        built.append(self)
        if len(built) == 2:
            path.write_bytes(content[: len(content) // 2] + b"nonsense\n")
        return original(self)

    monkeypatch.setattr(Lanes, "_build", build)
    capsys.readouterr()
    assert main([*words, "--run", "damaged"]) == 2
    assert "lines.jsonl" in capsys.readouterr().err
    assert (here / "runs/damaged/checkpoints/step-00000005.safetensors").exists()
    monkeypatch.setattr(Lanes, "_build", original)
    assert main([*words, "--run", "damaged"]) == 2  # it has changed
    path.write_bytes(content)
    assert main([*words, "--run", "damaged"]) == 0
    assert bytes_of(here, "damaged") == bytes_of(here, "whole")


def test_going_on_with_text_that_has_changed(here, corpora, seen, capsys):
    _, limit = seen
    folder = here / "texts"
    folder.mkdir()
    for number, text in enumerate(texts(1)):
        (folder / f"{number:02d}.txt").write_text(text)
    words = [*TRAIN, "--data", "texts", "--run", "one"]
    limit[0] = 10
    with pytest.raises(Killed):
        main(words)
    for number in range(3, 60):
        (folder / f"{number:02d}.txt").unlink()
    limit[0] = None
    capsys.readouterr()
    assert main(words) == 2
    assert "--data texts: the text has changed (files.03.txt.bytes: was" in capsys.readouterr().err
    assert main([*words, "--accept-changed-data"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert notes[0].endswith("more); going on, to other bits and scores of another text")
    assert notes[1].endswith("; texts is read again from its start")
    assert json.loads((here / "runs/one/data.json").read_bytes())["texts"]["files"].keys() == {
        "00.txt", "01.txt", "02.txt"
    }  # fmt: skip


def test_secrets_of_urls_are_in_config_json_alone(here, capsys):
    def command(secret, path="/text.jsonl"):
        base = f"http://me:{secret}@127.0.0.1:{server.server_port}"
        urls = [f"{base}{path}?id={number}x&sign={secret}" for number in (1, 2)]
        return [*TRAIN, *(word for url in urls for word in ("--data", url))]

    with serving(Server()) as server:
        server.files = {"/text.jsonl": (json_lines(6), "1")}
        assert main(command("hush")) == 0
        [newest, *_] = sorted((here / "runs/tiny/checkpoints").iterdir(), reverse=True)
        newest.unlink()
        # A signature that was renewed is no other configuration.
        assert main(command("husher")) == 0
        assert main(["eval", "tiny"]) == 0
        assert main(["data", command("hush")[-1]]) == 0
        assert main(command("hush", "/other.jsonl")) == 2
    shown = capsys.readouterr()
    assert "text.data" in shown.err and "/other.jsonl" in shown.err
    assert "hush" not in shown.out + shown.err
    files = [path for path in here.rglob("*") if path.is_file()]
    assert {path.name for path in files if b"hush" in path.read_bytes()} == {"config.json"}
    fingerprints = json.loads((here / "runs/tiny/data.json").read_bytes())
    url = server.url("/text.jsonl")
    assert [*fingerprints] == [url, f"{url} (2)"]
