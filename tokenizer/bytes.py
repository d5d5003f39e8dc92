"""The tokenizer that needs no training: a token is a byte."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from intlm.checkpoint import replace_file
from intlm.errors import InputError

SAVED = b'{"kind": "bytes"}\n'


class ByteTokenizer:
    """256 tokens, one for each byte value.

    Byte 0 doubles as the separator, so that the vocabulary stays at 256. Any bytes survive the round trip,
    zeros too; but a zero inside a document looks to the model like the start of a document. Text has none.
    """

    name = "bytes"
    vocabulary = 256
    separator = 0
    unknown = -1
    loss = ""

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "ByteTokenizer":
        """The byte tokenizer; it is the same everywhere, so nothing in `directory` is read."""
        return cls()

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes of `text` as uint8 [len(text)], without a separator."""
        return np.frombuffer(text, np.uint8).copy()

    def encode_batch(self, documents: Sequence[bytes], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each document, as `encode` has them."""
        return [self.encode(document) for document in documents]

    def encode_aligned(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `text` and, int32 [len(text)], the bytes that each stands for: 1."""
        return self.encode(text), np.ones(len(text), np.int32)

    def decode(self, tokens: ArrayLike) -> bytes:
        """The bytes of the 1-D integers `tokens`. `InputError` for anything else, or outside 0 … 255."""
        return checked_tokens(tokens, self.vocabulary).astype(np.uint8).tobytes()

    def byte_lengths(self) -> np.ndarray:
        """How many bytes each token stands for: int32 [256], all 1."""
        return np.ones(self.vocabulary, np.int32)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into `directory`, which is made if it is not there. May raise `OSError`."""
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "tokenizer.json", [SAVED])

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the saved file."""
        return hashlib.sha256(SAVED).hexdigest()


def checked_tokens(tokens: ArrayLike, vocabulary: int) -> np.ndarray:
    """`tokens` as an array of integers [T]. `InputError` for anything else, or outside the vocabulary."""
    tokens_T = np.asarray(tokens)
    if tokens_T.shape == (0,):
        return tokens_T.astype(np.int64)
    if tokens_T.ndim != 1 or tokens_T.dtype.kind not in "iu":
        found = f"{tokens_T.dtype} of shape {tokens_T.shape}"
        raise InputError(f"tokens: {found} (accepted: a 1-D array of integers)")
    low, high = int(tokens_T.min()), int(tokens_T.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"tokens: {low if low < 0 else high} (accepted: 0 to {vocabulary - 1})")
    return tokens_T
