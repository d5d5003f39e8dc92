"""What several test modules share: a harness that runs NumPy and JAX, and arrays full of extremes."""

import hashlib
from functools import cache

import jax
import numpy as np
from hypothesis import strategies as st

from intlm import fixedpoint, model
from train.corpus import Corpus

seeds = st.integers(0, 2**32 - 1)

REGENERATE = (
    "The SHA-256 of {what} is {digest}. Paste it here only if a change of the numbers was intended: runs and "
    "checkpoints made before it cannot be reproduced any more, which belongs in the change log. If nothing "
    "was meant to change, this is a bug."
)


@cache
def compiled(function):
    return jax.jit(function)


def both(function, *arrays):
    """The result of `function` on NumPy arrays, after proving that JAX gives the same bits and dtypes."""
    expected = function(*arrays)
    with jax.enable_x64(True):
        assert_same(expected, compiled(function)(*arrays))
    return expected


def assert_same(expected, actual, what="result"):
    """Equal in structure, dtype, shape and every bit."""
    if isinstance(expected, dict):
        assert set(expected) == set(actual), what
        for name in expected:
            assert_same(expected[name], actual[name], f"{what}.{name}")
    elif isinstance(expected, tuple):
        assert len(expected) == len(actual), what
        for i, (one, other) in enumerate(zip(expected, actual, strict=True)):
            assert_same(one, other, f"{what}[{i}]")
    else:
        one, other = np.asarray(expected), np.asarray(actual)
        assert one.dtype == other.dtype, f"{what}: {one.dtype} and {other.dtype}"
        np.testing.assert_array_equal(one, other, err_msg=what)


def extremes(rng, shape, low=-127, high=127):
    """Integers in [low, high]; about half of them at an end or at 0, and sometimes all of a row."""
    value = rng.integers(low, high + 1, shape)
    special = rng.choice([low, 0, high], shape)
    value = np.where(rng.random(shape) < rng.choice([0.0, 0.5, 1.0]), special, value)
    if value.ndim and rng.random() < 0.5:
        value[rng.integers(0, shape[0])] = rng.choice([low, high])
    return value


def extreme_parameters(config, seed, corruption):
    """Int8 parameters: fresh ones at corruption 0; blocks at -127, 0 or 127 at 1; any and extremes at 2."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in model.shapes(config).items():
        if corruption == 2:
            made[name] = extremes(rng, shape)
            continue
        deviation = {"embedding": 16, "head": 8}.get(name, 24)
        value = np.rint(rng.normal(0, deviation, shape))
        if name.startswith("norm"):
            value = np.full(shape, 16)
        if corruption == 1:
            flat = value.reshape(-1)
            start, stop = sorted(rng.integers(0, flat.size + 1, 2))
            flat[start:stop] = rng.choice([-127, 0, 127])
        made[name] = np.clip(value, -127, 127)
    limit = fixedpoint.LOGIT_LIMIT if corruption else 200
    bias = extremes(rng, (config.vocabulary,), -limit, limit).astype(np.int16)
    return {name: value.astype(np.int8) for name, value in made.items()} | {"head_bias": bias}


def digest(tree):
    """SHA-256 over the names, dtypes, shapes and bytes of a dictionary of arrays, or of one array."""
    tree = tree if isinstance(tree, dict) else {"": tree}
    sha = hashlib.sha256()
    for name in sorted(tree):
        value = np.ascontiguousarray(tree[name])
        sha.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def assert_digest(tree, expected, what):
    found = digest(tree)
    assert found == expected, REGENERATE.format(what=what, digest=found)


class ListCorpus(Corpus):
    """A corpus in memory, which counts how often it was opened."""

    def __init__(self, documents, name="list"):
        self.name = name
        self.items = list(documents)
        self.opened = 0

    def read(self, cursor):
        self.opened += 1
        for number in range(cursor.get("number", 0), len(self.items)):
            yield self.items[number], {"number": number + 1}

    def fingerprint(self):
        return {"documents": len(self.items)}


def exact_slope(logits, target, direction):
    """128 (direction[target] - the softmax's mean of the direction), the mean rounded towards 0."""
    terms = []
    for logit in logits:
        whole, part = divmod(max(logits) - logit, 256)
        terms.append((2 * int(fixedpoint.exp2_table()[part]) + 2**whole) // 2 ** (whole + 1))
    along = sum(term * sign for term, sign in zip(terms, direction, strict=True))
    mean = 128 * abs(along) // sum(terms)
    return 128 * direction[target] - (mean if along > 0 else -mean)
