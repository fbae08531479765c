"""Exact negative-binomial draws of a block of rows: a walk along its genes, all rows in step.

A negative binomial is a Poisson number of logarithmic-series clusters (Quenouille 1949): with odds
o = p/(1-p), ::

    x_g = sum of K_i over i <= M_g,   M_g ~ Poisson(lambda_g),   K_i ~ Logarithmic(p_g)
    lambda_g = size_g * log1p(o_g)

The walk lays a row's lambdas end to end and goes along them with Exp(1) gaps. A gene that the gap
reaches past is zero. Where the gap ends within a gene, the count is above zero, and a fresh gap
starts at the gene's end (the exponential has no memory). What is left of the gap at such a gene,
given that it is below lambda, makes exp(-gap) uniform above exp(-lambda) = P(0). So

- where p < `INVERT_BELOW` the count follows by inversion of the negative binomial's own
  probabilities, without another random number;
- elsewhere inversion gives the number of clusters, and each adds one logarithmic draw (Kemp 1981),
  whose cost does not depend on how close p is to 1;
- where lambda > `LARGE_LAMBDA`, the gene is left out of the walk and drawn as a Poisson variate of
  a gamma-distributed mean (Marsaglia & Tsang 2000; Hormann's PTRS 1993), as exact, in constant
  time.

Random numbers beyond the gaps come from a stream of the gene's own.

Rows are the lanes of a vector: a step takes one gene in all of them, and whether a gap ends there
is a mask, not a branch that nobody can predict. What happens in a lane does not depend on the
others. Genes go in tiles, so that everything but the rates stays in the core's first cache.

numba's cache looks at this file only: after a change in special.py, special64.py, keys.py or
variates.py, touch it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.compiled import compiled
from rayvaec.kernels.distinct import Distinct
from rayvaec.kernels.keys import DRAWS, gene_stream, stream_keys, uniform
from rayvaec.kernels.special import FAST, log1p_positive
from rayvaec.kernels.special64 import expm1_small, log_unit
from rayvaec.kernels.variates import large_negative_binomial, logarithmic

LANES = 64
"""Rows of a block."""

LARGE_LAMBDA = 16.0

# Inversion then takes fewer than 200 steps on average, and with probability 1 - 1e-15 fewer than
# _MOST_STEPS, where it stops.
INVERT_BELOW = 0.98
_MOST_STEPS = 4000

_TILE = 128
SPAN = 8 * _TILE
"""Genes whose counts are completed together."""
_GAPS = 256  # a lane's ring of gaps: a tile takes at most _TILE, and they come by _NEW
_NEW = 64
_F = np.float32
_LARGE = np.float32(-1.0)


@njit(nogil=True, error_model="numpy", pipeline_class=Distinct)
def _softplus_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], cluster: NDArray[Any], lam: NDArray[Any]
) -> bool:
    """Fill a tile's lambdas; return whether every rate is within bounds."""
    good = True
    for gene in range(len(rate)):
        top, factor = limit[gene], cluster[gene]
        for lane in range(LANES):
            r = rate[gene, lane]
            # NaN fails both comparisons.
            good &= (r >= _F(0.0)) & (r <= top)
            lam[gene, lane] = r * factor
    return good


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def _softmax_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], size: NDArray[Any], lam: NDArray[Any]
) -> bool:
    """Fill a tile's lambdas; return whether every mean is within bounds."""
    good = True
    for gene in range(len(rate)):
        top, r = limit[gene], size[gene]
        for lane in range(LANES):
            mu = rate[gene, lane]
            good &= (mu >= _F(0.0)) & (mu <= top)
            lam[gene, lane] = r * log1p_positive(mu / r)
    return good


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _fill_gaps(k0: np.uint64, k1: np.uint64, first: int, gaps: NDArray[Any]) -> None:
    """Draw a row's gaps from number `first` on."""
    for i in range(len(gaps)):
        gaps[i] = -log_unit(uniform(k0, k1, np.uint64(first + i)))


@njit(nogil=True, error_model="numpy")
def _refill(
    k0: NDArray[Any],
    k1: NDArray[Any],
    taken: NDArray[Any],
    filled: NDArray[Any],
    ring: NDArray[Any],
    n_lanes: int,
) -> None:
    """See to it that every lane has as many gaps as a tile can take."""
    for lane in range(n_lanes):
        while filled[lane] - taken[lane] < _TILE:
            place = filled[lane] % _GAPS
            _fill_gaps(k0[lane], k1[lane], filled[lane], ring[lane, place : place + _NEW])
            filled[lane] += _NEW


@njit(nogil=True, error_model="numpy", pipeline_class=Distinct)
def _walk(lam: NDArray[Any], ring: NDArray[Any], gap: NDArray[Any], taken: NDArray[Any]) -> None:
    """Walk through a tile; `lam` becomes the gap where one ends, and 0 elsewhere.

    It becomes `_LARGE` where lambda is too large for the walk.
    """
    for gene in range(len(lam)):
        for lane in range(LANES):
            wide = lam[gene, lane]
            large = wide > _F(LARGE_LAMBDA)
            reach = 0.0 if large else np.float64(wide)
            before, n = gap[lane], taken[lane]
            fresh = ring[lane, n & (_GAPS - 1)]
            ends = reach > before
            gap[lane] = fresh if ends else before - reach
            taken[lane] = n + 1 if ends else n
            found = _F(before) if ends else _F(0.0)
            lam[gene, lane] = _LARGE if large else found


@njit(nogil=True, error_model="numpy", pipeline_class=Distinct)
def _collect(
    noted: NDArray[Any], first: int, n: int, genes: NDArray[Any], gaps: NDArray[Any]
) -> np.uint64:
    """Append the genes of a tile that the walk noted to a lane's list, without a branch."""
    end = np.uint64(n)
    for gene in range(len(noted)):
        value = noted[gene]
        genes[end] = first + gene
        gaps[end] = value
        end += np.uint64(value != _F(0.0))
    return end


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
def _look_up(
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
def _odds_from_size(size: NDArray[Any], odds: NDArray[Any]) -> None:
    """Turn the softmax form's means, in `odds`, into odds."""
    for i in range(len(odds)):
        odds[i] /= size[i]


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def _first_counts(
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
def _finish(
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

    `rest` holds what `_first_counts` left.
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


class Walk(NamedTuple):
    """A block of rows on its way along the genes, and memory to work in.

    Parameters
    ----------
    k0, k1 : uint64[LANES]
        Key words of each row's stream.
    ring, gap, taken, filled
        Gaps drawn ahead, what is left of the present one, and how many were used and drawn.
    lam, genes, gaps, rest
        A tile's lambdas; a span's genes that the walk noted, and what is known of them.
    indices, counts : int32[LANES, n_genes]
        Each row's entries so far, from the left.
    ends : int64[LANES]
        Their number.
    """

    k0: NDArray[np.uint64]
    k1: NDArray[np.uint64]
    ring: NDArray[np.float64]
    gap: NDArray[np.float64]
    taken: NDArray[np.int64]
    filled: NDArray[np.int64]
    lam: NDArray[np.float32]
    genes: NDArray[np.int32]
    gaps: NDArray[np.float32]
    rest: NDArray[np.float64]
    indices: NDArray[np.int32]
    counts: NDArray[np.int32]
    ends: NDArray[np.int64]


def new_walk(n_genes: int) -> Walk:
    """Make the memory for blocks of rows of so many genes.

    Parameters
    ----------
    n_genes : int
        Genes of a row.

    Returns
    -------
    Walk
        To be used again and again, by one thread: its first touch costs as much as the draws.
    """
    noted = LANES, SPAN + 1  # the last entry of a list is written before it is known to stay
    return Walk(
        k0=np.zeros(LANES, np.uint64),
        k1=np.zeros(LANES, np.uint64),
        ring=np.ones((LANES, _GAPS)),
        gap=np.ones(LANES),
        taken=np.zeros(LANES, np.int64),
        filled=np.zeros(LANES, np.int64),
        lam=np.empty((_TILE, LANES), np.float32),
        genes=np.empty(noted, np.int32),
        gaps=np.empty(noted, np.float32),
        rest=np.empty((6, SPAN)),
        indices=np.empty((LANES, n_genes), np.int32),
        counts=np.empty((LANES, n_genes), np.int32),
        ends=np.zeros(LANES, np.int64),
    )


@compiled(error_model="numpy")
def start_rows(
    walk: Walk, seed: np.uint64, keys: NDArray[np.uint64], samples: NDArray[np.uint64]
) -> None:
    """Put a block of rows, as many as there are keys, before the first gene."""
    # Lanes without a row walk as well, on gaps that nobody looks at.
    walk.gap[:], walk.taken[:], walk.filled[:], walk.ends[:] = 1.0, 0, 0, 0
    for lane in range(len(keys)):
        k0, k1 = stream_keys(DRAWS, seed, keys[lane], samples[lane])
        walk.k0[lane], walk.k1[lane] = k0, k1
    _refill(walk.k0, walk.k1, walk.taken, walk.filled, walk.ring, len(keys))
    for lane in range(len(keys)):
        walk.gap[lane], walk.taken[lane] = walk.ring[lane, 0], 1


@njit(nogil=True, error_model="numpy")
def _note_span(
    walk: Walk,
    n_rows: int,
    rate: NDArray[Any],
    limit: NDArray[Any],
    cluster: NDArray[Any],
    softmax: bool,
    found: NDArray[Any],
) -> bool:
    """Walk through a span of genes and list those with counts; return whether rates are good."""
    for first in range(0, len(rate), _TILE):
        tile = slice(first, min(first + _TILE, len(rate)))
        noted = walk.lam[: tile.stop - first]
        if softmax:
            good = _softmax_lambdas(rate[tile], limit[tile], cluster[tile], noted)
        else:
            good = _softplus_lambdas(rate[tile], limit[tile], cluster[tile], noted)
        if not good:
            return False
        _refill(walk.k0, walk.k1, walk.taken, walk.filled, walk.ring, n_rows)
        _walk(noted, walk.ring, walk.gap, walk.taken)
        for lane in range(n_rows):
            found[lane] = _collect(
                noted[:, lane], first, found[lane], walk.genes[lane], walk.gaps[lane]
            )
    return True


@compiled(error_model="numpy")
def draw_genes(
    walk: Walk,
    n_rows: int,
    rate: NDArray[Any],
    origin: int,
    odds_or_size: NDArray[Any],
    limit: NDArray[Any],
    cluster: NDArray[Any],
    softmax: bool,
) -> bool:
    """Draw a block's next genes; return whether every rate is within bounds.

    Parameters
    ----------
    walk : Walk
        Rows that have come as far as gene `origin`.
    n_rows : int
        As many lanes hold a row.
    rate : float32[n, LANES]
        Rates of genes [origin, origin + n), a row a lane, 0 in lanes beyond the rows.
    origin : int
        Number of the first of these genes.
    odds_or_size, limit, cluster, softmax
        As in `GeneTables`, of these genes.
    """
    for start in range(0, len(rate), SPAN):
        span = slice(start, min(start + SPAN, len(rate)))
        found = np.zeros(LANES, np.int64)
        if not _note_span(walk, n_rows, rate[span], limit[span], cluster[span], softmax, found):
            return False
        for lane in range(n_rows):
            n = found[lane]
            genes, gaps = walk.genes[lane, :n], walk.gaps[lane, :n]
            # Rows first: a slice of a row is known to be contiguous, and loops over it vectorise.
            p, size = walk.rest[3][:n], walk.rest[4][:n]
            if softmax:
                _look_up(genes, rate[span][:, lane], odds_or_size[span], p, size)
                _odds_from_size(size, p)
            else:
                _look_up(genes, rate[span][:, lane], odds_or_size[span], size, p)
            _first_counts(
                *(gaps, size, p),
                *(walk.rest[0][:n], walk.rest[1][:n], walk.rest[2][:n], walk.rest[5][:n]),
            )
            walk.ends[lane] = _finish(
                *(genes, gaps, walk.rest, origin + start, walk.k0[lane], walk.k1[lane]),
                *(walk.indices[lane], walk.counts[lane], walk.ends[lane]),
            )
    return True


@compiled(error_model="numpy")
def close_ranks(walk: Walk, indptr: NDArray[Any]) -> None:
    """Put the entries of a block's rows one after another, and fill in where they start and end.

    Parameters
    ----------
    walk : Walk
        Rows that have come to the end; entry i is then number i of the flattened arrays.
    indptr : int64[n_rows + 1]
        To be filled.
    """
    width = walk.indices.shape[1]
    indices, counts = walk.indices.reshape(-1), walk.counts.reshape(-1)
    indptr[0] = 0
    for lane in range(len(indptr) - 1):
        end, n, first = indptr[lane], walk.ends[lane], lane * width
        for i in range(n):
            indices[end + i] = indices[first + i]
            counts[end + i] = counts[first + i]
        indptr[lane + 1] = end + n
