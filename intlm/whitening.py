"""Whitening: votes times the inverse of their inputs' covariance, in integers (estimator `activation`).

The votes of a matrix are sums of A Bᵀ. Their rows have the covariance of the B, whose entries have much in
common; their columns have none, since A is random signs. With C that covariance (of the votes themselves,
over steps), votes times (C + a quarter of its mean eigenvalue)⁻¹ are a step of the matrix as if its inputs
were uncorrelated and alike in scale: the factor of K-FAC (Martens and Grosse, arXiv 1503.05671) on the side
of the inputs, found from the votes as in Shampoo (Gupta et al., arXiv 1802.09568).

Inputs are taken in blocks of 64, whatever the width. B is the number of blocks in all: of each of `NAMES` in
turn, layer by layer. docs/numerics.md has the bounds. The functions on arrays are written once, against the
array API that NumPy and JAX share.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from intlm.config import ModelConfig
from intlm.fixedpoint import Array, namespace, rounding_shift, saturate
from intlm.model import LAYER_MATRICES, shapes

Whitening = dict[str, Array]
"""`covariance`: int32 [B, 64, 64], a decaying sum over steps; `inverse`: int16 [B, 64, 64], Q11. Empty where
votes are not whitened."""

NAMES = ("head", *LAYER_MATRICES)
"""The parameters whose votes are whitened. The embedding's have no noise in common along the rows."""

BLOCK = 64
NORMAL_FRACTION_BITS = 6
"""Votes are measured in their standard deviation if fitness were pure noise: Q6, 64 is one."""
NORMAL_LIMIT = (1 << 12) - 1
INVERSE_FRACTION_BITS = 11
INVERSE_LIMIT = (1 << 13) - 1
WHITENED_FRACTION_BITS = NORMAL_FRACTION_BITS + INVERSE_FRACTION_BITS
"""Of whitened votes. Where the votes are white already, their standard deviation is 4/5."""

PERIOD = 32
"""Steps between two inversions, but for the first ones."""
DECAY = 6
"""A step leaves 1 - 2**-DECAY of the covariance."""
COVARIANCE_LIMIT = 1 << 30
"""No entry of the covariance reaches it: see docs/numerics.md."""
_FIRST = 1 << 16
_FRACTION_BITS = 20
_LIMIT = (1 << 31) - 1


def blocks(model: ModelConfig) -> dict[str, int]:
    """The blocks of each parameter in all its layers together."""
    sizes = shapes(model)
    return {
        name: (sizes[name][0] if len(sizes[name]) == 3 else 1) * (sizes[name][-1] // BLOCK) for name in NAMES
    }


def arrays(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], type]]:
    """The shapes and dtypes of a `Whitening`."""
    shape = (sum(blocks(model).values()), BLOCK, BLOCK)
    return {"covariance": (shape, np.int32), "inverse": (shape, np.int16)}


def initial(model: ModelConfig) -> Whitening:
    """Before the first step: inputs that are white, as good as one step's evidence."""
    identity = np.eye(BLOCK, dtype=np.int32)[None] * np.int32(_FIRST)
    first = {"covariance": identity, "inverse": invert(identity)}
    return {name: np.repeat(first[name], shape[0], axis=0) for name, (shape, _) in arrays(model).items()}


def whiten(
    votes: dict[str, Array], unit: dict[str, Array], whitening: Whitening
) -> tuple[dict[str, Array], Whitening]:
    """Votes times the inverse, Q17, and the whitening with these votes in its covariance.

    votes: int32 by name; unit: int64 [L] or [], what a vote is multiplied by to be Q30 of its standard deviation.
    Parameters that are not whitened come back as they are.
    """
    xp = namespace(whitening["covariance"])
    whitened, seen, first = dict(votes), [], 0
    for name in NAMES:
        layers_LxMxK = votes[name].reshape(-1, *votes[name].shape[-2:])
        layers, outputs, _ = layers_LxMxK.shape
        wide = layers_LxMxK.astype(xp.int64) * unit[name].reshape(-1, 1, 1)
        normal = xp.clip(rounding_shift(wide, 24), -NORMAL_LIMIT, NORMAL_LIMIT).astype(xp.int32)
        split = xp.swapaxes(normal.reshape(layers, outputs, -1, BLOCK), 1, 2)
        normal_BxMx64 = split.reshape(-1, outputs, BLOCK)
        inverse = whitening["inverse"][first : first + len(normal_BxMx64)].astype(xp.int32)
        product = xp.matmul(normal_BxMx64, xp.swapaxes(inverse, 1, 2))
        joined = xp.swapaxes(product.reshape(layers, -1, outputs, BLOCK), 1, 2)
        whitened[name] = joined.reshape(votes[name].shape)
        seen.append(_products(normal_BxMx64))
        first += len(normal_BxMx64)
    covariance = whitening["covariance"]
    return whitened, whitening | {"covariance": covariance - (covariance >> DECAY) + xp.concatenate(seen)}


def _products(normal_BxMx64: Array) -> Array:
    """The products of all pairs of inputs, summed over the outputs: int32 [B, 64, 64]; 2**16 to 2**17 is 1.0."""
    xp = namespace(normal_BxMx64)
    # Q4: with eight bits no sum over the outputs passes 31.
    coarse = saturate(rounding_shift(normal_BxMx64, 2)).astype(xp.int32)
    sums = xp.matmul(xp.swapaxes(coarse, 1, 2), coarse)
    shift = normal_BxMx64.shape[1].bit_length() - 1 - 8
    return sums >> shift if shift >= 0 else sums << -shift


def renewed(whitening: Whitening, step: Array) -> Whitening:
    """With the inverse of the covariance after so many steps (uint32), where it is due."""
    xp, covariance = namespace(whitening["covariance"]), whitening["covariance"]
    if xp is np:
        return whitening | ({"inverse": invert(covariance)} if is_due(step) else {})
    from jax.lax import cond

    return whitening | {"inverse": cond(is_due(step), invert, lambda _: whitening["inverse"], covariance)}


def is_due(step: Array) -> Array:
    """Whether the covariance is inverted after so many steps: after 1, 2, 4, ... and every `PERIOD`."""
    return (step % PERIOD == 0) | (step & (step - 1) == 0)


def invert(covariance: Array) -> Array:
    """The inverse of C / mean + I / 4 of each block, mean being that of C's diagonal: int16 [B, 64, 64], Q11.

    By Gauss and Jordan in Q20, without pivoting, which a matrix without negative eigenvalues does not need.
    Whatever the numbers are, nothing passes 63 bits.
    """
    xp = namespace(covariance)
    places, wide = xp.arange(BLOCK), covariance.astype(xp.int64)
    chosen = places[:, None] == places
    mean = xp.maximum(xp.sum(xp.where(chosen, wide, 0), axis=(1, 2)) >> 6, _FIRST >> 2)
    scaled = (wide * ((1 << 46) // mean)[:, None, None]) >> (46 - _FRACTION_BITS)
    matrix = xp.clip(scaled + xp.where(chosen, 1 << (_FRACTION_BITS - 2), 0), -_LIMIT, _LIMIT)

    def pivot(k: Array, matrix: Array) -> Array:
        here = places == k
        row, column = matrix[:, k, :], matrix[:, :, k]
        # Each is at least 1/4 but for rounding.
        reciprocal = (1 << (2 * _FRACTION_BITS)) // xp.maximum(matrix[:, k, k], 1 << (_FRACTION_BITS - 3))[
            :, None
        ]
        row = xp.where(here, reciprocal, xp.clip((row * reciprocal) >> _FRACTION_BITS, -_LIMIT, _LIMIT))
        rest = xp.where(here, 0, matrix) - ((column[:, :, None] * row[:, None, :]) >> _FRACTION_BITS)
        return xp.where(here[:, None], row[:, None, :], xp.clip(rest, -_LIMIT, _LIMIT))

    inverse = rounding_shift(_loop(xp, BLOCK, pivot, matrix), _FRACTION_BITS - INVERSE_FRACTION_BITS)
    return xp.clip(inverse, -INVERSE_LIMIT, INVERSE_LIMIT).astype(xp.int16)


def _loop(xp: Any, count: int, body: Callable[[Array, Array], Array], value: Array) -> Array:
    if xp is np:
        for i in range(count):
            value = body(np.int64(i), value)
        return value
    from jax.lax import fori_loop

    return fori_loop(0, count, body, value)
