"""EGG: parameters, initialisation, shapes. The order of operations is in docs/numerics.md.

Parameters are a plain dictionary from name to array. Layers are stacked on a leading axis L, so that a loop
over layers is a loop over that axis. Matrices are stored [outputs, inputs]: a matmul contracts the last axis
of both operands, which is the form that XLA and vector units like best.
"""

import math

import numpy as np

from intlm import fixedpoint, noise
from intlm.config import ModelConfig
from intlm.fixedpoint import Array

Parameters = dict[str, Array]
"""int8 weights by name, with `head_bias` (int16, 1/256 bit) beside them, which is not trained."""

LAYER_MATRICES = (
    "gate_input",
    "gate_recurrent",
    "candidate_input",
    "candidate_recurrent",
    "mlp_in",
    "mlp_out",
)
LAYER_NORMS = ("norm_recurrent", "norm_mlp")
LAYER_BIASES = ("gate_bias", "candidate_bias")
LAYER = LAYER_MATRICES + LAYER_NORMS + LAYER_BIASES
"""Names of the parameters that every layer has."""

TRAINED = ("embedding", "head", "norm_output", *LAYER)
"""Names of the trained parameters, in the order that numbers their noise streams. Append only."""

SEPARATOR = 0
"""The token that opens a document; the recurrent state is reset before it is read. All tokenizers use 0."""

HEAD_BIAS_TOP = 3 << fixedpoint.SCORE_FRACTION_BITS
"""The head bias of the most frequent token: +3 bits, so that it has room to rise and rare ones to fall."""


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every trained parameter. D is the width, L the layers, V the vocabulary."""
    width, layers = config.width, config.layers
    return {
        "embedding": (config.vocabulary, width),
        "head": (config.vocabulary, width),
        "norm_output": (width,),
        "gate_input": (layers, width, width),
        "gate_recurrent": (layers, width, width),
        "candidate_input": (layers, width, width),
        "candidate_recurrent": (layers, width, width),
        "mlp_in": (layers, 4 * width, width),
        "mlp_out": (layers, width, 4 * width),
        "norm_recurrent": (layers, width),
        "norm_mlp": (layers, width),
        "gate_bias": (layers, width),
        "candidate_bias": (layers, width),
    }


_DEVIATIONS = {
    "embedding": 4,
    "head": 4,
    "gate_input": 24,
    "gate_recurrent": 8,
    "candidate_input": 24,
    "candidate_recurrent": 8,
    "mlp_in": 24,
    "mlp_out": 24,
}
"""Standard deviations of the initial int8 weights at a width that is a power of 4."""


def initial_masters(config: ModelConfig, key: Array) -> dict[str, Array]:
    """Initial masters: int16, Q8 of an int8 weight step, from integer noise alone.

    key: uint32 [2], `noise.seed_key(seed)`. Matrices are nearly Gaussian; where the input width K is no power
    of 4 their deviation is multiplied by 2**(shift - 4) / sqrt(K), which makes the shift after the matmul
    exact. Norm weights are 1.0, biases 0.
    """
    xp = fixedpoint.namespace(key)
    root = noise.fold(key, xp.uint32(INITIALISATION))
    masters = {}
    for stream, (name, shape) in enumerate(shapes(config).items()):
        if name in _DEVIATIONS:
            deviation = _DEVIATIONS[name] << 8
            if name != "embedding":
                shift = fixedpoint.matmul_shift(shape[-1])
                deviation = (deviation << (shift - 4 + 8)) // math.isqrt(shape[-1] << 16)
            rows = xp.arange(math.prod(shape[:-1]), dtype=xp.uint32)
            bell = noise.bell(noise.fold(root, stream), rows, shape[-1])
            value = fixedpoint.rounding_shift(bell * np.int32(deviation), 8).reshape(shape)
        else:
            value = xp.full(shape, 16 << 8 if name.startswith("norm") else 0, xp.int32)
        limit = fixedpoint.MASTER_LIMIT
        masters[name] = xp.clip(value, -limit, limit).astype(xp.int16)
    return masters


INITIALISATION = 0xFFFFFFFF
"""The counter that sets initialisation's noise apart from that of any step."""


def head_bias(counts_V: np.ndarray) -> np.ndarray:
    """log2 of the training text's token counts: int16 [V], in 1/256 bit, the most frequent token at +3 bits.

    counts_V: non-negative integers [V]; a token that never occurs counts as once. A bias lies in
    [-2047, 2047]. With it the model starts at the entropy of single tokens.
    """
    counts = np.maximum(counts_V.astype(np.int64), 1)
    # log2 through the same bit-length-and-table as the softmax's, after scaling to 31 bits.
    biases = []
    for count in counts.tolist():
        exponent = count.bit_length() - 1
        bits = fixedpoint.LOG2_MANTISSA_BITS
        mantissa = (count << bits >> exponent) & ((1 << bits) - 1)
        biases.append((exponent << 8) + int(fixedpoint.log2_table()[mantissa]))
    bias = np.array(biases, np.int64)
    bias += HEAD_BIAS_TOP - bias.max()
    return np.clip(bias, -fixedpoint.LOGIT_LIMIT, fixedpoint.LOGIT_LIMIT).astype(np.int16)


def parameters(masters: dict[str, Array], bias: Array) -> Parameters:
    """The int8 weights of `masters`, and the head bias."""
    return {name: fixedpoint.round_masters(value) for name, value in masters.items()} | {"head_bias": bias}


def initial_state(config: ModelConfig, rows: int) -> np.ndarray:
    """Zero recurrent states: int8 [rows, L, D]."""
    return np.zeros((rows, config.layers, config.width), np.int8)
