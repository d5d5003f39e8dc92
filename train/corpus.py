"""Where text comes from.

A document is `bytes`. A corpus yields documents in a fixed order, from any of them on. `train.split` holds some
of them out, `train.stream` orders the rest, and `train.lanes` turns them into the tokens of a step.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from intlm.errors import InputError

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
    """The corpus as the user wrote it; of a URL, without secrets."""

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


def open_corpus(name: str, text_field: str = "text", flag: str = "--data") -> Corpus:
    """The corpus that a user's `name` stands for.

    `stdlib` is the standard library (`./stdlib` a file of that name), see `train.files.StdlibCorpus`;
    `hf:NAME…` a dataset of the Hugging Face Hub and `http://…` or `https://…` a file, see `train.remote`; all
    else is a file, a directory or a glob, see `train.files.FilesCorpus`. `InputError`, starting with `flag`,
    where there is no such thing; what is wrong inside the files, or far away, shows when documents are read.
    """
    # Not above: these import this module.
    from train import files, remote

    if name == files.StdlibCorpus.name:
        return files.StdlibCorpus()
    if name.startswith("hf:"):
        return remote.HubCorpus(name, text_field, flag)
    if name.lower().startswith(("http://", "https://")):
        return remote.HttpCorpus(name, text_field, flag)
    return files.FilesCorpus(name, text_field, flag)


def without_secrets(name: str) -> str:
    """A corpus' name that may be shown and kept: of a URL, no user, no password, no query and no fragment."""
    if not name.lower().startswith(("http://", "https://")):
        return name
    plain = name.partition("#")[0].partition("?")[0]
    scheme, slashes, rest = plain.partition("//")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"


def numbered(names: Iterable[str]) -> list[str]:
    """The names, those that came before with a number behind: URLs may differ in their query alone."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = number = seen.get(name, 0) + 1
        found.append(name if number == 1 else f"{name} ({number})")
    return found


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


def _character_start(document: bytes, position: int) -> int:
    """The nearest start of a UTF-8 character at or before `position`; `position` where there is none."""
    for start in range(position, position - LONGEST_UTF8, -1):
        if document[start] & 0xC0 != 0x80:
            return start
    return position
