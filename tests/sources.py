"""Files in every format that `train.formats` reads, made from documents."""

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from hypothesis import strategies as st

from train.formats import _zstd

zstd = _zstd()

Documents = list[str | None]
documents = st.lists(
    st.one_of(st.none(), st.text(max_size=8), st.text('é😀\n"\\ ', max_size=20)), max_size=40
)


def json_lines(texts: Documents) -> bytes:
    lines = [
        json.dumps({"id": i, "text": text or ""}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
    ]
    return "".join(line + ("\n\n" if i % 5 == 4 else "\r\n") for i, line in enumerate(lines)).encode()


def in_two(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Two members, frames or streams, one after the other."""
    return lambda content: pack(content[: len(content) // 2]) + pack(content[len(content) // 2 :])


PACKED = {
    "": bytes,
    ".gz": in_two(lambda content: gzip.compress(content, mtime=0)),
    ".xz": in_two(lambda content: lzma.compress(content) + bytes(4)),
    ".zst": in_two(zstd.compress),
}

KINDS = {
    "strings": pa.string(),
    "large": pa.large_string(),
    "views": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def table(texts: Documents, kind: str) -> pa.Table:
    column = pa.array(texts, pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(KINDS[kind])
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": column, "other": column})


def write_parquet(path: Path, texts: Documents, kind: str) -> None:
    pa.parquet.write_table(table(texts, kind), path, row_group_size=7, write_page_checksum=True)


def write_arrow_file(path: Path, texts: Documents, kind: str) -> None:
    made = table(texts, kind)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=7)


def write_arrow_stream(path: Path, texts: Documents, kind: str) -> None:
    made = table(texts, kind)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=7)


def write_feather(path: Path, texts: Documents, kind: str) -> None:
    pa.feather.write_feather(table(texts, kind), str(path), compression="zstd", chunksize=7)


TABLES = {
    "t.parquet": write_parquet,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "f.feather": write_feather,
}
NAMES = [f"lines{ending}" for ending in (".jsonl.gz", ".ndjson.xz", ".json.zst", ".JSONL")] + list(TABLES)
"""One file of every format whose documents are those given."""


def write(path: Path, texts: Documents, kind: str = "strings") -> None:
    """A file of the format that the name stands for."""
    if path.name in TABLES:
        TABLES[path.name](path, texts, kind)
    else:
        pack = PACKED.get(path.suffix, bytes)
        path.write_bytes(
            pack(json_lines(texts) if path.name.startswith("lines") else "".join(map(str, texts)).encode())
        )


def plain(texts: Documents) -> list[bytes]:
    """The documents that a corpus of them yields."""
    return [text.encode() for text in texts if text]


def damaged(content: bytes, seed: int) -> bytes:
    """The content with some bits flipped, or cut short, or both."""
    source = random.Random(seed)
    changed = bytearray(content)
    if source.random() < 0.4:
        del changed[source.randrange(len(changed)) :]
    for _ in range(source.choice([0, 1, 1, 2, 8])):
        if changed:
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)
