"""What is in a corpus: how much, how long its documents are, and what simple models make of it."""

import heapq
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.baselines import MAXIMUM_ORDER, by_order, entropy, ngram_counts
from intlm.config import EggrollConfig
from intlm.errors import InputError
from tokenizer import Tokenizer
from train.config import TextConfig, parse_data
from train.split import Split, content_key
from train.text import open_limited

BATCH_BYTES = 16 << 20
"""Text whose n-grams are counted at once: counts take 128 MiB, so that small batches would cost more."""
SAMPLES = 3
SAMPLE_BYTES = 300
BAR = 40


@dataclass(frozen=True)
class Survey:
    """One corpus. Bits per byte are of all its text, by its own counts, and by gzip -9."""

    name: str
    weight: int
    documents: int
    bytes: int
    tokens: int
    """Separators included."""
    held_out_documents: int
    """By the rule for a part of --data; single files are cut into blocks first, see docs/data.md."""
    shortest: int
    longest: int
    lengths: list[int]
    """lengths[i]: documents of 2^i to 2^(i+1) - 1 bytes."""
    unigram: float
    bigram: float
    trigram: float
    gzip: float
    samples: list[str]
    """Starts of a few documents, chosen by their hash; what cannot be shown is escaped."""


@dataclass(frozen=True)
class Report:
    """Surveys of a mixture, and what an epoch of each corpus is for a preset."""

    surveys: list[Survey]
    tokenizer: str
    preset: str
    tokens_per_step: int
    steps_per_epoch: list[int]
    """By corpus: steps until the mixture has gone once through all its text, held-out text included."""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def table(self) -> str:
        """For a terminal."""
        lines = []
        weights = sum(each.weight for each in self.surveys)
        for survey, steps in zip(self.surveys, self.steps_per_epoch, strict=True):
            share = f", weight {survey.weight} of {weights}" if len(self.surveys) > 1 else ""
            lines += [
                f"{survey.name}: {survey.documents:,} documents, {survey.bytes:,} bytes, "
                f"{survey.tokens:,} tokens ({self.tokenizer}, {survey.bytes / survey.tokens:.2f} bytes a token)",
                f"lengths: {survey.shortest:,} to {survey.longest:,} bytes, on average "
                f"{survey.bytes // survey.documents:,}",
                *_histogram(survey.lengths),
                f"bits per byte by its own counts: unigram {survey.unigram:.3f}, bigram {survey.bigram:.3f}, "
                f"trigram {survey.trigram:.3f}; gzip -9 {survey.gzip:.3f}",
                f"an epoch with the preset {self.preset} ({self.tokens_per_step:,} tokens a step{share}): "
                f"{steps:,} steps",
                "documents, chosen by their hash:",
                *(f"  {sample}" for sample in survey.samples),
                "",
            ]
        return "\n".join(lines[:-1])


def survey(
    config: TextConfig,
    tokenizer: Tokenizer,
    preset: str,
    eggroll: EggrollConfig,
    progress: Callable[[int, int], None],
) -> Report:
    """Read every corpus of `config` to its end, in bounded memory. Raises InputError.

    `progress` is told of further documents and bytes.
    """
    surveys = []
    for data in config.data:
        name, weight = parse_data(data)
        corpus = open_limited(name, config)
        surveys.append(_survey(corpus.name, weight, corpus.documents(), tokenizer, progress))
    per_step = eggroll.lanes * eggroll.segment
    steps = []
    for each in surveys:
        # The mixture's tokens until this corpus has been read once.
        tokens = sum(
            each.bytes * other.weight * other.tokens // (each.weight * other.bytes) for other in surveys
        )
        steps.append(-(-tokens // per_step))
    return Report(surveys, tokenizer.name, preset, per_step, steps)


def _survey(
    name: str,
    weight: int,
    documents: Iterator[bytes],
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None],
) -> Survey:
    counts = np.zeros(256**MAXIMUM_ORDER, np.int64)
    lengths = np.zeros(64, np.int64)
    packer = zlib.compressobj(9, wbits=31)
    split = Split()
    packed = total = tokens = held_out = shortest = longest = number = 0
    # The smallest hashes: a choice that the order of the corpus does not matter to. Negated for a heap.
    chosen: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    for batch in _batches(documents):
        counts += ngram_counts(batch, MAXIMUM_ORDER)
        tokens += sum(1 + len(each) for each in tokenizer.encode_batch(batch))
        size = 0
        for document in batch:
            size += len(document)
            lengths[len(document).bit_length() - 1] += 1
            packed += len(packer.compress(document))
            key = content_key(document)
            held_out += split.holds_out_key(key)
            rank = -int.from_bytes(key[8:16])
            if (len(chosen) < SAMPLES or rank > chosen[0][0]) and rank not in seen:
                seen.add(rank)
                heapq.heappush(chosen, (rank, document[:SAMPLE_BYTES]))
                if len(chosen) > SAMPLES:
                    heapq.heappop(chosen)
        sizes = [len(document) for document in batch]
        shortest = min([shortest, *sizes]) if number else min(sizes)
        longest = max([longest, *sizes])
        number += len(batch)
        total += size
        progress(len(batch), size)
    packed += len(packer.flush())
    if not total:
        raise InputError(f"--data: {name!r} has no text (accepted: at least one byte)")
    unigram, bigram, trigram = map(entropy, by_order(counts))
    return Survey(
        name=name,
        weight=weight,
        documents=number,
        bytes=total,
        tokens=tokens,
        held_out_documents=held_out,
        shortest=shortest,
        longest=longest,
        lengths=lengths[: int(lengths.nonzero()[0][-1]) + 1].tolist(),
        unigram=unigram,
        bigram=bigram,
        trigram=trigram,
        gzip=8 * packed / total,
        samples=[shown(text) for _, text in sorted(chosen, reverse=True)],
    )


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def shown(text: bytes) -> str:
    """One line that is safe on any terminal: control characters and what is no UTF-8 are escaped."""
    # A character that was cut in two at the end is no news.
    decoded = text.decode(errors="backslashreplace") if len(text) < SAMPLE_BYTES else _decode_start(text)
    more = " …" if len(text) >= SAMPLE_BYTES else ""
    return (
        "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in decoded)
        + more
    )


def _decode_start(text: bytes) -> str:
    for end in range(len(text), len(text) - 4, -1):
        try:
            return text[:end].decode()
        except UnicodeDecodeError:
            continue
    return text.decode(errors="backslashreplace")


def _histogram(lengths: Sequence[int]) -> list[str]:
    """A bar for each power of two from the first that occurs."""
    first = next(number for number, count in enumerate(lengths) if count)
    most = max(lengths)
    return [
        f"  {1 << number:>13,}+ {'█' * -(-count * BAR // most):{BAR}s} {count:,}"
        for number, count in enumerate(lengths)
        if number >= first
    ]
