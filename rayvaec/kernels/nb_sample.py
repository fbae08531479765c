"""Exact negative-binomial draws, in one sweep over each row and straight into CSR.

A negative binomial is a Poisson number of logarithmic-series clusters (Quenouille 1949): with odds
o = p/(1-p), ::

    x_g = sum of K_i over i <= M_g,   M_g ~ Poisson(lambda_g),   K_i ~ Logarithmic(p_g)
    softplus form:  o_g = exp(px_r_g)         lambda_g = rate_g * log1p(o_g)
    softmax form:   o_g = rate_g / theta_g    lambda_g = theta_g * log1p(o_g),  theta = exp(px_r)

The sweep lays a row's lambdas end to end and walks along them with Exp(1) gaps: each arrival within
gene g adds one logarithmic draw to it. A zero costs an addition and a comparison.

Two things bound the work. A gene with lambda above `LARGE_LAMBDA` is left out of the walk and drawn
as a Poisson variate of a gamma-distributed mean (Marsaglia & Tsang 2000; Hormann's PTRS 1993), as
exact, in constant time, and from the same stream. And logarithmic draws cost the same however close
p is to 1 (Kemp 1981). Means above `MAX_MEAN` and log odds above `MAX_LOG_ODDS` are refused: up to
there the probability of a draw that an int32 does not hold is below 1e-30.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from rayvaec.errors import ConfigError, CountsError
from rayvaec.kernels.keys import DRAWS, check_row_keys, check_seed, stream_keys, uniform
from rayvaec.kernels.threads import run_all, spans

MAX_MEAN = 1e8
MAX_LOG_ODDS = 17.0
LARGE_LAMBDA = 16.0

# Below this p a logarithmic draw by inversion takes fewer than four steps on average.
_INVERT_BELOW = 0.9
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_CHUNK_ENTRIES = 1 << 20


class Draws(NamedTuple):
    """Drawn counts in compressed sparse rows.

    Parameters
    ----------
    indptr : ndarray[n_rows + 1], int64
        Where each row's entries start and end.
    indices : ndarray[nnz], int32
        Genes, ascending within a row.
    counts : ndarray[nnz], int32
        Counts, all above 0.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    counts: NDArray[np.int32]


@njit(nogil=True)
def _logarithmic(
    p: float, cluster: float, k0: np.uint64, k1: np.uint64, number: np.uint64
) -> tuple[int, np.uint64]:
    """Draw from P(k) = p**k / (k * cluster), cluster = -log(1-p) (Kemp 1981, LS and LK)."""
    u = uniform(k0, k1, number)
    number += _ONE
    if p < _INVERT_BELOW:
        k = 1
        probability = p / cluster
        # The bound only stops rounding from walking on for ever in the tail: p**2000 < 1e-91.
        while u > probability and k < 2000:
            u -= probability
            probability *= p * k / (k + 1)
            k += 1
        return k, number
    if u >= p:
        return 1, number
    q = -math.expm1(-cluster * uniform(k0, k1, number))
    number += _ONE
    if u <= q * q:
        return int(1.0 + math.log(u) / math.log(q)), number
    return (1 if u >= q else 2), number


@njit(nogil=True)
def _gamma(
    shape: float, k0: np.uint64, k1: np.uint64, number: np.uint64
) -> tuple[float, np.uint64]:
    """Draw from Gamma(shape, 1) (Marsaglia & Tsang 2000, with their boost below shape 1)."""
    boost = 1.0
    if shape < 1.0:
        boost = uniform(k0, k1, number) ** (1.0 / shape)
        number += _ONE
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        radius = math.sqrt(-2.0 * math.log(uniform(k0, k1, number)))
        z = radius * math.cos(2.0 * math.pi * uniform(k0, k1, number + _ONE))
        u = uniform(k0, k1, number + _TWO)
        number += _ONE + _TWO
        v = 1.0 + c * z
        if v <= 0.0:
            continue
        v = v * v * v
        if math.log(u) < 0.5 * z * z + d - d * v + d * math.log(v):
            return d * v * boost, number


@njit(nogil=True)
def _poisson(mean: float, k0: np.uint64, k1: np.uint64, number: np.uint64) -> tuple[int, np.uint64]:
    """Draw from Poisson(mean): products of uniforms below 10, PTRS (Hormann 1993) above."""
    if mean < 10.0:
        k = 0
        floor = math.exp(-mean)
        product = uniform(k0, k1, number)
        number += _ONE
        while product > floor:
            k += 1
            product *= uniform(k0, k1, number)
            number += _ONE
        return k, number
    log_mean = math.log(mean)
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u = uniform(k0, k1, number) - 0.5
        v = uniform(k0, k1, number + _ONE)
        number += _TWO
        us = 0.5 - abs(u)
        k = math.floor((2.0 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return k, number
        if k < 0 or (us < 0.013 and v > us):
            continue
        left = math.log(v * inverse_alpha / (a / (us * us) + b))
        if left <= k * log_mean - mean - math.lgamma(k + 1.0):
            return k, number


@njit(nogil=True)
def _large(
    size: float, odds: float, k0: np.uint64, k1: np.uint64, number: np.uint64
) -> tuple[int, np.uint64]:
    """Draw NB(size, odds) as Poisson of a gamma mean."""
    mean, number = _gamma(size, k0, k1, number)
    return _poisson(mean * odds, k0, k1, number)


@njit(nogil=True)
def _softplus_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], cluster: NDArray[Any], lambdas: NDArray[Any]
) -> bool:
    """Fill one row's lambdas; return whether every rate is within bounds."""
    good = True
    for gene in range(len(rate)):
        r = float(rate[gene])
        # NaN fails both comparisons.
        good &= (r >= 0.0) & (r <= limit[gene])
        lambdas[gene] = r * cluster[gene]
    return good


@njit(nogil=True)
def _softmax_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], theta: NDArray[Any], lambdas: NDArray[Any]
) -> bool:
    """Fill one row's lambdas; return whether every mean is within bounds."""
    good = True
    for gene in range(len(rate)):
        mu = float(rate[gene])
        good &= (mu >= 0.0) & (mu <= limit[gene])
        lambdas[gene] = theta[gene] * math.log1p(mu / theta[gene])
    return good


@njit(nogil=True)
def _sweep_row(
    rate: NDArray[Any],
    gene_terms: NDArray[Any],
    softmax: bool,
    lambdas: NDArray[Any],
    k0: np.uint64,
    k1: np.uint64,
    indices: NDArray[Any],
    counts: NDArray[Any],
    end: int,
) -> int:
    """Draw one row; return where its entries end.

    `gene_terms` is the odds of every gene in the softplus form, theta in the softmax form.
    """
    gap = -math.log(uniform(k0, k1, np.uint64(0)))
    number = _ONE
    for gene in range(len(lambdas)):
        lam = lambdas[gene]
        if lam <= gap and lam <= LARGE_LAMBDA:
            gap -= lam
            continue
        r = float(rate[gene])
        odds = r / gene_terms[gene] if softmax else gene_terms[gene]
        total = 0
        if lam > LARGE_LAMBDA:
            size = gene_terms[gene] if softmax else r
            total, number = _large(size, odds, k0, k1, number)
        else:
            p = odds / (1.0 + odds)
            cluster = math.log1p(odds)
            while gap < lam:
                k, number = _logarithmic(p, cluster, k0, k1, number)
                total += k
                gap -= math.log(uniform(k0, k1, number))
                number += _ONE
            gap -= lam
        if total > 0:
            indices[end] = gene
            counts[end] = total
            end += 1
    return end


@njit(nogil=True, cache=True)
def _sweep(
    rate: NDArray[Any],
    gene_terms: NDArray[Any],
    limit: NDArray[Any],
    cluster: NDArray[Any],
    softmax: bool,
    seed: np.uint64,
    keys: NDArray[Any],
    samples: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
) -> int:
    """Draw every row; return -1, or the first row that holds a value out of bounds."""
    lambdas = np.empty(rate.shape[1], np.float64)
    end = 0
    for row in range(rate.shape[0]):
        if softmax:
            good = _softmax_lambdas(rate[row], limit, gene_terms, lambdas)
        else:
            good = _softplus_lambdas(rate[row], limit, cluster, lambdas)
        if not good:
            return row
        k0, k1 = stream_keys(DRAWS, seed, keys[row], samples[row])
        end = _sweep_row(rate[row], gene_terms, softmax, lambdas, k0, k1, indices, counts, end)
        indptr[row] = end
    return -1


def draw_counts(
    rate: ArrayLike,
    px_r: ArrayLike,
    seed: int,
    keys: ArrayLike,
    samples: ArrayLike,
    *,
    generative: str = "softplus",
) -> Draws:
    """Draw counts from negative binomials, exactly, each row from its own random stream.

    Parameters
    ----------
    rate : ndarray[n_rows, n_genes], float32
        Softplus form: total count, library * px_scale. Softmax form: mean mu.
    px_r : ndarray[n_genes], float32
        Softplus form: logits. Softmax form: log theta.
    seed : int
        From 0 to 2**64 - 1.
    keys, samples : ndarray[n_rows], uint64
        Cell key and sample number of every row.
    generative : {"softplus", "softmax"}
        Which form of the model the rates come from.

    Returns
    -------
    Draws
        Row i depends, bit for bit, on (rate[i], px_r, seed, keys[i], samples[i]) alone: neither
        the other rows nor the number of threads change it.

    Raises
    ------
    ConfigError
        If shapes, keys, samples, seed or `generative` do not fit.
    CountsError
        If a rate is negative or not finite, a mean is above `MAX_MEAN`, or log odds (px_r in the
        softplus form) are above `MAX_LOG_ODDS` at a rate above 0.
    """
    rates = np.ascontiguousarray(rate, dtype=np.float32)
    logits = np.asarray(px_r, dtype=np.float64)
    if rates.ndim != 2 or logits.shape != (rates.shape[1],):
        raise ConfigError(
            f"rate has shape {rates.shape} and px_r {logits.shape}",
            "pass rate[n_rows, n_genes] and px_r[n_genes]",
        )
    word = check_seed(seed)
    row_keys, row_samples = check_row_keys(len(rates), keys, samples)
    tables = _tables(logits, generative)

    height = max(1, _CHUNK_ENTRIES // max(1, rates.shape[1]))
    cuts = spans(len(rates), -(-len(rates) // height))
    pieces = run_all(
        [partial(_draw_span, rates, tables, word, row_keys, row_samples, a, b) for a, b in cuts]
    )
    return _join(pieces)


class _Tables(NamedTuple):
    """What the sweep reads per gene, float64[n_genes] each."""

    softmax: bool
    gene_terms: NDArray[np.float64]
    limit: NDArray[np.float64]
    cluster: NDArray[np.float64]


def _tables(px_r: NDArray[np.float64], generative: str) -> _Tables:
    if generative not in ("softplus", "softmax"):
        raise ConfigError(f"generative is {generative!r}", "choose softplus or softmax")
    if not np.isfinite(px_r).all():
        gene = int(np.flatnonzero(~np.isfinite(px_r))[0])
        raise CountsError(f"px_r of gene {gene} is {px_r[gene]}", "use a model with finite weights")
    # Beyond these every odds is 0 or refused, and exp would over- or underflow.
    terms = np.exp(np.clip(px_r, -300.0, 300.0))
    if generative == "softmax":
        limit = np.minimum(MAX_MEAN, terms * math.exp(MAX_LOG_ODDS))
        return _Tables(True, terms, limit, terms)
    limit = np.where(px_r > MAX_LOG_ODDS, 0.0, np.minimum(MAX_MEAN / terms, 1e30))
    return _Tables(False, terms, limit, np.log1p(terms))


def _draw_span(
    rates: NDArray[np.float32],
    tables: _Tables,
    seed: np.uint64,
    keys: NDArray[np.uint64],
    samples: NDArray[np.uint64],
    start: int,
    stop: int,
) -> Draws:
    """Draw rows [start, stop)."""
    rows = rates[start:stop]
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    # Room for the worst case; memory that no draw reaches is never touched.
    indices = np.empty(rows.size, dtype=np.int32)
    counts = np.empty(rows.size, dtype=np.int32)
    bad = _sweep(
        rows,
        tables.gene_terms,
        tables.limit,
        tables.cluster,
        tables.softmax,
        seed,
        keys[start:stop],
        samples[start:stop],
        indptr[1:],
        indices,
        counts,
    )
    if bad >= 0:
        raise _refusal(rows[bad], tables, start + bad)
    return Draws(indptr, indices[: indptr[-1]].copy(), counts[: indptr[-1]].copy())


def _refusal(rate: NDArray[np.float32], tables: _Tables, row: int) -> CountsError:
    """Name the first value of a row that is out of bounds."""
    gene = int(np.flatnonzero(~((rate >= 0) & (rate <= tables.limit)))[0])
    where = f"rate of row {row}, gene {gene} is {rate[gene]:g}"
    if not np.isfinite(rate[gene]) or rate[gene] < 0:
        return CountsError(where, "rates are finite and not negative: check the model's weights")
    return CountsError(
        f"{where}, at px_r for which draws are bounded by a rate of {tables.limit[gene]:.4g}",
        f"means go up to {MAX_MEAN:.0e} and log odds up to {MAX_LOG_ODDS:g}: draws must fit int32",
    )


def _join(pieces: list[Draws]) -> Draws:
    if not pieces:
        return Draws(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    if len(pieces) == 1:
        return pieces[0]
    lengths = np.concatenate([np.diff(piece.indptr) for piece in pieces])
    indptr = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=indptr[1:])
    return Draws(
        indptr,
        np.concatenate([piece.indices for piece in pieces]),
        np.concatenate([piece.counts for piece in pieces]),
    )
