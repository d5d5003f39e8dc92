import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intlm.errors import InputError
from tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_survive_the_round_trip(text):
    tokenizer: Tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint8 and tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokenizer.byte_lengths()[tokens].sum() == len(text)
    assert [made.tolist() for made in tokenizer.encode_batch([text, b"", text], 2)] == [
        list(text),
        [],
        list(text),
    ]
    aligned, lengths = tokenizer.encode_aligned(text)
    assert aligned.tolist() == tokens.tolist() and lengths.tolist() == [1] * len(text)


def test_encoded_tokens_can_be_written_to():
    tokens = ByteTokenizer().encode(b"abc")
    tokens[0] = 0
    assert ByteTokenizer().decode(tokens) == b"\0bc"


def test_byte_lengths_are_all_one():
    lengths = ByteTokenizer().byte_lengths()
    assert lengths.dtype == np.int32 and lengths.tolist() == [1] * 256


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([256], r"^tokens: 256 \(accepted: 0 to 255\)$"),
        ([3, -1], r"^tokens: -1 \(accepted: 0 to 255\)$"),
        ([0.5], r"^tokens: float64 of shape \(1,\) \(accepted: a 1-D array of integers\)$"),
        ([[1, 2]], r"^tokens: int64 of shape \(1, 2\) \(accepted: a 1-D array of integers\)$"),
    ],
)
def test_decode_refuses_what_is_no_token(tokens, message):
    with pytest.raises(InputError, match=message):
        ByteTokenizer().decode(tokens)


def test_saved_tokenizer_is_read_back(tmp_path):
    directory = tmp_path / "run" / "new"
    ByteTokenizer().save(directory)
    assert json.loads((directory / "tokenizer.json").read_text()) == {"kind": "bytes"}
    loaded = load_tokenizer(directory)
    assert (loaded.name, loaded.vocabulary, loaded.separator) == ("bytes", 256, 0)
    assert loaded.digest == ByteTokenizer().digest
    assert len(bytes.fromhex(loaded.digest)) == 32


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.json': no tokenizer can be read here: No such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"tokenizer.json': damaged: not JSON \(at character 2\)$"),
        (b"\xff\xfe\xff", r"tokenizer.json': damaged: not JSON \(no UTF-8 at byte 1\)$"),
        (b"[" * 60_000, r"tokenizer.json': damaged: not JSON of ours \(nested deeper than 32\)$"),
        (b"[]", r"tokenizer.json': damaged: no 'kind' in it \(accepted: bytes, sentencepiece\)$"),
        (
            b'{"kind": ["bytes"]}',
            r"tokenizer.json': damaged: no 'kind' in it \(accepted: bytes, sentencepiece\)$",
        ),
        (
            b'{"kind": "byte"}',
            r"tokenizer.json': kind: unknown 'byte'; did you mean 'bytes'\? \(accepted: bytes, sentencepiece\)$",
        ),
    ],
)
def test_damaged_tokenizer_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
