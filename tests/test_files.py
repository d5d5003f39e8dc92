"""Corpora of files: every format, from every document on, and whatever is wrong with them."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
import sources
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sources import KINDS, NAMES, PACKED, TABLES, plain, write

from intlm.errors import InputError
from train import formats
from train.corpus import cut, open_corpus
from train.files import FilesCorpus


def read(path, **options):
    return list(open_corpus(str(path), **options).documents())


def assert_resumes_everywhere(name):
    """Reading from every cursor, as JSON carries it, goes on with exactly the next document; returns all."""
    everything = list(open_corpus(str(name)).read({}))
    for number, (_, cursor) in enumerate(everything):
        rest = open_corpus(str(name)).read(json.loads(json.dumps(cursor)))
        assert list(rest) == everything[number + 1 :]
    return [document for document, _ in everything]


def refusal(path, **options):
    """The one line that reading is refused with, after the flag and the quoted path."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    opening = f"--data: {str(path)!r}"
    assert message.startswith(opening), message
    return message[len(opening) :].lstrip(": ")


# Every format


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(sources.documents.filter(any))
def test_every_format_resumes_at_every_document(name, texts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path, texts)
        assert assert_resumes_everywhere(path) == plain(texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_string_in_a_table(tmp_path, name, kind):
    texts = [None, "", "é", *(f"{i}" * i for i in range(30)), None, "é"]
    write(tmp_path / name, texts, kind)
    assert assert_resumes_everywhere(tmp_path / name) == plain(texts)


@pytest.mark.parametrize("ending", PACKED)
@settings(max_examples=20)
@given(
    st.one_of(st.binary(max_size=200), st.text("aé€😀\n", max_size=100).map(str.encode)), st.integers(4, 30)
)
def test_text_is_cut_where_cut_cuts(ending, content, longest):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "LONGEST_TEXT", longest)
        path = Path(folder, f"a.txt{ending}")
        path.write_bytes(PACKED[ending](content + b"."))
        assert assert_resumes_everywhere(path) == cut(content + b".", longest)


def test_text_up_to_1_mib_is_one_document(tmp_path):
    line = b"0123456789abcde\n"
    (tmp_path / "a.txt").write_bytes(line * (1 << 16))
    assert read(tmp_path / "a.txt") == [line * (1 << 16)]
    (tmp_path / "a.txt").write_bytes(line * (1 << 16) + b"more")
    assert read(tmp_path / "a.txt") == [line * (1 << 16), b"more"]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([*NAMES, "a.txt", "b.txt.gz"]), sources.documents), min_size=1, max_size=4
    )
)
@example([("a.txt", ["x"]), ("lines.JSONL", [None]), ("t.parquet", []), ("f.feather", ["last"])])
def test_a_directory_of_files_resumes_at_every_document(files):
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for number, (name, texts) in enumerate(files):
            Path(folder, f"{number}").mkdir()
            write(Path(folder, f"{number}", name), texts)
            whole = "".join(map(str, texts)).encode()
            expected += plain(texts) if name in NAMES else [whole] if whole else []
        # A lone .json.zst is found in a directory, since no configuration is compressed.
        assert (
            assert_resumes_everywhere(folder) == expected
            if expected
            else not refusal(folder).find("is empty")
        )


def test_what_is_found_in_a_directory(tmp_path):
    found = [
        "a.arrow",
        "b.feather",
        "c.parquet",
        "d.jsonl.zst",
        "e.txt.gz",
        "f.md.xz",
        "g.json.gz",
        "h.PY.GZ",
    ]
    for name in [*found, "i.json", "j.gz", "k.parquet.gz", "l.zip", ".m.txt"]:
        (tmp_path / name).touch()
    assert sorted(FilesCorpus(str(tmp_path)).fingerprint()["files"]) == found


def test_a_resumed_reader_reads_only_what_it_needs(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("no JSON\n" * 1000 + '{"text": "a"}\nno JSON either\n')
    corpus = open_corpus(str(path))
    rest = corpus.read({"file": 0, "offset": 8000, "line": 1000})
    assert next(rest) == (b"a", {"file": 0, "offset": 8014, "line": 1001})
    with pytest.raises(InputError, match=r" line 1002: not JSON \("):
        next(rest)


def test_row_groups_before_the_cursor_are_not_read(tmp_path):
    path = tmp_path / "t.parquet"
    write(path, [f"{number:05d}" * 20 for number in range(70)])
    content = bytearray(path.read_bytes())
    column = pa.parquet.read_metadata(path).row_group(2).column(1)
    content[column.dictionary_page_offset + 50] ^= 1
    path.write_bytes(content)
    corpus = open_corpus(str(path))
    assert "damaged Parquet" in refusal(path)
    assert len(list(corpus.read({"file": 0, "row": 21}))) == 49


def test_arrow_in_parts_is_read_to_the_end(tmp_path):
    # One batch of many rows, read in several slices.
    made = pa.table({"text": [str(number) for number in range(1000)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made)
    assert read(tmp_path / "a.arrow") == [b"%d" % number for number in range(1000)]
    rest = open_corpus(str(tmp_path / "a.arrow")).read({"file": 0, "batch": 0, "row": 700})
    assert [document for document, _ in rest] == [b"%d" % number for number in range(700, 1000)]


# What is wrong with a file


def tables_of(tmp_path, columns):
    for name, make in {"a.parquet": pa.parquet.write_table, "a.feather": pa.feather.write_feather}.items():
        make(pa.table(columns), str(tmp_path / name))
        yield tmp_path / name


def test_a_column_that_is_missing_or_no_text(tmp_path):
    for path in tables_of(tmp_path, {"id": [1], "body": ["x"]}):
        assert refusal(path) == "no column 'text' (the columns are: 'id', 'body')"
        assert read(path, text_field="body") == [b"x"]
    for path in tables_of(tmp_path, {"text": [1]}):
        wanted = "(accepted: strings, or UTF-8 as binary)"
        assert refusal(path) == f"column 'text' is of type int64 {wanted}"
    for path in tables_of(tmp_path, {"text": [["a"]]}):
        assert "column 'text' is of type list<" in refusal(path)
    for path in tables_of(tmp_path, {"a": [{"b": "nested"}], "a.b": ["dotted"]}):
        assert read(path, text_field="a.b") == [b"dotted"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.dictionary(pa.int8(), pa.binary())], ids=str)
def test_a_row_that_is_not_utf8_is_named(tmp_path, kind):
    rows = pa.array([b"fine"] * 99 + [b"\xe9"], pa.binary())
    if pa.types.is_dictionary(kind):
        column = rows.dictionary_encode()
    else:
        column = pa.Array.from_buffers(kind, 100, rows.buffers())
    for path in tables_of(tmp_path, {"text": column}):
        assert re.match(r"(record batch 1 )?row 100: damaged .*(UTF-8|UTF8|utf-8)", refusal(path))


@pytest.mark.parametrize("name", [*NAMES, "text.txt.gz", "text.txt.xz", "text.txt.zst"])
@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_damage_is_an_input_error_or_goes_unnoticed(name, seed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path, [f"{number} é" * 5 for number in range(60)])
        path.write_bytes(sources.damaged(path.read_bytes(), seed))
        try:
            for document in read(path):
                # Flipped bits may make other text, but they make text.
                assert document if name.startswith("text") else document.decode()
        except InputError as error:
            assert str(error).startswith("--data: ") and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("name", [*NAMES, "text.txt.gz"])
@given(content=st.binary(min_size=1, max_size=100))
@settings(max_examples=20)
def test_garbage_is_an_input_error(name, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        if content.strip():
            refusal(path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lines.JSONL"])
def test_a_file_cut_short_is_noticed(tmp_path, name):
    path = tmp_path / name
    write(path, [f"{number} é" * 5 for number in range(60)])
    path.write_bytes(path.read_bytes()[:-20])
    assert re.search(r"(line|row) [0-9]+: damaged (gz|xz|zst|json|Parquet|Arrow): ", refusal(path))


def test_messages_name_the_line_after_a_resume_and_in_compressed_files(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(PACKED[".gz"](b'{"text": "a"}\n\n{"text": "b"}\n{"text": 5}\n'))
    assert refusal(path) == "line 4: field 'text' is of type int (accepted: a string)"
    corpus = open_corpus(str(path))
    (_, cursor), _ = itertools.islice(corpus.read({}), 2)
    rest = corpus.read(cursor)
    next(rest)
    with pytest.raises(InputError, match=" line 4: "):
        next(rest)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_all_before_the_damage_is_read(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    content = PACKED[ending](b'{"text": "a"}\n{"text": "b"}\n')
    path.write_bytes(content[:-6])
    documents = open_corpus(str(path)).documents()
    assert next(documents) == b"a"
    with pytest.raises(InputError, match=rf" line [23]: damaged {ending[1:]}: "):
        list(documents)


def test_a_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' + bytes(5 << 20)))
    assert refusal(tmp_path / "a.jsonl.gz") == "line 2: longer than 1 MiB (accepted: up to that)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet.gz", ".parquet packed as .gz; unpack it (accepted: .parquet)"),
        ("a.arrow.zst", ".arrow packed as .zst; unpack it (accepted: .arrow)"),
        ("a.zip", ".zip cannot be read; unpack it (accepted: .gz .xz .zst, or none)"),
        ("a.tar.gz", ".tar cannot be read; unpack it (accepted: .gz .xz .zst, or none)"),
        ("a.jsonl.bz2", ".bz2 cannot be read; unpack it (accepted: .gz .xz .zst, or none)"),
    ],
)
def test_what_has_to_be_unpacked(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"content")
    assert refusal(tmp_path / name) == message


# Change


@pytest.mark.parametrize("name", [*NAMES, "a.txt", "a.txt.gz"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name):
    path = tmp_path / name
    for change in (
        path.unlink,
        lambda: path.write_bytes(path.read_bytes() + b"x"),
        lambda: os.truncate(path, 0),
    ):
        write(path, [f"{number} é" * 5 for number in range(300)])
        documents = open_corpus(str(path)).documents()
        next(documents)
        change()
        with pytest.raises(InputError, match=r"(changed while it was read|No such file or directory)$"):
            list(documents)


@pytest.mark.parametrize("name", [*NAMES, "a.txt"])
def test_a_cursor_beyond_the_end(tmp_path, name):
    path = tmp_path / name
    write(path, [f"{number} é" * 5 for number in range(60)])
    *_, (_, last) = open_corpus(str(path)).read({})
    write(path, ["a"])
    with pytest.raises(InputError, match=r": ends before .*: it has changed$"):
        list(open_corpus(str(path)).read(last))
    with pytest.raises(InputError, match=r" has no file 2 any more: it has changed$"):
        list(open_corpus(str(path)).read({**last, "file": 1}))


@pytest.mark.parametrize("key", ["file", "offset", "line", "row", "batch"])
@pytest.mark.parametrize("value", [-1, "1", None, 1.5])
def test_a_cursor_that_is_none(tmp_path, key, value):
    for name in NAMES:
        write(tmp_path / name, ["a"])
        corpus = open_corpus(str(tmp_path / name))
        if key in {"file": 0} | next(corpus.read({}))[1]:
            with pytest.raises(
                InputError, match=rf"^cursor: {key} is {value!r} \(accepted: an integer from 0\)$"
            ):
                list(corpus.read({key: value}))


def test_the_fingerprint_tells_content_and_names(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    first, second = tmp_path / "a.txt", tmp_path / "b" / "b.txt"
    first.write_text("one")
    second.write_text("two")
    corpus = open_corpus(str(tmp_path))
    before = json.loads(json.dumps(corpus.fingerprint()))
    assert list(before["files"]) == ["a.txt", "b/b.txt"]
    assert before["files"]["a.txt"]["bytes"] == 3
    os.utime(first, (1, 1))
    assert corpus.fingerprint() == before
    # The same files elsewhere are the same corpus.
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    elsewhere = tmp_path.with_name("elsewhere")
    assert open_corpus(str(elsewhere)).fingerprint() == before
    assert open_corpus(f"{elsewhere}/**/*.txt").fingerprint() == before
    for change in ("One", "onee"):
        (elsewhere / "a.txt").write_text(change)
        assert open_corpus(str(elsewhere)).fingerprint() != before
    (elsewhere / "a.txt").write_text("one")
    assert open_corpus(str(elsewhere)).fingerprint() == before
    monkeypatch.setattr("train.files.HASHED", 2)
    by_time = open_corpus(str(elsewhere)).fingerprint()
    os.utime(elsewhere / "a.txt", (2, 2))
    assert open_corpus(str(elsewhere)).fingerprint() != by_time
    (elsewhere / "a.txt").unlink()
    assert set(open_corpus(str(elsewhere)).fingerprint()["files"]) == {"b/b.txt"}


def test_the_fingerprint_of_a_file_that_is_gone(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    corpus = open_corpus(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"^--data: cannot read '.*a.txt': No such file or directory$"):
        corpus.fingerprint()


# Memory

MEMORY = """
import resource, sys
from train.corpus import open_corpus
documents, size = 0, 0
for document, _ in open_corpus(sys.argv[1]).read({}):
    documents, size = documents + 1, size + len(document)
print(documents, size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def memory_of_reading(path):
    command = [sys.executable, "-c", MEMORY, str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return map(int, shown.split())


def grow(path, megabytes):
    """A file of that much text in the format that the name tells, in documents of 1000 bytes."""
    text = "0123456789" * 100
    if path.suffix == ".parquet":
        batch = pa.table({"text": pa.array([text + str(number) for number in range(1000)])})
        # One row group, however long: what a reader of whole row groups could not hold.
        with pa.parquet.ParquetWriter(path, batch.schema, compression="none", use_dictionary=False) as writer:
            rows = pa.concat_tables([batch] * megabytes)
            writer.write_table(rows, row_group_size=len(rows))
        return
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        line = json.dumps({"text": text}).encode() + b"\n"
        for _ in range(megabytes):
            file.write(line * 1000)


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet"])
def test_a_long_file_takes_no_more_memory_than_a_short_one(tmp_path, name):
    used = {}
    for megabytes in (20, 400):
        grow(tmp_path / name, megabytes)
        documents, size, used[megabytes] = memory_of_reading(tmp_path / name)
        assert size >= megabytes * 1_000_000 and documents * (1 << 20) >= size
    assert used[400] < used[20] + 50, used
