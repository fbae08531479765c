"""What the fused loss does to one row of activations on the CPU, in numba.

The zeros of a row are dealt with by vectorised float32 loops, and the non-zeros after them, one by
one, in float64. Both kernels turn activations in place into gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.kernels.nb_loss_terms import RATE_FLOOR
from rayvaec.kernels.special import (
    digamma_rise,
    exp_negative,
    lgamma_rise,
    log1p_positive,
    log1p_unit,
)

_F = np.float32
_BLOCK = 1024
# Counts up to here go by products: below (1e6 + 32)**32 nothing overflows a float64.
_SMALL = 32
_LARGE_RATE = 1e6
_INVERSE_FACTORIAL = np.array([1.0 / math.factorial(x) for x in range(_SMALL + 1)])

# FMA and sums in several lanes; nothing that depends on anything but the row itself.
_FAST = {"contract", "nsz"}
_SUMS = {"contract", "nsz", "reassoc", "nnan"}


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _dot(u: NDArray[Any], v: NDArray[Any]) -> float:
    """Return u @ v, by blocks whose float32 sums are added up in float64."""
    total = 0.0
    for start in range(0, len(u), _BLOCK):
        part = _F(0.0)
        for i in range(start, min(start + _BLOCK, len(u))):
            part += u[i] * v[i]
        total += float(part)
    return total


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _add_scaled(total: NDArray[Any], values: NDArray[Any], factor: np.float32) -> None:
    for g in range(len(total)):
        total[g] += factor * values[g]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _softplus_sigmoid(
    a: NDArray[Any], bias: NDArray[Any], scale: NDArray[Any], slope: NDArray[Any]
) -> None:
    for g in range(len(a)):
        v = a[g] + bias[g]
        e = exp_negative(-abs(v))
        scale[g] = max(v, _F(0.0)) + log1p_unit(e)
        slope[g] = (_F(1.0) if v >= _F(0.0) else e) / (_F(1.0) + e)


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _product(
    out: NDArray[Any], u: NDArray[Any], v: NDArray[Any], factor: np.float32, total: NDArray[Any]
) -> None:
    """Set out = factor * u * v, and add it to `total`."""
    for g in range(len(out)):
        value = factor * u[g] * v[g]
        out[g] = value
        total[g] += value


@njit(nogil=True, error_model="numpy")
def _bracket(r: float, x: int) -> tuple[float, float, float]:
    """Return (product, value, ratio) of a count x > 0.

    lgamma(x+r) - lgamma(r) - lgamma(x+1) is log(product) + value, and ratio its derivative.
    """
    if x > _SMALL or r > _LARGE_RATE:
        value = lgamma_rise(r, float(x)) - math.lgamma(x + 1.0)
        return 1.0, value, digamma_rise(r, float(x))
    product, derivative = 1.0, 0.0
    for k in range(x):
        term = r + k
        derivative = derivative * term + product
        product *= term
    return product * _INVERSE_FACTORIAL[x], 0.0, derivative / product


@njit(nogil=True, error_model="numpy")
def _softplus_counts(
    indices: NDArray[Any],
    counts: NDArray[Any],
    scale: NDArray[Any],
    slope: NDArray[Any],
    log_p: NDArray[Any],
    library: float,
    factor: float,
    want: bool,
    grad_a: NDArray[Any],
    sum_a: NDArray[Any],
    sum_x: NDArray[Any],
) -> float:
    """Add one row's non-zeros to the gradients; return their log-likelihood."""
    value, product = 0.0, 1.0
    for i in range(len(indices)):
        g, x = np.uint32(indices[i]), counts[i]
        if x <= 0:
            continue
        r = max(library * scale[g], RATE_FLOOR)
        p, v, ratio = _bracket(r, x)
        value += v + x * log_p[g]
        product *= p
        if product < 1e-100 or product > 1e100:
            value += math.log(product)
            product = 1.0
        if want:
            delta = _F(factor * library * slope[g] * ratio)
            grad_a[g] -= delta
            sum_a[g] -= delta
            sum_x[g] += _F(factor * x)
    return value + math.log(product)


@njit(nogil=True, cache=True, error_model="numpy")
def softplus_rows(
    a: NDArray[Any],
    bias: NDArray[Any],
    log_q: NDArray[Any],
    log_p: NDArray[Any],
    library: NDArray[Any],
    factor: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    want: bool,
    loss: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Compute the loss of each row, and turn `a` into its gradient.

    `sums` gathers over rows: the gradient of the bias, sum f*r and sum f*x per gene.
    """
    scale, slope = np.empty(a.shape[1], _F), np.empty(a.shape[1], _F)
    for c in range(len(a)):
        weight = factor[c] * library[c]
        _softplus_sigmoid(a[c], bias, scale, slope)
        dense = library[c] * _dot(scale, log_q)
        if want:
            _product(a[c], slope, log_q, weight, sums[0])
            _add_scaled(sums[1], scale, weight)
        start, stop = indptr[c], indptr[c + 1]
        loss[c] = dense - _softplus_counts(
            indices[start:stop],
            counts[start:stop],
            scale,
            slope,
            log_p,
            float(library[c]),
            float(factor[c]),
            want,
            a[c],
            sums[0],
            sums[2],
        )


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _add_bias_max(a: NDArray[Any], bias: NDArray[Any]) -> float:
    """Add the bias in place; return the largest sum."""
    largest = _F(-np.inf)
    for g in range(len(a)):
        v = a[g] + bias[g]
        a[g] = v
        largest = max(largest, v)
    return float(largest)


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _exp_shifted(a: NDArray[Any], shift: np.float32, out: NDArray[Any]) -> None:
    for g in range(len(a)):
        out[g] = exp_negative(a[g] - shift)


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _sum(values: NDArray[Any]) -> float:
    total = 0.0
    for start in range(0, len(values), _BLOCK):
        part = _F(0.0)
        for i in range(start, min(start + _BLOCK, len(values))):
            part += values[i]
        total += float(part)
    return total


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _log_odds(
    mu: NDArray[Any], inverse_theta: NDArray[Any], log_odds: NDArray[Any], p: NDArray[Any]
) -> None:
    """Set log1p(mu/theta) and mu/(mu+theta)."""
    for g in range(len(mu)):
        odds = min(mu[g] * inverse_theta[g], _F(1e37))
        log_odds[g] = log1p_positive(odds)
        p[g] = odds / (_F(1.0) + odds)


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _add_dispersion_slope(
    total: NDArray[Any], log_odds: NDArray[Any], p: NDArray[Any], factor: np.float32
) -> None:
    """Add factor * (log1p(odds) - odds/(1+odds)), by its series where that cancels."""
    for g in range(len(total)):
        q = p[g]
        # In p = odds/(1+odds): -log(1-p) - p = p**2/2 + p**3/3 + ...
        series = q * q * (_F(0.5) + q * (_F(1 / 3) + q * _F(0.25)))
        total[g] += factor * (series if q < _F(0.01) else log_odds[g] - q)


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _project(grad: NDArray[Any], mu: NDArray[Any], factor: np.float32, sums: NDArray[Any]) -> None:
    """Set grad = grad - factor * mu, softmax's derivative, and add it to `sums`."""
    for g in range(len(grad)):
        value = grad[g] - factor * mu[g]
        grad[g] = value
        sums[g] += value


@njit(nogil=True, error_model="numpy")
def _softmax_counts(
    indices: NDArray[Any],
    counts: NDArray[Any],
    mu: NDArray[Any],
    theta: NDArray[Any],
    factor: float,
    want: bool,
    grad: NDArray[Any],
    sum_theta: NDArray[Any],
) -> float:
    """Add one row's non-zeros to the gradients with respect to log mu and log theta."""
    value, product = 0.0, 1.0
    for i in range(len(indices)):
        g, x = np.uint32(indices[i]), counts[i]
        if x <= 0:
            continue
        m, t = max(float(mu[g]), RATE_FLOOR), theta[g]
        p, v, ratio = _bracket(t, x)
        value += v + x * math.log(m / (t + m))
        product *= p
        if product < 1e-100 or product > 1e100:
            value += math.log(product)
            product = 1.0
        if want:
            part = t * x / (t + m)
            grad[g] -= _F(factor * part)
            sum_theta[g] += factor * (t * ratio - part)
    return value + math.log(product)


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_rows(
    a: NDArray[Any],
    bias: NDArray[Any],
    theta_32: NDArray[Any],
    theta: NDArray[Any],
    library: NDArray[Any],
    factor: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    want: bool,
    loss: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Compute the loss of each row, and turn `a` into its gradient.

    `sums` gathers over rows: the gradient of the bias, the zeros' part of the
    gradient with respect to log theta (by theta), and the non-zeros' part, negated.
    """
    n_genes = a.shape[1]
    inverse = (1.0 / theta).astype(_F)
    mu, log_odds, p = np.empty(n_genes, _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    unused = np.empty(n_genes, _F)
    sum_theta = np.zeros(n_genes)
    for c in range(len(a)):
        shift = _add_bias_max(a[c], bias)
        _exp_shifted(a[c], _F(shift), mu)
        ratio = _F(library[c] / _sum(mu))
        for g in range(n_genes):
            mu[g] *= ratio
        _log_odds(mu, inverse, log_odds, p)
        dense = _dot(log_odds, theta_32)
        if want:
            _product(a[c], p, theta_32, factor[c], unused)
            _add_dispersion_slope(sums[1], log_odds, p, factor[c])
        start, stop = indptr[c], indptr[c + 1]
        loss[c] = dense - _softmax_counts(
            indices[start:stop],
            counts[start:stop],
            mu,
            theta,
            float(factor[c]),
            want,
            a[c],
            sum_theta,
        )
        if want:
            # softmax's derivative: every gene gives up its share of the gradients' sum.
            share = _F(_sum(a[c]) / max(float(library[c]), RATE_FLOOR))
            _project(a[c], mu, share, sums[0])
    for g in range(n_genes):
        sums[2, g] += sum_theta[g]
