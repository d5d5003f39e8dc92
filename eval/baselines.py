"""What simple models make of the same held-out text: figures to set beside a model's bits per byte.

All are in bits per byte of held-out text. A document is preceded by byte 0, the separator, as context; the
separators are neither predicted nor counted as bytes, and no context crosses from one document to another.
Nothing here takes part in training: the figures are only shown to people, so they are floats.
"""

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from intlm.errors import InputError

MAXIMUM_ORDER = 3
CHUNK = 1 << 22


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of one held-out text under simple models."""

    unigram: float
    """Byte frequencies of the training text."""
    bigram: float
    """Given 1 byte before, fit on the training text."""
    trigram: float
    """Given 2 bytes before, fit on the training text."""
    own_unigram: float
    """Entropy of the held-out text's own byte frequencies."""
    own_bigram: float
    """The same, given 1 byte before."""
    own_trigram: float
    """The same, given 2 bytes before."""
    gzip: float
    """The held-out text alone, by gzip -9."""
    xz: float
    """The held-out text alone, by xz."""
    bytes: int
    """Bytes of held-out text."""


def baselines(train: Iterable[bytes], held_out: Iterable[bytes]) -> Baselines:
    """Every baseline of the documents `held_out`. `InputError` where they have no bytes."""
    held_out = list(held_out)
    train_by_order = by_order(ngram_counts(train, MAXIMUM_ORDER))
    held_out_by_order = by_order(ngram_counts(held_out, MAXIMUM_ORDER))
    fit = [
        _cross_entropy(train_by_order[:order], counts) for order, counts in enumerate(held_out_by_order, 1)
    ]
    own = [entropy(counts) for counts in held_out_by_order]
    compressed = compressed_bits_per_byte(held_out)
    return Baselines(
        unigram=fit[0],
        bigram=fit[1],
        trigram=fit[2],
        own_unigram=own[0],
        own_bigram=own[1],
        own_trigram=own[2],
        gzip=compressed["gzip"],
        xz=compressed["xz"],
        bytes=sum(map(len, held_out)),
    )


def ngram_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes], order: int) -> float:
    """Cross-entropy of `held_out`, bits per byte, under an n-gram model of bytes fit on `train`.

    Order 1, 2 or 3, with Witten-Bell smoothing, interpolated down to the uniform distribution over 256 bytes:
    P(b | h) = (count(h b) + kinds(h) · P(b | shorter h)) / (count(h) + kinds(h)), where kinds(h) is how many
    different bytes follow h (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
    Modeling", Harvard TR-10-98). `InputError` for another order, or where `held_out` has no bytes.
    """
    return _cross_entropy(by_order(ngram_counts(train, order)), ngram_counts(held_out, order))


def own_entropy(held_out: Iterable[bytes], order: int) -> float:
    """Conditional entropy of `held_out`, bits per byte, by its own n-gram counts of order 1, 2 or 3.

    No n-gram model of this order can do better on this text, whatever it was fit on. `InputError` for another
    order, or where `held_out` has no bytes.
    """
    return entropy(ngram_counts(held_out, order))


def compressed_bits_per_byte(held_out: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of the documents joined and compressed by `gzip` -9 and `xz` (-6, its default).

    `InputError` where `held_out` has no bytes.
    """
    text = b"".join(held_out)
    if not text:
        raise _nothing_held_out()
    sizes = {"gzip": len(gzip.compress(text, 9, mtime=0)), "xz": len(lzma.compress(text))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def ngram_counts(documents: Iterable[bytes], order: int) -> np.ndarray:
    """How often each n-gram ends at a byte of text: int64 [256 ** order], the last byte varying fastest."""
    if order not in range(1, MAXIMUM_ORDER + 1):
        raise InputError(f"order: {order} (accepted: 1, 2, 3)")
    context = order - 1
    pieces = [b"".join((bytes(context), document)) for document in documents]
    text = np.frombuffer(b"".join(pieces), np.uint8)
    is_text = np.ones(len(text), bool)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    for offset in range(context):
        is_text[starts + offset] = False
    counts = np.zeros(256**order, np.int64)
    # In chunks, since the codes take several times the memory of the text.
    for begin in range(context, len(text), CHUNK):
        end = min(begin + CHUNK, len(text))
        codes = np.zeros(end - begin, np.int32)
        for back in range(context, -1, -1):
            codes = (codes << 8) | text[begin - back : end - back]
        counts += np.bincount(codes[is_text[begin:end]], minlength=len(counts))
    return counts


def by_order(counts: np.ndarray) -> list[np.ndarray]:
    """The counts of order 1, order 2 and so on, from those of the highest, which are the last of them."""
    found = [counts]
    while len(found[0]) > 256:
        found.insert(0, found[0].reshape(256, -1).sum(axis=0))
    return found


def _cross_entropy(train_by_order: list[np.ndarray], held_out_counts: np.ndarray) -> float:
    codes = np.flatnonzero(held_out_counts)
    if not len(codes):
        raise _nothing_held_out()
    probability = np.full(len(codes), 1 / 256)
    for counts in train_by_order:
        of_order = codes % len(counts)
        context = of_order >> 8
        by_context = counts.reshape(-1, 256)
        total = by_context.sum(axis=1)[context]
        kinds = np.count_nonzero(by_context, axis=1)[context]
        # A context never seen in training says nothing: the shorter one decides.
        weight = np.maximum(total + kinds, 1)
        longer = (counts[of_order] + kinds * probability) / weight
        probability = np.where(total > 0, longer, probability)
    weights = held_out_counts[codes]
    return float(-(weights * np.log2(probability)).sum() / weights.sum())


def entropy(counts: np.ndarray) -> float:
    """Bits per byte of the text that has these counts (`ngram_counts`), by themselves."""
    codes = np.flatnonzero(counts)
    if not len(codes):
        raise _nothing_held_out()
    weights = counts[codes]
    total = counts.reshape(-1, 256).sum(axis=1)[codes >> 8]
    return float((weights * np.log2(total / weights)).sum() / weights.sum())


def _nothing_held_out() -> InputError:
    return InputError("the held-out text is empty (accepted: at least one byte)")
