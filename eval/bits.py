"""Bits per byte of held-out text under the unperturbed model."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from intlm.config import ModelConfig
from intlm.engine.engine import Engine
from intlm.errors import InputError
from intlm.model import Parameters, initial_state
from tokenizer import Tokenizer

LANES = 128
SEGMENT = 128
LARGEST_LOGITS = 1 << 24
"""Logits that are computed at once, so that a large vocabulary does not fill the memory."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, laid out to be read once by many lanes side by side.

    inputs_NxS, targets_NxS: int32; a target is the input that follows in its lane. counted_NxS: bool, false for
    padding and for separators, which are no text. Each lane starts in the middle of the stream from an empty
    state: that costs the model a little, never flatters it. bytes: of raw text, in the counted targets.
    """

    inputs_NxS: np.ndarray
    targets_NxS: np.ndarray
    counted_NxS: np.ndarray
    bytes: int

    @classmethod
    def from_stream(
        cls,
        stream_S: np.ndarray,
        tokenizer: Tokenizer,
        limit: int = 0,
        lengths_S: np.ndarray | None = None,
    ) -> "HeldOut":
        """Lay out a token stream (separator, document, …), or its first `limit` tokens where that is not 0.

        lengths_S: bytes of raw text behind each token; None takes those that it is decoded to, which is the
        same for a tokenizer without loss. Every token but the first, which is a separator, is predicted
        exactly once. Raises InputError for a stream in which nothing is to be predicted.
        """
        stream = stream_S[: limit or None].astype(np.int32)
        lengths = tokenizer.byte_lengths()[stream] if lengths_S is None else lengths_S[: limit or None]
        predicted = len(stream) - 1
        lanes = max(1, min(LANES, predicted // SEGMENT))
        width = -(-predicted // (lanes * SEGMENT)) * SEGMENT
        padded = np.pad(stream, (0, lanes * width - predicted))
        inputs, targets = padded[:-1], padded[1:]
        counted = (targets != tokenizer.separator) & (np.arange(lanes * width) < predicted)
        is_text = stream[1:] != tokenizer.separator
        byte_count = int(lengths[1:][is_text].sum(dtype=np.int64))
        if not byte_count:
            raise InputError("the held-out text is nothing but separators (accepted: a byte other than 0)")
        shape = (lanes, width)
        return cls(inputs.reshape(shape), targets.reshape(shape), counted.reshape(shape), byte_count)


def lay_out(documents: Iterable[bytes], tokenizer: Tokenizer, limit: int = 0) -> HeldOut:
    """Documents, each opened by a separator, as held-out text; their first `limit` tokens where that is not 0.

    Bytes are those of the raw text, also where the tokenizer does not keep all of it: the same documents have
    as many under every tokenizer. Raises InputError where nothing is to be predicted.
    """
    tokens, lengths, size = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for document in documents:
        if limit and size >= limit:
            break
        tokens_T, lengths_T = tokenizer.encode_aligned(document)
        tokens += [np.array([tokenizer.separator], np.int32), tokens_T.astype(np.int32)]
        lengths += [np.zeros(1, np.int32), lengths_T]
        size += 1 + len(tokens_T)
    return HeldOut.from_stream(np.concatenate(tokens), tokenizer, limit, np.concatenate(lengths))


class Evaluator:
    """Scores held-out text on an engine."""

    def __init__(self, engine: Engine, model: ModelConfig, held_out: HeldOut):
        self.engine, self.model, self.held_out = engine, model, held_out

    def score(self, parameters: Parameters) -> int:
        """The log-likelihood of the counted targets, in 1/256 bit: an exact integer, 0 or negative."""
        data, total = self.held_out, 0
        state = initial_state(self.model, data.inputs_NxS.shape[0])
        step = SEGMENT
        while step > 1 and data.inputs_NxS.shape[0] * step * self.model.vocabulary > LARGEST_LOGITS:
            step //= 2
        for start in range(0, data.inputs_NxS.shape[1], step):
            window = np.s_[:, start : start + step]
            text_NxT1 = np.concatenate([data.inputs_NxS[window], data.targets_NxS[window][:, -1:]], axis=1)
            scores, state = self.engine.score(parameters, text_NxT1, state)
            total += int(np.asarray(scores)[data.counted_NxS[window]].sum(dtype=np.int64))
        return total

    def bits_per_byte(self, parameters: Parameters) -> float:
        """Bits per byte of raw text, for people to read."""
        return bits_per_byte(self.score(parameters), self.held_out.bytes)


def bits_per_byte(score: int, byte_count: int) -> float:
    """Bits per byte from a score in 1/256 bit, for people to read."""
    return -score / (256 * max(1, byte_count))
