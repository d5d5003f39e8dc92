"""Corpora far away, which here are served by the tests on 127.0.0.1 and fail as told."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import parse_qs

import pytest
from sources import NAMES, plain, write

from intlm.errors import InputError
from train import remote
from train.corpus import SourceUnavailable, open_corpus, without_secrets
from train.remote import FIRST_RETRIES, RETRIES, HttpCorpus

TEXTS = [None, "", *(f"{number} é\n" * 20 for number in range(300)), None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, with ranges; `server.failures` are served first, one a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        failure = self.server.failures.pop(0) if self.server.failures else None
        path = self.path.partition("?")[0]
        if isinstance(failure, int):
            retry_after = {"Retry-After": "40"} if failure == 429 else {}
            self.send(b"oops", status=failure, **retry_after)
        elif failure == "hang up":
            self.close_connection = True
        elif path == "/moved.jsonl":
            location = f"http://localhost:{self.server.server_port}/lines.JSONL?secret"
            self.send(b"", status=302, Location=location)
        elif path in self.server.files:
            content, version = self.server.files[path]
            self.send_file(content, version, failure)
        else:
            self.send(b"no", status=404)

    def send(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, content, version, failure=None, **headers):
        """The content or the range asked for, or a third of it, after which the server hangs up or stalls."""
        ranges = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if ranges and self.server.ranges:
            start, stop = int(ranges[1]), min(stop, int(ranges[2] or stop) + 1)
            if start >= len(content):
                self.send(b"", status=416, **{"Content-Range": f"bytes */{len(content)}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:stop]
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        for name, value in {"ETag": version, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if failure in ("drop", "stall"):
                self.wfile.write(body[: len(body) // 3])
                self.wfile.flush()
                if failure == "stall":
                    self.server.released.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(body)
        except OSError:
            # The reader has hung up.
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler=Handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.files = {}
        self.failures = []
        self.requests = []
        self.ranges = True
        self.tells_length = True
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name in NAMES:
        write(folder / name, TEXTS)
    (folder / "text.txt").write_text("".join(map(str, TEXTS)) * 60)
    return {f"/{path.name}": (path.read_bytes(), '"1"') for path in folder.iterdir()}


@pytest.fixture
def server(contents):
    with serving(Server()) as server:
        server.files = dict(contents)
        yield server


class Waits(list):
    """A stand-in for `time.sleep` that notes the seconds."""

    def __call__(self, seconds):
        self.append(seconds)


def corpus_of(server, path, waits=None):
    return HttpCorpus(server.url(path), sleep=Waits() if waits is None else waits)


# Files behind a URL


@pytest.mark.parametrize("name", NAMES)
def test_a_url_reads_like_a_file_from_every_tenth_document_on(server, name):
    corpus = corpus_of(server, f"/{name}")
    everything = list(corpus.read({}))
    assert [document for document, _ in everything] == plain(TEXTS)
    for number in [*range(0, len(everything), 37), len(everything) - 1]:
        cursor = json.loads(json.dumps(everything[number][1]))
        assert list(corpus_of(server, f"/{name}").read(cursor)) == everything[number + 1 :]


def test_text_behind_a_url_is_cut_like_a_file(server, tmp_path):
    (tmp_path / "text.txt").write_bytes(server.files["/text.txt"][0])
    here = open_corpus(str(tmp_path / "text.txt")).documents()
    assert list(corpus_of(server, "/text.txt").documents()) == list(here)


@pytest.mark.parametrize("name", NAMES)
def test_failures_of_every_kind_leave_no_trace_in_the_documents(server, name, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 1)
    waits = Waits()
    corpus = corpus_of(server, f"/{name}", waits)
    expected = list(corpus.read({}))
    server.failures = [503, "hang up", "drop", 429, "drop", "stall", "drop", 500, 502]
    assert list(corpus.read({})) == expected
    assert not server.failures
    # Once something was received, the waits start over; 40 is what the server asked for.
    assert waits[:2] == [1, 2] and 40 in waits and len(waits) == 9


def test_the_rest_alone_is_asked_for(server):
    corpus = corpus_of(server, "/lines.JSONL")
    everything = list(corpus.read({}))
    server.requests.clear()
    list(corpus.read(everything[200][1]))
    [(_, headers)] = server.requests
    assert headers["Range"] == f"bytes={everything[200][1]['offset'] - 1}-"


@pytest.mark.parametrize("name", ["lines.JSONL", "lines.jsonl.gz", "stream.arrow", "t.parquet"])
def test_a_server_without_ranges(server, name):
    expected = list(corpus_of(server, f"/{name}").read({}))
    server.ranges = False
    if name == "t.parquet":
        with pytest.raises(InputError, match=r"does not serve parts of a file .* download it first$"):
            list(corpus_of(server, f"/{name}").read(expected[-2][1]))
        return
    server.failures = ["drop", "drop"]
    assert list(corpus_of(server, f"/{name}").read({})) == expected
    assert list(corpus_of(server, f"/{name}").read(expected[200][1])) == expected[201:]


def test_a_server_that_tells_no_length(server):
    server.tells_length = server.ranges = False
    assert list(corpus_of(server, "/lines.JSONL").documents()) == plain(TEXTS)
    with pytest.raises(InputError, match=r"does not tell its length; download it first$"):
        list(corpus_of(server, "/t.parquet").documents())


def test_a_server_that_is_gone_while_reading(server):
    waits = Waits()
    documents = corpus_of(server, "/text.txt", waits).documents()
    server.failures = ["drop"] + ["hang up"] * 20
    with pytest.raises(
        SourceUnavailable, match=r"^--data: 'http:.*text.txt': no answer after 8 retries: Remote "
    ):
        list(documents)
    assert waits == [1 << retry for retry in range(RETRIES)]


def test_a_server_that_never_was_there(server):
    waits = Waits()
    server.failures = [503] * 20
    with pytest.raises(
        SourceUnavailable, match=r": no answer after 3 retries: HTTP 503 Service Unavailable$"
    ):
        list(corpus_of(server, "/text.txt", waits).documents())
    assert waits == [1, 2, 4] and len(waits) == FIRST_RETRIES
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(SourceUnavailable, match=r": no answer after 3 retries: Connection refused$"):
        HttpCorpus(f"http://127.0.0.1:{port}/a.txt", sleep=Waits()).fingerprint()


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_no_retry_helps_against(server, code):
    waits = Waits()
    server.failures = [code]
    with pytest.raises(InputError, match=rf"^--data: 'http://.*/a\.txt': HTTP {code} ") as caught:
        list(corpus_of(server, "/a.txt", waits).documents())
    assert not isinstance(caught.value, SourceUnavailable) and not waits and len(server.requests) == 1


def test_a_file_that_changes_on_the_server(server):
    server.failures = ["drop", "drop"]
    documents = corpus_of(server, "/text.txt").documents()
    next(documents)
    server.files["/text.txt"] = (server.files["/text.txt"][0], '"2"')
    with pytest.raises(InputError, match=r"^--data: 'http:.*/text.txt': changed while it was read$"):
        list(documents)


def test_a_file_that_got_shorter_than_the_cursor(server):
    *_, (_, last) = corpus_of(server, "/lines.JSONL").read({})
    server.files["/lines.JSONL"] = (b"{}\n", '"2"')
    with pytest.raises(InputError):
        list(corpus_of(server, "/lines.JSONL").read(last))


def test_the_fingerprint_of_a_url(server):
    content, _ = server.files["/text.txt"]
    before = corpus_of(server, "/text.txt").fingerprint()
    assert before == {"url": server.url("/text.txt"), "bytes": len(content), "etag": '"1"'}
    server.files["/text.txt"] = (content, '"2"')
    assert corpus_of(server, "/text.txt").fingerprint() == {**before, "etag": '"2"'}
    server.files["/text.txt"] = (content + b"x", '"1"')
    assert corpus_of(server, "/text.txt").fingerprint() == {**before, "bytes": len(content) + 1}


def test_secrets_are_sent_to_their_host_and_shown_to_nobody(server):
    url = f"http://me:p%40ss@127.0.0.1:{server.server_port}/moved.jsonl?token=hush"
    corpus = HttpCorpus(url)
    assert list(corpus.documents()) == plain(TEXTS)
    assert corpus.name == server.url("/moved.jsonl")
    (first, here), (second, there) = server.requests
    assert first == "/moved.jsonl?token=hush" and here["Authorization"] == "Basic bWU6cEBzcw=="
    assert second == "/lines.JSONL?secret" and "Authorization" not in there
    assert corpus.fingerprint()["url"] == server.url("/moved.jsonl")
    server.failures = [404]
    with pytest.raises(InputError) as caught:
        corpus.fingerprint()
    assert not re.search("p%40ss|p@ss|hush|secret", str(caught.value))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("hf:a/b", "hf:a/b"),
        ("a?b@c#d", "a?b@c#d"),
        ("http://h/a@b.txt", "http://h/a@b.txt"),
        ("HTTPS://u:p@h:1/a%20b.txt?k=v#f", "HTTPS://h:1/a%20b.txt"),
        ("http://u@h?k=@", "http://h"),
        ("http://[::1]:8/a", "http://[::1]:8/a"),
    ],
)
def test_names_without_secrets(name, shown):
    assert without_secrets(name) == shown


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "https:///a.txt", "http://host:port/a.txt", "http://[::1/a.txt"),
        *("http://me:hush/hush@host/a.txt", "http://me:hush?hush@host/a.txt", "http://me:hush#hush@host:x/a"),
    ],
)
def test_what_is_no_url(url):
    with pytest.raises(InputError, match=r"^--held-out: '[^h]*(http|https)://((?!hush).)*$"):
        open_corpus(url, flag="--held-out")


def test_damage_and_no_text_behind_a_url(server):
    label = re.escape(f"--data: {server.url('/a.jsonl')!r}")
    for content, message in {
        b'{"text": "a"}\n{"text": 5}\n': " line 2: field 'text' is of type int",
        b'{"text": ""}\n': ": is empty",
        b"": ": is empty",
    }.items():
        server.files["/a.jsonl"] = (content, '"1"')
        with pytest.raises(InputError, match=f"^{label}{message}"):
            list(corpus_of(server, "/a.jsonl").documents())


def test_nothing_is_asked_before_it_is_needed(server):
    corpus = open_corpus(server.url("/text.txt"))
    corpus.read({})
    assert server.requests == []


def test_a_stall_is_told_once_on_a_terminal(server, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    server.failures = ["drop", 503, 503, "hang up"]
    list(corpus_of(server, "/text.txt").documents())
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and "connection closed at byte" in shown[0] and "8 times" in shown[0]


# The Hub

HUB_COMMIT = "0123456789abcdef" * 2 + "01234567"
OTHER_COMMIT = HUB_COMMIT[::-1]
"""What the tag `v2` stands for; the files are the same."""


class HubHandler(Handler):
    """As much of the Hub as reading takes: `server.files[dataset][path]`; failures are those of data files."""

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        asked = parse_qs(self.rfile.read(size).decode()).get("paths", [])
        path, _, _ = self.path.partition("?")
        parts = re.fullmatch(r"(/api)?/datasets/(me/\w+)/?(.*)", path)
        self.dataset = self.server.files.get(parts[2]) if parts else None
        what = parts[3].replace(HUB_COMMIT, "COMMIT").replace(OTHER_COMMIT, "COMMIT") if parts else ""
        commit = OTHER_COMMIT if OTHER_COMMIT in path or what == "revision/v2" else HUB_COMMIT
        if parts and parts[1] and self.server.api_failures:
            self.send(b"oops", status=self.server.api_failures.pop(0))
        elif self.dataset is None:
            self.send_json({}, status=404, **{"X-Error-Code": "RepoNotFound"})
        elif what in ("", "revision/main", "revision/v2", "revision/COMMIT"):
            siblings = [{"rfilename": name} for name in self.dataset]
            self.send_json({"_id": "1", "id": parts[2], "sha": commit, "tags": [], "siblings": siblings})
        elif what.startswith("revision/"):
            self.send_json({}, status=404, **{"X-Error-Code": "RevisionNotFound"})
        elif what.startswith("tree/COMMIT"):
            folder = what.removeprefix("tree/COMMIT").strip("/")
            below = [name.removeprefix(folder).strip("/") for name in self.dataset if name.startswith(folder)]
            names = {f"{folder}/{name.partition('/')[0]}".strip("/") for name in below}
            self.send_json([self.entry(name) for name in sorted(names)])
        elif what == "paths-info/COMMIT":
            self.send_json([self.entry(name) for name in asked if name in self.dataset])
        elif (name := what.removeprefix("resolve/COMMIT/")) in self.dataset:
            content, failure = self.dataset[name], None
            if self.command == "GET" and not name.endswith(".md"):
                self.server.requests.append((self.path, dict(self.headers)))
                failure = self.server.failures.pop(0) if self.server.failures else None
            if isinstance(failure, int):
                self.send(b"oops", status=failure)
            else:
                self.send_file(content, f'"{len(content)}"', failure, **{"X-Repo-Commit": commit})
        else:
            self.send_json({}, status=404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    do_HEAD = do_POST = do_GET

    def entry(self, name):
        if name in self.dataset:
            return {"type": "file", "oid": "1" * 40, "size": len(self.dataset[name]), "path": name}
        return {"type": "directory", "oid": "2" * 40, "size": 0, "path": name}

    def send_json(self, content, **options):
        self.send(json.dumps(content).encode(), **{"Content-Type": "application/json"}, **options)


HUB_SCRIPT = """
import json, sys
from intlm.errors import InputError
from train.corpus import SourceUnavailable
from train.remote import HubCorpus
results = []
for name, field, cursors in json.loads(sys.argv[1]):
    waits = []
    corpus = HubCorpus(name, field, sleep=waits.append)
    results.append({"waits": waits, "error": ""})
    try:
        results[-1]["read"] = [[(d.decode(), c) for d, c in corpus.read(cursor)] for cursor in cursors]
        results[-1]["fingerprint"] = corpus.fingerprint()
    except InputError as error:
        results[-1].update(error=str(error), unavailable=isinstance(error, SourceUnavailable))
print(json.dumps(results))
"""


@pytest.fixture
def hub():
    with serving(Server(HubHandler)) as server:
        server.api_failures = []
        yield server


@pytest.fixture
def read_hub(hub, tmp_path):
    def read(*jobs):
        """What a process of its own reads, for each (name, field, cursors); it shows nothing on its streams."""
        environment = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", HUB_SCRIPT, json.dumps(jobs)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        # Neither warnings nor progress bars.
        assert done.stderr == ""
        return json.loads(done.stdout)

    return read


def rows(start, count):
    return [f"{number} é" * 3 if number % 7 else None for number in range(start, start + count)]


def test_datasets_resume_at_every_document(hub, read_hub, tmp_path):
    texts = [rows(0, 400), rows(400, 100)]
    expected = [text for part in texts for text in part if text]
    for dataset, name in {
        "me/parquet": "t.parquet",
        "me/lines": "lines.jsonl.gz",
        "me/json": "lines.json.zst",
        "me/arrow": "stream.arrow",
    }.items():
        hub.files[dataset] = {"README.md": b"# A dataset"}
        for number, part in enumerate(texts):
            write(tmp_path / name, part)
            ending = name[name.index(".") :]
            hub.files[dataset][f"data/train-{number}{ending}"] = (tmp_path / name).read_bytes()
    # What only `datasets` reads: a table of text, and an array of records over many lines.
    records = [{"text": text} for text in expected]
    hub.files["me/csv"] = {"train.csv": "".join(["text\n", *(f"{text}\n" for text in expected)]).encode()}
    hub.files["me/array"] = {"train.json": json.dumps(records, indent=1).encode()}
    # A directory that happens to have the name of the dataset.
    (tmp_path / "me" / "csv").mkdir(parents=True)
    (tmp_path / "me" / "csv" / "wrong.csv").write_text("text\nwrong\n")
    results = read_hub(*([f"hf:{name}", "text", [{}]] for name in hub.files))
    again = []
    for name, result in zip(hub.files, results, strict=True):
        assert not result["error"] and not result["waits"]
        [everything] = result["read"]
        assert [document for document, _ in everything] == expected
        assert ("file" in everything[0][1]) == (name not in ("me/csv", "me/array"))
        assert result["fingerprint"]["commit"] == HUB_COMMIT and result["fingerprint"]["split"] == "train"
        chosen = [0, 100, 218, 342, 343, 400, len(everything) - 1]
        again.append([f"hf:{name}@main", "text", [everything[number][1] for number in chosen]])
    hub.failures = [None, "drop", None, None, 429, None, None, None, "hang up", None] * 10
    waits = []
    for first, second in zip(results, read_hub(*again), strict=True):
        [everything] = first["read"]
        assert not second["error"] and second["fingerprint"] == first["fingerprint"]
        assert second["read"] == [everything[number + 1 :] for number in chosen]
        waits.append(len(second["waits"]))
    # In the last two, the library tries again by itself.
    assert all(waits[:-2]), waits


def test_splits_columns_and_errors_of_datasets(hub, read_hub):
    hub.files["me/data"] = {
        "train.jsonl": b'{"body": "train"}\n{"body": 5}\n',
        "validation.jsonl": b'{"body": "validation"}\n',
    }
    hub.files["me/csv"] = {"train.csv": b"body,id\n5,6\n"}
    hub.files["me/nothing"] = {"train.jsonl": b"\n\n"}
    messages = {
        ("hf:me/data::validation", "body"): "",
        ("hf:me/data::validation@v2", "body"): "",
        ("hf:me/data", "body"): " 'train.jsonl' line 2: field 'body' is of type int (accepted: a string)",
        ("hf:me/data", "text"): " 'train.jsonl' line 1: no field 'text' (the fields are: 'body')",
        ("hf:me/data::other", "body"): ": no split 'other' (the splits are: 'train', 'validation')",
        ("hf:me/data:other", "body"): ": BuilderConfig 'other' not found. Available: ['default']",
        ("hf:me/csv", "text"): ": no column 'text' (the columns are: 'body', 'id')",
        (
            "hf:me/csv",
            "body",
        ): " row 1: column 'body' is of type int (accepted: a string, or UTF-8 as binary)",
        ("hf:me/nothing", "text"): ": is empty (accepted: at least one byte of text)",
        (
            "hf:me/none",
            "text",
        ): ": no such dataset on the Hub, or one that takes a login with `hf auth login`",
        ("hf:me/data@nowhere", "text"): ": the dataset has no revision 'nowhere'",
    }
    results = read_hub(*([name, field, [{}]] for name, field in messages))
    for (name, _), message, result in zip(messages, messages.values(), results, strict=True):
        assert result["error"] == (f"--data: {name!r}{message}" if message else "")
        assert result["waits"] == []
    first, second = results[:2]
    [[[document, cursor]]] = first["read"]
    assert document == "validation" and cursor["commit"] == first["fingerprint"]["commit"] == HUB_COMMIT
    assert second["fingerprint"]["commit"] == OTHER_COMMIT


def test_a_hub_that_does_not_answer(hub, read_hub):
    hub.files["me/data"] = {"train.jsonl": b'{"text": "a"}\n'}
    hub.api_failures = [429, 429]
    [result] = read_hub(["hf:me/data", "text", [{}]])
    assert result["read"][0][0][0] == "a" and result["waits"] == [1, 2]
    hub.api_failures = [429] * 50
    [result] = read_hub(["hf:me/data", "text", [{}]])
    assert result["unavailable"] and result["waits"] == [1, 2, 4]
    assert re.match(r"--data: 'hf:me/data': no answer after 3 retries: .*429", result["error"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:squad", ("squad", None, "train", None)),
        ("hf:me/data.v1", ("me/data.v1", None, "train", None)),
        ("hf:me/data:small", ("me/data", "small", "train", None)),
        ("hf:me/data:small:test", ("me/data", "small", "test", None)),
        ("hf:me/data::test@v1.0", ("me/data", None, "test", "v1.0")),
        ("hf:me/data@refs/convert/parquet", ("me/data", None, "train", "refs/convert/parquet")),
    ],
)
def test_names_of_datasets(name, parts):
    corpus = open_corpus(name)
    assert corpus.name == name
    assert (corpus._dataset, corpus._config, corpus._split, corpus._revision) == parts


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:/", "hf:a/b/c", "hf:me/", "hf:me/data@", "hf:me/data:a:b:c", "hf:../data", "hf:me data"],
)
def test_what_is_no_name_of_a_dataset(name):
    with pytest.raises(InputError, match=r"^--data: 'hf:.*': is no dataset \(accepted: hf:NAME\[:CONFIG\["):
        open_corpus(name)
