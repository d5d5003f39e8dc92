import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import both, seeds
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from eval.sampling import SAMPLING
from intlm import eggroll, fixedpoint, model, noise

KEY = np.array([0x13198A2E, 0x03707344], np.uint32)


# --- the generator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # From kat_vectors of the Random123 distribution, threefry2x32 with 20 rounds.
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, expected):
    counters = np.array(counter, np.uint32)
    found = both(noise.threefry, np.array(key, np.uint32), counters[:1], counters[1:])
    assert (int(found[0][0]), int(found[1][0])) == expected


@given(st.integers(0, 2**64 - 1), seeds)
def test_it_is_the_generator_inside_jax(seed, other):
    key = noise.seed_key(seed)
    counters = np.random.default_rng(other).integers(0, 1 << 32, (2, 64), dtype=np.uint32)
    found = both(noise.threefry, key, counters[0], counters[1])
    theirs = threefry_2x32(jnp.asarray(key), jnp.asarray(counters.reshape(-1)))
    np.testing.assert_array_equal(np.concatenate(found), theirs)


def test_seed_key_is_the_seed_in_two_words():
    for seed in (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**64 - 1):
        key = noise.seed_key(seed)
        assert key.dtype == np.uint32 and int(key[0]) + (int(key[1]) << 32) == seed


def test_fold_is_the_generator_at_the_two_numbers():
    first, second = np.uint32(7), np.uint32(0xFFFFFFFE)
    x0, x1 = noise.threefry(KEY, np.array([7], np.uint32), np.array([0xFFFFFFFE], np.uint32))
    found = both(noise.fold, KEY, first, second)
    assert found.dtype == np.uint32 and found.tolist() == [int(x0[0]), int(x1[0])]
    assert noise.fold(KEY, 7).tolist() == noise.fold(KEY, 7, 0).tolist() != noise.fold(KEY, 0, 7).tolist()


# --- what is made of its words ------------------------------------------------------------------------------

KINDS = {
    "words": noise.words,
    "rademacher": noise.rademacher,
    "gaussian": noise.gaussian,
    "bell": noise.bell,
}


def test_words_are_the_generator_at_pair_and_block():
    rows = np.array([0, 5, 2**31 - 1], np.int32)
    found = both(partial(noise.words, count=6), KEY, rows)
    for i, row in enumerate(rows):
        for block in range(3):
            pair = noise.threefry(KEY, np.array([row], np.uint32), np.array([block], np.uint32))
            assert found[i, 2 * block : 2 * block + 2].tolist() == [int(pair[0][0]), int(pair[1][0])]


def test_rademacher_is_minus_one_where_a_bit_is_set():
    rows = np.arange(4)
    words = noise.words(KEY, rows, 3)
    found = noise.rademacher(KEY, rows, 96)
    for row, i in itertools.product(range(4), range(96)):
        assert found[row, i] == (-1 if int(words[row, i // 32]) >> (i % 32) & 1 else 1)


def test_gaussian_is_the_table_at_each_half_word():
    rows = np.arange(4)
    words, table = noise.words(KEY, rows, 8), fixedpoint.gaussian_table()
    found = noise.gaussian(KEY, rows, 16)
    for row, i in itertools.product(range(4), range(16)):
        assert found[row, i] == table[int(words[row, i // 2]) >> (16 * (i % 2)) & 0xFFFF]


def test_bell_is_twelve_bytes_less_their_mean():
    rows = np.arange(4)
    words = noise.words(KEY, rows, 15)
    found = noise.bell(KEY, rows, 5)
    for row, i in itertools.product(range(4), range(5)):
        twelve = words[row, 3 * i : 3 * i + 3].astype("<u4").tobytes()
        assert found[row, i] == sum(twelve) - 1530


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 7, 33, 64])
def test_numpy_and_jax_make_the_same_noise(name, count):
    dtype = {"words": np.uint32, "bell": np.int32}.get(name, np.int8)
    for rows in (np.arange(5), np.array([3], np.int32), np.array([2**24, 0, 9], np.uint32)):
        found = both(partial(KINDS[name], count=count), KEY, rows)
        assert found.shape == (len(rows), count) and found.dtype == dtype


@pytest.mark.parametrize("name", KINDS)
@given(st.lists(st.integers(0, 63), min_size=1, max_size=9), st.integers(1, 70))
def test_any_part_equals_the_same_part_of_the_whole(name, rows, count):
    whole = KINDS[name](KEY, np.arange(64), 70)
    part = KINDS[name](KEY, np.array(rows), count)
    np.testing.assert_array_equal(part, whole[rows, :count])


# --- statistics: fixed seeds, five standard deviations ------------------------------------------------------


def test_every_bit_of_a_word_is_balanced():
    words = noise.words(noise.seed_key(1), np.arange(1024), 64)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    deviation = np.sqrt(0.25 / words.size)
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 5 * deviation
    # And within a word no bit follows another.
    signs = 1 - 2.0 * bits.reshape(-1, 32)
    correlation = signs.T @ signs / len(signs) - np.eye(32)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(signs))


def test_bytes_of_words_are_uniform():
    counts = np.bincount(noise.words(noise.seed_key(2), np.arange(512), 128).view(np.uint8).ravel())
    expected = 512 * 128 * 4 / 256
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


def stream_keys(key, layers=3):
    """Every stream of one step, by name."""
    keys = {}
    for name in model.TRAINED:
        for layer in range(layers):
            keys["A", name, layer] = noise.fold(key, eggroll.output_stream(name), layer)
            keys["B", name, layer] = noise.fold(key, eggroll.input_stream(name), layer)
    for site in eggroll.SITES:
        for layer in range(layers):
            keys["direction", site, layer] = noise.fold(key, eggroll.direction_stream(site), layer)
            keys["sign", site, layer] = noise.fold(key, eggroll.sign_stream(site), layer)
    return keys


def test_no_two_streams_share_a_key():
    roots = [noise.seed_key(seed) for seed in (0, 1, 2**32, 2**63)]
    keys = []
    for root in roots:
        keys.append(noise.fold(root, SAMPLING))
        initial = noise.fold(root, np.uint32(model.INITIALISATION))
        keys += [initial, *(noise.fold(initial, stream) for stream in range(len(model.TRAINED)))]
        for step in (*range(20), 2**31, 2**32 - 3):
            key = eggroll.step_key(root, np.uint32(step))
            keys += [key, *stream_keys(key).values()]
    assert len({key.tobytes() for key in keys}) == len(keys)


def test_no_two_words_of_a_stream_share_a_counter():
    # The generator is a bijection: different (pair, block) give different double words.
    double = noise.words(KEY, np.arange(1 << 10), 128).view(np.uint64)
    assert len(np.unique(double)) == double.size == 1 << 16


def test_the_generator_is_used_with_every_bit_of_the_pair():
    rows = np.array([1 << k for k in range(32)], np.uint32)
    assert len(np.unique(noise.words(KEY, rows, 2), axis=0)) == 32


def test_streams_steps_pairs_and_layers_are_independent():
    root, length = noise.seed_key(11), 8192
    signs = []
    for step in (0, 1, 2):
        for key in stream_keys(eggroll.step_key(root, np.uint32(step))).values():
            signs.append(noise.rademacher(key, np.array([0]), length)[0])
    key = noise.fold(eggroll.step_key(root, np.uint32(0)), eggroll.output_stream("head"), 0)
    signs += list(noise.rademacher(key, np.arange(1, 64), length))
    signs = np.array(signs, np.float64)
    assert len(signs) > 350
    correlation = signs @ signs.T / length - np.eye(len(signs))
    assert np.abs(correlation).max() < 5.3 / np.sqrt(length)  # 1 of 70,000 is expected beyond 4.3
    # Nor does one follow another at a distance.
    for distance in (1, 2, 31, 32, 64):
        shifted = np.mean(signs[:, distance:] * signs[:, :-distance], axis=1)
        assert np.abs(shifted).max() < 5 / np.sqrt(length - distance)


@pytest.mark.parametrize(
    ("name", "variance"), [("rademacher", 1), ("gaussian", 256 + 1 / 12), ("bell", 65535)]
)
def test_mean_and_variance(name, variance):
    value = KINDS[name](noise.seed_key(4), np.arange(512), 512).astype(np.float64)
    assert abs(value.mean()) < 5 * np.sqrt(variance / value.size)
    # The fourth moment of a distribution no heavier than a normal one bounds the sample variance's deviation.
    assert abs((value**2).mean() / variance - 1) < 5 * np.sqrt(2 / value.size)


def test_gaussian_noise_is_as_frequent_as_its_table_says():
    value = noise.gaussian(noise.seed_key(5), np.arange(256), 1024).astype(int).ravel()
    table = np.bincount(fixedpoint.gaussian_table().astype(int) + 128, minlength=256) / 65536
    counts = np.bincount(value + 128, minlength=256)
    expected = table * value.size
    likely = expected > 20
    chi_square = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    freedom = likely.sum() - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    assert not counts[table == 0].any()


def test_bell_ends():
    value = noise.bell(noise.seed_key(6), np.arange(256), 1024)
    assert np.abs(value).max() <= 1530 and value.max() > 4 * 256 and value.min() < -4 * 256
    assert abs(np.mean(np.abs(value) < 256) - 0.683) < 0.01  # as normal numbers, within one deviation
