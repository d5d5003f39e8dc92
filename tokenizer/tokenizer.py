"""What every tokenizer offers, and how a saved one is read back."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from intlm.errors import InputError, unknown
from intlm.untrusted import parse_json, read_file
from tokenizer.bytes import ByteTokenizer
from tokenizer.pieces import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Turns the bytes of a document into token numbers 0 … vocabulary − 1, and back."""

    @property
    def name(self) -> str:
        """What people call it; shown in logs, and kept in a run's config.json."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, the separator included; at most 65,536."""
        ...

    @property
    def separator(self) -> int:
        """The token that opens each document; the model's recurrent state is reset there. It is 0."""
        ...

    @property
    def unknown(self) -> int:
        """The token of text that the tokenizer cannot spell; -1 where it can spell everything."""
        ...

    @property
    def loss(self) -> str:
        """Why `decode(encode(text))` need not be `text`, for people; empty where it always is."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: 1-D, uint8 where the vocabulary is at most 256, else uint16. No separator."""
        ...

    def encode_batch(self, documents: Sequence[bytes], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each document, as `encode` has them; the number of threads changes speed alone."""
        ...

    def encode_aligned(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `text` and, int32 [T], how many bytes of `text` stand behind each.

        These add up to all of `text`, also where it is normalised, if it has a token at all.
        """
        ...

    def decode(self, tokens: ArrayLike) -> bytes:
        """The bytes of 1-D integer `tokens`, a token at a time. `InputError` outside the vocabulary."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """How many bytes each token is decoded to: int32 [vocabulary]."""
        ...

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, and what else is needed, into `directory`, for `load_tokenizer`."""
        ...

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what the tokenizer does; kept in every checkpoint."""
        ...


# A kind of tokenizer is one line here: the "kind" in tokenizer.json, and what reads that kind's directory.
READERS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    "bytes": ByteTokenizer.load,
    "sentencepiece": SentencePieceTokenizer.load,
}


LARGEST_JSON = 1 << 16
"""Bytes of tokenizer.json."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `directory`.

    `InputError`, naming the file, where `tokenizer.json` is missing, damaged or of an unknown kind.
    """
    path = directory / "tokenizer.json"
    try:
        saved = parse_json(read_file(path, LARGEST_JSON))
    except OSError as error:
        raise InputError(f"{str(path)!r}: no tokenizer can be read here: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r}: damaged: {error}") from error
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{str(path)!r}: damaged: no 'kind' in it (accepted: {', '.join(READERS)})")
    if kind not in READERS:
        raise unknown(f"{str(path)!r}: kind", kind, READERS)
    return READERS[kind](directory, saved)


def open_tokenizer(name: str, flag: str = "--tokenizer") -> Tokenizer:
    """The tokenizer that a person's `name` stands for: `bytes`, a `.model` file, or a run's directory.

    Raises InputError, opening with `flag`, where there is none.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(name)
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    if path.is_dir():
        raise InputError(f"{flag} {name}: a directory without tokenizer.json {_ACCEPTED}")
    if not path.exists():
        raise InputError(f"{flag} {name}: no such file {_ACCEPTED}")
    return SentencePieceTokenizer.read(path, flag)


_ACCEPTED = "(accepted: 'bytes', a .model file of SentencePiece, or the directory of a run)"
