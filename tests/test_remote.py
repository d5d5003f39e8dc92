"""Corpora far away, which here are served by the tests on 127.0.0.1 and fail as told."""

import http.server
import json
import re
import socket
import sys
import threading
from contextlib import contextmanager

import pytest
from sources import NAMES, plain, write

from intlm.errors import InputError
from train import remote
from train.corpus import SourceUnavailable, open_corpus
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
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        failure = server.failures.pop(0) if server.failures else None
        if isinstance(failure, int):
            self.send_response(failure)
            if failure == 429:
                self.send_header("Retry-After", "40")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"oops")
            return
        if failure == "hang up":
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if path == "/moved.jsonl":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/lines.JSONL?secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path not in server.files:
            self.send_error(404)
            return
        content, version = server.files[path]
        first = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first and server.ranges else 0
        if first and server.ranges and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if first and server.ranges else 200)
        if first and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.send_header("ETag", version)
        self.end_headers()
        try:
            if failure in ("drop", "stall"):
                self.wfile.write(body[: len(body) // 3])
                self.wfile.flush()
                if failure == "stall":
                    server.released.wait(60)
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
    server.failures = ["drop"]
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
    assert corpus.name == url
    (first, here), (second, there) = server.requests
    assert first == "/moved.jsonl?token=hush" and here["Authorization"] == "Basic bWU6cEBzcw=="
    assert second == "/lines.JSONL?secret" and "Authorization" not in there
    assert corpus.fingerprint()["url"] == server.url("/moved.jsonl")
    server.failures = [404]
    with pytest.raises(InputError) as caught:
        corpus.fingerprint()
    assert not re.search("p%40ss|p@ss|hush|secret", str(caught.value))


@pytest.mark.parametrize("url", ["http://", "https:///a.txt", "http://host:port/a.txt", "http://[::1/a.txt"])
def test_what_is_no_url(url):
    with pytest.raises(InputError, match=r"^--held-out: '.*' is no URL"):
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
