"""Where text comes from.

A document is `bytes`. A corpus yields documents in a fixed order, from any of them on. `train.split` holds some
of them out, `train.stream` orders the rest, and `train.lanes` turns them into the tokens of a step.
"""

import difflib
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from intlm.errors import InputError

JSON_LINES_ENDINGS = (".json", ".jsonl", ".ndjson")
# A lone .json found in a directory is more often a configuration than text, so it has to be named.
DIRECTORY_ENDINGS = (".jsonl", ".md", ".ndjson", ".py", ".rst", ".text", ".txt")
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
)
LONGEST_UTF8 = 4


Cursor = dict[str, int | str]
"""Where a reader of a corpus stands, exactly: small, flat, and fit for JSON. `{}` is the start."""

Fingerprint = dict[str, Any]
"""What a corpus is read from, fit for JSON; equal fingerprints mean equal documents."""


class SourceUnavailable(InputError):
    """A source that was there no longer answers, after every retry: what was trained so far is worth saving."""


class Corpus(Protocol):
    """Documents in a fixed order, to be read from any of them on."""

    name: str
    """The corpus as the user wrote it."""

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """Documents that are not empty, in a fixed order, from `cursor` on; each with the cursor behind it.

        `read(c)` for a `c` that was yielded goes on with exactly the next document. A document's memory is
        the reader's own; a corpus of any size takes no more than a bounded amount beside it. `InputError` for
        unusable text, and where a reader that started at `{}` finds none; `SourceUnavailable` where the
        source stopped answering.
        """
        ...

    def fingerprint(self) -> Fingerprint:
        """What tells at resume, cheaply, whether the corpus has changed. `InputError` as in `read`."""
        ...

    def documents(self) -> Iterator[bytes]:
        """All of `read({})`, without the cursors."""
        return (document for document, _ in self.read({}))


class _Counted(Corpus):
    """A stop-gap: a cursor that counts documents."""

    def _all(self) -> Iterator[bytes]:
        raise NotImplementedError

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        skipped = int(cursor.get("document", 0))
        for number, document in enumerate(self._all(), start=1):
            if number > skipped:
                yield document, {"document": number}

    def fingerprint(self) -> Fingerprint:
        return {"sha256": digest(self._all())}


class StdlibCorpus(_Counted):
    """The source of the running interpreter's standard library without its tests: one file, one document."""

    name = "stdlib"

    def _all(self) -> Iterator[bytes]:
        """Each `.py` file, by path. `InputError` where this Python came without its source."""
        root = Path(sysconfig.get_path("stdlib"))
        flag = "stdlib"
        paths = _files_below(root, (".py",), STDLIB_LEFT_OUT, flag)
        if not paths:
            raise InputError(f"stdlib: Python has no library source in {str(root)!r}; name a file instead")
        for path in paths:
            if document := _read(path, flag):
                yield document


class FilesCorpus(_Counted):
    """Text files and JSON-lines files: one path, a directory with all below it, or a glob.

    A file ending in .json, .jsonl or .ndjson has one JSON object a line, each a document, whose text is in
    the field `text_field`; blank lines are skipped. Any other file is one document, whatever bytes are in it.
    In a directory only the endings in `DIRECTORY_ENDINGS` are looked for, and names that start with a dot are
    passed over. Documents come by path.
    """

    def __init__(self, name: str, text_field: str = "text", flag: str = "--data"):
        """Find the files; `flag` is what messages call this input. `InputError` where there are none."""
        self.name = name
        self._text_field = text_field
        self._flag = flag
        self._paths = self._find()

    def _all(self) -> Iterator[bytes]:
        """Every document that is not empty. `InputError` for an unusable file or line, or for no text."""
        empty = True
        for path in self._paths:
            is_json_lines = path.suffix.lower() in JSON_LINES_ENDINGS
            for document in self._json_lines(path) if is_json_lines else [_read(path, self._flag)]:
                if document:
                    empty = False
                    yield document
        if empty:
            raise InputError(f"{self._flag}: {self.name!r} is empty (accepted: at least one byte of text)")

    def _find(self) -> list[Path]:
        path = Path(self.name)
        try:
            if not self.name:
                raise InputError(f"{self._flag}: the name is empty (accepted: {_ACCEPTED})")
            if path.is_file():
                return [path]
            if path.is_dir():
                return self._find_in_directory(path)
            if path.exists():
                raise InputError(f"{self._flag}: {self.name!r} is neither a file nor a directory")
        except OSError as error:
            raise _unreadable(self._flag, path, error) from error
        if any(character in self.name for character in "*?["):
            # Not Path.glob, which takes no absolute pattern.
            matches = map(Path, glob.iglob(self.name, recursive=True))  # noqa: PTH207
            if paths := sorted({match for match in matches if match.is_file()}):
                return paths
            raise InputError(f"{self._flag}: no file matches {self.name!r}")
        near = difflib.get_close_matches(self.name.lower(), ["stdlib"])
        hint = "; did you mean 'stdlib'?" if near else ""
        raise InputError(f"{self._flag}: {self.name!r} does not exist{hint} (accepted: {_ACCEPTED})")

    def _find_in_directory(self, root: Path) -> list[Path]:
        paths = _files_below(root, DIRECTORY_ENDINGS, frozenset(), self._flag)
        if not paths:
            endings = " ".join(DIRECTORY_ENDINGS)
            raise InputError(f"{self._flag}: no text in directory {self.name!r} (looked for {endings})")
        return paths

    def _json_lines(self, path: Path) -> Iterator[bytes]:
        field = self._text_field
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{self._flag}: {str(path)!r} line {number}"
                        yield _text_of_json(line, field, where)
        except OSError as error:
            raise _unreadable(self._flag, path, error) from error


def open_corpus(name: str, text_field: str = "text", flag: str = "--data") -> Corpus:
    """The corpus that a user's `name` stands for.

    `stdlib` is the standard library (`./stdlib` a file of that name); all else is a file, a directory or a
    glob, see `FilesCorpus`. `InputError`, starting with `flag`, where there is no such thing; what is wrong
    inside the files shows when the documents are read.
    """
    if name == StdlibCorpus.name:
        return StdlibCorpus()
    return FilesCorpus(name, text_field, flag)


def cut(document: bytes, size: int) -> list[bytes]:
    """Blocks of at most `size` bytes (4 or more) that join to `document`.

    Each ends at the last line end that fits; in a line too long for that, between two UTF-8 characters.
    """
    blocks = []
    start = 0
    while len(document) - start > size:
        end = document.rfind(b"\n", start, start + size) + 1
        if end == 0:
            end = _character_start(document, start + size)
        blocks.append(document[start:end])
        start = end
    if start < len(document):
        blocks.append(document[start:])
    return blocks


def digest(documents: Iterable[bytes]) -> str:
    """Hex SHA-256 of the documents in their order: tells at resume whether the corpus has changed."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(_hash(document))
    return whole.hexdigest()


_ACCEPTED = "'stdlib', or a file, a directory or a glob of text or JSON lines"


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _character_start(document: bytes, position: int) -> int:
    """The nearest start of a UTF-8 character at or before `position`; `position` where there is none."""
    for start in range(position, position - LONGEST_UTF8, -1):
        if document[start] & 0xC0 != 0x80:
            return start
    return position


def _files_below(root: Path, endings: tuple[str, ...], left_out: Collection[str], flag: str) -> list[Path]:
    """Files below `root` with one of the endings, by relative path; hidden and left-out names are pruned."""

    def stop(error: OSError) -> None:
        raise _unreadable(flag, Path(error.filename), error)

    paths = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        paths += [Path(folder, name) for name in files if not name.startswith(".")]
    wanted = [path for path in paths if path.suffix.lower() in endings and path.is_file()]
    return sorted(wanted, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(flag, path, error) from error


def _unreadable(flag: str, path: Path, error: OSError) -> InputError:
    return InputError(f"{flag}: cannot read {str(path)!r}: {error.strerror}")


def _text_of_json(line: bytes, field: str, where: str) -> bytes:
    """The bytes of the text field of one JSON line; `where` opens the message of an `InputError`."""
    try:
        # utf-8-sig: some editors open a file with a byte-order mark.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON (accepted: one JSON object a line)") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: of type {type(record).__name__} (accepted: one JSON object a line)")
    if field not in record:
        names = ", ".join(map(repr, record))
        raise InputError(f"{where}: no field {field!r} (the fields are: {names or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} is of type {type(text).__name__} (accepted: a string)")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {field!r} has half a surrogate pair, which is not UTF-8") from error
