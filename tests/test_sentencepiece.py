"""Tokenizers of SentencePiece: round trips, other people's models, training, damaged files."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import field_of
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.bits import lay_out
from intlm.cli import main
from intlm.engine.native import available_isas
from intlm.errors import InputError
from tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, open_tokenizer
from tokenizer.inspection import inspect
from tokenizer.model_file import BYTE, CONTROL, LARGEST_FILE, UNKNOWN, ModelFile, _fields
from tokenizer.pieces import BLOCK, cut
from tokenizer.trainer import train

LIBRARY = Path(sysconfig.get_path("stdlib"))
KINDS = ("bpe", "unigram")
VOCABULARY = 700

# Whatever a document is, and what the library treats in ways of its own: spaces at the ends, U+2581, zeros,
# the names of control and byte pieces, broken UTF-8, halves of surrogate pairs.
ODD = [
    b"",
    b" ",
    b"   ",
    b"\n",
    b"\t",
    b"\r\n",
    b"\0",
    b"<s>",
    b"<unk>",
    b"<0x41>",
    b"self.assertEqual",
    b" ==",
]
ODD += [
    b"\xe2\x96\x81",
    b"\xe2\x96",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xef\xbf\xbd",
    "\ue000ﬁ½".encode(),
]
ODD += [b"x" * (BLOCK + 1), b" " * (BLOCK + 1), "é".encode() * BLOCK, b"a b " * BLOCK]
PARTS = st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20), st.sampled_from(ODD))
DOCUMENTS = st.lists(PARTS, max_size=8).map(b"".join)


def documents() -> list[bytes]:
    """About 150 KB of text: documentation, code, and a little in other scripts."""
    names = ("argparse.py", "base64.py", "cmd.py", "textwrap.py")
    other = "Größe, naïve, δοκιμή, проверка, 試験; “quoted” — ½\n" * 20
    return [*[(LIBRARY / name).read_bytes() for name in names], other.encode()]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of ours, and others made with the library's own defaults."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("models")

    def foreign(**settings: object) -> bytes:
        written = io.BytesIO()
        lines = iter(b"".join(documents()).splitlines())
        defaults = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 3}
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines, model_writer=written, **(defaults | settings)
        )
        return written.getvalue()

    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    whole = {"byte_fallback": True, "vocab_size": 600}
    made = {kind: train(documents(), VOCABULARY, kind).model for kind in KINDS}
    made |= {
        "defaults": foreign(),
        "folded": foreign(normalization_rule_name="nmt_nfkc_cf", model_type="bpe"),
        # Like Llama 2's: only the dummy prefix is lost.
        "prefixed": foreign(model_type="bpe", self_test_sample_size=3, **identity, **whole),
        "suffixed": foreign(treat_whitespace_as_suffix=True, **identity, **whole),
        "sentences": foreign(split_by_whitespace=False, add_dummy_prefix=False, **identity, **whole),
        "no_control": foreign(bos_id=-1, eos_id=-1, unk_id=0),
        "end_first": foreign(eos_id=0, bos_id=-1, pad_id=3, unk_id=1, model_type="word", vocab_size=2000),
        "letter": foreign(bos_piece="e", eos_id=-1, model_type="bpe"),
        "small": foreign(vocab_size=130, model_type="char"),
    }
    for name, content in made.items():
        (directory / f"{name}.model").write_bytes(content)
    return {name: directory / f"{name}.model" for name in made}


LOSSLESS = ("bpe", "unigram", "sentences", "suffixed")
FOREIGN = (
    "defaults",
    "folded",
    "prefixed",
    "suffixed",
    "sentences",
    "no_control",
    "end_first",
    "letter",
    "small",
)


@pytest.fixture(scope="session")
def tokenizers(models: dict[str, Path]) -> dict[str, SentencePieceTokenizer]:
    return {name: SentencePieceTokenizer.read(path) for name, path in models.items()}


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=DOCUMENTS)
def test_any_bytes_survive_the_round_trip(
    tokenizers: dict[str, SentencePieceTokenizer], name: str, text: bytes
) -> None:
    tokenizer = tokenizers[name]
    assert not tokenizer.loss
    tokens = tokenizer.encode(text)
    assert tokens.ndim == 1 and tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens.tolist()) == text
    assert (tokens != tokenizer.separator).all()
    assert tokenizer.byte_lengths()[tokens].sum() == len(text)
    # Tokens that are decoded one by one, as they are sampled, are the same text.
    assert b"".join(
        tokenizer.decode(tokens[i : i + 1]) for i in range(min(len(tokens), 50))
    ) == tokenizer.decode(tokens[:50])


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_survives(tokenizers: dict[str, SentencePieceTokenizer], kind: str) -> None:
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = [
        b"".join(f"a{chr(point)}".encode() for point in points[i : i + 999])
        for i in range(0, len(points), 999)
    ]
    tokenizer = tokenizers[kind]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts, 2), strict=True):
        assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("name", [*KINDS, *FOREIGN])
@settings(max_examples=30)
@given(texts=st.lists(DOCUMENTS, max_size=4))
def test_a_batch_is_its_documents_and_threads_change_nothing(
    tokenizers: dict[str, SentencePieceTokenizer], name: str, texts: list[bytes]
) -> None:
    tokenizer = tokenizers[name]
    for threads in (1, 3):
        made = tokenizer.encode_batch(texts, threads)
        assert [tokens.tolist() for tokens in made] == [tokenizer.encode(text).tolist() for text in texts]


@pytest.mark.parametrize("name", [*KINDS, *FOREIGN])
@settings(max_examples=30)
@given(text=DOCUMENTS)
def test_every_byte_of_raw_text_is_counted_once(
    tokenizers: dict[str, SentencePieceTokenizer], name: str, text: bytes
) -> None:
    tokenizer = tokenizers[name]
    tokens, lengths = tokenizer.encode_aligned(text)
    assert tokens.tolist() == tokenizer.encode(text).tolist()
    assert lengths.shape == tokens.shape and lengths.dtype == np.int32
    assert (lengths >= 0).all()
    assert lengths.sum() == (len(text) if len(tokens) else 0)
    assert (tokens != tokenizer.separator).all() and (tokens < tokenizer.vocabulary).all()
    if name in LOSSLESS:
        assert lengths.tolist() == tokenizer.byte_lengths()[tokens].tolist()


@pytest.mark.parametrize("name", [*KINDS, *FOREIGN])
def test_the_same_text_has_the_same_bytes_under_every_tokenizer(
    tokenizers: dict[str, SentencePieceTokenizer], name: str
) -> None:
    texts = [*documents(), b"  two  spaces\n\n", "ﬁ\u3000½ ".encode(), b"\xff\xfe broken"]
    expected = lay_out(texts, ByteTokenizer())
    assert expected.bytes == sum(map(len, texts))
    laid_out = lay_out(texts, tokenizers[name])
    assert laid_out.bytes == expected.bytes
    assert laid_out.counted_NxS.sum() == sum(len(tokenizers[name].encode(text)) for text in texts)
    # The part that training looks at has the bytes of its own tokens.
    part = lay_out(texts, tokenizers[name], 500)
    _, lengths = tokenizers[name].encode_aligned(texts[0])
    assert part.bytes == lengths[:499].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_gives_the_same_pieces(models: dict[str, Path], kind: str) -> None:
    """Blocks are cut where no piece can lie across."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(models[kind]))
    tokenizer = SentencePieceTokenizer.read(models[kind])
    for text in documents():
        expected = processor.Encode(text, return_type="numpy")
        tokens = tokenizer.encode(text)
        assert len(text) > BLOCK or len(tokens) < 3000
        if kind == "bpe":
            assert tokens.tolist() == expected.tolist()
        else:
            # The library adds up scores in 32 bits, in which ties over a long text are broken by chance.
            assert abs(len(tokens) - len(expected)) <= len(expected) // 1000


def test_token_0_is_the_separator(tokenizers: dict[str, SentencePieceTokenizer]) -> None:
    expected = {
        "bpe": "<s>",
        "defaults": "<s>",
        "no_control": "<separator>",
        "end_first": "</s>",
        "letter": "<separator>",
    }
    for name, tokenizer in tokenizers.items():
        file = tokenizer.file
        assert tokenizer.separator == 0
        assert tokenizer.pieces[0] == (expected.get(name, "<s>"), CONTROL)
        assert tokenizer.decode([0]) == b"" and tokenizer.byte_lengths()[0] == 0
        # All the others are there once, in the file's order.
        rest = [piece.text for piece in file.pieces if piece.text != tokenizer.pieces[0][0]]
        assert [text for text, _ in tokenizer.pieces[1:]] == rest
        assert tokenizer.vocabulary == 1 + len(rest)
        assert tokenizer.encode(b"").dtype == (np.uint8 if tokenizer.vocabulary <= 256 else np.uint16)
    assert tokenizers["small"].vocabulary <= 256


def test_what_is_lost_is_told(tokenizers: dict[str, SentencePieceTokenizer]) -> None:
    prefix, drops = (
        "it puts a space before each document",
        "it drops spaces that are repeated or stand at the end",
    )
    lacks = "it has no byte pieces for what its vocabulary lacks"
    assert {name: tokenizer.loss for name, tokenizer in tokenizers.items() if tokenizer.loss} == {
        "prefixed": prefix,
        "folded": f"it normalises text (nmt_nfkc_cf), {drops}, {prefix}, {lacks}",
        **{
            name: f"it normalises text (nmt_nfkc), {drops}, {prefix}, {lacks}"
            for name in ("defaults", "no_control", "end_first", "letter", "small")
        },
    }
    assert "\n" not in "".join(tokenizer.loss for tokenizer in tokenizers.values())


@given(text=DOCUMENTS)
def test_a_dummy_prefix_is_put_once_and_at_the_front(
    tokenizers: dict[str, SentencePieceTokenizer], text: bytes
) -> None:
    tokenizer = tokenizers["prefixed"]
    assert tokenizer.decode(tokenizer.encode(text)) == (b" " + text if text else b"")


def test_foreign_models_encode_as_the_library_does(models: dict[str, Path]) -> None:
    import sentencepiece

    text = b"".join(documents())
    for name in ("defaults", "folded", "prefixed", "no_control", "letter", "small"):
        tokenizer = SentencePieceTokenizer.read(models[name])
        processor = sentencepiece.SentencePieceProcessor(model_file=str(models[name]))
        for line in [*text.splitlines()[:500], b"  a   b  ", "ﬁ½ \u3000 漢字".encode(), text[:3000]]:
            pieces = [tokenizer.pieces[token][0] for token in tokenizer.encode(line)]
            assert pieces == [
                processor.IdToPiece(int(i)) for i in processor.Encode(line, return_type="numpy")
            ]
        tokens, whole = tokenizer.encode(text), processor.Encode(text, return_type="numpy")
        assert abs(len(tokens) - len(whole)) <= len(whole) // 1000


def test_unknown_characters_have_a_token(tokenizers: dict[str, SentencePieceTokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        if name in (*LOSSLESS, "prefixed"):
            assert tokenizer.unknown == -1
        else:
            assert tokenizer.pieces[tokenizer.unknown] == ("<unk>", UNKNOWN)
            assert tokenizer.unknown in tokenizer.encode("a 龍 b".encode())
            assert tokenizer.decode([tokenizer.unknown]) == " \u2047 ".encode()


@pytest.mark.parametrize("tokens", [[-1], [VOCABULARY], [0.5], [[1]]])
def test_decode_refuses_what_is_no_token(
    tokenizers: dict[str, SentencePieceTokenizer], tokens: list[object]
) -> None:
    with pytest.raises(InputError, match=r"^tokens: "):
        tokenizers["bpe"].decode(tokens)


@given(text=DOCUMENTS, size=st.integers(4, 40), at_spaces=st.booleans())
def test_cut(text: bytes, size: int, at_spaces: bool) -> None:
    blocks = list(cut(text[:5000], size, at_spaces))
    assert b"".join(blocks) == text[:5000]
    assert all(0 < len(block) <= size for block in blocks)
    try:
        text[:5000].decode()
    except UnicodeDecodeError:
        return
    for block in blocks:
        block.decode()


def test_cut_prefers_spaces_then_lines() -> None:
    assert list(cut(b"one  two three", 8, True)) == [b"one", b"  two", b" three"]
    assert list(cut(b"one  two three", 8)) == [b"one  two", b" three"]
    assert list(cut(b"one\ntwo\nthree", 9)) == [b"one\ntwo\n", b"three"]
    assert list(cut(b" " * 9, 4, True)) == [b"    ", b"    ", b" "]


def test_a_saved_tokenizer_is_read_back(models: dict[str, Path], tmp_path: Path) -> None:
    digests = set()
    for name, path in models.items():
        tokenizer = SentencePieceTokenizer.read(path)
        tokenizer.save(tmp_path / name)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "tokenizer.json",
            "tokenizer.model",
        ]
        assert (tmp_path / name / "tokenizer.model").read_bytes() == path.read_bytes()
        loaded = load_tokenizer(tmp_path / name)
        assert isinstance(loaded, SentencePieceTokenizer)
        assert (loaded.name, loaded.digest) == (tokenizer.name, tokenizer.digest)
        assert loaded.encode(b"of the rest").tolist() == tokenizer.encode(b"of the rest").tolist()
        assert len(bytes.fromhex(loaded.digest)) == 32
        digests.add(loaded.digest)
    assert len(digests) == len(models)


def test_damaged_runs_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer.read(models["bpe"])
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_bytes())
    for change, message in (
        ({"format": 2}, r"tokenizer.json: format 2 \(accepted: 1\)$"),
        ({"sha256": "0" * 64}, r"tokenizer.model: damaged, or another file: its SHA-256 is not that of"),
        ({"sha256": None}, r"tokenizer.model: damaged, or another file"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved | change))
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(models["bpe"].read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tokenizer.model: damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"tokenizer.model: cannot be read: No such file"):
        load_tokenizer(tmp_path)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        open_tokenizer(str(path))
    message = str(raised.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


def test_files_that_are_no_model(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    assert "no such file" in refusal(path)
    assert "a directory without tokenizer.json" in refusal(tmp_path)
    good = models["bpe"].read_bytes()
    spelled = good.replace(b"<0x41>", b"<0x4g>")
    for content in (
        b"",
        b"\0",
        b"hello\n",
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\x7f",
        good[:-1],
        good[5:],
        spelled,
    ):
        path.write_bytes(content)
        assert "damaged, or no SentencePiece model" in refusal(path)
    path.write_bytes(good.replace(b"<0x41>", b"<0x42>"))
    assert "damaged, or no SentencePiece model" in refusal(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert f"too large for a SentencePiece model (accepted: {LARGEST_FILE} bytes)" in refusal(path)
    piece = b"\x0a\x03abc\x15\0\0\0\0"
    many = b"".join(b"\x0a\x0f\x0a\x08%08d\x15\0\0\0\0" % number for number in range(70_000))
    path.write_bytes(many)
    assert "70,000 pieces (accepted: up to 65,536)" in refusal(path)
    # As many as there may be, and none for the separator.
    path.write_bytes(b"\x0a\x09\x0a\x05<unk>\x18\x02" + many[: 17 * 65_535])
    assert "65,537 tokens with the separator (accepted: up to 65,536)" in refusal(path)
    path.write_bytes(b"\x0a" + bytes([len(piece)]) + piece)
    assert "unk is not defined" in refusal(path)


def test_a_replacement_without_end_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    rules = (4).to_bytes(4, "little") + bytes(4) + b"x" * 5000
    size = len(rules)
    spec = b"\x12" + bytes([size & 127 | 128, size >> 7]) + rules
    size = len(spec)
    (tmp_path / "x.model").write_bytes(
        models["bpe"].read_bytes() + b"\x1a" + bytes([size & 127 | 128, size >> 7]) + spec
    )
    assert "damaged" in refusal(tmp_path / "x.model")


MANY = {
    "messages of settings": field_of(3, b"") * 9,
    "fields that nobody knows": field_of(99, 0) * 140_000,
    "fields of a piece": field_of(1, field_of(3, 1) * 4 + field_of(1, b"abcd")),
    "fields of the trainer": field_of(2, field_of(99, 0) * 65_537),
    "letters in a piece": field_of(1, field_of(1, b"x" * 4097)),
    "letters in what an unknown piece is decoded to": field_of(2, field_of(44, b"x" * 4097)),
    "rules": field_of(3, field_of(2, bytes((8 << 20) + 1))),
    "text in place of a flag": field_of(3, field_of(3, b"")),
}


@pytest.mark.parametrize("name", MANY)
def test_models_without_end_are_refused(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(models["bpe"].read_bytes() + MANY[name])
    assert "damaged, or no SentencePiece model" in refusal(path)


def test_a_model_without_a_piece_for_a_space_is_not_lossless(models: dict[str, Path]) -> None:
    """It spells a space as the bytes of U+2581."""
    good = models["bpe"].read_bytes()
    space = next(
        raw
        for _, value, raw in _fields(good)
        if isinstance(value, bytes) and value[:5] == b"\n\x03\xe2\x96\x81"
    )
    tokenizer = SentencePieceTokenizer(ModelFile.parse(good.replace(space, b""), ""), "")
    assert tokenizer.loss == "it has no piece for a space"
    tokens, lengths = tokenizer.encode_aligned(b"def f(x)")
    assert lengths.sum() == 8 and len(tokens)


def test_models_with_much_are_read(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    more = field_of(3, b"") * 3 + field_of(99, 0) * 100_000 + field_of(2, field_of(99, 0) * 60_000)
    path.write_bytes(
        models["bpe"].read_bytes() + more + field_of(1, field_of(1, b"x" * 4096) + field_of(2, bytes(4), 5))
    )
    assert open_tokenizer(str(path)).vocabulary == VOCABULARY + 1


def damaged(good: bytes, seed: int) -> bytes:
    source = random.Random(seed)
    content = bytearray(good)
    for _ in range(source.choice([1, 1, 2, 8, 64])):
        content += b"x" * (not content)
        place = source.choice([source.randrange(len(content)), source.randrange(min(len(content), 200))])
        match source.randrange(5):
            case 0:
                content[place] ^= 1 << source.randrange(8)
            case 1:
                content[place] = source.choice([0, 127, 128, 255])
            case 2:
                del content[place : place + source.randrange(1, 9)]
            case 3:
                content[place:place] = source.randbytes(source.randrange(1, 9))
            case 4:
                del content[place + 1 :]
    return bytes(content)


@pytest.mark.parametrize("name", ["bpe", "unigram", "defaults"])
def test_damaged_models(models: dict[str, Path], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """They are refused, or they work as well as any other model."""
    good = models[name].read_bytes()
    refused = 0
    for seed in range(150):
        try:
            tokenizer = SentencePieceTokenizer(ModelFile.parse(damaged(good, seed), "a file"), "a file")
        except InputError as error:
            assert str(error).startswith("a file: ") and "\n" not in str(error)
            refused += 1
            continue
        for text in (b"def f(x):\n    return  x", "ﬁ½ \u3000 漢字".encode(), b"\xff\0\xe2\x96\x81"):
            tokens, lengths = tokenizer.encode_aligned(text)
            assert lengths.sum() == (len(text) if len(tokens) else 0)
            assert (tokens != 0).all()
            decoded = tokenizer.decode(tokens)
            assert tokenizer.loss or decoded == text
    assert refused > 50
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable(models: dict[str, Path], kind: str) -> None:
    again = train(iter(documents()), VOCABULARY, kind)
    assert again.model == models[kind].read_bytes()
    assert again.used == again.read == sum(map(len, documents()))
    assert again.documents == len(documents()) and not again.skipped and not again.stopped
    file = ModelFile.parse(again.model, "")
    assert len(file.pieces) == VOCABULARY
    assert sum(piece.type == BYTE for piece in file.pieces) == 256
    assert file.kind == kind and file.byte_fallback
    assert not (file.normalization or file.dummy_prefix or file.removes_spaces)


def test_training_says_what_it_leaves_out() -> None:
    bad = b"\xff\xfe" + "\u2581\u2585".encode() + b"\0"
    lines: list[str] = []
    seen: list[int] = []
    texts = [*documents(), bad, b"x" * 100_000]
    result = train(texts, VOCABULARY, "bpe", progress=seen.append, say=lines.append)
    assert result.skipped == {"not UTF-8": 2, "reserved characters": 7}
    assert result.read == sum(map(len, texts)) == result.used + 9
    assert seen == sorted(seen) and seen[-1] == result.read
    assert lines == [f"fitting 700 pieces to {result.used:,} bytes"]
    part = train(texts, VOCABULARY, "bpe", most_bytes=150_001)
    assert part.stopped and 149_000 < part.read <= 150_001
    assert part.model == train([b"", *texts], VOCABULARY, "bpe", most_bytes=150_001).model


def test_every_byte_reaches_the_trainer() -> None:
    """Lines longer than the library's limit, line ends at the end of a block, nothing but one line."""
    rare = "ŧ".encode()
    for text in (
        b"word " * 3000 + rare * 40,
        b"word\n" * 3000 + (rare + b"\n\n") * 40,
        b"a" * 9000 + rare * 40,
    ):
        model = train(
            [text + b" the quick brown fox" * 50, *documents()], VOCABULARY, "bpe", coverage=1
        ).model
        assert "ŧ" in {piece.text for piece in ModelFile.parse(model, "").pieces}
    endings = train([b"a;\n\n" * 5000, *documents()], VOCABULARY, "bpe").model
    assert ";\n\n" in {piece.text for piece in ModelFile.parse(endings, "").pieces}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_does_not_fit(kind: str) -> None:
    texts = documents()[2:3]
    with pytest.raises(
        InputError, match=r"^--vocab 60000: too large for this text \(accepted: up to \d+\)$"
    ) as error:
        train(texts, 60000, kind)
    most = int(str(error.value).split()[-1].rstrip(")"))
    assert len(ModelFile.parse(train(texts, most, kind).model, "").pieces) == most
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 1000))).encode()
    with pytest.raises(
        InputError, match=r"^--vocab 600: too small for the characters of this text \(accepted: 1\d\d\d or"
    ):
        train([*texts, many * 9], 600, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bpf"}, r"^--model bpf: unknown \(accepted: bpe, unigram\)$"),
        ({"vocabulary": 511}, r"^--vocab 511: must be from 512 to 65536$"),
        ({"vocabulary": 65537}, r"^--vocab 65537: must be from 512 to 65536$"),
        ({"coverage": 0.5}, r"^--character-coverage 0.5: must be from 0.98 to 1$"),
        ({"coverage": float("nan")}, r"^--character-coverage nan: must be from 0.98 to 1$"),
        ({"most_bytes": -1}, r"^--max-bytes -1: must be 0 or more$"),
        ({"documents": []}, r"^--data: has no text to train a tokenizer on"),
        ({"documents": [b"", b"\xff\0"]}, r"^--data: has no text to train a tokenizer on"),
        ({"documents": [b"short"]}, r"^--data: too little text: 5 bytes make a vocabulary of \d+ at most"),
    ],
)
def test_training_refuses(options: dict[str, object], message: str) -> None:
    settings = {"documents": [b"text"], "vocabulary": 512, "kind": "bpe"} | options
    with pytest.raises(InputError, match=message):
        train(**settings)  # type: ignore[arg-type]


def test_an_error_in_the_documents_comes_through() -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield b"text " * 1000
        raise InputError("--data: line 7 is broken")

    with pytest.raises(InputError, match=r"^--data: line 7 is broken$"):
        train(broken(), 512, "unigram")


def test_inspection(tokenizers: dict[str, SentencePieceTokenizer]) -> None:
    text = documents()
    for name in ("bpe", "unigram", "defaults"):
        found = inspect(tokenizers[name], text)
        figures = found.text
        assert figures is not None
        tokens = np.concatenate([tokenizers[name].encode(document) for document in text])
        assert (figures.documents, figures.bytes) == (len(text), sum(map(len, text)))
        assert figures.tokens == len(tokens)
        assert figures.bytes_per_token == figures.bytes / figures.tokens > 1.5
        assert figures.vocabulary_used == len(set(tokens)) / sum(
            type_ != CONTROL for _, type_ in tokenizers[name].pieces
        )
        assert found.lossless == (name != "defaults")
        assert sum(count for _, count in figures.most_frequent) <= figures.tokens
        for word in (found.name, f"{figures.bytes:,}", f"{figures.tokens:,}", found.digest):
            assert word in found.table()
        assert json.loads(json.dumps(found.as_dict()))["text"]["tokens"] == figures.tokens
    spelled = inspect(tokenizers["bpe"], [b"\xff" * 30 + b"the" * 30]).text
    assert spelled is not None and 0.25 <= spelled.bytes_spelled < 0.5
    whole = inspect(ByteTokenizer(), [b"aab"]).text
    assert whole is not None and whole.most_frequent == [("<0x61>", 2), ("<0x62>", 1)]
    with pytest.raises(InputError, match="is empty"):
        inspect(tokenizers["bpe"], [])


# The command line, in processes of its own.

TRAIN = ["--set", "population=16", "--set", "segment=8", "--evaluate-every", "10", "--checkpoint-every", "10"]
RUN = ["train", "tiny", "--data", "text", *TRAIN, "--engine", "reference", "--steps", "20"]


def start(home: Path, *words: str) -> subprocess.Popen[bytes]:
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-m", "intlm", *words], cwd=home, **pipes)


def run(home: Path, *words: str, code: int = 0, given: bytes = b"", err: bytes = b"") -> bytes:
    process = start(home, *words)
    out, said = process.communicate(given, timeout=300)
    assert process.returncode == code, said.decode()
    assert code or said == err, said.decode()
    return said if code else out


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process: exit code, output, errors."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        capfd.readouterr()
        code = main(list(words))
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def home(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "text").mkdir()
    for number, document in enumerate(documents()):
        (home / "text" / f"{number}.txt").write_bytes(document)
    for name in ("defaults", "unigram"):
        (home / f"{name}.model").write_bytes(models[name].read_bytes())
    words = ["--data", "text", "--vocab", str(VOCABULARY), "--model", "bpe", "--out", "bpe.model"]
    out = run(home, "tokenizer", "train", *words)
    size = sum(map(len, documents()))
    assert out.decode() == (
        f"bpe.model: bpe, 700 tokens; read {size:,} bytes in {len(documents())} documents; used {size:,}, "
        "skipped none\n"
    )
    assert (home / "bpe.model").read_bytes() == models["bpe"].read_bytes()
    assert run(home, *RUN, "--tokenizer", "bpe.model", "--run", "whole").startswith(
        b"runs/whole: step 20 of 20; "
    )
    return home


def last(home: Path, name: str) -> bytes:
    return max((home / "runs" / name / "checkpoints").iterdir()).read_bytes()


def test_a_run_keeps_its_tokenizer(home: Path) -> None:
    directory = home / "runs/whole"
    assert (directory / "tokenizer.model").read_bytes() == (home / "bpe.model").read_bytes()
    config = json.loads((directory / "config.json").read_bytes())
    assert config["model"]["vocabulary"] == VOCABULARY
    assert config["tokenizer"] == SentencePieceTokenizer.read(home / "bpe.model").name


def test_a_killed_run_goes_on_to_the_same_bytes(home: Path) -> None:
    words = [*RUN, "--tokenizer", "bpe.model", "--run", "killed"]
    process = start(home, *words)
    limit = time.monotonic() + 300
    while not (home / "runs/killed/checkpoints/step-00000010.safetensors").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run(home, *words)
    assert last(home, "killed") == last(home, "whole")


def test_engines_agree_on_the_vocabulary(home: Path) -> None:
    words = ["train", "tiny", "--data", "text", "--set", "population=4", "--set", "segment=4", "--steps", "3"]
    other = "native" if available_isas() else "xla"
    for engine in ("reference", other):
        run(home, *words, "--tokenizer", "bpe.model", "--engine", engine, "--run", f"short-{engine}")
    assert last(home, "short-reference") == last(home, f"short-{other}")


def test_another_tokenizer_is_refused(home: Path, call: Call) -> None:
    before = last(home, "whole")
    for words in (["--tokenizer", "unigram.model"], ["--tokenizer", "bytes"], []):
        code, out, err = call(*RUN, *words, "--run", "whole")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("intlm: runs/whole: the run has another configuration: tokenizer: run has ")
    for words in (["train"], [*RUN, "--tokenizer", "runs/whole"]):
        assert "done already" in call(*words, "--run", "whole")[1]
    assert last(home, "whole") == before


def test_a_run_with_another_model_file_is_refused(home: Path, call: Call) -> None:
    shutil.copytree(home / "runs/whole", home / "runs/swapped")
    SentencePieceTokenizer.read(home / "unigram.model").save(home / "runs/swapped")
    code, _, err = call("sample", "swapped")
    assert code == 2 and "runs/swapped/config.json: key tokenizer=sentencepiece bpe 700 " in err


def test_sampling_and_evaluation(home: Path, call: Call) -> None:
    prompt = "def naïve_漢(self"
    words = ["sample", "whole", "--engine", "reference", "--tokens", "30", "--prompt", prompt]
    code, text, err = call(*words)
    assert (code, err) == (0, "")
    assert text.startswith(prompt) and len(text) > len(prompt) + 20
    assert run(home, *words) == text.encode()
    result = json.loads(call("eval", "whole", "--engine", "reference", "--data", "text", "--json")[1])
    assert result["bytes"] == sum(map(len, documents()))
    assert 0 < result["bits_per_byte"] < 8


def test_a_tokenizer_that_loses_text(home: Path, call: Call) -> None:
    tokenizer = SentencePieceTokenizer.read(home / "defaults.model")
    line = f"intlm: the tokenizer ({tokenizer.name}) is not lossless: {tokenizer.loss}\n"
    words = ["train", "tiny", "--data", "text", *TRAIN, "--engine", "reference", "--steps", "2"]
    code, _, err = call(*words, "--tokenizer", "defaults.model", "--run", "foreign")
    assert (code, err) == (0, line)
    result = json.loads(call("eval", "foreign", "--engine", "reference", "--data", "text", "--json")[1])
    assert result["bytes"] == sum(map(len, documents()))
    sample = ["sample", "foreign", "--engine", "reference", "--tokens", "3", "--prompt"]
    assert call(*sample, "the parser")[1].startswith("the parser")
    assert call(*sample, "a 龍 b") == (
        2,
        "",
        f"intlm: --prompt: '龍' is not in the run's tokenizer ({tokenizer.name})\n",
    )


def test_encode_and_decode(home: Path) -> None:
    text = b" two  spaces\n\tand \xff\0 naive\xcc\x88\n"
    numbers = run(home, "tokenizer", "encode", "bpe.model", given=text)
    assert run(home, "tokenizer", "decode", "bpe.model", given=numbers) == text
    (home / "text.txt").write_bytes(text)
    (home / "numbers.txt").write_bytes(numbers)
    assert run(home, "tokenizer", "encode", "runs/whole", "text.txt") == numbers
    assert run(home, "tokenizer", "decode", "runs/whole", "numbers.txt") == text
    pieces = run(home, "tokenizer", "encode", "bpe.model", "text.txt", "--pieces").decode()
    assert len(pieces.split()) == len(numbers.split()) and "<0xFF>" in pieces
    assert run(home, "tokenizer", "encode", "bytes", given=b"ab") == b"97 98\n"


def test_inspect(call: Call) -> None:
    found = json.loads(call("tokenizer", "inspect", "bpe.model", "--data", "text", "--json")[1])
    assert found["lossless"] and found["vocabulary"] == VOCABULARY
    assert found["text"]["bytes"] == sum(map(len, documents()))
    table = call("tokenizer", "inspect", "defaults.model")[1]
    assert "nmt_nfkc" in table and "no: it normalises text" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["trian"], "tokenizer command: unknown 'trian'; did you mean 'train'?"),
        (["train", "--data", "text", "--out", "x", "--voc", "9"], "unknown '--voc'; did you mean '--vocab'?"),
        (["train", "--data", "text", "--out", "x", "--vocab", "many"], "--vocab many: expected an integer"),
        (["train", "--data", "text", "--out", "x", "--vocab", "9"], "--vocab 9: must be from 512 to 65536"),
        (["train", "--data", "text", "--out", "x", "--vocab", "60000"], "--vocab 60000: too large for this text"),
        (["train", "--data", "text", "--out", "x", "--model", "wordpiece"], "--model wordpiece: unknown"),
        (["train", "--data", "text", "--out", "x", "--character-coverage", "all"], "--character-coverage all: "),
        (["train", "--data", "nothing", "--out", "x"], "--data: 'nothing' does not exist"),
        (["train", "--data", "text", "--out", "."], "--out .: is a directory"),
        (["train", "--data", "text", "--out", "no/x"], "--out no/x: its directory does not exist"),
        (["encode", "nothing"], "MODEL nothing: no such file"),
        (["encode", "text/0.txt"], "MODEL text/0.txt: damaged, or no SentencePiece model"),
        (["encode", "bpe.model", "nothing"], "FILE nothing: No such file"),
        (["decode", "bpe.model"], "FILE: word 2, 'x', is no token (accepted: 0 to 699)"),
        (["inspect", "bpe.model", "--data", "nothing"], "--data: 'nothing' does not exist"),
    ],
)  # fmt: skip
def test_bad_input(
    home: Path, call: Call, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1 x")))
    try:
        code, out, err = call("tokenizer", *words)
    except SystemExit as left:  # argparse's own way
        assert left.code == 2
        return
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (home / "x").exists()


def test_bad_tokenizers_of_a_run(home: Path, call: Call) -> None:
    for name, message in (
        ("nothing", "--tokenizer nothing: no such file (accepted: 'bytes', a .model file of SentencePiece"),
        ("text", "--tokenizer text: a directory without tokenizer.json"),
        ("text/0.txt", "--tokenizer text/0.txt: damaged, or no SentencePiece model"),
    ):
        code, _, err = call(*RUN, "--run", "new", "--tokenizer", name)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not (home / "runs/new").exists()


def test_training_can_be_stopped(home: Path) -> None:
    process = start(
        home, "tokenizer", "train", "--data", "stdlib", "--model", "unigram", "--out", "stopped.model"
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and err == b""
    assert not (home / "stopped.model").exists()


@pytest.mark.parametrize("command", ["train", "encode", "decode", "inspect"])
def test_help(home: Path, command: str) -> None:
    text = run(home, "tokenizer", command, "--help").decode()
    assert text.startswith(f"usage: intlm tokenizer {command}")
    assert "None" not in text and max(map(len, text.splitlines())) < 120
