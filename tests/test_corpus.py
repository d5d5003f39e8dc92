import os
import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm.errors import InputError
from train.corpus import cut, open_corpus


def read(path, **options):
    return list(open_corpus(str(path), **options).documents())


# The standard library


def test_stdlib_is_source_without_tests():
    documents = list(open_corpus("stdlib").documents())
    assert len(documents) > 300 and all(documents)
    assert documents == list(open_corpus("stdlib").documents())
    assert Path(os.__file__).read_bytes() in documents
    assert Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_bytes() in documents
    assert Path(pytest.__file__).read_bytes() not in documents


def test_stdlib_goes_by_relative_path_and_leaves_out_tests(tmp_path, monkeypatch):
    for name in ["b.py", "a/z.py", "a.py", "test/t.py", "a/tests/t.py", "site-packages/s.py", "idlelib/i.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.py").touch()
    (tmp_path / "notes.txt").write_text("no source")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert read("stdlib") == [b"a.py", b"a/z.py", b"b.py"]


def test_stdlib_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"^stdlib: Python has no library source in "):
        read("stdlib")


# Files


def test_a_file_is_one_document_of_any_bytes(tmp_path):
    path = tmp_path / "corpus.bin"
    path.write_bytes(b"\xff\0a\r\n")
    assert read(path) == [b"\xff\0a\r\n"]
    assert open_corpus(str(path)).name == str(path)


def test_a_directory_is_read_by_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    contents = {
        "b.txt": "b",
        "a.md": "a",
        "sub/c.PY": "c",
        "d.jsonl": '{"text": "d"}',
        "e.jpg": "no",
        "f.json": "{}",
        ".g.txt": "no",
        ".git/h.txt": "no",
        "empty.txt": "",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == [b"a", b"b", b"d", b"c"]


def test_a_glob_takes_every_file_that_matches(tmp_path):
    (tmp_path / "sub.log").mkdir()
    for name in ["2.log", "1.log", "sub.log/3.log", "other"]:
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.log") == [b"1.log", b"2.log"]
    assert read(tmp_path / "**" / "*.log") == [b"1.log", b"2.log", b"sub.log/3.log"]


def test_a_file_named_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "[a].txt").write_text("brackets")
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path / "[a].txt") == [b"brackets"]


def test_json_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        '\ufeff{"text": "é\\n", "id": 1}\r\n\n  \n{"text": ""}\n{"text": "last \\u00e9"}'.encode()
    )
    assert read(path) == ["é\n".encode(), "last é".encode()]


def test_json_lines_with_another_field(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "no", "body": "yes"}\n')
    assert read(path, text_field="body") == [b"yes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"not JSON \(accepted: one JSON object a line\)"),
        (b"[" * 100_000, r"not JSON \(accepted: one JSON object a line\)"),
        (b'{"text": ' + b"1" * 10_000 + b"}", r"not JSON \(accepted: one JSON object a line\)"),
        (b'["text"]', r"of type list \(accepted: one JSON object a line\)"),
        (b"{}", r"no field 'text' \(the fields are: none\)"),
        (b'{"Text": "a", "id": 1}', r"no field 'text' \(the fields are: 'Text', 'id'\)"),
        (b'{"text": 5}', r"field 'text' is of type int \(accepted: a string\)"),
        (b'{"text": "\xe9"}', r"not UTF-8 at byte 11 of the line"),
        (b'{"text": "\\ud800"}', r"field 'text' has half a surrogate pair, which is not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    with pytest.raises(InputError, match=f"^--data: {re.escape(repr(str(path)))} line 3: {message}$"):
        read(path)


def test_what_does_not_exist(tmp_path):
    with pytest.raises(
        InputError, match=r"^--text: '.*nowhere' does not exist \(accepted: 'stdlib', or a file"
    ):
        open_corpus(str(tmp_path / "nowhere"), flag="--text")
    with pytest.raises(InputError, match=r"^--data: the name is empty \(accepted: 'stdlib'"):
        open_corpus("")
    with pytest.raises(InputError, match=r"^--data: cannot read '.*aaa': File name too long$"):
        open_corpus("a" * 10_000)


@pytest.mark.parametrize("name", ["stdlb", "STDLIB", "std-lib"])
def test_a_near_miss_of_stdlib_gets_a_hint(name):
    with pytest.raises(InputError, match=rf"^--data: '{name}' does not exist; did you mean 'stdlib'\? \("):
        open_corpus(name)


def test_no_files(tmp_path):
    (tmp_path / "picture.jpg").touch()
    with pytest.raises(
        InputError, match=r"^--data: no text in directory '.*' \(looked for \.arrow .* \.txt, with .* too\)$"
    ):
        open_corpus(str(tmp_path))
    with pytest.raises(InputError, match=r"^--data: no file matches '.*\*\.txt'$"):
        open_corpus(str(tmp_path / "*.txt"))


def test_no_text(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"^--data: '.*' is empty \(accepted: at least one byte of text\)$"):
        read(tmp_path)


def test_neither_file_nor_directory(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"^--data: '.*pipe' is neither a file nor a directory$"):
        open_corpus(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_unreadable_file(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "a"}')
    opened = open_corpus(str(path))
    path.unlink()
    with pytest.raises(InputError, match=rf"^--data: cannot read '.*{name}': No such file or directory$"):
        list(opened.documents())


def test_unreadable_directory(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"^--data: cannot read '.*': Permission denied$"):
        open_corpus(str(tmp_path))


# Blocks


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("aé€😀\n")).map(str.encode), st.integers(4, 20))
def test_blocks_of_text_join_to_it_and_are_text(document, size):
    blocks = cut(document, size)
    assert b"".join(blocks) == document
    assert all(0 < len(block) <= size for block in blocks)
    for block in blocks:
        block.decode()


@settings(deadline=None)
@given(st.binary(), st.integers(4, 20))
def test_blocks_of_any_bytes_join_to_them(document, size):
    blocks = cut(document, size)
    assert b"".join(blocks) == document
    assert all(0 < len(block) <= size for block in blocks)


def test_blocks_end_at_line_ends():
    assert cut(b"ab\ncd\nefghijkl\n\n", 7) == [b"ab\ncd\n", b"efghijk", b"l\n\n"]
    assert cut(b"\x80" * 9, 4) == [b"\x80" * 4, b"\x80" * 4, b"\x80"]
