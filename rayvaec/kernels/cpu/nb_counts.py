"""Negative-binomial counts given the remaining exponential gap at each gene.

`rayvaec.kernels.cpu.nb_sweep` says how the gap makes a count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.kernels.cpu.variates import large_negative_binomial, logarithmic
from rayvaec.kernels.math32 import FAST
from rayvaec.kernels.math64 import expm1_small, log_unit
from rayvaec.kernels.rng import gene_stream
from rayvaec.kernels.simd import Distinct

# Inversion then takes fewer than 200 steps on average, and with probability 1 - 1e-15 fewer than
# _MOST_STEPS, where it stops.
INVERT_BELOW = 0.98
_MOST_STEPS = 4000

_F = np.float32


@njit(inline="always")
def _step(
    u: float, term: float, x: float, p: float, size: float, k: float, reciprocal: float
) -> tuple[float, float, float]:
    """Go from count k to the next, unless the count is found; `reciprocal` is 1 / (k + 1)."""
    more = u > term
    u = u - term if more else u
    term = term * (p * (size + k) * reciprocal) if more else term
    return u, term, k + 1.0 if more else x


@njit(nogil=True, error_model="numpy", pipeline_class=Distinct)
def look_up(
    genes: NDArray[Any],
    rate: NDArray[Any],
    per_gene: NDArray[Any],
    rates: NDArray[Any],
    terms: NDArray[Any],
) -> None:
    """Gather a lane's rates, and what the table has, for the genes of its list."""
    for i in range(len(genes)):
        gene = np.uint32(genes[i])
        rates[i] = rate[gene]
        terms[i] = per_gene[gene]


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def odds_from_size(size: NDArray[Any], odds: NDArray[Any]) -> None:
    """Turn the softmax form's means, in `odds`, into odds."""
    for i in range(len(odds)):
        odds[i] /= size[i]


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def first_counts(
    gaps: NDArray[Any],
    each_size: NDArray[Any],
    odds_then_p: NDArray[Any],
    rest_u: NDArray[Any],
    rest_term: NDArray[Any],
    count: NDArray[Any],
    each_lam: NDArray[Any],
) -> None:
    """Invert up to a count of 4, for a lane's whole list.

    Probabilities are in units of P(0), so that small lambdas lose no digits: u is
    exp(lambda - gap) - 1, and the terms are P(x) / P(0). The count stands where u <= term.
    """
    for i in range(len(gaps)):
        size, odds = each_size[i], odds_then_p[i]
        q = 1.0 / (1.0 + odds)
        p = odds * q
        # Not the walk's own lambda: it was rounded to float32, and where that is above the sum of
        # all terms, some gaps would leave no count to be found.
        lam = -size * log_unit(q)
        u = expm1_small(min(max(lam - np.float64(gaps[i]), 0.0), 40.0))
        term = size * p
        u, term, x = _step(u, term, 1.0, p, size, 1.0, 0.5)
        u, term, x = _step(u, term, x, p, size, 2.0, 1.0 / 3.0)
        u, term, x = _step(u, term, x, p, size, 3.0, 0.25)
        rest_u[i], rest_term[i], count[i] = u, term, x
        odds_then_p[i], each_lam[i] = p, lam


@njit(nogil=True, error_model="numpy")
def _inverted(u: float, term: float, x: float, p: float, size: float) -> int:
    while u > term and x < _MOST_STEPS:
        u, term, x = _step(u, term, x, p, size, x, 1.0 / (x + 1.0))
    return int(x)


@njit(nogil=True, error_model="numpy")
def _clusters(u: float, lam: float) -> int:
    """Return the Poisson count above 0 at which the distribution function reaches exp(-gap)."""
    term, x = lam, 1
    while u > term and x < _MOST_STEPS:
        u -= term
        x += 1
        term *= lam / x
    return x


@njit(nogil=True, error_model="numpy")
def _summed(n: int, p: float, k0: np.uint64, k1: np.uint64) -> int:
    """Return the sum of `n` logarithmic draws."""
    cluster = -math.log1p(-p)
    total, number = 0, np.uint64(0)
    for _ in range(n):
        k, number = logarithmic(p, cluster, k0, k1, number)
        total += k
    return total


@njit(nogil=True, error_model="numpy")
def finish(
    genes: NDArray[Any],
    gaps: NDArray[Any],
    rest: NDArray[Any],
    origin: int,
    k0: np.uint64,
    k1: np.uint64,
    indices: NDArray[Any],
    counts: NDArray[Any],
    end: int,
) -> int:
    """Complete a lane's counts and append those above 0; return where its entries end.

    `rest` holds what `first_counts` left.
    """
    for i in range(len(genes)):
        u, term, x = rest[0, i], rest[1, i], rest[2, i]
        p, size, lam = rest[3, i], rest[4, i], rest[5, i]
        total, gene = int(x), origin + genes[i]
        if gaps[i] < _F(0.0):
            s0, s1 = gene_stream(k0, k1, np.uint64(gene))
            total = large_negative_binomial(size, p / (1.0 - p), s0, s1, np.uint64(0))[0]
        elif p >= INVERT_BELOW:
            s0, s1 = gene_stream(k0, k1, np.uint64(gene))
            u = math.expm1(max(lam - np.float64(gaps[i]), 0.0))
            total = _summed(_clusters(u, lam), p, s0, s1)
        elif u > term:
            total = _inverted(u, term, x, p, size)
        if total > 0:
            indices[end] = gene
            counts[end] = total
            end += 1
    return end
