"""How fast text becomes the tokens of steps: reading, splitting, shuffling, tokenizing and packing."""

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from intlm.config import EggrollConfig
from tokenizer import Tokenizer
from train.config import TextConfig
from train.corpus import cut, open_corpus
from train.lanes import Lanes
from train.text import load_text

TEXT_BYTES = 48 << 20
"""Text in each file: more than a window, so that windows are read and shuffled while we look."""
DOCUMENT_BYTES = 4096
FORMATS = ("txt", "jsonl", "jsonl.gz", "parquet")


@dataclass(frozen=True)
class Loading:
    """One format. Rates count bytes of text; megabytes are 10^6 bytes."""

    format: str
    start_seconds: float
    """Until a run knows its held-out text."""
    megabytes_per_second: float
    """From then on, to the tokens of every lane, on the thread that reads ahead and the one that trains."""
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def measure_loading(
    tokenizer: Tokenizer, config: EggrollConfig, say: Callable[[str], None], size: int = TEXT_BYTES
) -> list[Loading]:
    """Write the standard library, cut into documents, in every format to a temporary folder; time an epoch.

    Raises InputError where this Python lacks its source, OSError where the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="intlm-bench-") as folder:
        results = []
        for format in FORMATS:
            say(f"writing {format}")
            path = Path(folder, f"text.{format}")
            _write(path, _documents(size))
            say(f"reading {format}")
            results.append(_measure(path, format, tokenizer, config, size))
            path.unlink()
    return results


def table(results: Sequence[Loading]) -> str:
    """For a terminal."""
    lines = [f"{'format':10s} {'start s':>8s} {'MB/s':>8s} {'tokens/s':>14s}"]
    return "\n".join(
        lines
        + [
            f"{each.format:10s} {each.start_seconds:8.2f} {each.megabytes_per_second:8.1f} "
            f"{each.tokens_per_second:14,.0f}"
            for each in results
        ]
    )


def _documents(size: int) -> Iterable[str]:
    texts = [
        piece.decode(errors="replace")
        for document in open_corpus("stdlib").documents()
        for piece in cut(document, DOCUMENT_BYTES)
    ]
    total = 0
    # Numbered, so that no two are alike.
    for number, text in enumerate(cycle(texts)):
        yield f"{number}\n{text}"
        total += len(text)
        if total >= size:
            return


def _write(path: Path, documents: Iterable[str]) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        remaining = iter(documents)
        with parquet.ParquetWriter(path, schema) as writer:
            while rows := list(islice(remaining, 1000)):
                writer.write_table(pyarrow.table({"text": rows}, schema))
        return
    with (
        gzip.open(path, "wt", 6, "utf-8")
        if path.suffix == ".gz"
        else path.open("w", encoding="utf-8") as file
    ):
        for document in documents:
            file.write(document if path.suffix == ".txt" else json.dumps({"text": document}) + "\n")


def _measure(path: Path, format: str, tokenizer: Tokenizer, config: EggrollConfig, size: int) -> Loading:
    started = time.perf_counter()
    text = load_text(TextConfig(data=(str(path),)))
    opened = time.perf_counter()
    lanes = Lanes(text.stream(config.seed), tokenizer, config.lanes, config.segment)
    steps = 0
    try:
        # Of text: a packed file is smaller, and the first window would be all that is timed.
        while lanes.progress()["text_bytes"] < size and not any(lanes.epochs().values()):
            lanes.next_segment()
            steps += 1
    finally:
        lanes.close()
    seconds = time.perf_counter() - opened
    megabytes = lanes.progress()["text_bytes"] / 1e6
    tokens = steps * config.lanes * config.segment
    return Loading(format, opened - started, megabytes / seconds, tokens / seconds)
