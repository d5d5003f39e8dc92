"""`intlm data` and `intlm bench data`."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.baselines import compressed_bits_per_byte, own_entropy
from eval.loading import FORMATS, measure_loading
from eval.survey import SAMPLE_BYTES, shown, survey
from intlm.cli import main
from intlm.config import EggrollConfig
from tokenizer import ByteTokenizer
from train.config import TextConfig

TEXTS = [f"document {number}\n" * (1 + number % 7) for number in range(50)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "b.txt").write_bytes(b"\x1b[31m\xff bell \a" + b"x" * 987)
    return tmp_path


def test_figures(here, monkeypatch):
    monkeypatch.setattr("eval.survey.BATCH_BYTES", 2000)
    told = Counter()

    def progress(documents, size):
        told.update(documents=documents, bytes=size)

    found = survey(TextConfig(data=("a.jsonl",)), ByteTokenizer(), "small", EggrollConfig(), progress)
    (one,) = found.surveys
    documents = [text.encode() for text in TEXTS]
    size = sum(map(len, documents))
    assert (one.documents, one.bytes, one.tokens) == (50, size, size + 50)
    assert told == {"documents": 50, "bytes": size}
    assert (one.shortest, one.longest) == (min(map(len, documents)), max(map(len, documents)))
    assert one.lengths == [
        sum(1 << power <= len(document) < 2 << power for document in documents) for power in range(7)
    ]
    assert one.unigram == pytest.approx(own_entropy(documents, 1))
    assert one.trigram == pytest.approx(own_entropy(documents, 3))
    assert one.gzip == pytest.approx(compressed_bits_per_byte(documents)["gzip"], rel=0.1)
    assert found.steps_per_epoch == [-(-(size + 50) // found.tokens_per_step)]
    assert len(one.samples) == 3
    # Neither the order of the corpus nor the size of a batch decides which documents are shown.
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-1]))
    again = survey(TextConfig(data=("a.jsonl",)), ByteTokenizer(), "small", EggrollConfig(), progress)
    assert again.surveys[0].samples == one.samples


def test_a_mixture_by_command_line(here, capsys):
    words = ["data", "a.jsonl=3", "--data", "b.txt", "--set", "population=2", "--set", "segment=4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    a, b = found["surveys"]
    assert [a["weight"], b["weight"]] == [3, 1]
    assert found["tokens_per_step"] == 4
    assert b["bytes"] == 1000
    # When b has been read once, so have 3000 bytes of a.
    assert found["steps_per_epoch"][1] == -(-(3000 * a["tokens"] // a["bytes"] + 1001) // 4)
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "a.jsonl: 50 documents" in table
    assert "weight 3 of 4" in table
    assert "\\x1b[31m\\xff bell \\x07xxx" in table
    assert "\x1b" not in table


def test_the_first_documents(here, capsys):
    assert main(["data", "a.jsonl", "--max-documents", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["surveys"][0]["documents"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "--data: 'nowhere' does not exist"),
        (["a.jsonl=0"], "the weight 0 must be an integer from 1 to 1000000"),
        (["a.jsonl", "--data", "a.jsonl"], "--data a.jsonl: given twice"),
        (["a.jsonl", "--preset", "smal"], "preset: unknown 'smal'; did you mean 'small'?"),
        (["a.jsonl", "--text-field", "body"], "no field 'body'"),
        (["a.jsonl", "--tokenizer", "none.model"], "--tokenizer none.model: no such file"),
        (["a.jsonl", "--max-documents", "-1"], "--max-documents -1: must be 0 or more"),
    ],
)
def test_bad_input(here, capsys, words, message):
    assert main(["data", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@given(st.one_of(st.text().map(str.encode), st.binary()))
def test_what_is_shown_is_one_safe_line(text):
    line = shown(text[:SAMPLE_BYTES])
    assert line.isprintable()
    assert "\n" not in line
    long = shown(("a" + "é€" * SAMPLE_BYTES).encode()[:SAMPLE_BYTES])
    assert long.endswith("é …")


def test_bench_data_measures_every_format():
    results = measure_loading(ByteTokenizer(), EggrollConfig(population=2), lambda line: None, 100_000)
    assert [each.format for each in results] == list(FORMATS)
    for each in results:
        assert each.megabytes_per_second > 0
        assert each.tokens_per_second > 0
