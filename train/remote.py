"""Corpora far away: a file behind a URL, and a dataset of the Hugging Face Hub.

Both outlast a network that stalls: a try that fails is made again after 1, 2, 4, … seconds, and what comes
next is exactly the next document. Nothing is asked of the network before documents or a fingerprint are.
"""

import base64
import hashlib
import http.client
import io
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from intlm.errors import InputError
from train import formats
from train.corpus import Corpus, Cursor, Fingerprint, SourceUnavailable, without_secrets

RETRIES = 8
"""Tries after the first that fails, 255 s of waiting in all, each try up to `TIMEOUT` on top."""
FIRST_RETRIES = 3
"""The same, 7 s of waiting, before a source has answered for the first time: that is more often a mistake."""
TIMEOUT = 30
"""Seconds without a byte after which a connection counts as stalled."""
LONGEST_WAIT = 300
"""Seconds that a server may ask for with `Retry-After`."""
# Less is read and thrown away, more is worth another request.
SHORT_SKIP = 1 << 20

Sleep = Callable[[float], None]


class HttpCorpus(Corpus):
    """One file behind `http://…` or `https://…`, in any format of `train.formats`, which the path's ending tells.

    A cursor is that of the format; going on from one asks the server for the rest alone. Parquet and Arrow
    need a server that serves parts of a file (range requests). A name and password in the URL are sent as
    such; these, and a query, appear in no message.
    """

    def __init__(self, name: str, text_field: str = "text", flag: str = "--data", sleep: Sleep = time.sleep):
        """Look at the URL, without a request. `InputError` where it is none."""
        self._text_field = text_field
        self._source = _HttpSource(name, flag, sleep)
        self.name = self._source.shown

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """See `Corpus.read`; `SourceUnavailable` after the last retry."""
        empty = not cursor
        self._source.answered |= not empty
        for document, position in formats.documents(self._source, self._text_field, cursor):
            if document:
                empty = False
                yield document, position
        if empty:
            raise InputError(f"{self._source.label}: is empty (accepted: at least one byte of text)")

    def fingerprint(self) -> Fingerprint:
        """The URL without secrets, and what the server tells of the file: `bytes`, `etag`, `last-modified`."""
        with self._source.file() as file:
            return {"url": self._source.shown, **file.facts()}


class HubCorpus(Corpus):
    """`hf:NAME[:CONFIG[:SPLIT]][@REVISION]`: a dataset of the Hugging Face Hub.

    CONFIG may be left out where the dataset has one or a default; SPLIT is `train` unless given. REVISION is
    a branch, a tag or a commit, `main` unless given. The library `datasets` tells which files these are.

    Parquet, Arrow and JSON lines are read as `train.formats` reads them, from the Hub: of Parquet only the
    column `text_field`, and going on from a cursor asks for the rest alone. Files in all other formats are
    streamed by `datasets` row by row; nulls are passed over, and going on from a cursor reads what is before it
    again, since the library's own states have not always been exact. A cursor holds the commit, so that going
    on from it reads the same even after a branch has moved on.
    """

    def __init__(self, name: str, text_field: str = "text", flag: str = "--data", sleep: Sleep = time.sleep):
        """Look at the name, without a request. `InputError` where it is none."""
        self.name = name
        self._field = text_field
        self._label = f"{flag}: {name!r}"
        self._sleep = sleep
        match = re.fullmatch(
            r"hf:(?P<name>\w[\w.-]*(/\w[\w.-]*)?)"
            r"(:(?P<config>[^:@/]*)(:(?P<split>\w+(\.\w+)*))?)?(@(?P<revision>[^@\s:]+))?",
            name,
        )
        if not match:
            raise InputError(f"{self._label}: is no dataset (accepted: hf:NAME[:CONFIG[:SPLIT]][@REVISION])")
        self._dataset = match["name"]
        self._config = match["config"] or None
        self._split = match["split"] or "train"
        self._revision = match["revision"]

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """See `Corpus.read`; `SourceUnavailable` after the last retry."""
        empty = not cursor
        patience = _Patience(self._label, self._sleep, answered=not empty)
        commit = str(cursor["commit"]) if "commit" in cursor else self._ask(self._commit, patience)
        builder = self._ask(lambda: self._builder(commit), patience)
        sources = self._sources(builder, commit)
        within = {key: value for key, value in cursor.items() if key != "commit"}
        if "file" in cursor or (empty and self._are_ours(builder, sources)):
            documents = self._read_files(sources, within)
        else:
            documents = self._read_rows(builder, within, patience)
        for document, position in documents:
            if document:
                empty = False
                yield document, {"commit": commit, **position}
        if empty:
            raise InputError(f"{self._label}: is empty (accepted: at least one byte of text)")

    def fingerprint(self) -> Fingerprint:
        """The commit, the configuration, the split, the number of its files and a hash of their names."""
        patience = _Patience(self._label, self._sleep)
        commit = self._ask(self._commit, patience)
        builder = self._ask(lambda: self._builder(commit), patience)
        files = self._files(builder)
        return {
            "commit": commit,
            "config": builder.config.name,
            "split": self._split,
            "files": len(files),
            "names": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        }

    def _commit(self) -> str:
        _datasets()
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self._dataset, revision=self._revision, timeout=TIMEOUT).sha)

    def _builder(self, commit: str) -> Any:
        # With this prefix, never a directory here that happens to have the same name.
        path = f"hf://datasets/{self._dataset}"
        return _datasets().load_dataset_builder(path, self._config, revision=commit)

    def _files(self, builder: Any) -> list[str]:
        """The files of the split, by their URLs."""
        splits = builder.config.data_files or {}
        if self._split not in splits:
            names = ", ".join(repr(str(split)) for split in splits) or "none"
            raise InputError(f"{self._label}: no split {self._split!r} (the splits are: {names})")
        return list(map(str, splits[self._split]))

    def _sources(self, builder: Any, commit: str) -> "list[_HttpSource]":
        """The same as sources, as far as they are in the dataset itself."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        # For files that not everyone may read. Not to other hosts, which the Hub points to.
        secret = build_hf_headers().get("authorization")
        sources = []
        for url in self._files(builder):
            _, inside, path = url.partition(f"hf://datasets/{self._dataset}@{commit}/")
            if inside:
                url = hf_hub_url(self._dataset, path, repo_type="dataset", revision=commit)
                source = _HttpSource(url, self._label, self._sleep)
                source.label, source.secret = f"{self._label} {path!r}", secret
                source.is_pinned = source.answered = True
                sources.append(source)
        return sources

    def _are_ours(self, builder: Any, sources: "list[_HttpSource]") -> bool:
        """Whether the files are in formats that `train.formats` reads, row for row as `datasets` does."""
        special = [getattr(builder.config, name, None) for name in ("field", "filters")]
        if len(sources) < len(self._files(builder)) or any(value is not None for value in special):
            return False
        if not all(formats.has_rows(source.name) for source in sources):
            return False
        if not any(".json" in PurePosixPath(source.name).suffixes for source in sources):
            return True
        # What is called .json may be one array of records over many lines.
        try:
            next(formats.documents(sources[0], self._field, {}), None)
        except SourceUnavailable:
            raise
        except InputError:
            return False
        return True

    def _read_files(self, sources: "list[_HttpSource]", cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        first = formats.count(cursor, "file")
        cursor = {key: value for key, value in cursor.items() if key != "file"}
        for number, source in enumerate(sources[first:], start=first):
            for document, position in formats.documents(source, self._field, cursor):
                yield document, {"file": number, **position}
            cursor = {}

    def _read_rows(
        self, builder: Any, cursor: Cursor, patience: "_Patience"
    ) -> Iterator[tuple[bytes, Cursor]]:
        row = formats.count(cursor, "row")
        while True:
            try:
                dataset = builder.as_streaming_dataset(split=self._split)
                if dataset.column_names is not None:
                    self._check(dataset.column_names)
                    dataset = dataset.select_columns([self._field])
                for record in dataset.skip(row):
                    patience.answer()
                    document = self._text(record, row + 1)
                    row += 1
                    yield document, {"row": row}
                return
            except Exception as error:
                self._judge(error, patience, f" row {row + 1}")

    def _check(self, columns: Any) -> None:
        if self._field not in columns:
            names = ", ".join(map(repr, columns)) or "none"
            raise InputError(f"{self._label}: no column {self._field!r} (the columns are: {names})")

    def _text(self, record: dict[str, Any], row: int) -> bytes:
        self._check(record)
        value = record[self._field]
        try:
            if isinstance(value, bytes):
                value.decode()
                return value
            if value is None or isinstance(value, str):
                return (value or "").encode()
        except UnicodeError as error:
            raise InputError(f"{self._label} row {row}: column {self._field!r} is not UTF-8") from error
        raise InputError(
            f"{self._label} row {row}: column {self._field!r} is of type {type(value).__name__}"
            " (accepted: a string, or UTF-8 as binary)"
        )

    def _ask(self, action: Callable[[], Any], patience: "_Patience") -> Any:
        """The result of `action`, tried again where the network failed it."""
        while True:
            try:
                result = action()
                patience.answer()
                return result
            except Exception as error:
                self._judge(error, patience)

    def _judge(self, error: Exception, patience: "_Patience", place: str = "") -> None:
        """Waits if trying again may help, else raises `InputError`. The library may raise anything."""
        if isinstance(error, InputError):
            raise error
        if _is_passing(error):
            return patience.wait(error)
        from huggingface_hub import errors

        what = _one_line(error)
        if isinstance(error, errors.GatedRepoError):
            what = (
                "is open to those alone who asked for access on its page and logged in with `hf auth login`"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            what = "no such dataset on the Hub, or one that takes a login with `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            what = f"the dataset has no revision {self._revision!r}"
        raise InputError(f"{self._label}{place}: {what}") from error


@dataclass
class _Patience:
    """How often to try again, and how long to wait before."""

    label: str
    sleep: Sleep
    answered: bool = False
    failures: int = 0

    def answer(self) -> None:
        """The source sent something: the next failure is the first again."""
        self.answered = True
        self.failures = 0

    def wait(self, error: Exception, at_least: int = 0) -> None:
        """Waits after a failure; raises `SourceUnavailable` after the last. Says so once, on a terminal."""
        limit = RETRIES if self.answered else FIRST_RETRIES
        if self.failures == limit:
            raise SourceUnavailable(
                f"{self.label}: no answer after {limit} retries: {_one_line(error)}"
            ) from error
        if self.failures == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(f"{self.label}: {_one_line(error)}; trying again up to {limit} times", file=sys.stderr)
        seconds = max(1 << self.failures, min(at_least, LONGEST_WAIT))
        self.failures += 1
        self.sleep(seconds)


class _HttpSource:
    """A `formats.Source` behind a URL."""

    def __init__(self, url: str, flag: str, sleep: Sleep):
        self._sleep = sleep
        self.answered = False
        """Whether the source has once been there."""
        self.is_pinned = False
        """Whether the URL can only ever mean this one file."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None  # the error might quote a password
        if not host:
            shown = without_secrets(re.sub("//.*@", "//", url, flags=re.DOTALL))
            raise InputError(
                f"{flag}: {shown!r} is no URL (accepted: http://HOST/FILE or https://HOST/FILE; PORT: a number)"
            )
        address = f"[{host}]" if ":" in host else host
        address += f":{port}" if port is not None else ""
        self.shown = without_secrets(url)
        self.label = f"{flag}: {self.shown!r}"
        self.name = PurePosixPath(urllib.parse.unquote(parts.path)).name
        plain = urllib.parse.urlunsplit((parts.scheme, address, parts.path, parts.query, ""))
        # What a browser would do with a blank or an accent.
        self.url = urllib.parse.quote(plain, safe=":/?#[]@!$&'()*+,;=%~")
        self.headers = {"Accept-Encoding": "identity", "User-Agent": "intlm"}
        self.secret: str | None = None
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self.secret = "Basic " + base64.b64encode(pair.encode()).decode()

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(self.file(), formats.BUFFER)

    def file(self) -> "_HttpFile":
        """The same without a buffer."""
        return _HttpFile(self, _Patience(self.label, self._sleep, self.answered))

    def request(self, position: int) -> http.client.HTTPResponse:
        """The answer to a request for the file from `position` on."""
        request = urllib.request.Request(self.url, headers={**self.headers, "Range": f"bytes={position}-"})
        if self.secret:
            # Not to another host that the first one points to.
            request.add_unredirected_header("Authorization", self.secret)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response


class _HttpFile(io.RawIOBase):
    """The bytes of a file behind a URL: whatever breaks off is asked for again from the same byte on."""

    def __init__(self, source: _HttpSource, patience: _Patience):
        super().__init__()
        self._source = source
        self._patience = patience
        self._by_parts = formats.is_table(source.name)
        self._response: http.client.HTTPResponse | None = None
        self._received = 0
        """Where in the file the response stands."""
        self._position = 0
        self._jumps = False
        self._size: int | None = None
        self._version: dict[str, str] | None = None

    def facts(self) -> dict[str, int | str]:
        """What the server tells of the file, by which a change shows."""
        self._persist(self._connect)
        return {**({} if self._size is None else {"bytes": self._size}), **(self._version or {})}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            if self._size is None:
                self._persist(self._connect)
            if self._size is None:
                raise InputError(
                    f"{self._source.label}: the server does not tell its length; download it first"
                )
            offset += self._size
        self._position = max(0, offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = self._persist(lambda: self._receive(buffer))
        self._position += count
        return count

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _persist(self, action: Callable[[], int]) -> int:
        """The result of `action`, tried again where the network failed it."""
        while True:
            at_least = 0
            try:
                result = action()
                self._patience.answer()
                self._source.answered = True
                return result
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in (408, 425, 429) and error.code < 500:
                    raise InputError(f"{self._source.label}: {_one_line(error)}") from error
                asked = error.headers.get("Retry-After", "")
                at_least = int(asked) if re.fullmatch(r"[0-9]{1,9}", asked) else 0
                failure: Exception = error
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(reason, (ssl.SSLCertVerificationError, http.client.InvalidURL, UnicodeError)):
                    raise InputError(f"{self._source.label}: {_one_line(error)}") from error
                failure = error
            self._hang_up()
            self._patience.wait(failure, at_least)

    def _receive(self, buffer: Any) -> int:
        if self._size is not None and self._position >= self._size:
            return 0
        self._jumps = self._response is not None and not 0 <= self._position - self._received <= SHORT_SKIP
        if self._jumps:
            self._hang_up()
        if self._response is None and not self._connect():
            return 0
        assert self._response is not None
        while self._received < self._position:
            if not (skipped := self._response.read(min(SHORT_SKIP, self._position - self._received))):
                return self._end()
            self._received += len(skipped)
        count = self._response.readinto(buffer)
        self._received += count
        return count or self._end()

    def _end(self) -> int:
        """0 for the end of the file, where this is it."""
        if self._size is not None and self._received < self._size:
            raise ConnectionError(f"connection closed at byte {self._received} of {self._size}")
        return 0

    def _connect(self) -> int:
        """Asks for the file from the position on; 0 where that is its end. Notes what it is told of the file."""
        self._hang_up()
        try:
            response = self._source.request(self._position)
        except urllib.error.HTTPError as error:
            total = re.fullmatch(r"bytes \*/([0-9]+)", error.headers.get("Content-Range", ""))
            if error.code != 416 or (total and int(total[1]) < self._position):
                raise
            error.close()
            self._size = self._position
            return 0
        self._response = response
        begin, size = 0, response.headers.get("Content-Length")
        if response.status == 206:
            part = re.fullmatch(
                r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", "")
            )
            if not part or int(part[1]) > self._position:
                raise InputError(
                    f"{self._source.label}: the server sent another part of the file than asked for"
                )
            begin, size = int(part[1]), part[2].replace("*", "")
        elif self._by_parts and self._jumps:
            raise InputError(
                f"{self._source.label}: the server does not serve parts of a file (range requests), which"
                " Parquet and Arrow need; download it first"
            )
        version = {key: response.headers[key] for key in ("ETag", "Last-Modified") if response.headers[key]}
        version = {key.lower(): value for key, value in version.items()}
        length = int(size) if size and size.isdigit() else None
        if self._version is None:
            self._version, self._size = version, length
        elif not self._is_same(version, length):
            raise InputError(f"{self._source.label}: changed while it was read")
        self._received = begin
        return 1

    def _is_same(self, version: dict[str, str], size: int | None) -> bool:
        """Whether the file is still the one first seen: of its size, and its date or its tag are the same."""
        assert self._version is not None
        known = self._version.keys() & version.keys()
        return self._size == size and (
            self._source.is_pinned or not known or any(self._version[key] == version[key] for key in known)
        )

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _datasets() -> Any:
    """The library, quiet, and with the retries left to `_Patience`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    for name in ("READ_MAX_RETRIES", "OPEN_MAX_RETRIES"):
        setattr(datasets.config, f"STREAMING_{name}", 1)
    for name in ("READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY", "OPEN_RETRY"):
        setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0)
    return datasets


def _is_passing(error: BaseException) -> bool:
    """Whether an error of the Hub's libraries is the network's or the server's, and may pass."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError):
            code = cause.response.status_code if cause.response is not None else 0
            return code in (408, 425, 429) or code >= 500
        if isinstance(cause, (ConnectionError, TimeoutError, *CONNECTION_ERRORS_TO_RETRY)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _one_line(error: BaseException) -> str:
    """What went wrong, for people."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}".rstrip()
    if isinstance(reason, OSError) and reason.strerror:
        return str(reason.strerror)
    return " ".join(str(reason).split())[:300] or type(reason).__name__
