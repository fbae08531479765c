from __future__ import annotations

import mpmath
import numpy as np
import pytest
from numba import njit
from scipy import special

from rayvaec.kernels.math32 import (
    digamma_rise,
    exp_negative,
    lgamma_rise,
    log1p_positive,
    log1p_unit,
)


def largest_error(function, exact, x):
    @njit
    def apply(values, out):
        for i in range(len(values)):
            out[i] = function(values[i])

    x = x.astype("f4")
    found = np.empty_like(x)
    apply(x, found)
    return np.abs(found / exact(x.astype("f8")) - 1).max()


def test_float32_functions_are_right_to_relative_accuracy():
    x = np.concatenate([np.linspace(1e-6, 1, 100_001), np.logspace(-37, 0, 10_001)])
    assert largest_error(log1p_unit, np.log1p, x) < 3e-7
    assert (
        largest_error(log1p_positive, np.log1p, np.concatenate([x, np.logspace(0, 37, 99_999)]))
        < 3e-7
    )
    assert (
        largest_error(exp_negative, np.exp, -np.concatenate([x, np.linspace(1, 87, 99_999)])) < 3e-7
    )


def test_exp_stays_finite_below_its_range():
    assert exp_negative(np.float32(-1e30)) == exp_negative(np.float32(-87.0)) > 0


@pytest.mark.parametrize("r", [1e-30, 1e-6, 0.3, 15.9, 16.1, 400.0, 1e6, 1e9, 1e13])
@pytest.mark.parametrize("x", [1, 33, 1_000, 1_000_000])
def test_rises_of_lgamma_and_digamma(r, x):
    with mpmath.workdps(60):
        value = mpmath.loggamma(mpmath.mpf(r) + x) - mpmath.loggamma(r)
        slope = mpmath.digamma(mpmath.mpf(r) + x) - mpmath.digamma(r)
    assert lgamma_rise(r, float(x)) == pytest.approx(float(value), rel=1e-11, abs=1e-11)
    assert digamma_rise(r, float(x)) == pytest.approx(float(slope), rel=1e-11)
    assert digamma_rise(r, 0.0) == lgamma_rise(r, 0.0) == special.gammaln(1.0)
