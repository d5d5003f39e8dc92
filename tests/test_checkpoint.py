"""Checkpoints: exact round trips, one byte string per content, and no way to read a wrong one."""

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from intlm.checkpoint import FORMAT_VERSION, HEADER_LIMIT, Checkpoint, expect, read, replace_file, write
from intlm.errors import DamagedError, InputError

SMALL = Checkpoint(
    {
        "head.weight": np.arange(-60, 60, dtype=np.int8).reshape(10, 12),
        "head.master": np.arange(-12, 12, dtype=np.int16).reshape(2, 12),
        "position": np.array(123456789012, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.uint32),
    },
    {"step": 1000, "config": {"model": {"width": 64}, "name": "größe"}, "tokenizer": "ab12"},
)

INTEGER_TYPES = st.sampled_from([np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CHECKPOINTS = st.builds(
    Checkpoint,
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__"),
        hnp.arrays(INTEGER_TYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
        max_size=5,
    ),
    st.dictionaries(st.text(), JSON_VALUES, max_size=4),
)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (
        one.meta == other.meta
        and one.arrays.keys() == other.arrays.keys()
        and all(
            array.dtype == other.arrays[name].dtype
            and array.shape == other.arrays[name].shape
            and np.array_equal(array, other.arrays[name])
            for name, array in one.arrays.items()
        )
    )


def reversed_order(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(dict(reversed(checkpoint.arrays.items())), dict(reversed(checkpoint.meta.items())))


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_of(content: bytes) -> tuple[dict, bytes]:
    """The header of a file as JSON, and the bytes after it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        read(path)
    assert isinstance(raised.value, DamagedError) == ("update intlm" not in str(raised.value))
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "step-00001000.safetensors"
    write(path, SMALL)
    return path


@given(CHECKPOINTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_round_trip_and_one_byte_string_per_content(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "a.safetensors"
    write(path, checkpoint)
    found = read(path)
    assert same(found, checkpoint)
    content = path.read_bytes()
    write(path, reversed_order(checkpoint))
    assert path.read_bytes() == content
    write(path, found)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    plain = np.arange(24, dtype=np.int32).reshape(4, 6)
    wide = np.repeat(plain, 2, axis=1)
    contents = set()
    for array in (plain, np.asfortranarray(plain), wide[:, ::2], plain.astype(">i4")):
        write(tmp_path / "a", Checkpoint({"x": array}, {}))
        contents.add((tmp_path / "a").read_bytes())
    assert len(contents) == 1
    assert np.array_equal(read(tmp_path / "a").arrays["x"], plain)


def test_arrays_read_are_writable(small: Path) -> None:
    assert all(array.flags.writeable for array in read(small).arrays.values())


def test_other_programs_can_open_the_file(small: Path) -> None:
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(small)["head.weight"], SMALL.arrays["head.weight"])


def test_every_damaged_byte_is_found(small: Path) -> None:
    """And called damage, whatever it makes of the file."""
    content = small.read_bytes()
    assert 500 < len(content) < 2000
    for index in range(len(content)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(content)
            damaged[index] ^= flip
            small.write_bytes(damaged)
            assert "update intlm" not in error_of(small)


def test_every_truncation_is_found(small: Path) -> None:
    content = small.read_bytes()
    for length in range(len(content)):
        small.write_bytes(content[:length])
        assert error_of(small).startswith("truncated: ")


def test_trailing_bytes_are_found(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"x")
    assert "not a safetensors file, or its header is damaged" in error_of(small)


def test_damage_in_an_array_is_called_by_its_name(small: Path) -> None:
    content = bytearray(small.read_bytes())
    content[-1] ^= 1
    small.write_bytes(content)
    assert error_of(small) == "damaged: its content does not match its SHA-256"


@pytest.mark.parametrize("swap", [("head.weight", "head.waight"), ('\\"width\\":64', '\\"width\\":65')])
def test_the_digest_covers_names_and_meta(small: Path, swap: tuple[str, str]) -> None:
    content = small.read_bytes()
    assert swap[0].encode() in content
    small.write_bytes(content.replace(swap[0].encode(), swap[1].encode()))
    assert "does not match its SHA-256" in error_of(small)


def test_the_digest_covers_shapes_and_dtypes(small: Path) -> None:
    content = small.read_bytes()
    for old, new in ((b"[10,12]", b"[12,10]"), (b'"I8"', b'"U8"')):
        assert content.count(old) == 1
        small.write_bytes(content.replace(old, new))
        assert "does not match its SHA-256" in error_of(small)


def array_header(**changes: object) -> dict:
    return {"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]} | changes}


METADATA = {"format": "intlm-checkpoint", "version": "1", "meta": "{}", "sha256": "0" * 64}

HOSTILE = {
    "text": b"Once upon a time there was a text that is no checkpoint at all.",
    "zeros": bytes(64),
    "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "header over the limit": struct.pack("<Q", HEADER_LIMIT + 1) + bytes(HEADER_LIMIT + 1),
    "not JSON": safetensors_file(b"hello"),
    "not UTF-8": safetensors_file(b'{"\xff":1}'),
    "a list": safetensors_file([]),
    "nested lists": safetensors_file(b"[" * 100_000),
    "nested objects": safetensors_file(b'{"a":' * 100_000),
    "nested metadata": safetensors_file(b'{"__metadata__":' + b'{"a":' * 100_000),
    "huge number": safetensors_file(b'{"a":' + b"9" * 10_000 + b"}"),
    "entry is a number": safetensors_file({"__metadata__": METADATA, "a": 5}),
    "entry is a list": safetensors_file({"__metadata__": METADATA, "a": []}),
    "no offsets": safetensors_file({"__metadata__": METADATA, "a": {"dtype": "I8"}}),
    "one offset": safetensors_file({"__metadata__": METADATA} | array_header(data_offsets=[0]), b"12"),
    "infinite offset": safetensors_file(
        b'{"__metadata__":'
        + json.dumps(METADATA).encode()
        + b',"a":{"dtype":"I8","shape":[2],"data_offsets":[0,Infinity]}}',
        b"12",
    ),
    "negative shape": safetensors_file({"__metadata__": METADATA} | array_header(shape=[-2]), b"12"),
    "overflowing shape": safetensors_file(
        {"__metadata__": METADATA} | array_header(shape=[1 << 40, 1 << 40]), b"12"
    ),
    "empty but huge": safetensors_file(
        {"__metadata__": METADATA} | array_header(dtype="I64", shape=[0, 1 << 62], data_offsets=[0, 0])
    ),
    "100 dimensions": safetensors_file(
        {"__metadata__": METADATA} | array_header(shape=[1] * 99 + [2]), b"12"
    ),
    "hole": safetensors_file({"__metadata__": METADATA} | array_header(data_offsets=[1, 3]), b"123"),
    "overlap": safetensors_file(
        {"__metadata__": METADATA, "b": {"dtype": "I8", "shape": [2], "data_offsets": [1, 3]}}
        | array_header(),
        b"123",
    ),
    "a name twice": safetensors_file(  # both parsers take the last, or an array of floats could slip through
        json.dumps({"__metadata__": METADATA} | array_header(dtype="BF16", shape=[1])).encode()[:-1]
        + b","
        + json.dumps(array_header()).encode()[1:],
        b"12",
    ),
    "odd dtype": safetensors_file({"__metadata__": METADATA} | array_header(dtype=["I8"]), b"12"),
    "long name": safetensors_file({"__metadata__": METADATA, "\n" * 100_000: 5}),
    "long dtype": safetensors_file({"__metadata__": METADATA} | array_header(dtype="\n" * 100_000), b"12"),
    "metadata of numbers": safetensors_file({"__metadata__": METADATA | {"x": 1}}),
    "wrong digest": safetensors_file({"__metadata__": METADATA}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(HOSTILE[name])
    error_of(path)


@given(st.binary(max_size=200) | st.binary(max_size=200).map(safetensors_file))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_garbage_gives_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content)
    error_of(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none") == "does not exist"
    assert error_of(tmp_path) == "is a directory; a checkpoint is a file"
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert error_of(tmp_path / "pipe") == "is not a regular file; a checkpoint is one"
    (tmp_path / "file").write_bytes(b"")
    assert error_of(tmp_path / "file" / "below").startswith("cannot be read: ")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "C64", "BOOL"])
def test_arrays_of_other_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "float"
    header = {"__metadata__": METADATA} | array_header(dtype=dtype, shape=[1], data_offsets=[0, 4])
    path.write_bytes(safetensors_file(header, b"1234"))
    assert error_of(path) == f"array 'a' is '{dtype}'; a checkpoint holds integers only"


def test_a_later_version_says_which(small: Path) -> None:
    header, data = header_of(small.read_bytes())
    header["__metadata__"]["version"] = str(FORMAT_VERSION + 1)
    header["__metadata__"].pop("meta")  # a later version may differ in anything else
    small.write_bytes(safetensors_file(header, data))
    assert error_of(small) == "is of format version 2; this intlm reads up to 1: update intlm"


@pytest.mark.parametrize("version", [b"3", b"9"])
def test_a_flipped_bit_in_the_version_is_damage(small: Path, version: bytes) -> None:
    small.write_bytes(small.read_bytes().replace(b'"version":"1"', b'"version":"' + version + b'"'))
    assert error_of(small) == "damaged: its format version is not what was written"


@pytest.mark.parametrize("version", ["0", "01", "", "one", "-1", "²", "9" * 5000, None, 1])
def test_versions_that_never_were(small: Path, version: object) -> None:
    header, data = header_of(small.read_bytes())
    header["__metadata__"]["version"] = version
    small.write_bytes(safetensors_file(header, data))
    assert error_of(small).startswith("not an intlm checkpoint: ")


def test_other_safetensors_files_are_not_checkpoints(small: Path) -> None:
    for header in ({}, {"__metadata__": {}}, {"__metadata__": {"format": "pt"}}):
        small.write_bytes(safetensors_file(header | array_header(), b"12"))
        assert error_of(small) == "not an intlm checkpoint: its metadata lacks format 'intlm-checkpoint'"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.complex64, object])
def test_only_integers_are_written(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(TypeError, match=r"'x' is .*integers only"):
        write(tmp_path / "a", Checkpoint({"x": np.zeros(2, dtype)}, {}))
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    array = np.zeros(2, np.int8)
    for checkpoint in (
        Checkpoint({"__metadata__": array}, {}),
        Checkpoint({"\ud800": array}, {}),
        Checkpoint({}, {"loss": float("nan")}),
        Checkpoint({}, {"long": "x" * HEADER_LIMIT}),
    ):
        with pytest.raises(ValueError):
            write(tmp_path / "a", checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(
    small: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    content = small.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(InputError) as raised:
        write(small, Checkpoint({}, {"step": 2000}))
    assert str(raised.value) == f"{small}: cannot be written: No space left on device"
    assert small.read_bytes() == content
    assert list(small.parent.iterdir()) == [small]


def test_an_interrupted_write_leaves_the_old_file(small: Path) -> None:
    content = small.read_bytes()

    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(small, chunks())
    assert small.read_bytes() == content
    assert list(small.parent.iterdir()) == [small]


def test_a_killed_write_is_overwritten_by_the_next(small: Path) -> None:
    (small.parent / (small.name + ".tmp")).write_bytes(b"half a checkpoint")
    write(small, SMALL)
    assert same(read(small), SMALL)
    assert list(small.parent.iterdir()) == [small]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_stands_in_place_of_the_temporary_file_is_not_written_to(small: Path, kind: str) -> None:
    temporary, other = small.parent / (small.name + ".tmp"), small.parent / "other"
    other.write_bytes(b"mine")
    if kind == "link":
        temporary.symlink_to(other)
    else:
        os.mkfifo(temporary)
    write(small, SMALL)
    assert same(read(small), SMALL) and not small.is_symlink()
    assert other.read_bytes() == b"mine"
    assert sorted(small.parent.iterdir()) == [other, small]


def test_the_directory_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a"
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write(path, SMALL)


def test_expect(small: Path) -> None:
    checkpoint = read(small)
    wanted = {name: (array.shape, array.dtype) for name, array in checkpoint.arrays.items()}
    expect(checkpoint, wanted, small)
    weight = "head.weight"
    for arrays, message in (
        (wanted | {"more": ((), np.dtype("i1"))}, "array 'more' is missing"),
        ({weight: wanted[weight]}, "array 'empty' is not one of this model's"),
        (
            wanted | {weight: ((10, 64), np.dtype("i1"))},
            "array 'head.weight' is int8 (10, 12); this model takes int8 (10, 64)",
        ),
        (
            wanted | {weight: ((10, 12), np.dtype("i2"))},
            "array 'head.weight' is int8 (10, 12); this model takes int16 (10, 12)",
        ),
    ):
        with pytest.raises(InputError) as raised:
            expect(checkpoint, arrays, small)
        assert str(raised.value) == f"{small}: {message}"
