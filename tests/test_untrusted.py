"""Bounds on files that anyone may have made."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from intlm import checkpoint
from intlm.checkpoint import MOST_ARRAYS, Checkpoint
from intlm.cli import main
from intlm.config import EggrollConfig, ModelConfig
from intlm.errors import LONGEST_SHOWN, InputError
from intlm.evolution import initial, zeros
from intlm.untrusted import DEEPEST_JSON, LONGEST_NUMBER, SMALL_FILE, parse_json, read_file


@pytest.mark.parametrize(
    "value",
    [0, -1, 1 << 64, 10 ** (LONGEST_NUMBER - 1), 0.5, 1e308, "", "é\ud800\0", None, True, [], {}, {"": [{}]}],
)
def test_json_that_is_read(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value).encode()):
        assert parse_json(text) == value
        assert type(parse_json(text)) is type(value)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_depth() -> None:
    for depth in (1, DEEPEST_JSON):
        assert json.dumps(parse_json(nested(depth))) == nested(depth)
        parse_json('{"a":' * depth + "0" + "}" * depth)
    for text in (nested(DEEPEST_JSON + 1), nested(900), "[" * 100_000, '{"a":' * 100_000, nested(100_000)):
        with pytest.raises(ValueError, match=r"^not JSON of ours \(nested deeper than 32\)$"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON (at character 1)"),
        (b"{'a': 1}", "not JSON (at character 2)"),
        (b"[1] x", "not JSON (at character 5)"),
        (b"\xff", "not JSON (no UTF-8 at byte 1)"),
        (b'["\xed\xa0\x80"]', "not JSON (no UTF-8 at byte 3)"),
        ('["x"]'.encode("utf-16"), "not JSON (no UTF-8 at byte 1)"),
        (b'\xef\xbb\xbf"x"', "not JSON (at character 1)"),
        (b'"a\nb"', "not JSON (at character 3)"),
        (b"01", "not JSON (at character 2)"),
        (b"NaN", "not JSON (NaN)"),
        (b"[-Infinity]", "not JSON (-Infinity)"),
        (b"1e400", "not JSON of ours (a number beyond the range of floats)"),
        (b"-1e400", "not JSON of ours (a number beyond the range of floats)"),
        (b"9" * 5000, "not JSON of ours (a number of 5000 digits)"),
        (b"1." + b"9" * 5000, "not JSON of ours (a number beyond the range of floats)"),
        (b'{"a": 1, "a": 1}', "not JSON of ours (a key stands twice in an object)"),
        (b'[{"b": {"a": 1, "\\u0061": 1}}]', "not JSON of ours (a key stands twice in an object)"),
    ],
)
def test_json_that_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_json(text)
    assert str(raised.value) == reason


def test_read_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(InputError, match=r"file: too large: 5 bytes \(accepted: up to 4\)$"):
        read_file(path, 4)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none", 5)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 5)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=rf"{name}: is not a regular file$"):
            read_file(tmp_path / name, 5)


def with_holes(path: Path, size: int, start: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    if path.stat().st_blocks * 512 * 64 >= size:
        pytest.skip("the file system has no holes")


def test_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with_holes(path, 1 << 40)
    with pytest.raises(InputError, match=r"file: damaged: 1099511627776 bytes, of which [0-9]+ are on disk$"):
        read_file(path, 1 << 50)
    with_holes(path, SMALL_FILE)  # not worth a word
    assert len(read_file(path, SMALL_FILE)) == SMALL_FILE
    path.write_bytes(bytes(SMALL_FILE + 1))  # zeros are no holes
    assert len(read_file(path, 1 << 50)) == SMALL_FILE + 1


def test_a_checkpoint_that_is_nearly_all_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, Checkpoint({"x": np.zeros(8, np.int8)}, {}))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["x"] |= {"shape": [1 << 40], "data_offsets": [0, 1 << 40]}
    text = json.dumps(header).encode()
    with_holes(path, 8 + len(text) + (1 << 40), struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match=r"file: damaged: [0-9]+ bytes, of which [0-9]+ are on disk$"):
        checkpoint.read(path)


def test_a_checkpoint_of_too_many_arrays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    arrays = {str(number): np.zeros(0, np.int8) for number in range(MOST_ARRAYS + 1)}
    checkpoint.write(path, Checkpoint(dict(list(arrays.items())[1:]), {}))
    assert len(checkpoint.read(path).arrays) == MOST_ARRAYS
    checkpoint.write(path, Checkpoint(arrays, {}))
    with pytest.raises(InputError, match=r"file: 4097 arrays \(accepted: up to 4096\)$"):
        checkpoint.read(path)


def test_shapes_take_no_memory() -> None:
    """The largest configuration that there is, 400 GB of it, is compared with what a checkpoint has."""
    model = ModelConfig(width=8192, layers=256, vocabulary=1 << 16)
    tracemalloc.start()
    try:
        state = zeros(model, EggrollConfig(population=1 << 24))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert state.recurrent.shape == (1 << 23, 256, 8192)
    small = ModelConfig(layers=3)
    one, other = (
        make(small, EggrollConfig(population=6), *counts)
        for make, counts in ((zeros, ()), (initial, (np.ones(256, np.int64),)))
    )
    for name, value in other.masters.items():
        assert (one.masters[name].shape, one.masters[name].dtype) == (value.shape, value.dtype)
    for name in ("head_bias", "recurrent"):
        mine, real = getattr(one, name), getattr(other, name)
        assert (mine.shape, mine.dtype) == (real.shape, real.dtype)


def test_messages_are_short_and_drive_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "\x1b[31m\r").mkdir()
    (tmp_path / "\x1b[31m\r/config.json").write_bytes(b"{")
    assert main(["sample", "./\x1b[31m\r"]) == 2
    said = capsys.readouterr().err
    assert said[:-1].isprintable() and r"\x1b[31m" in said
    for run, config in (("a", {"x" * 100_000: 1}), ("b", {"model": "y" * 100_000}), ("c", {"tokenizer": []})):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "config.json").write_text(json.dumps(config))
        assert main(["audit", f"./{run}"]) == 2
        assert len(capsys.readouterr().err) < 3 * LONGEST_SHOWN
