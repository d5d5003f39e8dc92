"""Sampling with integers: temperature, top-k, top-p and min-p on the model's logits."""

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import numpy as np

from intlm import fixedpoint, noise
from intlm.config import ModelConfig
from intlm.engine.engine import DrawRule, Engine, SamplingEngine
from intlm.errors import InputError
from intlm.fixedpoint import Array, namespace
from intlm.model import Parameters, initial_state
from tokenizer import Tokenizer

SAMPLING = 0xFFFFFFFE
"""The counter that sets sampling's noise apart from training's and initialisation's."""

PROMPT_BLOCK = 64


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, in integers.

    temperature: Q8 (256 is 1.0; 0 takes the likeliest token); top_k: 0 keeps all; top_p: Q16 share of the
    probability to keep (65536 keeps all); min_p: Q16 share of the likeliest token's probability that a token
    needs (0 keeps all); seed: of the random numbers.
    """

    temperature: int = 256
    top_k: int = 0
    top_p: int = 1 << 16
    min_p: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for values out of range."""
        for name, high, unit in (
            ("temperature", 1 << 16, 256),
            ("top_k", 1 << 16, 1),
            ("top_p", 1 << 16, 1 << 16),
            ("min_p", 1 << 16, 1 << 16),
            ("seed", (1 << 64) - 1, 1),
        ):
            value = getattr(self, name)
            if not 0 <= value <= high:
                flag = "--" + name.replace("_", "-")
                shown = value if unit == 1 else value / unit
                raise InputError(f"{flag} {shown}: must be from 0 to {high // unit}")


def fixed(text: str, fraction_bits: int, flag: str, high: int = 1) -> int:
    """A decimal number from 0 to `high`, as written by a person, in fixed point, rounded down.

    Exactly, without a float. Raises InputError, naming `flag`, for anything else.
    """
    try:
        value = Decimal(text)
        if value.is_finite() and 0 <= value <= high:
            # A fraction is exact; one with millions of digits would never be done.
            return math.floor(Fraction(value) * (1 << fraction_bits)) if value.adjusted() > -30 else 0
    except InvalidOperation:
        pass
    raise InputError(f"{flag} {text}: must be a number from 0 to {high}, such as 0.8")


def draw(config: SamplingConfig, logits_NxV: Array, random_N: Array) -> Array:
    """A token for each row: int32 [N], from logits in 1/256 bit (int16 [N, V]) and uint32 random words [N].

    Ties are broken by token number. The weights' sum is at most 2**32 and is multiplied by 31 random bits.
    """
    xp = namespace(logits_NxV)
    vocabulary = logits_NxV.shape[-1]
    logits = logits_NxV.astype(xp.int32)
    order = xp.argsort(-logits, axis=-1, stable=True)
    if config.temperature == 0:
        return order[:, 0].astype(xp.int32)
    ordered = xp.take_along_axis(logits, order, axis=-1)
    weights = _weights(config, vocabulary, ordered[:, :1] - ordered)
    weights = xp.where(xp.arange(vocabulary) < (config.top_k or vocabulary), weights, 0)
    sums = xp.cumsum(weights, axis=-1, dtype=xp.int64)
    # A token is kept while those before it have not reached the share; the first one always is.
    before = sums - weights
    weights = xp.where((before == 0) | ((before << 16) < sums[:, -1:] * config.top_p), weights, 0)
    sums = xp.cumsum(weights, axis=-1, dtype=xp.int64)
    point = ((random_N >> xp.uint32(1)).astype(xp.int64) * sums[:, -1]) >> 31
    index = xp.sum((sums <= point[:, None]).astype(xp.int32), axis=-1, dtype=xp.int32)
    return xp.take_along_axis(order, index[:, None], axis=-1)[:, 0].astype(xp.int32)


def _weights(config: SamplingConfig, vocabulary: int, below: Array) -> Array:
    """int64 weights of tokens whose logits are `below` the likeliest one's: int32, in 1/256 bit, any shape.

    2**(-below / temperature), from the table of the softmax; 0 where min-p leaves a token out.
    """
    xp = namespace(below)
    below = (below << 8) // config.temperature
    # Fewer bits a weight for larger vocabularies, so that the sum fits.
    bits = min(fixedpoint.EXP2_FRACTION_BITS, 32 - (vocabulary - 1).bit_length())
    table = xp.asarray(fixedpoint.exp2_table())[below & 255].astype(xp.int64)
    shift = xp.minimum(below >> 8, 40).astype(xp.int64) + (fixedpoint.EXP2_FRACTION_BITS - bits)
    weights = fixedpoint.rounding_shift(table, shift)
    return xp.where((weights << 16) >= (config.min_p << bits), weights, 0)


def draw_rule(config: SamplingConfig, vocabulary: int) -> DrawRule:
    """What `draw` does, and the key of its random words, for an engine that draws tokens itself."""
    below = np.arange(2 * fixedpoint.LOGIT_LIMIT + 1, dtype=np.int32)
    greedy = config.temperature == 0
    weights = below == 0 if greedy else _weights(config, vocabulary, below)
    top_k = 1 if greedy else config.top_k or vocabulary
    key = noise.fold(noise.seed_key(config.seed), SAMPLING)
    return DrawRule(weights.astype(np.int32), top_k, config.top_p, key)


class Sampler:
    """Draws tokens from a model on an engine. The same seed gives the same tokens on every engine."""

    def __init__(self, engine: Engine, model: ModelConfig, parameters: Parameters, config: SamplingConfig):
        self.engine, self.model, self.parameters, self.config = engine, model, parameters, config

    def tokens(self, prompt_T: np.ndarray, count: int, length: int) -> Iterator[np.ndarray]:
        """`length` tokens of each of `count` samples, as they are drawn: int32 [count, n], n at least 1.

        prompt_T: integers, at least one. Sample i of several equals sample i of any other count.
        """
        prompt = np.asarray(prompt_T, np.int32)
        rule = draw_rule(self.config, self.model.vocabulary)
        if isinstance(self.engine, SamplingEngine):
            return self.engine.sample(self.parameters, prompt, rule, count, length)
        return self._together(prompt, rule, count, length)

    def _together(self, prompt: np.ndarray, rule: DrawRule, count: int, length: int) -> Iterator[np.ndarray]:
        """All samples at once, token by token, on any engine."""
        drawing = self.engine.compile(lambda logits, random: draw(self.config, logits, random))
        state: Array = initial_state(self.model, 1)
        logits: Array = None
        # Whole blocks first, then token by token: two shapes in all, so that nothing else is compiled.
        whole = len(prompt) - len(prompt) % PROMPT_BLOCK
        pieces = [prompt[i : i + PROMPT_BLOCK] for i in range(0, whole, PROMPT_BLOCK)]
        pieces += [prompt[i : i + 1] for i in range(whole, len(prompt))]
        for piece in pieces:
            logits, state = self.engine.forward(self.parameters, piece[None], state)
        state = np.repeat(np.asarray(state), count, axis=0)
        last = np.repeat(np.asarray(logits)[:, -1], count, axis=0)
        samples = np.arange(count)
        for position in range(length):
            if position % 64 == 0:
                words = noise.words(noise.fold(rule.key, position), samples, 64)
            token = np.asarray(drawing(last, words[:, position % 64]))
            yield token[:, None]
            if position + 1 < length:
                logits, state = self.engine.forward(self.parameters, token[:, None], state)
                last = logits[:, 0]


class Utf8Stream:
    """Text from bytes that arrive a few at a time: whole characters only, what is not UTF-8 as U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def end(self) -> str:
        """What is left: a broken character, or nothing."""
        return self._decoder.decode(b"", final=True)


class SampleStream:
    """What a person sees of tokens as they are drawn: text, and a blank line where a document ends.

    A separator stands for no text: what comes after it has nothing to do with what was before.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._text = Utf8Stream()
        self._last = ""

    def start(self, prompt: bytes) -> str:
        """The text that samples go on from."""
        return self._seen(self._text.feed(prompt))

    def feed(self, tokens_T: np.ndarray) -> str:
        """What 1-D `tokens_T` complete."""
        first, *others = np.split(tokens_T, np.flatnonzero(tokens_T == self._tokenizer.separator))
        shown = self._seen(self._text.feed(self._tokenizer.decode(first)))
        for document in others:
            shown += self._seen(self._text.end())
            # None before the first document, and one where several have no text.
            if self._last:
                ended = len(self._last) - len(self._last.rstrip("\n"))
                shown += self._seen("\n" * (2 - ended))
            shown += self._seen(self._text.feed(self._tokenizer.decode(document[1:])))
        return shown

    def end(self) -> str:
        """What is left: a broken character, or nothing."""
        return self._text.end()

    def _seen(self, text: str) -> str:
        self._last = (self._last + text)[-2:]
        return text
