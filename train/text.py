"""The text of a run: documents for training and for evaluation, as streams of tokens."""

from dataclasses import dataclass

import numpy as np

from eval.bits import HeldOut, lay_out
from tokenizer import Tokenizer
from train import corpus
from train.config import TextConfig

EVALUATED_TOKENS = 1 << 18
"""Held-out tokens that training looks at now and then; `intlm eval` takes all of them."""


@dataclass(frozen=True)
class Text:
    """Documents and streams. train_S, held_out_S: 1-D tokens; digest: of the training documents in order."""

    train: list[bytes]
    held_out: list[bytes]
    train_S: np.ndarray
    held_out_S: np.ndarray
    digest: str

    @property
    def bytes_per_token(self) -> float:
        """Bytes of training text a token, separators counted as tokens; for people to read."""
        return sum(map(len, self.train)) / max(1, len(self.train_S))


def load_text(config: TextConfig, tokenizer: Tokenizer, seed: int) -> Text:
    """Read, split, shuffle and tokenize the corpora of a run. Raises InputError; see `train.corpus`."""
    documents = list(corpus.open_corpus(config.data, config.text_field, "--data").documents())
    if config.held_out:
        held_out_corpus = corpus.open_corpus(config.held_out, config.text_field, "--held-out")
        train, held_out = documents, list(held_out_corpus.documents())
    else:
        train, held_out = corpus.split(documents)
    train = corpus.shuffle(train, seed)
    return Text(
        train,
        held_out,
        corpus.pack(train, tokenizer),
        corpus.pack(held_out, tokenizer),
        corpus.digest(train),
    )


def evaluated(text: Text, tokenizer: Tokenizer) -> HeldOut:
    """The part of the held-out text that is scored during training."""
    return lay_out(text.held_out, tokenizer, EVALUATED_TOKENS)
