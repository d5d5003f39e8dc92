import math
from bisect import bisect_left
from decimal import Decimal, localcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_digest, both, exact_slope, extremes, seeds
from hypothesis import example, given
from hypothesis import strategies as st

from intlm import fixedpoint
from intlm.fixedpoint import (
    activate,
    activation_table,
    exp2_table,
    floor_log2,
    gated,
    gaussian_table,
    integer_sqrt,
    log2_sum_exp2,
    log2_table,
    log_likelihood,
    log_likelihood_slopes,
    matmul_shift,
    normal_cdf,
    normal_tail_quantile,
    normalize,
    reciprocal_table,
    round_masters,
    rounding_shift,
    saturate,
)

DIGITS = 40
"""Decimal digits of the exact references; `Decimal.ln`, `exp` and `sqrt` round correctly in the last."""


# --- rounding and saturating --------------------------------------------------------------------------


def test_saturate_takes_every_int16_to_the_nearest_of_the_range():
    x = np.arange(-(1 << 15), 1 << 15, dtype=np.int16)
    expected = np.array([max(-127, min(127, v)) for v in x.tolist()], np.int8)
    np.testing.assert_array_equal(both(saturate, x), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_saturate_at_the_ends_of_a_type(dtype):
    ends = np.array([np.iinfo(dtype).min, -128, -127, 0, 127, np.iinfo(dtype).max], dtype)
    found = both(saturate, ends)
    assert found.dtype == np.int8 and found.tolist() == [-127, -127, -127, 0, 127, 127]


def test_rounding_shift_is_division_to_the_nearest_halves_up():
    x = np.arange(-2100, 2101, dtype=np.int32)
    bits = np.arange(0, 13, dtype=np.int32)[:, None]
    found = both(rounding_shift, x, bits)
    expected = [[(2 * v + (1 << b)) // (2 << b) for v in x.tolist()] for b in bits[:, 0].tolist()]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[0], x)


@pytest.mark.parametrize(("dtype", "bits"), [(np.int32, 30), (np.int64, 48)])
def test_rounding_shift_far(dtype, bits):
    top = 1 << (bits - 1)
    x = np.array([-top - 1, -top, -top + 1, -1, 0, 1, top - 1, top, top + 1], dtype)
    found = both(partial(rounding_shift, bits=bits), x)
    assert found.dtype == dtype and found.tolist() == [-1, 0, 0, 0, 0, 0, 0, 1, 1]


def test_matmul_shift_is_the_root_of_the_width():
    for width in range(64, 32769, 64):
        root = matmul_shift(width) - 4
        assert 4**root <= width < 4 ** (root + 1)


def test_round_masters_for_every_master():
    limit = fixedpoint.MASTER_LIMIT
    masters = np.arange(-limit, limit + 1, dtype=np.int16)
    found = both(round_masters, masters)
    expected = [math.floor((m + 128) / 256) for m in masters.tolist()]
    assert found.dtype == np.int8 and found.min() == -127 and found.max() == 127
    np.testing.assert_array_equal(found, expected)


# --- norm, gates ----------------------------------------------------------------------------------------


def slow_normalize(row, weights):
    width = len(row)
    mean = sum(map(abs, row)) * (-(-(1 << 24) // width)) >> 24
    reciprocal = (2 * 65536 + max(1, mean)) // (2 * max(1, mean))
    return [max(-127, min(127, (x * w * reciprocal) >> 16)) for x, w in zip(row, weights, strict=True)]


def rows_of_every_mean(width):
    """Constant rows of each magnitude with mixed signs, and rows whose whole mass is in few elements."""
    rng = np.random.default_rng(width)
    constant = np.arange(128)[:, None] * rng.choice([-1, 1], (128, width))
    sparse = np.where(rng.random((128, width)) < np.linspace(0, 1, 128)[:, None], 127, 0)
    ends = np.array([[-127] * width, [127] * width, [0] * width, [127] + [0] * (width - 1)])
    return np.concatenate([constant, -sparse, ends]).astype(np.int8)


@pytest.mark.parametrize("width", [64, 192, 256])
@pytest.mark.parametrize("weight", [-127, -1, 0, 1, 16, 127])
def test_normalize_for_every_mean(width, weight):
    x = rows_of_every_mean(width)
    found = both(normalize, x, np.full(width, weight, np.int8))
    assert found.dtype == np.int8 and found.min() >= -127
    np.testing.assert_array_equal(found, [slow_normalize(row, [weight] * width) for row in x.tolist()])


@given(seeds)
def test_normalize_with_any_weights(seed):
    rng = np.random.default_rng(seed)
    x, weights = extremes(rng, (6, 64)).astype(np.int8), extremes(rng, (64,)).astype(np.int8)
    found = both(normalize, x, weights)
    expected = [slow_normalize(row, weights.tolist()) for row in x.tolist()]
    np.testing.assert_array_equal(found, expected)


def test_normalize_divides_by_the_mean():
    # With a power of two as the width the mean of a constant row is exact; the reciprocal is off by at most
    # 1/2 in 2**16 and the shift floors.
    for mean in range(1, 128):
        signs = np.where(np.arange(64) % 3 == 0, -1, 1)
        x = (mean * signs).astype(np.int8)
        for weight in (-127, -16, 1, 16, 127):
            exact = x.astype(int) * weight / mean
            error = normalize(x, np.full(64, weight, np.int8)) - exact
            slack = 127 * 127 / 2**17
            assert np.all(error <= slack) and np.all(error > -1 - slack)


def test_normalize_is_per_row_and_broadcasts_its_weights():
    rng = np.random.default_rng(5)
    x, weights = extremes(rng, (3, 2, 4, 64)).astype(np.int8), extremes(rng, (2, 1, 64)).astype(np.int8)
    whole = both(normalize, x, weights)
    assert whole.shape == x.shape
    for i, j, k in np.ndindex(3, 2, 4):
        np.testing.assert_array_equal(whole[i, j, k], normalize(x[i, j, k], weights[j, 0]))


def test_gated_for_every_pair_of_int8():
    values = np.arange(-128, 128, dtype=np.int8)
    found = both(gated, values[:, None], values[None, :])
    expected = [[(g + 127) * x // 256 for x in range(-128, 128)] for g in range(-128, 128)]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_a_gate_moves_the_state_towards_the_candidate_and_never_past_it():
    gate = np.arange(-127, 128, dtype=np.int8)[:, None]
    difference = np.arange(-254, 255, dtype=np.int32)[None, :]
    moved = both(gated, gate, difference)
    assert np.all(np.where(difference >= 0, (moved >= 0) & (moved <= difference), True))
    assert np.all(np.where(difference < 0, (moved <= 0) & (moved >= difference), True))
    np.testing.assert_array_equal(moved[-1], (254 * difference[0]) >> 8)
    assert not moved[0].any()


# --- logarithm and root ---------------------------------------------------------------------------------


def test_floor_log2_around_every_power():
    powers = [1 << k for k in range(31)]
    x = sorted({v for p in powers for v in (p - 1, p, p + 1) if 0 < v < 1 << 31} | set(range(1, 3000)))
    found = both(floor_log2, np.array(x, np.int32))
    assert found.dtype == np.int32 and found.tolist() == [v.bit_length() - 1 for v in x]


def test_integer_sqrt_is_the_floor_of_the_root():
    rng = np.random.default_rng(0)
    roots = [*range(300), *(int(r) for r in rng.integers(0, 1 << 31, 2000)), (1 << 31) - 1]
    squares = {r * r + offset for r in roots for offset in (-1, 0, 1, 2 * r) if r * r + offset >= 0}
    x = sorted(squares | {(1 << 62) - 1} | {1 << k for k in range(62)})
    x = [v for v in x if v < 1 << 62]
    found = both(integer_sqrt, np.array(x, np.int64))
    assert found.dtype == np.int64 and found.tolist() == [math.isqrt(v) for v in x]
    assert both(integer_sqrt, np.int64(17)) == 4


# --- tables -------------------------------------------------------------------------------------------

TABLES = {
    "exp2": (exp2_table, "d4d8b67964338c9b15470bd69eeafd5d591f9084dff6f271fc1b2460509ed14c"),
    "log2": (log2_table, "b9d0cfc2d78479713db904f4ad91a24b16b2e1aff493479828d909e7a194f60d"),
    "reciprocal": (reciprocal_table, "405b61cb32d216811e3ff6e014fff11d79ad0e0312b33fe8b4f2e0be1c991efa"),
    "gaussian": (gaussian_table, "817f3f3196d400ddc51591faff0c08e6b82782512fecdaa30962264c3e7f4c17"),
    "identity": (
        partial(activation_table, "identity"),
        "4fb7b9934a9c9e04968a3b65922793fa3e1e4aeb9b071288d1d0d69e5b9e18b7",
    ),
    "relu": (
        partial(activation_table, "relu"),
        "235a6431b1184233a4d6ae629e7fe07366ae40c08649669cd31ec0d3c9caf453",
    ),
    "relu2": (
        partial(activation_table, "relu2"),
        "065e48619bfdce3118ae22ec20e796f18f13415d86a56e5ad269530551384ea2",
    ),
    "sigmoid": (
        partial(activation_table, "sigmoid"),
        "8b562a8384dafc21945826ac2b087619698c8e9b3971ed5586b4aa0f970afbd9",
    ),
    "sigmoid_soft": (
        partial(activation_table, "sigmoid_soft"),
        "51bcc133c651a2d18e49c4114fe97a5a2982483eb66e11ab95bfbac2f0e1c875",
    ),
    "tanh": (
        partial(activation_table, "tanh"),
        "e6a6eb7df47fc8e34c7a46529913a995afb8d91c838090266da0455d4e5edd31",
    ),
    "tanh_soft": (
        partial(activation_table, "tanh_soft"),
        "43df6aee02734715eb15cb3b0b7268b835ff9bf4b7b0553702010acecc33c3fa",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_pinned(name):
    table, expected = TABLES[name]
    assert_digest(table(), expected, f"the table {name}")
    with pytest.raises(ValueError, match="read-only"):
        table()[0] = 1


def test_every_activation_is_pinned():
    assert set(fixedpoint.ACTIVATIONS) == set(TABLES) - {"exp2", "log2", "reciprocal", "gaussian"}


def test_exp2_table_is_rounded_exactly():
    table = exp2_table()
    assert table.shape == (256,) and table.dtype == np.int32
    for i, entry in enumerate(table.tolist()):
        # |entry - 2**(24 - i / 256)| <= 1/2, times 2, to the power 256.
        exact = 1 << (25 * 256 - i)
        assert (2 * entry - 1) ** 256 < exact <= (2 * entry + 1) ** 256


def test_log2_table_is_rounded_exactly():
    table = log2_table()
    cells = 1 << fixedpoint.LOG2_MANTISSA_BITS
    assert table.shape == (cells,) and table.dtype == np.int32
    for i, entry in enumerate(table.tolist()):
        # |entry - 256 log2(y)| <= 1/2 with y = (2 i + 1 + 2 cells) / (2 cells), the middle of the cell.
        power, scale = (2 * i + 1 + 2 * cells) ** 512, (2 * cells) ** 512
        assert 2 * power >= scale << (2 * entry) and power <= scale << (2 * entry + 1)


def test_reciprocal_table_is_rounded_exactly():
    table = reciprocal_table()
    assert table.shape == (128,) and table.dtype == np.int32 and table[0] == 65536
    for m, entry in enumerate(table.tolist()[1:], 1):
        assert 2 * abs(65536 - entry * m) <= m


def sigmoid(v, scale):
    return 1 / (1 + (-Decimal(v) / scale).exp())


EXACT_ACTIVATIONS = {
    "identity": Decimal,
    "relu": lambda v: Decimal(max(v, 0)),
    "relu2": lambda v: Decimal(max(0, min(2 * v, 127))),
    "sigmoid": lambda v: 254 * sigmoid(v, 16) - 127,
    "sigmoid_soft": lambda v: 254 * sigmoid(v, 64) - 127,
    "tanh": lambda v: 127 * (2 * sigmoid(2 * v, 16) - 1),
    "tanh_soft": lambda v: 127 * (2 * sigmoid(2 * v, 127) - 1),
}


@pytest.mark.parametrize("name", fixedpoint.ACTIVATIONS)
def test_activation_tables_are_the_nearest_to_the_function(name):
    table = activation_table(name)
    assert table.shape == (256,) and table.dtype == np.int8
    with localcontext(prec=DIGITS):
        for v in range(-127, 128):
            entry = int(table[v + 128])
            assert -127 <= entry <= 127
            assert abs(entry - EXACT_ACTIVATIONS[name](v)) <= Decimal("0.5")
    assert table[0] == table[1]


@pytest.mark.parametrize("name", fixedpoint.ACTIVATIONS)
def test_activate_is_its_table_for_every_value(name):
    x = np.arange(-127, 128, dtype=np.int8)
    found = both(partial(activate, name=name), x)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, activation_table(name)[1:])
    wide = x.reshape(5, 51)
    np.testing.assert_array_equal(both(partial(activate, name=name), wide), found.reshape(5, 51))


def test_an_unknown_activation():
    with pytest.raises(KeyError):
        activation_table("swish")


# --- the normal distribution ------------------------------------------------------------------------------

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


@cache
def exact_cdf(numerator, denominator):
    """Phi(x) = 1/2 + phi(x) * (x + x**3 / 3 + x**5 / 15 + ...), a series other than the library's."""
    with localcontext(prec=60):
        x = Decimal(numerator) / denominator
        term = total = x
        k = 1
        while abs(term) > Decimal("1e-45"):
            k += 2
            term = term * x * x / k
            total += term
        return Decimal("0.5") + (-x * x / 2).exp() / (2 * PI).sqrt() * total


@pytest.mark.parametrize("denominator", [32, 256])
def test_normal_cdf_is_exact_to_2_to_the_minus_63(denominator):
    for numerator in range(-9 * denominator, 9 * denominator + 1, 5):
        error = Decimal(normal_cdf(numerator, denominator)) - exact_cdf(numerator, denominator) * 2**64
        assert abs(error) <= 2


def test_gaussian_table_inverts_the_distribution():
    table = gaussian_table().astype(int)
    assert table.shape == (65536,) and gaussian_table().dtype == np.int8
    np.testing.assert_array_equal(table, -table[::-1])
    assert np.all(np.diff(table) >= 0) and table.max() == fixedpoint.GAUSSIAN_LIMIT == 67
    # v stands for [v - 1/2, v + 1/2] sixteenths of a standard deviation, and 67 for all above as well.
    for v in range(67):
        below = int(np.sum(table <= v))
        assert abs(below - exact_cdf(2 * v + 1, 32) * 65536) <= Decimal("0.5000001")


def test_gaussian_table_has_the_variance_of_its_format():
    table = gaussian_table().astype(int)
    assert abs(np.mean(table**2) - (256 + 1 / 12)) < 0.15


def test_normal_tail_quantile_is_the_smallest_that_is_rare_enough():
    rng = np.random.default_rng(3)
    alphas = sorted({0, 1, 2, 3, 3277, 6554, 65534, 65535, 65536, *rng.integers(0, 65537, 150).tolist()})

    def tail(z):
        return 2 * (1 - exact_cdf(z, 256)) * 65536

    previous = 1152
    for alpha in alphas:
        z = normal_tail_quantile(alpha)
        assert 0 <= z <= previous
        previous = z
        assert z == 1152 or tail(z) <= alpha + Decimal("1e-12")
        assert z == 0 or tail(z - 1) > alpha - Decimal("1e-12")
    assert normal_tail_quantile(0) == 1152 and normal_tail_quantile(65536) == 0
    assert abs(normal_tail_quantile(3277) / 256 - 1.96) < 0.005


# --- log-likelihood -----------------------------------------------------------------------------------

LARGEST = 1 << 16
DIFFERENCES = 2 * fixedpoint.LOGIT_LIMIT + 1


@cache
def terms():
    """Of each difference from the maximum: the integer term, and the exact one, in Q24."""
    table = exp2_table().tolist()
    whole = [(table[d & 255] + ((1 << (d >> 8)) >> 1)) >> (d >> 8) for d in range(DIFFERENCES)]
    with localcontext(prec=DIGITS):
        step = Decimal(2).ln() / 256
        exact = [2**24 * (-d * step).exp() for d in range(DIFFERENCES)]
    return whole, exact


def slow_log2_sum_exp2(logits):
    """The definition in Python's integers, which cannot overflow."""
    whole, _ = terms()
    top = int(logits.max())
    counts = np.bincount(top - logits.astype(int), minlength=DIFFERENCES)
    total = sum(int(n) * whole[d] for d, n in enumerate(counts) if n)
    position = total.bit_length() - 1
    bits = fixedpoint.LOG2_MANTISSA_BITS
    mantissa = (total << bits >> position) & ((1 << bits) - 1)
    return ((position - 24) << 8) + int(log2_table()[mantissa]) + top


def exact_log2_sum_exp2(logits):
    """log2 of the sum of 2**(logit / 256), times 256, to 30 digits or more."""
    _, exact = terms()
    top = int(logits.max())
    counts = np.bincount(top - logits.astype(int), minlength=DIFFERENCES)
    with localcontext(prec=DIGITS):
        total = sum(int(n) * exact[d] for d, n in enumerate(counts) if n)
        return (total / 2**24).ln() / Decimal(2).ln() * 256 + top


BOUND = Decimal("1")
"""The largest error of log2_sum_exp2, in 1/256 bit, as `test_the_error_bound` proves it."""


def hull(sign):
    """Upper hull of (term, sign * its error) over all differences, and over no term at all."""
    whole, exact = terms()
    points = sorted({(0, Decimal(0)), *((w, sign * (w - e)) for w, e in zip(whole, exact, strict=True))})
    upper = []
    for x, y in points:
        if upper and upper[-1][0] == x:
            upper.pop()  # the later one has the larger error
        while len(upper) > 1:
            (x0, y0), (x1, y1) = upper[-2:]
            if (x1 - x0) * (y - y0) < (y1 - y0) * (x - x0):
                break
            upper.pop()
        upper.append((x, y))
    return upper


def test_every_term_is_rounded_once_or_twice():
    whole, exact = terms()
    assert whole[0] == exact[0] == 2**24
    differences = np.arange(DIFFERENCES, dtype=np.int32)
    shifted = rounding_shift(exp2_table()[differences & 255], differences >> 8)
    np.testing.assert_array_equal(shifted, whole)
    assert min(whole) >= 256
    for w, e in zip(whole, exact, strict=True):
        assert abs(w - e) <= Decimal("0.75")


def test_the_error_bound():
    """The error of log2_sum_exp2 is below BOUND for any logits and any vocabulary up to 65,536.

    The computed sum C is exact but for its terms: C = 2**24 + the terms of at most 65,535 others. Each other
    adds a point (term, error) of a finite set, an absent one adds (0, 0); so the sum of their errors is at
    most 65,535 times the set's upper hull at (C - 2**24) / 65,535. In each cell of the log2 table [a, b) that
    C can be in, the hull is concave: its largest value is at an end or at its peak. The computed logarithm is
    the cell's entry and the exact one log2(C - error); the entry is compared at the end that is worse.
    """
    others = LARGEST - 1
    cells = 1 << fixedpoint.LOG2_MANTISSA_BITS
    worst = Decimal(0)
    with localcontext(prec=DIGITS):
        unit = 256 / Decimal(2).ln()
        entries = log2_table().tolist()
        edges = [(1 + Decimal(i) / cells).ln() * unit for i in range(cells + 1)]
        for sign in (1, -1):
            upper = hull(sign)
            xs = [x for x, _ in upper]
            peak_x, peak = max(upper, key=lambda point: point[1])

            def height(x, upper=upper, xs=xs):
                i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
                (x0, y0), (x1, y1) = upper[i - 1 : i + 1]
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

            for exponent in range(24, 41):
                for i, entry in enumerate(entries):
                    low = 2**exponent * (1 + Decimal(i) / cells)
                    high = 2**exponent * (1 + Decimal(i + 1) / cells)
                    x_low, x_high = (low - 2**24) / others, min((high - 2**24) / others, Decimal(2**24))
                    if x_low > 2**24:
                        continue
                    inside = x_low <= peak_x <= x_high
                    error = others * (peak if inside else max(height(x_low), height(x_high)))
                    of_terms = abs((1 - sign * error / low).ln()) * unit
                    of_table = sign * (entry - edges[i if sign > 0 else i + 1])
                    worst = max(worst, of_terms + of_table)
    assert Decimal("0.9") < worst <= BOUND


def adversaries():
    """Rows of logits that come close to the bound or to the ends of a word, by name."""
    low, high = -fixedpoint.LOGIT_LIMIT, fixedpoint.LOGIT_LIMIT
    rng = np.random.default_rng(0)

    def one_among(vocabulary, rest):
        row = np.full(vocabulary, rest, np.int16)
        row[vocabulary // 3] = high
        return row

    rows = {f"all {v}, V={n}": np.full(n, v, np.int16) for v in (low, 0, high) for n in (2, 100, LARGEST)}
    rows |= {f"one above, V={n}": one_among(n, low) for n in (2, 3, 63, 65, 256, 1000, LARGEST - 1, LARGEST)}
    for first, second, many in ((4091, 3941, 12605), (4091, 3941, 6051), (4091, 3941, 1766)):
        row = one_among(LARGEST, high - first)
        row[np.flatnonzero(row != high)[:many]] = high - second
        rows[f"worst mix of {many}"] = row
    for n in (2, 77, 256, 1000, LARGEST):
        rows[f"random, V={n}"] = rng.integers(low, high + 1, n).astype(np.int16)
        rows[f"ends, V={n}"] = rng.choice([low, high], n).astype(np.int16)
        rows[f"near, V={n}"] = rng.integers(-300, 300, n).astype(np.int16)
    return rows


@pytest.mark.parametrize("name", adversaries())
def test_log2_sum_exp2_on_adversaries(name):
    logits = adversaries()[name]
    found = both(log2_sum_exp2, logits[None])
    assert found.dtype == np.int32 and found.shape == (1,)
    assert found[0] == slow_log2_sum_exp2(logits)
    assert abs(Decimal(int(found[0])) - exact_log2_sum_exp2(logits)) <= BOUND


@example(0, 2).via("the smallest vocabulary")
@given(seeds, st.sampled_from([2, 100, 256, 1000]))
def test_log2_sum_exp2_on_any_logits(seed, vocabulary):
    rng = np.random.default_rng(seed)
    spread = int(rng.choice([3, 50, 600, 2047]))
    middle = int(rng.integers(-2047 + spread, 2048 - spread))
    logits = extremes(rng, (4, vocabulary), middle - spread, middle + spread).astype(np.int16)
    found = both(log2_sum_exp2, logits)
    for row, value in zip(logits, found.tolist(), strict=True):
        assert value == slow_log2_sum_exp2(row)
        assert abs(Decimal(value) - exact_log2_sum_exp2(row)) <= BOUND


def test_log2_sum_exp2_takes_any_leading_axes_and_int32():
    rng = np.random.default_rng(9)
    logits = extremes(rng, (3, 2, 5, 100), -2047, 2047).astype(np.int32)
    whole = both(log2_sum_exp2, logits)
    assert whole.shape == (3, 2, 5)
    for index in np.ndindex(whole.shape):
        assert whole[index] == slow_log2_sum_exp2(logits[index])


@given(seeds)
def test_log_likelihood_is_the_targets_logit_less_the_sum(seed):
    rng = np.random.default_rng(seed)
    logits = extremes(rng, (2, 3, 100), -2047, 2047).astype(np.int16)
    targets = rng.integers(0, 100, (2, 3)).astype(np.int32)
    found = both(log_likelihood, logits, targets)
    assert found.dtype == np.int32
    for index in np.ndindex(2, 3):
        target = int(logits[index][targets[index]])
        assert found[index] == target - slow_log2_sum_exp2(logits[index])
    assert found.max() <= 2


def test_the_range_of_a_score():
    logits = np.full((1, LARGEST), fixedpoint.LOGIT_LIMIT, np.int16)
    logits[0, 7] = -fixedpoint.LOGIT_LIMIT
    assert -8192 <= both(log_likelihood, logits, np.array([7], np.int32))[0] <= -8189
    alone = np.full((1, 2), -fixedpoint.LOGIT_LIMIT, np.int16)
    alone[0, 1] = fixedpoint.LOGIT_LIMIT
    assert both(log_likelihood, alone, np.array([1], np.int32))[0] == 0


def slopes(logits, targets, *directions):
    return log_likelihood_slopes(logits, targets, directions)


@example(0, 2).via("the smallest vocabulary")
@given(seeds, st.sampled_from([2, 100, 256, 1000]))
def test_the_slope_of_a_score(seed, vocabulary):
    rng = np.random.default_rng(seed)
    spread = int(rng.choice([0, 3, 50, 600, 2047]))
    logits = extremes(rng, (2, 3, vocabulary), -spread, spread).astype(np.int16)
    targets = rng.integers(0, vocabulary, (2, 3)).astype(np.int32)
    signs = np.where(rng.random((3, vocabulary)) < rng.choice([0, 0.1, 0.5, 1]), -1, 1).astype(np.int8)
    (found,) = both(slopes, logits, targets, signs)
    assert found.dtype == np.int32 and found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert found[i, j] == exact_slope(logits[i, j].tolist(), targets[i, j], signs[j].tolist())
    assert np.all(np.abs(found) <= 256)
    several = log_likelihood_slopes(logits, targets, [-signs, signs, signs[0]])
    np.testing.assert_array_equal(several[:2], [-found, found])
    np.testing.assert_array_equal(several[2][:, 0], found[:, 0])


def test_the_slope_of_the_largest_vocabulary():
    logits = np.full((1, LARGEST), 1000, np.int16)
    signs = np.ones((1, LARGEST), np.int8)
    target = np.array([5], np.int32)
    assert both(log_likelihood_slopes, logits, target, signs)[0] == 0
    signs[0, 5] = -1
    # The mean sign is 1 - 2 / 65536: 127.996.
    assert both(log_likelihood_slopes, logits, target, signs)[0] == -128 - 127


@given(seeds)
def test_the_slope_is_what_a_small_step_changes(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 400, (20, 100)).clip(-1500, 1500).astype(np.int32)
    targets = rng.integers(0, 100, 20).astype(np.int32)
    signs = rng.choice([-1, 1], (20, 100)).astype(np.int8)
    # Over half a bit the change, in 1/256 bit, is the slope, in 1/128.
    step = 64 * signs.astype(np.int32)
    change = log_likelihood(logits + step, targets) - log_likelihood(logits - step, targets)
    np.testing.assert_allclose(log_likelihood_slopes(logits, targets, [signs])[0], change, atol=6)


def test_the_namespace_of_an_array():
    assert fixedpoint.namespace(np.zeros(1)) is np and fixedpoint.namespace(np.int32(1)) is np
    assert fixedpoint.namespace(jnp.zeros(1)) is jnp
    assert jax.jit(lambda x: x + (fixedpoint.namespace(x) is jnp))(1) == 2
