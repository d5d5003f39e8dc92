"""What every tokenizer offers, and how a saved one is read back."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from intlm.errors import InputError, unknown
from tokenizer.bytes import ByteTokenizer


class Tokenizer(Protocol):
    """Turns the bytes of a document into token numbers 0 … vocabulary − 1, and back without loss."""

    name: str
    """What people call it; shown in logs."""

    vocabulary: int
    """How many tokens there are, the separator included; at most 65,536."""

    separator: int
    """The token that opens each document; the model's recurrent state is reset there."""

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: 1-D, uint8 where the vocabulary is at most 256, else uint16. No separator."""
        ...

    def decode(self, tokens: ArrayLike) -> bytes:
        """The bytes of 1-D integer `tokens`. `InputError` for a token outside the vocabulary."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of raw text each token stands for: int32 [vocabulary]."""
        ...

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, and what else is needed, into `directory`, for `load_tokenizer`."""
        ...

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what the tokenizer does; kept in every checkpoint."""
        ...


# A kind of tokenizer is one line here: the "kind" in tokenizer.json, and what reads that kind's directory.
READERS = {"bytes": ByteTokenizer.load}


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `directory`.

    `InputError`, naming the file, where `tokenizer.json` is missing, damaged or of an unknown kind.
    """
    path = directory / "tokenizer.json"
    try:
        saved = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{str(path)!r}: no tokenizer can be read here: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r}: damaged: not JSON") from error
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{str(path)!r}: damaged: no 'kind' in it (accepted: {', '.join(READERS)})")
    if kind not in READERS:
        raise unknown(f"{str(path)!r}: kind", kind, READERS)
    return READERS[kind](directory)
