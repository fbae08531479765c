"""Draw blocks of rows with exponential-gap sampling over the genes.

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

Rows are the lanes of a vector: a step takes one gene in `WIDTH` of them at once, and where gaps end
is a mask. Only the lanes in it are looked at one by one. What happens in a lane does not depend on
the others. Genes go in tiles, so that everything but the rates stays in the core's first cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.kernels.cpu.nb_counts import finish, first_counts, look_up, odds_from_size
from rayvaec.kernels.cpu.nb_walk import (
    GAPS,
    LANES,
    TILE,
    refill,
    softmax_lambdas,
    softplus_lambdas,
    walk_tile,
    whole_vectors,
)
from rayvaec.kernels.rng import DRAWS, stream_keys
from rayvaec.util.numba_cache import compiled

SPAN = 8 * TILE
"""Genes whose counts are completed together."""


class Walk(NamedTuple):
    """A block of rows on its way along the genes, and memory to work in.

    Parameters
    ----------
    k0, k1 : uint64[LANES]
        Key words of each row's stream.
    ring, gap, taken, filled
        Gaps drawn ahead, what is left of the present one, and how many were used and drawn.
    lam, genes, gaps, noted, rest
        A tile's lambdas; a span's genes that the walk noted, what is left of the gap at each, their
        number, and what else is known of a lane's.
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
    noted: NDArray[np.int64]
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
    listed = LANES, SPAN
    return Walk(
        k0=np.zeros(LANES, np.uint64),
        k1=np.zeros(LANES, np.uint64),
        ring=np.ones((LANES, GAPS)),
        gap=np.ones(LANES),
        taken=np.zeros(LANES, np.int64),
        filled=np.zeros(LANES, np.int64),
        lam=np.empty((TILE, LANES), np.float32),
        genes=np.empty(listed, np.int32),
        gaps=np.empty(listed, np.float32),
        noted=np.zeros(LANES, np.int64),
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
    refill(walk.k0, walk.k1, walk.taken, walk.filled, walk.ring, len(keys))
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
) -> bool:
    """Walk through a span of genes and list those with counts; return whether rates are good."""
    width = whole_vectors(n_rows)
    for first in range(0, len(rate), TILE):
        tile = slice(first, min(first + TILE, len(rate)))
        lam = walk.lam[: tile.stop - first]
        if softmax:
            good = softmax_lambdas(rate[tile], limit[tile], cluster[tile], width, lam)
        else:
            good = softplus_lambdas(rate[tile], limit[tile], cluster[tile], width, lam)
        if not good:
            return False
        refill(walk.k0, walk.k1, walk.taken, walk.filled, walk.ring, n_rows)
        walk_tile(
            lam,
            first,
            width,
            walk.ring,
            walk.gap,
            walk.taken,
            walk.genes,
            walk.gaps,
            walk.noted,
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
        Rates of genes [origin, origin + n), a row a lane; 0 in lanes beyond the rows, as far as
        vectors of `WIDTH` reach that hold rows.
    origin : int
        Number of the first of these genes.
    odds_or_size, limit, cluster, softmax
        As in `GeneTables`, of these genes.
    """
    for start in range(0, len(rate), SPAN):
        span = slice(start, min(start + SPAN, len(rate)))
        walk.noted[:] = 0
        if not _note_span(walk, n_rows, rate[span], limit[span], cluster[span], softmax):
            return False
        for lane in range(n_rows):
            n = walk.noted[lane]
            genes, gaps = walk.genes[lane, :n], walk.gaps[lane, :n]
            # Rows first: a slice of a row is known to be contiguous, and loops over it vectorise.
            p, size = walk.rest[3][:n], walk.rest[4][:n]
            if softmax:
                look_up(genes, rate[span][:, lane], odds_or_size[span], p, size)
                odds_from_size(size, p)
            else:
                look_up(genes, rate[span][:, lane], odds_or_size[span], size, p)
            first_counts(
                gaps,
                size,
                p,
                walk.rest[0][:n],
                walk.rest[1][:n],
                walk.rest[2][:n],
                walk.rest[5][:n],
            )
            walk.ends[lane] = finish(
                genes,
                gaps,
                walk.rest,
                origin + start,
                walk.k0[lane],
                walk.k1[lane],
                walk.indices[lane],
                walk.counts[lane],
                walk.ends[lane],
            )
    return True


@compiled(error_model="numpy")
def copy_entries(
    walk: Walk, indptr: NDArray[Any], indices: NDArray[Any], counts: NDArray[Any]
) -> None:
    """Put the entries of a block's rows one after another.

    Parameters
    ----------
    walk : Walk
        Rows that have come to the end.
    indptr : int64[n_rows + 1]
        Where each row's entries go.
    indices, counts : int32[nnz]
        To be filled.
    """
    for lane in range(len(indptr) - 1):
        first = indptr[lane]
        for i in range(walk.ends[lane]):
            indices[first + i] = walk.indices[lane, i]
            counts[first + i] = walk.counts[lane, i]
