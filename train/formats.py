"""The documents in one file: plain text, JSON lines, Parquet, Arrow; the first two also compressed.

Every reader goes on from a cursor and holds a bounded part of the file, however long that is. It also yields
the empty documents (and, for a null, `b""`), so that its cursor always tells how far it has come.
"""

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from intlm.errors import InputError, shown
from train.corpus import Cursor, cut

if TYPE_CHECKING:
    import pyarrow

JSON_LINES_ENDINGS = (".json", ".jsonl", ".ndjson")
PARQUET_ENDINGS = (".parquet",)
ARROW_ENDINGS = (".arrow", ".feather")
COMPRESSED_ENDINGS = (".gz", ".xz", ".zst")
ARCHIVE_ENDINGS = (".7z", ".bz2", ".lz4", ".rar", ".tar", ".tgz", ".zip")
LONGEST_TEXT = 1 << 20
"""Bytes in a document of plain text; a longer file is cut into several."""
LONGEST_LINE = 64 << 20
"""Bytes in a JSON line, its end included."""
BUFFER = 1 << 20
# Rows turned into Python objects at once, so that books for documents fit in memory too.
ROWS = 64
WENT_ON = "where reading was to go on: it has changed"


class Source(Protocol):
    """A file somewhere."""

    @property
    def name(self) -> str:
        """Its name, whose endings tell the format."""
        ...

    @property
    def label(self) -> str:
        """What opens each message about it: the flag and the quoted path."""
        ...

    def open(self) -> io.BufferedReader:
        """Its bytes from the start, seekable. `InputError` where it cannot be read."""
        ...


def documents(source: Source, text_field: str, cursor: Cursor) -> Iterator[tuple[bytes, Cursor]]:
    """The documents of a file from `cursor` on, each with the cursor behind it; some may be empty.

    - .json .jsonl .ndjson: one JSON object a line of at most `LONGEST_LINE` bytes, with the text in the field
      `text_field`; a null is empty. Blank lines are skipped. Cursor: `offset` in bytes, and `line`.
    - .parquet: the column `text_field`, of strings or of UTF-8 bytes; nulls are empty. Cursor: `row`.
    - .arrow .feather: likewise, from an Arrow IPC file or stream, holding that column of one record batch.
      Cursor: record `batch` and `row` in it.
    - all else: a file of at most `LONGEST_TEXT` bytes is one document, whatever is in it. A longer one is
      cut into documents of at most that size, which end at a line end where one fits, else between two UTF-8
      characters. Cursor: `offset`.

    Text and JSON lines may be compressed (.gz .xz .zst on top): their `offset` counts the bytes unpacked, and
    all before it are unpacked again. `InputError` for text that cannot be used, or that ends before `cursor`.
    """
    endings = _endings(source.name)
    compression = endings[-1] if endings[-1] in COMPRESSED_ENDINGS else ""
    ending = endings[-2] if compression else endings[-1]
    if compression and ending in PARQUET_ENDINGS + ARROW_ENDINGS:
        raise InputError(f"{source.label}: {ending} packed as {compression}; unpack it (accepted: {ending})")
    if ending in ARCHIVE_ENDINGS:
        raise InputError(
            f"{source.label}: {ending} cannot be read; unpack it (accepted: .gz .xz .zst, or none)"
        )
    with source.open() as file:
        if ending in PARQUET_ENDINGS:
            yield from _parquet(file, source.label, text_field, cursor)
        elif ending in ARROW_ENDINGS:
            yield from _arrow(file, source.label, text_field, cursor)
        else:
            yield from _bytes(
                file, source.label, text_field, cursor, compression, ending in JSON_LINES_ENDINGS
            )


def count(cursor: Cursor, key: str) -> int:
    """The number under a key of a cursor, 0 where there is none. `InputError` for what is no number of things."""
    value = cursor.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise InputError(f"cursor: {key} is {shown(value)} (accepted: an integer from 0)")
    return value


def is_table(name: str) -> bool:
    """Whether a file of this name is read by random access."""
    return _endings(name)[-1] in PARQUET_ENDINGS + ARROW_ENDINGS


def has_rows(name: str) -> bool:
    """Whether a file of this name has a document a row or line, rather than being one document."""
    *_, ending, last = _endings(name)
    return is_table(name) or (ending if last in COMPRESSED_ENDINGS else last) in JSON_LINES_ENDINGS


def _endings(name: str) -> list[str]:
    """The endings of a file name in lower case, at least two of them."""
    return ["", "", *(suffix.lower() for suffix in PurePosixPath(name).suffixes)]


# Text and JSON lines


def _bytes(
    file: io.BufferedReader, label: str, text_field: str, cursor: Cursor, compression: str, json_lines: bool
) -> Iterator[tuple[bytes, Cursor]]:
    stream, errors = _unpacked(file, compression)
    position = cursor
    try:
        offset = count(cursor, "offset")
        # The byte before the next one, to see that it is there.
        if offset and not _skip(stream, offset - 1, bool(compression)).read(1):
            raise InputError(f"{label}: ends before byte {offset}, {WENT_ON}")
        reader = _json_lines(stream, label, text_field, cursor) if json_lines else _text(stream, offset)
        for document, position in reader:
            yield document, position
    except errors as error:
        number = int(position.get("line", 0)) + 1
        place = f"line {number}" if json_lines else f"after byte {position.get('offset', 0)}"
        raise InputError(f"{label} {place}: {_reason(error, compression)}") from error


def _unpacked(file: io.BufferedReader, compression: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The stream in `file`, and the exceptions that reading it raises."""
    if compression == ".gz":
        import gzip

        return io.BufferedReader(_Soon(gzip.GzipFile(fileobj=file)), BUFFER), (EOFError, OSError, zlib.error)
    if compression == ".xz":
        import lzma

        unpacked = io.BufferedReader(_Xz(file, lzma.LZMADecompressor), BUFFER)
        return unpacked, (EOFError, OSError, lzma.LZMAError)
    if compression == ".zst":
        zstd = _zstd()
        # Archives of text are often packed with `zstd --long=31`, which has to be allowed.
        options = {zstd.DecompressionParameter.window_log_max: 31}
        packed = zstd.ZstdFile(file, options=options)
        return io.BufferedReader(_Soon(packed), BUFFER), (EOFError, OSError, zstd.ZstdError)
    return file, (OSError,)


def _zstd() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd
    return zstd


class _Soon(io.RawIOBase):
    """A packed file that yields all before the damage, which its own `readinto` drops for the error."""

    def __init__(self, packed: Any):
        self._packed = packed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._packed.read1(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class _Xz(io.RawIOBase):
    """Streams of xz, one after another. Not `lzma.LZMAFile`, which takes damage between two for the end."""

    def __init__(self, packed: io.BufferedReader, decompressor: Any):
        self._packed = packed
        self._new = decompressor
        self._decompressor = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                # Between two streams there may be zeros.
                rest = self._decompressor.unused_data.lstrip(b"\0")
                while not rest:
                    if not (rest := self._packed.read(BUFFER)):
                        return 0
                    rest = rest.lstrip(b"\0")
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                if not (rest := self._packed.read(BUFFER)):
                    raise EOFError
            else:
                rest = b""
            if piece := self._decompressor.decompress(rest, len(buffer)):
                buffer[: len(piece)] = piece
                return len(piece)


def _skip(stream: BinaryIO, offset: int, packed: bool) -> BinaryIO:
    """The stream at `offset`, or at its end if that comes first."""
    if not packed:
        stream.seek(offset)
    while packed and offset and (piece := stream.read(min(offset, BUFFER))):
        offset -= len(piece)
    return stream


def _text(stream: BinaryIO, offset: int) -> Iterator[tuple[bytes, Cursor]]:
    rest = b""
    while rest := rest + stream.read(LONGEST_TEXT + 1 - len(rest)):
        document = rest if len(rest) <= LONGEST_TEXT else cut(rest, LONGEST_TEXT)[0]
        rest = rest[len(document) :]
        offset += len(document)
        yield document, {"offset": offset}


def _json_lines(
    stream: BinaryIO, label: str, text_field: str, cursor: Cursor
) -> Iterator[tuple[bytes, Cursor]]:
    offset, number = count(cursor, "offset"), count(cursor, "line")
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{label} line {number}: longer than {LONGEST_LINE >> 20} MiB (accepted: up to that)"
            )
        offset += len(line)
        document = b"" if line.isspace() else _text_of_json(line, text_field, label, number)
        yield document, {"offset": offset, "line": number}


def _text_of_json(line: bytes, field: str, label: str, number: int) -> bytes:
    """The bytes of the text field of one JSON line."""
    try:
        text = line.decode()
        # Some editors open a file with a byte-order mark.
        record = json.loads(text[1:] if text[0] == "\ufeff" else text)
        return b"" if record[field] is None else record[field].encode()
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 at byte {error.start + 1} of the line"
    except UnicodeEncodeError:
        wrong = f"field {field!r} has half a surrogate pair, which is not UTF-8"
    except (KeyError, AttributeError, TypeError):
        if not isinstance(record, dict):
            wrong = f"of type {type(record).__name__} (accepted: one JSON object a line)"
        elif field in record:
            wrong = f"field {field!r} is of type {type(record[field]).__name__} (accepted: a string)"
        else:
            wrong = f"no field {field!r} (the fields are: {_list(record)})"
    except (ValueError, RecursionError):
        wrong = "not JSON (accepted: one JSON object a line)"
    raise InputError(f"{label} line {number}: {wrong}")


# Parquet and Arrow


def _parquet(
    file: io.BufferedReader, label: str, text_field: str, cursor: Cursor
) -> Iterator[tuple[bytes, Cursor]]:
    import pyarrow
    from pyarrow import parquet

    row = count(cursor, "row")
    try:
        # Pages one by one, not a row group at once, which may be as large as the file.
        table = parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True
        )
        _column(table.schema_arrow, text_field, label)
        if row > table.metadata.num_rows:
            raise InputError(f"{label}: ends before row {row}, {WENT_ON}")
        end = 0
        for group in range(table.num_row_groups):
            start, end = end, end + table.metadata.row_group(group).num_rows
            if end <= row:
                continue
            for batch in table.iter_batches(ROWS, [group], [text_field], use_threads=False):
                for document in _texts(_plain(batch.column(text_field))[max(0, row - start) :]):
                    row += 1
                    yield document, {"row": row}
                start += len(batch)
            if row != end:
                raise InputError(f"{label} row {row + 1}: damaged Parquet: {end - row} rows are missing")
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise InputError(f"{label} row {row + 1}: {_reason(error, 'Parquet')}") from error


def _arrow(
    file: io.BufferedReader, label: str, text_field: str, cursor: Cursor
) -> Iterator[tuple[bytes, Cursor]]:
    import pyarrow
    from pyarrow import ipc

    number = first = count(cursor, "batch")
    row = count(cursor, "row")
    try:
        # Not mapped: that a mapped file was cut short ends the process at the next look at it.
        source = pyarrow.PythonFile(file, "r")
        open_reader = ipc.open_file if source.read(6) == b"ARROW1" else ipc.open_stream
        source.seek(0)
        index = _column(open_reader(source).schema, text_field, label)
        source.seek(0)
        reader = open_reader(source, options=ipc.IpcReadOptions(included_fields=[index]))
        found = False
        for number, batch in _batches(reader, first):
            column = _plain(batch.column(0))
            found = True
            if row > len(column):
                break
            for start in range(row, len(column), ROWS):
                for document in _texts(column[start : start + ROWS]):
                    row += 1
                    yield document, {"batch": number, "row": row}
            row = 0
        if row or (cursor and not found):
            raise InputError(f"{label}: ends before record batch {first + 1} row {row}, {WENT_ON}")
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{label} record batch {number + 1} row {row + 1}: {_reason(error, 'Arrow')}"
        ) from error


def _batches(reader: Any, first: int) -> Iterator[tuple[int, Any]]:
    """The record batches of an Arrow file or stream from `first` on, each after its number."""
    if hasattr(reader, "get_batch"):
        for number in range(first, reader.num_record_batches):
            yield number, reader.get_batch(number)
    else:
        for number, batch in enumerate(reader):
            if number >= first:
                yield number, batch


def _column(schema: "pyarrow.Schema", field: str, label: str) -> int:
    """The index of the column of that name, which has to hold text."""
    from pyarrow import types

    indices = schema.get_all_field_indices(field)
    if not indices:
        raise InputError(f"{label}: no column {field!r} (the columns are: {_list(schema.names)})")
    if len(indices) > 1:
        raise InputError(f"{label}: {len(indices)} columns {field!r} (accepted: one)")
    kind = schema.field(indices[0]).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    text = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(
        is_kind(value) for is_kind in (*text, types.is_binary, types.is_large_binary, types.is_binary_view)
    ):
        raise InputError(
            f"{label}: column {field!r} is of type {kind} (accepted: strings, or UTF-8 as binary)"
        )
    return cast(int, indices[0])


def _plain(column: "pyarrow.Array") -> "pyarrow.Array":
    """The column without a dictionary."""
    if hasattr(column, "dictionary_decode"):
        column.validate(full=True)
        return column.dictionary_decode()
    return column


def _texts(column: "pyarrow.Array") -> Iterator[bytes]:
    """The bytes of each row, none for a null. `ValueError` at the row that is damaged or not UTF-8."""
    try:
        column.validate(full=True)
        values = column.to_pylist()
        for value in values:
            if isinstance(value, bytes):
                value.decode()
    except ValueError:
        if len(column) == 1:
            raise
        for row in range(len(column)):
            yield from _texts(column[row : row + 1])
        return
    for value in values:
        yield value if isinstance(value, bytes) else (value or "").encode()


# Messages


def _list(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _reason(error: Exception, kind: str) -> str:
    """What went wrong, in one line: the file, where `kind` says what it should be, or the reading of it."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    what = " ".join(str(error).split())[:200] or "it ends too early"
    return f"damaged {kind.lstrip('.')}: {what}" if kind else f"cannot be read: {what}"
