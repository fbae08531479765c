"""Vectorising float32 elementary functions for numba kernels.

numba calls libm for exp and log, one number at a time. The float32 functions here are branchless
polynomials, so that LLVM turns a loop over them into vector code: an element costs 0.3 to 0.5 ns
instead of 5 to 10. Coefficients are Chebyshev fits; errors (largest relative ones, over the whole
range) are below 3e-7.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

# FMA and sums in several lanes: fixed when compiled, and dependent on nothing but the row itself.
FAST = {"contract", "nsz"}
SUMS = {"contract", "nsz", "reassoc", "nnan"}

_F = np.float32
_BLOCK = 1024
# Counts up to here go by products: below (1e6 + 32)**32 nothing overflows a float64.
_SMALL = 32
_LARGE_RATE = 1e6
_INVERSE_FACTORIAL = np.array([1.0 / math.factorial(x) for x in range(_SMALL + 1)])
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, kept in the low bits
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_MANTISSA = np.int32(0x007FFFFF)
_ONE_BITS = np.int32(127 << 23)
_23 = np.int32(23)


@njit(inline="always")
def exp_negative(x: np.float32) -> np.float32:
    """Return exp(x) for x <= 0; below -87 as at -87, which is 1.6e-38."""
    x = max(x, _F(-87.0))
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    t = x - n * _LN2_HIGH
    t = t - n * _LN2_LOW
    p = _F(0.0013949782935591421)
    p = p * t + _F(0.008375970820020074)
    p = p * t + _F(0.041666200044223334)
    p = p * t + _F(0.16666405262911438)
    p = p * t + _F(0.5000000114384686)
    p = p * t + _F(1.0)
    p = p * t + _F(1.0)
    scale = (_F(shifted).view(np.int32) << _23) + _ONE_BITS
    return p * np.int32(scale).view(np.float32)


@njit(inline="always")
def log1p_unit(x: np.float32) -> np.float32:
    """Return log(1 + x) for 0 <= x <= 1, to relative accuracy."""
    p = _F(0.0020376905218038306)
    p = p * x + _F(-0.013444831077200178)
    p = p * x + _F(0.04155762269694332)
    p = p * x + _F(-0.08253533223605536)
    p = p * x + _F(0.12425102938401861)
    p = p * x + _F(-0.16108631931697398)
    p = p * x + _F(0.19891537478162236)
    p = p * x + _F(-0.24987392751292764)
    p = p * x + _F(0.333325691821074)
    p = p * x + _F(-0.4999998172448772)
    p = p * x + _F(1.0)
    return p * x


@njit(inline="always")
def log1p_positive(x: np.float32) -> np.float32:
    """Return log(1 + x) for 0 <= x <= 1e37, to relative accuracy."""
    u = _F(1.0) + x
    bits = _F(u).view(np.int32)
    # Split u into 2**k * m with m in [sqrt(1/2), sqrt(2)).
    offset = bits - _SQRT_HALF_BITS
    k = _F(np.int32(offset >> _23))
    m = np.int32((offset & _MANTISSA) + _SQRT_HALF_BITS).view(np.float32)
    f = m - _F(1.0)
    p = _F(0.07149753451661843)
    p = p * f + _F(-0.11571201069636255)
    p = p * f + _F(0.11661511417193123)
    p = p * f + _F(-0.12411050643369055)
    p = p * f + _F(0.14249936484271558)
    p = p * f + _F(-0.1666848024068438)
    p = p * f + _F(0.20000707480568916)
    p = p * f + _F(-0.24999989048727736)
    p = p * f + _F(0.3333333119082292)
    log_m = p * f * f * f - _F(0.5) * f * f + f
    # What rounding 1 + x dropped, to first order.
    dropped = (x - (u - _F(1.0))) / u
    return k * _LN2_HIGH + (k * _LN2_LOW + (log_m + dropped))


@njit(nogil=True)
def lgamma_rise(r: float, x: float) -> float:
    """Return lgamma(r + x) - lgamma(r) for x >= 0 without the cancellation at large r."""
    if r < 16.0:
        return math.lgamma(r + x) - math.lgamma(r)
    z = r + x
    # Stirling's series at both ends, subtracted term by term; the next term is below 2e-12.
    return (
        (r - 0.5) * math.log1p(x / r)
        + x * (math.log(z) - 1.0)
        + (1.0 / z - 1.0 / r) / 12.0
        - (z**-3.0 - r**-3.0) / 360.0
        + (z**-5.0 - r**-5.0) / 1260.0
    )


@njit(nogil=True)
def digamma_rise(r: float, x: float) -> float:
    """Return digamma(r + x) - digamma(r) for x >= 0 without the cancellation at large r."""
    steps = 0.0
    z = r + x
    while r < 16.0:
        steps += 1.0 / r - 1.0 / z
        r += 1.0
        z += 1.0
    tail = digamma_tail(z) - digamma_tail(r)
    return steps + math.log1p(x / r) + tail


@njit(nogil=True)
def digamma_tail(z: float) -> float:
    """Return digamma(z) - log(z) for z >= 16, to 1e-13."""
    w = 1.0 / (z * z)
    return -0.5 / z - w * (1.0 / 12.0 - w * (1.0 / 120.0 - w * (1.0 / 252.0 - w / 240.0)))


@njit(nogil=True)
def _large_bracket(r: float, x: float) -> tuple[float, float]:
    """Return lgamma(x+r) - lgamma(r) - lgamma(x+1) and its derivative."""
    return lgamma_rise(r, x) - math.lgamma(x + 1.0), digamma_rise(r, x)


@njit(inline="always")
def bracket(r: float, x: int) -> tuple[float, float, float]:
    """Return (product, value, ratio) of a count x > 0.

    lgamma(x+r) - lgamma(r) - lgamma(x+1) is log(product) + value, and ratio its derivative.
    """
    product, value = r, 0.0
    if x == 1:
        ratio = 1.0 / r
    elif x > _SMALL or r > _LARGE_RATE:
        product = 1.0
        value, ratio = _large_bracket(r, float(x))
    else:
        derivative = 1.0
        for k in range(1, x):
            term = r + k
            derivative = derivative * term + product
            product *= term
        ratio = derivative / product
        product *= _INVERSE_FACTORIAL[x]
    return product, value, ratio


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def short_dot(u: NDArray[Any], v: NDArray[Any]) -> np.float32:
    """Return u @ v in float32: for some thousand numbers at most."""
    total = _F(0.0)
    for i in range(len(u)):
        total += u[i] * v[i]
    return total


@njit(nogil=True)
def dot(u: NDArray[Any], v: NDArray[Any]) -> float:
    """Return u @ v, by blocks whose float32 sums are added up in float64."""
    total = 0.0
    for start in range(0, len(u), _BLOCK):
        total += float(short_dot(u[start : start + _BLOCK], v[start : start + _BLOCK]))
    return total


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def _short_sum(values: NDArray[Any]) -> np.float32:
    total = _F(0.0)
    for i in range(len(values)):
        total += values[i]
    return total


@njit(nogil=True)
def block_sum(values: NDArray[Any]) -> float:
    """Return the sum, by blocks whose float32 sums are added up in float64."""
    total = 0.0
    for start in range(0, len(values), _BLOCK):
        total += float(_short_sum(values[start : start + _BLOCK]))
    return total


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def add_scaled(total: NDArray[Any], values: NDArray[Any], factor: np.float32) -> None:
    """Add factor * values to `total`."""
    for g in range(len(total)):
        total[g] += factor * values[g]


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def product_into(
    out: NDArray[Any], u: NDArray[Any], v: NDArray[Any], factor: np.float32, total: NDArray[Any]
) -> None:
    """Set out = factor * u * v, and add it to `total`."""
    for g in range(len(out)):
        value = factor * u[g] * v[g]
        out[g] = value
        total[g] += value
