"""Counter-based integer noise: any element is a function of (seed, step, stream, pair, index).

The generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as
easy as 1, 2, 3*, SC 2011), the one inside `jax.random`. It is a bijection of the counter for each key, so no
two elements of a stream share a word. Nothing is stored, and any slice of a population can be made anywhere.
"""

import numpy as np

from intlm import fixedpoint
from intlm.fixedpoint import Array, namespace

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def threefry(key: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Threefry-2x32-20 of a key (uint32 [2]) and two broadcastable uint32 counters; two uint32 arrays."""
    xp = namespace(key)
    k0, k1 = key[0:1], key[1:2]
    schedule = (k0, k1, k0 ^ k1 ^ xp.uint32(_PARITY))
    x0, x1 = counter0 + k0, counter1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[(group % 2) * 4 : (group % 2) * 4 + 4]:
            x0 = x0 + x1
            x1 = ((x1 << xp.uint32(rotation)) | (x1 >> xp.uint32(32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + xp.uint32(group + 1)
    return x0, x1


def seed_key(seed: int) -> np.ndarray:
    """The root key (uint32 [2]) of a seed in [0, 2**64)."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)


def fold(key: Array, first: Array, second: Array = 0) -> Array:
    """A new key from a key and two numbers: uint32 [2]."""
    xp = namespace(key)
    counter0 = xp.asarray(first, dtype=xp.uint32).reshape(1)
    counter1 = xp.asarray(second, dtype=xp.uint32).reshape(1)
    return xp.concatenate(threefry(key, counter0, counter1))


def words(key: Array, rows_N: Array, count: int) -> Array:
    """`count` random words for each row: uint32 [N, count]. rows_N: integers (pair indices)."""
    xp = namespace(key)
    blocks = xp.arange((count + 1) // 2, dtype=xp.uint32)[None, :]
    x0, x1 = threefry(key, rows_N.astype(xp.uint32)[:, None], blocks)
    return xp.stack([x0, x1], axis=-1).reshape(rows_N.shape[0], -1)[:, :count]


def rademacher(key: Array, rows_N: Array, count: int) -> Array:
    """-1 or +1 with equal chance: int8 [N, count]. Element i is bit i % 32 of word i // 32; a set bit is -1."""
    xp = namespace(key)
    word = words(key, rows_N, -(-count // 32))
    bits = (word[:, :, None] >> xp.arange(32, dtype=xp.uint32)) & xp.uint32(1)
    bits = bits.reshape(rows_N.shape[0], -1)[:, :count]
    return xp.int8(1) - xp.int8(2) * bits.astype(xp.int8)


def gaussian(key: Array, rows_N: Array, count: int) -> Array:
    """Rounded Gaussian numbers in Q4 (16 is one standard deviation): int8 [N, count], |value| <= 67.

    Element i is made from the low (i even) or high (i odd) half of word i // 2.
    """
    xp = namespace(key)
    word = words(key, rows_N, -(-count // 2))
    halves = xp.stack([word & xp.uint32(0xFFFF), word >> xp.uint32(16)], axis=-1)
    halves = halves.reshape(rows_N.shape[0], -1)[:, :count]
    return xp.asarray(fixedpoint.gaussian_table())[halves.astype(xp.int32)]


def bell(key: Array, rows_N: Array, count: int) -> Array:
    """Nearly Gaussian numbers in Q8 (256 is one standard deviation): int32 [N, count], |value| <= 1530.

    The sum of 12 random bytes (Irwin-Hall), centred; finer than `gaussian` and without a table. It makes
    initial weights, whose magnitude is not that of a perturbation.
    """
    xp = namespace(key)
    word = words(key, rows_N, 3 * count).reshape(rows_N.shape[0], count, 3)
    total = xp.zeros(word.shape[:2], xp.int32)
    for byte in range(4):
        part = (word >> xp.uint32(8 * byte)) & xp.uint32(0xFF)
        total = total + xp.sum(part.astype(xp.int32), axis=-1, dtype=xp.int32)
    return total - xp.int32(12 * 255 // 2)
