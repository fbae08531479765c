"""Numba kernels of posterior predictive checks.

How calibration is measured. Let F be the model's distribution function of a count given z, and z a
draw from q(z | x, y). If the model is right and q is its posterior, the pair (x, z) has the model's
joint distribution, so that u, uniform on [F(x - 1), F(x)], is uniform on [0, 1]: a pivot in the
sense of Johnson (2007, Bayesian Analysis 2:719), randomised for counts as by Dunn & Smyth (1996,
Journal of Computational and Graphical Statistics 5:236). Instead of drawing u, its distribution is
added to the histogram: the non-randomised histogram of Czado, Gneiting & Held (2009, Biometrics
65:1254). The share of u inside a central interval then has exactly the interval's probability as
its expectation, however many zeros there are; the share of *counts* inside would exceed it, since
an interval whose ends are whole numbers holds more than its nominal probability.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.inference.ppc.accumulator import LEVELS, PIT_BINS
from rayvaec.util.numba_cache import compiled

_LEVELS = np.array(LEVELS)
_LARGE, _LOG_LARGE = 1e200, 200 * math.log(10)
_POINT = 1e-12
_LEAST_RATE = 1e-12


@compiled
def add_counts(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    datasets: NDArray[Any],
    labels: NDArray[Any],
    label_column: NDArray[Any],
    genes: NDArray[Any],
    label_genes: NDArray[Any],
    library: NDArray[Any],
) -> None:
    """Add rows of counts to `Tally.genes` and `Tally.label_genes`; set each row's library."""
    for row in range(len(indptr) - 1):
        dataset, label = datasets[row], labels[row]
        total = 0.0
        for entry in range(indptr[row], indptr[row + 1]):
            gene, count = indices[entry], np.float64(counts[entry])
            total += count
            genes[dataset, 0, gene] += count
            genes[dataset, 1, gene] += count * count
            genes[dataset, 2, gene] += 1.0
            column = label_column[gene]
            if column >= 0:
                label_genes[dataset, label, column] += count
        library[row] = total


@compiled
def fill_pairs(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    library: NDArray[Any],
    typical_library: float,
    pair_column: NDArray[Any],
    values: NDArray[Any],
) -> None:
    """Set values[n_rows, n_pair_genes], zero before, to log(1 + count) at the typical library."""
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            column = pair_column[indices[entry]]
            if column >= 0:
                values[row, column] = math.log1p(counts[entry] * typical_library / library[row])


@njit
def _interval(count: int, r: float, odds: float, log_zero: float) -> tuple[float, float]:
    """Return F(count - 1) and the probability of `count`, from the recurrence of the latter."""
    p = odds / (1 + odds)
    term = total = 1.0
    scale = log_zero
    for k in range(1, count + 1):
        term *= p * (r + k - 1) / k
        total += term
        if total > _LARGE:
            term /= _LARGE
            total /= _LARGE
            scale += _LOG_LARGE
    factor = math.exp(scale)
    return max(total - term, 0.0) * factor, term * factor


@njit
def _spread(histogram: NDArray[Any], low: float, width: float) -> None:
    """Add the uniform distribution on [low, low + width]."""
    low = min(low, 1.0)
    first = min(int(low * PIT_BINS), PIT_BINS - 1)
    if width < _POINT:
        histogram[first] += 1.0
        return
    high = max(min(low + width, 1.0), low + _POINT)
    last = min(int(high * PIT_BINS), PIT_BINS - 1)
    left = low
    for number in range(first, last):
        right = (number + 1) / PIT_BINS
        histogram[number] += (right - left) / (high - low)
        left = right
    histogram[last] += (high - left) / (high - low)


@compiled
def add_expected(
    rates: NDArray[Any],
    px_r: NDArray[Any],
    is_softplus: bool,
    counts: NDArray[Any],
    labels: NDArray[Any],
    label_column: NDArray[Any],
    expected: NDArray[Any],
    residual: NDArray[Any],
    label_expected: NDArray[Any],
    pit: NDArray[Any],
) -> None:
    """Add rows, given z, to `Tally.expected`, `residual`, `label_expected` and `pit`.

    `rates` and `px_r` are the decoder's, in either form; `counts` is [2, n_rows, n_genes]: what was
    observed and the replicate.
    """
    n_rows, n_genes = rates.shape
    scale = np.exp(px_r)  # odds in the softplus form, inverse dispersion in the softmax form
    log1p_scale = np.log1p(scale)
    for row in range(n_rows):
        label = labels[row]
        for gene in range(n_genes):
            rate = max(np.float64(rates[row, gene]), _LEAST_RATE)
            if is_softplus:
                r, odds = rate, scale[gene]
                log_zero = -rate * log1p_scale[gene]
            else:
                r, odds = scale[gene], rate / scale[gene]
                log_zero = -r * math.log1p(odds)
            mean = r * odds
            variance = mean * (1 + odds)
            zero = math.exp(log_zero)
            expected[0, gene] += mean
            expected[1, gene] += variance
            # Fourth cumulant of a negative binomial, and twice the squared variance.
            expected[2, gene] += variance * (1 + 6 * odds * (1 + odds) + 2 * variance)
            expected[3, gene] += zero
            expected[4, gene] += zero * (1 - zero)
            column = label_column[gene]
            if column >= 0:
                label_expected[0, label, column] += mean
                label_expected[1, label, column] += variance
            level = np.searchsorted(_LEVELS, mean, side="right") - 1
            for which in range(2):
                count = counts[which, row, gene]
                residual[which, gene] += (count - mean) ** 2
                if level >= 0:
                    low, width = 0.0, zero
                    if count > 0:
                        low, width = _interval(count, r, odds, log_zero)
                    _spread(pit[which, label, level], low, width)
