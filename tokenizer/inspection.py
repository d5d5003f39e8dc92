"""The inspection of a tokenizer: what it is, and what it makes of a text."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from intlm.errors import InputError
from tokenizer.model_file import BYTE, CONTROL
from tokenizer.pieces import SentencePieceTokenizer
from tokenizer.tokenizer import Tokenizer

SHOWN = 20
BATCH = 1 << 23
"""Bytes of text that are encoded at once."""


@dataclass(frozen=True)
class TextFigures:
    """What a tokenizer makes of a text. Shares are from 0 to 1."""

    documents: int
    bytes: int
    tokens: int
    """Without separators."""
    bytes_per_token: float
    vocabulary_used: float
    """Share of the tokens, but for the separator and other control pieces, that occur."""
    bytes_spelled: float
    """Share of the bytes that are spelled one by one, in byte pieces."""
    unknown_tokens: int
    most_frequent: list[tuple[str, int]]


@dataclass(frozen=True)
class Inspection:
    """What a tokenizer is."""

    name: str
    kind: str
    vocabulary: int
    separator: str
    normalization: str
    byte_fallback: bool
    lossless: bool
    loss: str
    digest: str
    longest: list[str]
    text: TextFigures | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def table(self) -> str:
        """For a terminal."""
        rows = [
            ("tokenizer", self.name),
            ("kind", self.kind),
            ("vocabulary", f"{self.vocabulary:,}"),
            ("separator (token 0)", self.separator),
            ("normalisation", self.normalization or "none"),
            ("byte pieces", "yes" if self.byte_fallback else "no"),
            ("lossless", "yes" if self.lossless else f"no: {self.loss}"),
            ("digest", self.digest),
        ]
        if self.longest:
            rows.append(("longest pieces", "  ".join(self.longest)))
        if text := self.text:
            rows += [
                ("text", f"{text.bytes:,} bytes in {text.documents:,} documents"),
                ("tokens", f"{text.tokens:,}, {text.bytes_per_token:.3f} bytes each"),
                ("vocabulary used", f"{text.vocabulary_used:.2%}"),
                ("bytes spelled one by one", f"{text.bytes_spelled:.3%}"),
                ("unknown tokens", f"{text.unknown_tokens:,}"),
                ("most frequent", "  ".join(f"{piece} {count:,}" for piece, count in text.most_frequent)),
            ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:{width}s}  {value}" for label, value in rows)


def inspect(tokenizer: Tokenizer, documents: Iterable[bytes] | None = None, threads: int = 0) -> Inspection:
    """Look at a tokenizer and, where there are `documents`, at how it encodes them; 0 threads are one a core.

    Raises InputError where the documents have no bytes.
    """
    file = tokenizer.file if isinstance(tokenizer, SentencePieceTokenizer) else None
    order = sorted(range(tokenizer.vocabulary), key=lambda token: (-len(tokenizer.decode([token])), token))
    return Inspection(
        name=tokenizer.name,
        kind=file.kind if file else tokenizer.name,
        vocabulary=tokenizer.vocabulary,
        separator=shown(tokenizer, tokenizer.separator),
        normalization=file.normalization if file else "",
        byte_fallback=file.byte_fallback if file else True,
        lossless=not tokenizer.loss,
        loss=tokenizer.loss,
        digest=tokenizer.digest,
        longest=[shown(tokenizer, token) for token in order[:SHOWN]] if file else [],
        text=None if documents is None else _figures(tokenizer, documents, threads or os.cpu_count() or 1),
    )


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as people can read it: U+2581 for a space, and escapes for what a terminal cannot show."""
    piece = (
        tokenizer.pieces[token][0] if isinstance(tokenizer, SentencePieceTokenizer) else f"<0x{token:02X}>"
    )
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in piece)


def _figures(tokenizer: Tokenizer, documents: Iterable[bytes], threads: int) -> TextFigures:
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    number = size = 0
    for batch in _batches(documents):
        number += len(batch)
        size += sum(map(len, batch))
        for tokens in tokenizer.encode_batch(batch, threads):
            counts += np.bincount(tokens, minlength=tokenizer.vocabulary)
    if not size:
        raise InputError("--data: is empty (accepted: at least one byte of text)")
    types = (
        np.array([type_ for _, type_ in tokenizer.pieces])
        if isinstance(tokenizer, SentencePieceTokenizer)
        else np.full(tokenizer.vocabulary, BYTE)
    )
    ordinary = (types != CONTROL) & (np.arange(tokenizer.vocabulary) != tokenizer.separator)
    total = int(counts.sum())
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    return TextFigures(
        documents=number,
        bytes=size,
        tokens=total,
        bytes_per_token=size / max(1, total),
        vocabulary_used=float((counts[ordinary] > 0).mean()),
        bytes_spelled=float(counts[types == BYTE].sum() / size),
        unknown_tokens=int(counts[tokenizer.unknown]) if tokenizer.unknown >= 0 else 0,
        most_frequent=[
            (shown(tokenizer, int(token)), int(counts[token])) for token in order if counts[token]
        ],
    )


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
