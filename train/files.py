"""Corpora on this machine: files, directories, globs, and the standard library."""

import difflib
import glob
import hashlib
import io
import os
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from intlm.errors import InputError
from train import formats
from train.corpus import Corpus, Cursor, Fingerprint

# A lone .json found in a directory is more often a configuration than text, so it has to be named.
DIRECTORY_ENDINGS = (
    *(".arrow", ".feather", ".jsonl", ".md", ".ndjson", ".parquet", ".py", ".rst", ".text", ".txt"),
    *(".json.gz", ".json.xz", ".json.zst"),
)
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
)
HASHED = 64 << 20
"""Bytes in a file up to which its content is in the fingerprint, not its modification time."""
ACCEPTED = (
    "'stdlib', or a file, a directory or a glob of text, JSON lines, Parquet or Arrow, or a URL, or hf:NAME"
)


class FilesCorpus(Corpus):
    """Files by path: one of them, a directory with all below it, or a glob; for formats see `train.formats`.

    In a directory only the endings in `DIRECTORY_ENDINGS` are looked for, those of text and JSON lines also
    with a compression's on top, and names that start with a dot are passed over. A cursor is the number of
    the file and the cursor in it.
    """

    def __init__(self, name: str, text_field: str = "text", flag: str = "--data"):
        """Find the files; `flag` is what messages call this input. `InputError` where there are none."""
        self.name = name
        self._text_field = text_field
        self._flag = flag
        self._root, self._paths = self._find()

    def read(self, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """See `Corpus.read`. `InputError` for an unusable file, line or row, and for no text at all."""
        empty = not cursor
        within = {key: value for key, value in cursor.items() if key != "file"}
        first = formats.count(cursor, "file")
        if first >= len(self._paths):
            raise InputError(f"{self._flag}: {self.name!r} has no file {first + 1} any more: it has changed")
        for number, path in enumerate(self._paths[first:], start=first):
            for document, position in _File(path, self._flag).documents(self._text_field, within):
                if document:
                    empty = False
                    yield document, {"file": number, **position}
            within = {}
        if empty:
            raise InputError(f"{self._flag}: {self.name!r} is empty (accepted: at least one byte of text)")

    def fingerprint(self) -> Fingerprint:
        """Of each file its relative path, its size, and the SHA-256 of its content or, above `HASHED`, its
        modification time in ns.
        """
        return {
            "files": {
                path.relative_to(self._root).as_posix(): _File(path, self._flag).fingerprint()
                for path in self._paths
            }
        }

    def _find(self) -> tuple[Path, list[Path]]:
        """The files, and the directory that the fingerprint names them from."""
        path = Path(self.name)
        try:
            if not self.name:
                raise InputError(f"{self._flag}: the name is empty (accepted: {ACCEPTED})")
            if path.is_file():
                return path.parent, [path]
            if path.is_dir():
                return path, self._find_in_directory(path)
            if path.exists():
                raise InputError(f"{self._flag}: {self.name!r} is neither a file nor a directory")
        except OSError as error:
            raise _unreadable(self._flag, path, error) from error
        if any(character in self.name for character in "*?["):
            # Not Path.glob, which takes no absolute pattern.
            matches = map(Path, glob.iglob(self.name, recursive=True))  # noqa: PTH207
            if paths := sorted({match for match in matches if match.is_file()}):
                return Path(os.path.commonpath([path.parent for path in paths])), paths
            raise InputError(f"{self._flag}: no file matches {self.name!r}")
        near = difflib.get_close_matches(self.name.lower(), ["stdlib"])
        hint = "; did you mean 'stdlib'?" if near else ""
        raise InputError(f"{self._flag}: {self.name!r} does not exist{hint} (accepted: {ACCEPTED})")

    def _find_in_directory(self, root: Path) -> list[Path]:
        packed = [
            ending + compression
            for ending in DIRECTORY_ENDINGS
            if ending not in formats.PARQUET_ENDINGS + formats.ARROW_ENDINGS
            for compression in formats.COMPRESSED_ENDINGS
        ]
        paths = _files_below(root, (*DIRECTORY_ENDINGS, *packed), frozenset(), self._flag)
        if not paths:
            endings = " ".join(sorted(DIRECTORY_ENDINGS))
            raise InputError(
                f"{self._flag}: no text in directory {self.name!r} (looked for {endings}, with"
                f" {' '.join(formats.COMPRESSED_ENDINGS)} on top too)"
            )
        return paths


class StdlibCorpus(FilesCorpus):
    """The source of the running interpreter's standard library without its tests: one file, one document."""

    name = "stdlib"

    def __init__(self) -> None:
        """Find the files. `InputError` where this Python came without its source."""
        super().__init__(self.name, flag=self.name)

    def _find(self) -> tuple[Path, list[Path]]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = _files_below(root, (".py",), STDLIB_LEFT_OUT, self.name)
        if not paths:
            raise InputError(f"stdlib: Python has no library source in {str(root)!r}; name a file instead")
        return root, paths


@dataclass(frozen=True)
class _File:
    """A `formats.Source`."""

    path: Path
    flag: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def label(self) -> str:
        return f"{self.flag}: {str(self.path)!r}"

    def open(self) -> io.BufferedReader:
        try:
            return io.BufferedReader(io.FileIO(str(self.path)), formats.BUFFER)
        except OSError as error:
            raise _unreadable(self.flag, self.path, error) from error

    def documents(self, text_field: str, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
        """As `formats.documents`. `InputError` also where the file changes before the last one is read."""
        before = self._state()
        try:
            yield from formats.documents(self, text_field, cursor)
        except InputError as error:
            if self._state() != before:
                raise InputError(f"{self.label}: changed while it was read") from error
            raise
        if self._state() != before:
            raise InputError(f"{self.label}: changed while it was read")

    def fingerprint(self) -> dict[str, int | str]:
        size, modified = self._state()
        if size > HASHED:
            return {"bytes": size, "modified_ns": modified}
        try:
            with self.path.open("rb") as content:
                return {"bytes": size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
        except OSError as error:
            raise _unreadable(self.flag, self.path, error) from error

    def _state(self) -> tuple[int, int]:
        """Size and modification time in ns."""
        try:
            state = self.path.stat()
        except OSError as error:
            raise _unreadable(self.flag, self.path, error) from error
        return state.st_size, state.st_mtime_ns


def _files_below(root: Path, endings: tuple[str, ...], left_out: Collection[str], flag: str) -> list[Path]:
    """Files below `root` with one of the endings, by relative path; hidden and left-out names are pruned."""

    def stop(error: OSError) -> None:
        raise _unreadable(flag, Path(error.filename), error)

    paths = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        paths += [Path(folder, name) for name in files if not name.startswith(".")]
    wanted = [path for path in paths if path.name.lower().endswith(endings) and path.is_file()]
    return sorted(wanted, key=lambda path: path.relative_to(root).as_posix())


def _unreadable(flag: str, path: Path, error: OSError) -> InputError:
    return InputError(f"{flag}: cannot read {str(path)!r}: {error.strerror}")
