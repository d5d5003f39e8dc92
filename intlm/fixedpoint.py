"""Integer arithmetic: the one home of every saturating, shifting and rounding rule, and of every table.

Formats are named Qn: an integer with n fractional bits, so that in Q4 the integer 16 stands for 1.0.
The functions on arrays are written once against the array API that NumPy and JAX share, so a JAX tracer
and a NumPy array go through the same lines. Tables are computed by exact integer arithmetic (big integers
of Python), never by the platform's libm, so that they are the same on every machine.

Right shifts are arithmetic and floor: -1 >> 1 is -1.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

Array = Any
"""An array of NumPy or JAX; the docstring of each function gives shape and dtype."""

WEIGHT_LIMIT = 127
"""Weights and activations lie in [-127, 127]. -128 never occurs, so that negation is exact."""

LOGIT_LIMIT = 2047
"""Logits are in 1/256 bit and lie in [-2047, 2047]: 8 bits to either side of zero."""

SCORE_FRACTION_BITS = 8
"""Scores (log-likelihoods) and logits are in 1/256 bit."""

MASTER_FRACTION_BITS = 8
"""Masters are Q8 in units of one int8 weight step: 256 is one step of the int8 weight."""

MASTER_LIMIT = WEIGHT_LIMIT << MASTER_FRACTION_BITS

EXP2_FRACTION_BITS = 24
"""The terms of the softmax sum are Q24."""

SUM_BLOCK = 64
"""Terms summed in one 32-bit word: 64 terms of at most 2**24 make at most 2**30."""

LOG2_MANTISSA_BITS = 11

SLOPE_FRACTION_BITS = 7
"""A log-likelihood's slope is Q7: two members' add up to at most 512, the limit of a credit."""


def namespace(x: Array) -> Any:
    """The array namespace of `x`: `numpy` or `jax.numpy`."""
    return np if isinstance(x, np.ndarray | np.generic) else x.__array_namespace__()


# --- rounding and saturating --------------------------------------------------------------------------


def saturate(x: Array) -> Array:
    """Clip integers of any shape to [-127, 127] and return int8."""
    xp = namespace(x)
    return xp.clip(x, -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(xp.int8)


def rounding_shift(x: Array, bits: Array) -> Array:
    """x / 2**bits rounded to the nearest, halves up; `bits` may be 0. Same dtype as `x`."""
    return (x + ((1 << bits) >> 1)) >> bits


def matmul_shift(width: int) -> int:
    """The right shift after a matmul over `width` inputs: 4 + floor(log2(width) / 2).

    4 takes the product of two Q4 numbers back to Q4; the rest divides by about the square root of `width`,
    so that a sum of `width` independent terms keeps the scale of one.
    """
    return 4 + (width.bit_length() - 1) // 2


def round_masters(master: Array) -> Array:
    """Int8 weights from masters (int16, Q8 of a weight step, within +-MASTER_LIMIT), rounded to the nearest."""
    xp = namespace(master)
    return rounding_shift(master.astype(xp.int32), MASTER_FRACTION_BITS).astype(xp.int8)


def normalize(x: Array, weight: Array) -> Array:
    """Scale each row of `x` to a mean magnitude of 1.0 (16 in Q4) times `weight`.

    x: int8 [..., D], Q4; weight: int8, broadcastable to x, Q4. Returns int8 [..., D], Q4.
    `saturate((x * weight * reciprocal[mean|x|]) >> 16)`; the product is at most 127 * 127 * 65536 < 2**31.
    The mean is `(sum|x| * ceil(2**24 / D)) >> 24`, which needs no division, is at most 127, and is exact where
    D is a power of two or divides the sum; the product is at most 127 * (2**24 + D) < 2**31.
    """
    xp = namespace(x)
    width = x.shape[-1]
    wide = x.astype(xp.int32)
    total = xp.sum(xp.abs(wide), axis=-1, keepdims=True, dtype=xp.int32)
    mean = (total * np.int32(-(-(1 << 24) // width))) >> 24
    reciprocal = xp.asarray(reciprocal_table())[mean]
    return saturate((wide * weight.astype(xp.int32) * reciprocal) >> 16)


def gated(gate: Array, x: Array) -> Array:
    """`((gate + 127) * x) >> 8` in int32: x times a gate in [0, 254/256]. int8 or int32 in, int32 out."""
    xp = namespace(x)
    return ((gate.astype(xp.int32) + WEIGHT_LIMIT) * x.astype(xp.int32)) >> 8


def floor_log2(x: Array) -> Array:
    """Position of the highest set bit of positive int32 `x`; int32."""
    xp = namespace(x)
    for distance in (1, 2, 4, 8, 16):
        x = x | (x >> distance)
    return xp.bitwise_count(x).astype(xp.int32) - 1


def integer_sqrt(x: Array) -> Array:
    """floor(sqrt(x)) of int64 `x` in [0, 2**62), bit by bit where `x` is traced; int64."""
    xp = namespace(x)
    if xp is np:
        return np.array([math.isqrt(value) for value in np.ravel(x).tolist()], np.int64).reshape(np.shape(x))
    from jax.lax import fori_loop

    def with_bit(i: Array, root: Array) -> Array:
        candidate = root + (xp.int64(1) << (30 - i))
        return xp.where(candidate * candidate <= x, candidate, root)

    # In a loop: XLA's simplifier gives up on so long a chain, and says so.
    return fori_loop(0, 31, with_bit, xp.zeros_like(x))


# --- log-likelihood -----------------------------------------------------------------------------------


def log2_sum_exp2(logits: Array) -> Array:
    """log2 of the sum of 2**logit over the last axis, in 1/256 bit.

    logits: int16 or int32 [..., V], in [-2047, 2047], V at most 65,536. Returns int32 [...].
    Exactly: the maximum m is taken out; each term 2**((logit - m) / 256) is a table entry in Q24, shifted
    with rounding; 64 terms are summed in one word of 32 bits, and the words of all blocks are split into 15
    low bits and the rest, so that no sum passes 2**31. log2 is the position of the highest bit plus a table
    over the eleven bits after it. The result is within 1/256 bit of the exact value (a test proves it).
    """
    xp = namespace(logits)
    terms, maximum = exp2_terms(logits)
    high, low = _sum(terms)
    # Where the sum passes 31 bits its 15 low bits no longer matter to a mantissa of eleven.
    large = high >= (1 << 16)
    mantissa = xp.where(large, high, (high << 15) | low)
    exponent = floor_log2(mantissa)
    fraction = (mantissa >> (exponent - LOG2_MANTISSA_BITS)) & ((1 << LOG2_MANTISSA_BITS) - 1)
    exponent = exponent + xp.where(large, 15, 0).astype(xp.int32) - EXP2_FRACTION_BITS
    return (
        (exponent << SCORE_FRACTION_BITS) + xp.asarray(log2_table())[fraction] + xp.squeeze(maximum, axis=-1)
    )


def log_likelihood(logits: Array, targets: Array) -> Array:
    """log2 of the softmax probability of the targets, in 1/256 bit (negative or 0, up to rounding).

    logits: int16 or int32 [..., V]; targets: int32 [...], in [0, V). Returns int32 [...].
    """
    xp = namespace(logits)
    chosen = xp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(xp.int32)
    return chosen - log2_sum_exp2(logits)


def log_likelihood_slopes(logits: Array, targets: Array, directions: Sequence[Array]) -> Array:
    """The derivatives of `log_likelihood` along directions of signs: int32 [R, ...], Q7, in [-256, 256].

    logits: int16 or int32 [..., V], in [-2047, 2047], V at most 65,536; targets: int32 [...]; directions: R of
    int8, -1 or 1, broadcastable to the logits. The softmax's p gives `signs[target] - sum(p * signs)`; here it is
    `128 signs[target] - 128 N / S`, with N the sum of the signed terms of `log2_sum_exp2`, S of the plain ones;
    the quotient is rounded towards 0, so that the opposite signs have the opposite slope.
    """
    xp = namespace(logits)
    terms, _ = exp2_terms(logits)

    def whole(terms: Array) -> Array:
        high, low = _sum(terms)
        return (high.astype(xp.int64) << 15) + low

    own = [
        xp.take_along_axis(xp.broadcast_to(signs, logits.shape), targets[..., None], axis=-1)[..., 0]
        for signs in directions
    ]
    along = [whole(xp.where(signs < 0, -terms, terms)) for signs in directions]
    return slopes(xp.stack(own), xp.stack(along), whole(terms))


def slopes(own: Array, along: Array, total: Array) -> Array:
    """The slopes of `log_likelihood_slopes` from the targets' signs, int8, and the sums N and S, int64. int32."""
    xp = namespace(along)
    mean = xp.sign(along) * ((xp.abs(along) << SLOPE_FRACTION_BITS) // total)
    return (own.astype(xp.int32) << SLOPE_FRACTION_BITS) - mean.astype(xp.int32)


def exp2_terms(logits: Array) -> tuple[Array, Array]:
    """2**(logit - maximum) of each logit, int32 [..., V], Q24; and the maximum, int32 [..., 1], in 1/256 bit."""
    xp = namespace(logits)
    logits = logits.astype(xp.int32)
    maximum = xp.max(logits, axis=-1, keepdims=True)
    below = maximum - logits
    return rounding_shift(xp.asarray(exp2_table())[below & 255], below >> 8), maximum


def _sum(terms: Array) -> tuple[Array, Array]:
    """The exact sum over the last axis of numbers of up to 2**24, as a high word and 15 low bits: int32 [...]."""
    xp = namespace(terms)
    vocabulary = terms.shape[-1]
    blocks = -(-vocabulary // SUM_BLOCK)
    if vocabulary % SUM_BLOCK:
        padding = [(0, 0)] * (terms.ndim - 1) + [(0, blocks * SUM_BLOCK - vocabulary)]
        terms = xp.pad(terms, padding)
    words = xp.sum(terms.reshape(*terms.shape[:-1], blocks, SUM_BLOCK), axis=-1, dtype=xp.int32)
    low = xp.sum(words & 0x7FFF, axis=-1, dtype=xp.int32)
    return xp.sum(words >> 15, axis=-1, dtype=xp.int32) + (low >> 15), low & 0x7FFF


# --- exact tables -------------------------------------------------------------------------------------


def _frozen(values: list[int], dtype: type) -> np.ndarray:
    table: np.ndarray = np.array(values, dtype)
    table.setflags(write=False)
    return table


@cache
def reciprocal_table() -> np.ndarray:
    """[128] int32: round(2**16 / max(1, m)) for a mean magnitude m."""
    return _frozen([((1 << 17) // max(1, m) + 1) >> 1 for m in range(128)], np.int32)


@cache
def exp2_table() -> np.ndarray:
    """[256] int32, Q24: round(2**24 * 2**(-i / 256)).

    Eight nested integer square roots give the floor of the 256th root exactly; eight spare bits round it.
    """

    def entry(i: int) -> int:
        root = 1 << (32 * 256 - i)
        for _ in range(8):
            root = math.isqrt(root)
        return (root + 128) >> 8

    return _frozen([entry(i) for i in range(256)], np.int32)


@cache
def log2_table() -> np.ndarray:
    """[2048] int32, in 1/256 bit: round(256 * log2(1 + (i + 1/2) / 2048)), the middle of each cell.

    log2(y) * 512 is the bit length of y**512: exact in big integers.
    """

    def entry(i: int) -> int:
        halves = ((2 * i + 4097) ** 512).bit_length() - 1 - 12 * 512
        return (halves + 1) >> 1

    return _frozen([entry(i) for i in range(1 << LOG2_MANTISSA_BITS)], np.int32)


_SERIES_BITS = 160


def _exp(numerator: int, denominator: int) -> int:
    """e**(numerator / denominator) for a non-negative argument, Q160, by its power series."""
    one = 1 << _SERIES_BITS
    term = total = one
    k = 0
    while term:
        k += 1
        term = term * numerator // (denominator * k)
        total += term
    return total


def _sigmoid(x: int, scale: int, height: int) -> int:
    """round(height * sigmoid(x / scale)), halves up; exact but for the 160-bit series."""
    one = 1 << _SERIES_BITS
    e = _exp(abs(x), scale)
    share = (height * (e if x >= 0 else one) << 8) // (one + e)
    return (share + 128) >> 8


@cache
def activation_table(name: str) -> np.ndarray:
    """[256] int8: the activation of the int8 value v at index v + 128 (index 0 repeats index 1).

    `identity`: v. `relu`: max(0, v). `relu2`: min(127, max(0, 2 v)). `sigmoid`: 254 sigmoid(v / 16) - 127,
    a gate of Q4 input; `sigmoid_soft`: 254 sigmoid(v / 64) - 127, of slope 1 at zero. `tanh`:
    127 tanh(v / 16); `tanh_soft`: 127 tanh(v / 127), of slope 1 at zero. Raises KeyError for other names.
    """
    rule = ACTIVATIONS[name]
    return _frozen([rule(max(v, -WEIGHT_LIMIT)) for v in range(-128, 128)], np.int8)


ACTIVATIONS = {
    "identity": lambda v: v,
    "relu": lambda v: max(0, v),
    "relu2": lambda v: min(WEIGHT_LIMIT, max(0, 2 * v)),
    "sigmoid": lambda v: _sigmoid(v, 16, 254) - 127,
    "sigmoid_soft": lambda v: _sigmoid(v, 64, 254) - 127,
    "tanh": lambda v: _sigmoid(2 * v, 16, 254) - 127,
    "tanh_soft": lambda v: _sigmoid(2 * v, 127, 254) - 127,
}
"""Activation functions by name, on Python integers in [-127, 127]; they fill the tables."""


def activate(x: Array, name: str) -> Array:
    """Apply an activation to int8 `x` in [-127, 127], of any shape. The piecewise-linear ones need no table."""
    xp = namespace(x)
    if name == "identity":
        return x
    if name == "relu":
        return xp.maximum(x, xp.int8(0))
    if name == "relu2":
        return saturate(xp.maximum(x, xp.int8(0)).astype(xp.int16) * xp.int16(2))
    return xp.asarray(activation_table(name))[x.astype(xp.int32) + 128]


def _pi() -> int:
    """pi in Q160 by Machin's formula, 16 atan(1/5) - 4 atan(1/239)."""

    def atan_inverse(n: int) -> int:
        power = (1 << _SERIES_BITS) // n
        total, k = power, 1
        while power:
            power //= -n * n
            k += 2
            total += power // k
        return total

    return 16 * atan_inverse(5) - 4 * atan_inverse(239)


@cache
def _normal_density_at_zero() -> int:
    """1 / sqrt(2 pi) in Q160."""
    return (1 << (2 * _SERIES_BITS)) // math.isqrt(2 * _pi() << _SERIES_BITS)


def normal_cdf(numerator: int, denominator: int) -> int:
    """Phi(numerator / denominator), the standard normal distribution function, in Q64, for |x| up to 9.

    Phi(x) = 1/2 + phi(0) * sum_k (-1)**k x**(2k+1) / (2**k k! (2k+1)).
    """
    term = (numerator << _SERIES_BITS) // denominator
    total, k = term, 0
    while term and k < 400:
        k += 1
        term = -term * numerator * numerator // (denominator * denominator * 2 * k)
        total += term // (2 * k + 1)
    half = 1 << (_SERIES_BITS - 1)
    return (half + (_normal_density_at_zero() * total >> _SERIES_BITS)) >> (_SERIES_BITS - 64)


@cache
def gaussian_table() -> np.ndarray:
    """[65536] int8, Q4: a uniform 16-bit number to a rounded Gaussian number, by inversion.

    Symmetric: entry 65535 - i is minus entry i. |values| stay at or below 67 (4.2 standard deviations).
    """
    bounds = [(normal_cdf(2 * k - 1, 32) + (1 << 47)) >> 48 for k in range(1, GAUSSIAN_LIMIT + 1)]
    upper = np.searchsorted(np.array(bounds, np.int64), np.arange(1 << 15, 1 << 16), side="right")
    table: np.ndarray = np.concatenate([-upper[::-1], upper]).astype(np.int8)
    table.setflags(write=False)
    return table


GAUSSIAN_LIMIT = 67
"""Rounded Gaussian numbers of Q4 are clipped here: a 16-bit number resolves no rarer tail than 2**-16."""


def normal_tail_quantile(alpha: int) -> int:
    """The z in Q8 that a standard normal number's magnitude passes with probability alpha / 65536.

    alpha in [0, 65536]; returns the smallest z in [0, 1152] with 2 (1 - Phi(z / 256)) <= alpha / 65536,
    and 1152 (4.5) where there is none.
    """
    low, high = 0, 1152
    while low < high:
        middle = (low + high) // 2
        if 2 * ((1 << 64) - normal_cdf(middle, 256)) <= alpha << 48:
            high = middle
        else:
            low = middle + 1
    return low
