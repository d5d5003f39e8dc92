"""The `.model` file of SentencePiece: what it says about itself, read without trusting it.

The format is Protocol Buffers' wire format: fields, each a number and a value. Only what decides how text is
encoded is read; the rest is left to the library.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from intlm.errors import InputError
from intlm.untrusted import refuse_special

LARGEST_FILE = 64 << 20
MOST_PIECES = 1 << 16
LONGEST_PIECE = 4096
"""Bytes of a piece, or of what an unknown one is decoded to; the library's own trainer makes up to 2048."""
MOST_MESSAGES = 8
"""Settings may come in several messages, which are merged."""
MOST_PIECE_FIELDS = 4
LARGEST_RULES = 8 << 20
"""Bytes of the rules of normalisation; Unicode's own take 0.3 MB."""
LONGEST_REPLACEMENT = 1024
"""Bytes that the normalisation may put for one character; the longest in Unicode's own tables are 33."""

SPACE = "\u2581"
"""What pieces have for a space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_VARINT, _FIXED64, _MESSAGE, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER, _SELF_TEST = 1, 2, 3, 4


@dataclass(frozen=True)
class Piece:
    """One piece: its text, with U+2581 for spaces, its score, and its type (`NORMAL`, `CONTROL`, …)."""

    text: str
    score: float
    type: int

    @property
    def bytes(self) -> bytes:
        """The text that the piece stands for; empty for a control piece."""
        if self.type == BYTE:
            return bytes([int(self.text[3:5], 16)])
        if self.type == CONTROL:
            return b""
        return self.text.replace(SPACE, " ").encode()


@dataclass(frozen=True)
class ModelFile:
    """The pieces, in the file's order, and the settings of a `.model` file."""

    content: bytes
    pieces: tuple[Piece, ...]
    kind: str
    """`bpe`, `unigram`, `word` or `char`."""
    normalization: str
    """The rule's name; empty where there is no rule."""
    dummy_prefix: bool
    """Whether a space is put before a text (after it, with `space_is_suffix`)."""
    removes_spaces: bool
    """Whether spaces at the ends are dropped and repeated ones made one."""
    space_is_suffix: bool
    byte_fallback: bool
    """Whether a character that no piece has is spelled in byte pieces."""
    bos: str
    unknown_surface: str
    """What an unknown piece is decoded to."""

    @classmethod
    def read(cls, path: Path, flag: str = "") -> "ModelFile":
        """The file at `path`. Raises InputError, naming `flag` and the file, for anything unusable."""
        where = f"{flag} {path}".strip()
        try:
            refuse_special(path)
            with path.open("rb") as file:
                # Not simply the most there may be, for which room would be taken at once.
                content = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_FILE) + 1)
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {error.strerror or error}") from error
        return cls.parse(content, where)

    @classmethod
    def parse(cls, content: bytes, where: str) -> "ModelFile":
        """The `content` of a file that messages call `where`. Raises InputError."""
        if len(content) > LARGEST_FILE:
            raise InputError(f"{where}: too large for a SentencePiece model (accepted: {LARGEST_FILE} bytes)")
        try:
            return cls._parse(content, where)
        except (ValueError, KeyError, IndexError, struct.error) as error:
            raise InputError(f"{where}: damaged, or no SentencePiece model") from error

    @classmethod
    def _parse(cls, content: bytes, where: str) -> "ModelFile":
        pieces: list[Piece] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        messages = 0
        for number, value, _ in _fields(content, 2 * MOST_PIECES):
            messages += number in (_TRAINER, _NORMALIZER)
            if messages > MOST_MESSAGES:
                raise ValueError("settings without end")
            if number == _PIECES:
                pieces.append(_piece(_bytes(value)))
            elif number == _TRAINER:
                trainer |= {key: item for key, item, _ in _fields(_bytes(value))}
            elif number == _NORMALIZER:
                normalizer |= {key: item for key, item, _ in _fields(_bytes(value))}
        if not pieces:
            raise ValueError("no pieces")
        if len(pieces) > MOST_PIECES:
            raise InputError(f"{where}: {len(pieces):,} pieces (accepted: up to {MOST_PIECES:,})")
        rules = _bytes(normalizer.get(2, b""))
        if len(rules) > LARGEST_RULES:
            raise ValueError("rules without end")
        # Four bytes of size, an index of that size, then the replacements, each with a zero at its end.
        if max(map(len, rules[4 + int.from_bytes(rules[:4], "little") :].split(b"\0"))) > LONGEST_REPLACEMENT:
            raise ValueError("a replacement without end")
        named = _text(normalizer.get(1, b""))
        return cls(
            content,
            tuple(pieces),
            KINDS[_number(trainer.get(3, 1))],
            (named or "a rule of its own") if rules else "",
            bool(_number(normalizer.get(3, 1))),
            bool(_number(normalizer.get(4, 1))),
            bool(_number(trainer.get(24, 0))),
            bool(_number(trainer.get(35, 0))),
            _text(trainer.get(46, b"<s>")),
            _text(trainer.get(44, b" \xe2\x81\x87 ")),
        )

    def without_dummy_prefix(self) -> bytes:
        """The content with that setting off, and without the self-test, which was made with it on."""
        kept = b"".join(
            raw for number, _, raw in _fields(self.content, 2 * MOST_PIECES) if number != _SELF_TEST
        )
        # A message that comes twice is merged, the later value taking the place of the earlier.
        return kept + bytes([_NORMALIZER << 3 | _MESSAGE, 2, 3 << 3 | _VARINT, 0])


def _piece(content: bytes) -> Piece:
    fields = {number: value for number, value, _ in _fields(content, MOST_PIECE_FIELDS)}
    text, type_ = _text(fields.get(1, b"")), _number(fields.get(3, NORMAL))
    if not text or not NORMAL <= type_ <= BYTE:
        raise ValueError("no piece")
    if type_ == BYTE and text != f"<0x{int(text[3:5], 16):02X}>":
        raise ValueError("no byte")
    return Piece(text, struct.unpack("<f", _bytes(fields.get(2, bytes(4))))[0], type_)


def _fields(content: bytes, most: int = MOST_PIECES) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Number, value and raw bytes of each field.

    Raises ValueError or IndexError where it ends too early, ValueError for more than `most` fields.
    """
    position = count = 0
    while position < len(content):
        count += 1
        if count > most:
            raise ValueError("fields without end")
        start = position
        key, position = _varint(content, position)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(content, position)
        else:
            if wire == _MESSAGE:
                size, position = _varint(content, position)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError("an unknown kind of field")
            if size > len(content) - position:
                raise ValueError("a field ends after the file")
            value = content[position : position + size]
            position += size
        yield number, value, content[start:position]


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number without end")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number in place of text")
    return value


def _text(value: int | bytes) -> str:
    text = _bytes(value)
    if len(text) > LONGEST_PIECE:
        raise ValueError("a text without end")
    return text.decode()


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text in place of a number")
    return value
