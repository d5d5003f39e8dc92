"""The tokenizer of SentencePiece: a token is a piece of text that a `.model` file lists."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from intlm.checkpoint import replace_file
from intlm.errors import InputError, shown
from tokenizer.bytes import checked_tokens
from tokenizer.model_file import (
    BYTE,
    CONTROL,
    MOST_PIECES,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ModelFile,
)

MODEL = "tokenizer.model"
FORMAT = 1
"""How text is cut and escaped before the library sees it; another way would give other tokens."""

BLOCK = 1 << 12
"""Bytes that the library is given at once where text can be cut at spaces."""
LONG_BLOCK = 1 << 20
GROUP = 1 << 23
"""Bytes that are encoded before their tokens are put together."""
LONGEST_UTF8 = 4

# What is no UTF-8, as Python's surrogateescape has it, and the character that the library takes for a space.
_ESCAPED = re.compile(f"([\udc80-\udcff{SPACE}]+)")


class SentencePieceTokenizer:
    """Encodes text with the pieces of a `.model` file.

    Token 0 is the separator: the file's own piece for the start of a text, such as `<s>`, or one more token
    where it has none. The other pieces follow in the file's order.

    A file with byte pieces and without normalisation loses nothing: any bytes survive the round trip, whether
    or not they are text. `loss` says why another file does not.
    """

    separator = 0

    def __init__(self, file: ModelFile, where: str = MODEL):
        """Raise InputError, opening with `where`, for a model that the library refuses or that is too large."""
        self.file = file
        keeps_all = file.byte_fallback and not file.normalization and not file.removes_spaces
        # Else a space is spelled in the bytes of U+2581, and cannot be told from that.
        spells_spaces = file.kind != "word" and any(
            piece.text == SPACE and piece.type in (NORMAL, USER_DEFINED) for piece in file.pieces
        )
        self._lacks_space = keeps_all and not spells_spaces
        exact = keeps_all and spells_spaces
        # A prefix of our own making is put once, however many blocks a document is cut into; and one that
        # comes last would stand between a prompt and what is sampled.
        ours = file.dummy_prefix and (exact or file.space_is_suffix)
        self._exact = exact
        self._prefix = b" " if ours and not file.space_is_suffix else b""
        self._processor = _processor(file.without_dummy_prefix() if ours else file.content, where)
        separator = _separator(file)
        added = separator is None
        order = [] if separator is None else [separator]
        order += [number for number in range(len(file.pieces)) if number != separator]
        self.vocabulary = len(order) + added
        if self.vocabulary > MOST_PIECES:
            raise InputError(
                f"{where}: {self.vocabulary:,} tokens with the separator (accepted: up to {MOST_PIECES:,})"
            )
        self._dtype = np.uint8 if self.vocabulary <= 256 else np.uint16
        self._token_of_id = np.empty(len(file.pieces), self._dtype)
        self._token_of_id[order] = np.arange(added, self.vocabulary)
        texts = [piece.bytes for piece in file.pieces]
        self.unknown = -1
        self._token_of_byte = np.zeros(256, self._dtype)
        for number, piece in enumerate(file.pieces):
            token = int(self._token_of_id[number])
            if piece.type == UNKNOWN:
                self.unknown = -1 if file.byte_fallback else token
                texts[number] = file.unknown_surface.encode()
            elif piece.type == BYTE:
                self._token_of_byte[piece.bytes[0]] = token
        self.pieces = ([("<separator>", CONTROL)] if added else []) + [
            (file.pieces[number].text, file.pieces[number].type) for number in order
        ]
        """Text and type of each token, as in the file."""
        self.texts = ([b""] if added else []) + [texts[number] for number in order]
        """The bytes that each token is decoded to."""
        spaces_inside = re.compile(f"[^{SPACE}]{SPACE}| ")
        self._cuts_at_spaces = (
            # A space that is taken off a block's front has to be put back.
            file.dummy_prefix == file.removes_spaces or exact
        ) and not any(spaces_inside.search(piece.text) for piece in file.pieces if piece.type != CONTROL)
        self._block = BLOCK if self._cuts_at_spaces else LONG_BLOCK

    @classmethod
    def read(cls, path: Path, flag: str = "") -> "SentencePieceTokenizer":
        """The tokenizer of a `.model` file. Raises InputError, naming `flag` and the file."""
        return cls(ModelFile.read(path, flag), f"{flag} {path}".strip())

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "SentencePieceTokenizer":
        """The tokenizer that `save` wrote into `directory`; `saved` is what its tokenizer.json holds."""
        path = directory / MODEL
        if type(saved.get("format")) is not int or saved["format"] != FORMAT:
            raise InputError(
                f"{directory / 'tokenizer.json'}: format {shown(saved.get('format'))} (accepted: {FORMAT})"
            )
        file = ModelFile.read(path)
        if saved.get("sha256") != hashlib.sha256(file.content).hexdigest():
            raise InputError(f"{path}: damaged, or another file: its SHA-256 is not that of tokenizer.json")
        return cls(file, str(path))

    @property
    def name(self) -> str:
        """Kind, vocabulary, and the start of the file's SHA-256: what config.json holds."""
        digest = hashlib.sha256(self.file.content).hexdigest()
        return f"sentencepiece {self.file.kind} {self.vocabulary} {digest[:16]}"

    @property
    def loss(self) -> str:
        """Why text does not survive the round trip; empty where it does."""
        file = self.file
        reasons = {
            f"it normalises text ({file.normalization})": bool(file.normalization),
            "it drops spaces that are repeated or stand at the end": file.removes_spaces,
            "it puts a space before each document": file.dummy_prefix and not file.space_is_suffix,
            "it has no byte pieces for what its vocabulary lacks": not file.byte_fallback,
            "it has no piece for a space": self._lacks_space,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`, uint8 or uint16 [T], without a separator."""
        return self.encode_batch([text])[0]

    def encode_batch(self, documents: Sequence[bytes], threads: int = 1) -> list[np.ndarray]:
        """The tokens of each document, as `encode` has them; the number of threads changes speed alone."""
        made: list[list[np.ndarray]] = [[np.empty(0, self._dtype)] for _ in documents]
        for group in _grouped(self._parts(documents)):
            blocks = [block for _, block, escaped in group if not escaped]
            found = iter(self._processor.Encode(blocks, return_type="numpy", num_threads=threads))
            for owner, block, escaped in group:
                if escaped:
                    tokens = self._token_of_byte[np.frombuffer(block, np.uint8)]
                else:
                    tokens = self._token_of_id[next(found)]
                made[owner].append(tokens)
        return [np.concatenate(pieces) for pieces in made]

    def encode_aligned(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `text` and, int32 [T], how many bytes of `text` each stands for.

        All bytes are counted, those too that normalisation drops; only where no token is left, none is.
        """
        tokens_T = self.encode(text)
        if self._exact:
            lengths_T = self.byte_lengths()[tokens_T]
            lengths_T[: len(self._prefix)] -= 1
            return tokens_T, lengths_T
        ends: list[int] = []
        start = 0
        for _, block, _ in self._parts([text]):
            aligned = self._processor.Encode(block, return_type="offset_mapping")
            ends += [start + end for _, end in aligned["offsets"]]
            start += len(block)
        ends[-1:] = [len(text)] if ends else []
        return tokens_T, np.diff(np.array(ends, np.int32), prepend=np.int32(0))

    def decode(self, tokens: ArrayLike) -> bytes:
        """The bytes of the 1-D integers `tokens`; none for the separator. `InputError` for other tokens."""
        return b"".join(map(self.texts.__getitem__, checked_tokens(tokens, self.vocabulary).tolist()))

    def byte_lengths(self) -> np.ndarray:
        """How many bytes each token is decoded to: int32 [vocabulary]; 0 for separators and control pieces."""
        return np.array([len(text) for text in self.texts], np.int32)

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer.model` into `directory`, which is made if it is not there."""
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / MODEL, [self.file.content])
        replace_file(directory / "tokenizer.json", [self._saved])

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the saved tokenizer.json, which holds that of the model."""
        return hashlib.sha256(self._saved).hexdigest()

    @property
    def _saved(self) -> bytes:
        sha256 = hashlib.sha256(self.file.content).hexdigest()
        return json.dumps({"kind": "sentencepiece", "format": FORMAT, "sha256": sha256}).encode() + b"\n"

    def _parts(self, documents: Sequence[bytes]) -> Iterator[tuple[int, bytes, bool]]:
        """Every document in parts: its number, bytes, and whether these are to be spelled in byte pieces."""
        for number, document in enumerate(documents):
            if self._prefix and document:
                document = self._prefix + document
            for block in cut(document, self._block, self._cuts_at_spaces):
                if self._exact:
                    for part, escaped in escape(block, _ESCAPED):
                        yield number, part, escaped
                else:
                    yield number, block, False


def cut(text: bytes, size: int, at_spaces: bool = False) -> Iterator[bytes]:
    """Blocks of at most `size` bytes (4 or more) that join to `text`, one after another.

    Each ends before the last spaces that fit, where `at_spaces`; else at the last line end; else between two
    UTF-8 characters.
    """
    start = 0
    while len(text) - start > size:
        limit = start + size
        end = start
        if at_spaces and (space := text.rfind(b" ", start, limit)) > start:
            end = start + len(text[start:space].rstrip(b" "))
        if end == start:
            end = text.rfind(b"\n", start, limit) + 1
        if end <= start:
            end = limit
            while end > limit - LONGEST_UTF8 and text[end] & 0xC0 == 0x80:
                end -= 1
            end = end if text[end] & 0xC0 != 0x80 else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def escape(block: bytes, escaped: re.Pattern[str]) -> Iterator[tuple[bytes, bool]]:
    """`block` in parts, with whether each matches `escaped`, in which U+DC80 to U+DCFF are bytes of no text."""
    try:
        text = block.decode()
    except UnicodeDecodeError:
        text = block.decode(errors="surrogateescape")
    parts = escaped.split(text)
    if len(parts) == 1:
        if block:
            yield block, False
        return
    for number, part in enumerate(parts):
        if part:
            yield part.encode(errors="surrogateescape"), bool(number % 2)


def _grouped(parts: Iterable[tuple[int, bytes, bool]]) -> Iterator[list[tuple[int, bytes, bool]]]:
    """The parts in lists of about `GROUP` bytes."""
    group: list[tuple[int, bytes, bool]] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part[1])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _separator(file: ModelFile) -> int | None:
    """The file's number of the piece to open a document with: that for the start of a text, or another control.

    None where there is no such piece. One of a single character could be taken for the character itself.
    """
    usable = [
        number for number, piece in enumerate(file.pieces) if piece.type == CONTROL and len(piece.text) > 1
    ]
    named = [number for number in usable if file.pieces[number].text == file.bos]
    return next(iter(named + usable), None)


def _processor(content: bytes, where: str) -> Any:
    """The library's processor of a model. Raises InputError where it refuses the model."""
    import sentencepiece

    sentencepiece.SetMinLogLevel(3)  # it tells its errors twice
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError) as error:
        # The message quotes the file, which need not be text.
        said = "" if isinstance(error, ValueError) else f" ({' '.join(str(error).split())[:200]})"
        raise InputError(f"{where}: damaged, or no SentencePiece model{said}") from error
    return processor
