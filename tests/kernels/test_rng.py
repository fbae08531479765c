from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rayvaec.errors import ConfigError
from rayvaec.kernels.rng import cell_keys, normal_noise, position_keys

WORDS = st.integers(0, 2**64 - 1)
# Tests of this module look at about 60 statistics of fixed seeds: a correct generator passes each
# with probability 1 - 1e-6.
ALPHA = 1e-6


def test_cell_keys_are_the_documented_hash():
    keys = cell_keys(["AAACCTG-1", "é", ""])
    assert keys.dtype == np.uint64
    # blake2b with digest_size=8, little-endian: these values must never change.
    assert keys.tolist() == [8669115045911818901, 3394012004367669963, 13020603013274838756]


def test_keys_of_many_cells_are_distinct():
    names = cell_keys([f"cell-{i}" for i in range(20_000)])
    positions = position_keys(0, 20_000)
    assert len(np.unique(np.concatenate([names, positions]))) == 40_000
    np.testing.assert_array_equal(position_keys(500, 520), positions[500:520])
    assert len(cell_keys([])) == len(position_keys(3, 3)) == 0


@settings(deadline=None)
@given(seed=WORDS, keys=st.lists(WORDS, min_size=1, max_size=8), n=st.integers(1, 9))
def test_a_row_of_noise_depends_on_its_own_key_only(seed, keys, n):
    samples = np.arange(len(keys), dtype=np.uint64)
    together = normal_noise(seed, np.array(keys, np.uint64), samples, n)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    for row, key in enumerate(keys):
        alone = normal_noise(seed, np.array([key], np.uint64), samples[row : row + 1], n)
        np.testing.assert_array_equal(alone[0], together[row])
    longer = normal_noise(seed, np.array(keys, np.uint64), samples, n + 3)
    np.testing.assert_array_equal(longer[:, :n], together)


def noise_of(what):
    """Noise of 20,000 rows that are neighbours in seed, key or sample."""
    n = 20_000
    steps = np.arange(n, dtype=np.uint64)
    zeros = np.zeros(n, np.uint64)
    if what == "keys":
        return normal_noise(0, steps, zeros, 8)
    if what == "samples":
        return normal_noise(0, zeros, steps, 8)
    if what == "high bits":
        return normal_noise(0, steps << np.uint64(49), zeros, 8)
    return np.concatenate([normal_noise(seed, zeros[:1], zeros[:1], 8) for seed in range(n)])


@pytest.mark.parametrize("what", ["keys", "samples", "high bits", "seeds"])
def test_neighbouring_streams_are_normal_and_independent(what):
    noise = noise_of(what).astype(float)
    assert stats.kstest(noise.ravel(), "norm").pvalue > ALPHA
    # Columns of one row, and the same column of the next row: correlations of z, z**2 and signs.
    limit = stats.norm.isf(ALPHA / 2) / np.sqrt(len(noise))
    for values in (noise, (noise**2 - 1) / np.sqrt(2), np.sign(noise)):
        within = values.T @ values / len(values) - np.eye(8)
        # The squares' own variance is estimated with twice the error of a correlation and more.
        np.fill_diagonal(within, 0)
        assert np.abs(within).max() < limit * 1.3
        across = values[1:].T @ values[:-1] / len(values)
        assert np.abs(across).max() < limit * 1.3


def test_seed_key_and_sample_are_not_interchangeable():
    a, b = np.array([5], np.uint64), np.array([9], np.uint64)
    rows = [normal_noise(s, k, m, 4) for s, k, m in [(1, a, b), (1, b, a), (5, b, a), (9, a, b)]]
    rows += [normal_noise(0, a, a, 4), normal_noise(0, b, b, 4)]
    assert len({row.tobytes() for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("seed", "keys", "samples", "message"),
    [
        (-1, [1], [0], "seed is -1"),
        (2**64, [1], [0], "seed is 18446744073709551616"),
        (0, [1, 2], [0], r"samples have shape \(1,\) for 2 rows"),
        (0, [-1], [0], "keys are of dtype int64, or negative"),
        (0, [0.5], [0], "keys are of dtype float64"),
    ],
)
def test_bad_keys_are_refused(seed, keys, samples, message):
    with pytest.raises(ConfigError, match=message):
        normal_noise(seed, np.array(keys), np.array(samples), 2)
