from __future__ import annotations

import numpy as np
from numba import njit

from rayvaec.kernels.math64 import expm1_small, log_unit


@njit
def logs(values):
    return np.array([log_unit(value) for value in values])


@njit
def exponentials(values):
    return np.array([expm1_small(value) for value in values])


def test_log_unit_is_accurate_down_to_the_smallest_and_next_to_one():
    rng = np.random.default_rng(0)
    near_one = 1 - 2.0 ** -rng.uniform(1, 53, 20_000)
    u = np.concatenate([rng.random(20_000), near_one, 2.0 ** -rng.uniform(0, 900, 20_000)])
    u = u[(u > 0) & (u < 1)]
    np.testing.assert_allclose(logs(u), np.log(u), rtol=1e-15)


def test_expm1_small_is_accurate_from_nothing_to_its_bound():
    x = np.concatenate([[0.0, 500.0], 10.0 ** np.random.default_rng(1).uniform(-300, 2.6, 50_000)])
    np.testing.assert_allclose(exponentials(x), np.expm1(x), rtol=2e-15)
