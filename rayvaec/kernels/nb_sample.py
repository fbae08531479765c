"""Exact negative-binomial draws, in one sweep over each row and straight into CSR.

A negative binomial is a Poisson number of logarithmic-series clusters (Quenouille 1949): with odds
o = p/(1-p), ::

    x_g = sum of K_i over i <= M_g,   M_g ~ Poisson(lambda_g),   K_i ~ Logarithmic(p_g)
    softplus form:  size_g = rate_g            o_g = exp(px_r_g)
    softmax form:   size_g = exp(px_r_g)       o_g = rate_g / size_g
    lambda_g = size_g * log1p(o_g)

The sweep lays a row's lambdas end to end and walks along them with Exp(1) gaps. A gene that the gap
reaches past is zero, at the cost of an addition and a comparison. In any other gene the count is
above zero, and

- where p < `INVERT_BELOW`, exp(-gap) is uniform above exp(-lambda) = P(0): the count follows by
  inversion of the negative binomial's own probabilities, without another random number, and a
  fresh gap starts at the gene's end (the exponential has no memory);
- elsewhere every arrival within the gene adds one logarithmic draw (Kemp 1981), whose cost does not
  depend on how close p is to 1;
- where lambda > `LARGE_LAMBDA`, the gene is left out of the walk and drawn as a Poisson variate of
  a gamma-distributed mean (Marsaglia & Tsang 2000; Hormann's PTRS 1993), as exact, in constant
  time, and from the same stream.

So the work is bounded. Means above `MAX_MEAN` and log odds above `MAX_LOG_ODDS` are refused: up to
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
from rayvaec.kernels.special import FAST, log1p_positive
from rayvaec.kernels.threads import run_all, spans
from rayvaec.kernels.variates import large_negative_binomial, logarithmic

MAX_MEAN = 1e8
MAX_LOG_ODDS = 17.0
LARGE_LAMBDA = 16.0

# Inversion then takes fewer than 200 steps on average, and with probability 1 - 1e-16 fewer than
# _MOST_STEPS, where it stops.
INVERT_BELOW = 0.98
_MOST_STEPS = 4000
_F = np.float32
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


@njit(inline="always")
def _inverted(size: float, p: float, passed: float) -> int:
    """Return the count above 0 at which NB(size, p)'s distribution function reaches exp(-gap).

    All probabilities are in units of P(0) = exp(-lambda), so that small lambdas lose no digits;
    `passed` is lambda - gap.
    """
    u = math.expm1(passed)
    odds = size * p
    x = 1
    while u > odds and x < _MOST_STEPS:
        u -= odds
        odds *= p * (size + x) / (x + 1)
        x += 1
    return x


@njit(nogil=True)
def softplus_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], cluster: NDArray[Any], lambdas: NDArray[Any]
) -> bool:
    """Fill one row's lambdas; return whether every rate is within bounds."""
    good = True
    for gene in range(len(rate)):
        r = rate[gene]
        # NaN fails both comparisons.
        good &= (r >= _F(0.0)) & (r <= limit[gene])
        lambdas[gene] = r * cluster[gene]
    return good


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def softmax_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], size: NDArray[Any], lambdas: NDArray[Any]
) -> bool:
    """Fill one row's lambdas; return whether every mean is within bounds."""
    good = True
    for gene in range(len(rate)):
        mu = rate[gene]
        good &= (mu >= _F(0.0)) & (mu <= limit[gene])
        lambdas[gene] = size[gene] * log1p_positive(mu / size[gene])
    return good


@njit(nogil=True, error_model="numpy")
def sweep_row(
    rate: NDArray[Any],
    odds_or_size: NDArray[Any],
    softmax: bool,
    lambdas: NDArray[Any],
    k0: np.uint64,
    k1: np.uint64,
    indices: NDArray[Any],
    counts: NDArray[Any],
    end: int,
) -> int:
    """Draw one row; return where its entries end.

    `odds_or_size` holds the odds in the softplus form, the size in the softmax form.
    """
    gap = -math.log(uniform(k0, k1, np.uint64(0)))
    # Drawn ahead: its logarithm is ready when the walk needs it.
    next_gap = -math.log(uniform(k0, k1, _ONE))
    number = _TWO
    for gene in range(len(lambdas)):
        lam = float(lambdas[gene])
        if lam <= gap and lam <= LARGE_LAMBDA:
            gap -= lam
            continue
        size, odds = float(rate[gene]), odds_or_size[gene]
        if softmax:
            size, odds = odds, size / odds
        p = odds / (1.0 + odds)
        if lam > LARGE_LAMBDA:
            total, number = large_negative_binomial(size, odds, k0, k1, number)
        elif p < INVERT_BELOW:
            passed = lam - gap
            gap = next_gap
            next_gap = -math.log(uniform(k0, k1, number))
            number += _ONE
            total = _inverted(size, p, passed)
        else:
            total, cluster = 0, math.log1p(odds)
            while gap < lam:
                k, number = logarithmic(p, cluster, k0, k1, number)
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
    odds_or_size: NDArray[Any],
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
    """Draw every row; return -1, or the first row that holds a value out of bounds.

    `cluster` holds log1p(odds) in the softplus form, sizes in the softmax form.
    """
    lambdas = np.empty(rate.shape[1], _F)
    end = 0
    for row in range(rate.shape[0]):
        if softmax:
            good = softmax_lambdas(rate[row], limit, cluster, lambdas)
        else:
            good = softplus_lambdas(rate[row], limit, cluster, lambdas)
        if not good:
            return row
        k0, k1 = stream_keys(DRAWS, seed, keys[row], samples[row])
        end = sweep_row(rate[row], odds_or_size, softmax, lambdas, k0, k1, indices, counts, end)
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
    tables = gene_tables(logits, generative)

    height = max(1, _CHUNK_ENTRIES // max(1, rates.shape[1]))
    cuts = spans(len(rates), -(-len(rates) // height))
    pieces = run_all(
        [partial(_draw_span, rates, tables, word, row_keys, row_samples, a, b) for a, b in cuts]
    )
    return join_rows(pieces)


class GeneTables(NamedTuple):
    """What the sweep reads per gene.

    Parameters
    ----------
    softmax : bool
        The form.
    odds_or_size : ndarray[n_genes]
        exp(px_r): odds in the softplus form, sizes in the softmax form.
    limit : ndarray[n_genes]
        Largest rate.
    cluster : ndarray[n_genes]
        log1p(odds), what a size is multiplied with to give lambda, in the softplus form; sizes in
        the softmax form.
    """

    softmax: bool
    odds_or_size: NDArray[np.float64]
    limit: NDArray[np.float32]
    cluster: NDArray[np.float32]


def gene_tables(px_r: NDArray[np.float64], generative: str) -> GeneTables:
    """Compute what the sweep reads per gene.

    Parameters
    ----------
    px_r : ndarray[n_genes]
        Logits (softplus form) or log theta (softmax form).
    generative : {"softplus", "softmax"}
        The form.

    Returns
    -------
    GeneTables

    Raises
    ------
    ConfigError
        If there is no such form.
    CountsError
        If a value is not finite.
    """
    if generative not in ("softplus", "softmax"):
        raise ConfigError(f"generative is {generative!r}", "choose softplus or softmax")
    if not np.isfinite(px_r).all():
        gene = int(np.flatnonzero(~np.isfinite(px_r))[0])
        raise CountsError(f"px_r of gene {gene} is {px_r[gene]}", "use a model with finite weights")
    # Beyond these every odds is 0 or refused, and float32 would over- or underflow.
    terms = np.exp(np.clip(px_r, -80.0, 80.0))
    if generative == "softmax":
        limit, cluster = np.minimum(MAX_MEAN, terms * math.exp(MAX_LOG_ODDS)), terms
    else:
        limit = np.where(px_r > MAX_LOG_ODDS, 0.0, np.minimum(MAX_MEAN / terms, 1e30))
        cluster = np.log1p(terms)
    return GeneTables(
        generative == "softmax", terms, limit.astype(np.float32), cluster.astype(np.float32)
    )


def _draw_span(
    rates: NDArray[np.float32],
    tables: GeneTables,
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
        tables.odds_or_size,
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
        raise refusal(rows[bad], tables, start + bad)
    return Draws(indptr, indices[: indptr[-1]].copy(), counts[: indptr[-1]].copy())


def refusal(rate: NDArray[np.float32], tables: GeneTables, row: int) -> CountsError:
    """Name the first value of a row that is out of bounds.

    Parameters
    ----------
    rate : ndarray[n_genes]
        The row, with a value that is.
    tables : GeneTables
        Holds the bounds.
    row : int
        Its number, for the message.

    Returns
    -------
    CountsError
        To be raised.
    """
    gene = int(np.flatnonzero(~((rate >= 0) & (rate <= tables.limit)))[0])
    where = f"rate of row {row}, gene {gene} is {rate[gene]:g}"
    if not np.isfinite(rate[gene]) or rate[gene] < 0:
        return CountsError(where, "rates are finite and not negative: check the model's weights")
    return CountsError(
        f"{where}, at px_r for which draws are bounded by a rate of {tables.limit[gene]:.4g}",
        f"means go up to {MAX_MEAN:.0e} and log odds up to {MAX_LOG_ODDS:g}: draws must fit int32",
    )


def join_rows(pieces: list[Draws]) -> Draws:
    """Put the rows of several draws, one after another, into one.

    Parameters
    ----------
    pieces : list of Draws
        Of the same genes; may be empty.

    Returns
    -------
    Draws
    """
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
