"""Exponential-gap sampling: step through a row's genes to the next non-zero count.

`rayvaec.kernels.cpu.nb_sweep` says what a gap is, and how what is noted here becomes counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayvaec.kernels.math32 import FAST, log1p_positive
from rayvaec.kernels.math64 import log_unit
from rayvaec.kernels.rng import uniform
from rayvaec.kernels.simd import WIDTH, Distinct, address, advance, lowest_bit

LANES = 64
"""Rows of a block, a multiple of `WIDTH`."""

LARGE_LAMBDA = 16.0

TILE = 128
"""Genes that are walked through together."""

GAPS = 256
"""A lane's ring of gaps: a tile takes at most `TILE`, and they come by `_NEW`."""

_NEW = 64
_F = np.float32
_LARGE = np.float32(-1.0)


@njit(inline="always")
def whole_vectors(n_rows: int) -> int:
    """Return how many lanes the vectors have that hold so many rows."""
    return (n_rows + WIDTH - 1) // WIDTH * WIDTH


@njit(nogil=True, error_model="numpy", pipeline_class=Distinct)
def softplus_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], cluster: NDArray[Any], width: int, lam: NDArray[Any]
) -> bool:
    """Fill a tile's lambdas in `width` lanes; return whether every rate is within bounds."""
    good = True
    for gene in range(len(rate)):
        top, factor = limit[gene], cluster[gene]
        for lane in range(width):
            r = rate[gene, lane]
            # NaN fails both comparisons.
            good &= (r >= _F(0.0)) & (r <= top)
            lam[gene, lane] = r * factor
    return good


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def softmax_lambdas(
    rate: NDArray[Any], limit: NDArray[Any], size: NDArray[Any], width: int, lam: NDArray[Any]
) -> bool:
    """Fill a tile's lambdas in `width` lanes; return whether every mean is within bounds."""
    good = True
    for gene in range(len(rate)):
        top, r = limit[gene], size[gene]
        for lane in range(width):
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
def refill(
    k0: NDArray[Any],
    k1: NDArray[Any],
    taken: NDArray[Any],
    filled: NDArray[Any],
    ring: NDArray[Any],
    n_lanes: int,
) -> None:
    """See to it that every lane has as many gaps as a tile can take."""
    for lane in range(n_lanes):
        while filled[lane] - taken[lane] < TILE:
            place = filled[lane] % GAPS
            _fill_gaps(k0[lane], k1[lane], filled[lane], ring[lane, place : place + _NEW])
            filled[lane] += _NEW


@njit(nogil=True, error_model="numpy")
def walk_tile(
    lam: NDArray[Any],
    first: int,
    width: int,
    ring: NDArray[Any],
    gap: NDArray[Any],
    taken: NDArray[Any],
    genes: NDArray[Any],
    gaps: NDArray[Any],
    noted: NDArray[Any],
) -> None:
    """Walk through a tile in `width` lanes, and append to each lane's list where its gaps end.

    `first` is the number of the tile's first gene. A gene whose lambda is too large for the walk
    is listed with `_LARGE` for a gap.
    """
    for gene in range(len(lam)):
        for start in range(0, width, WIDTH):
            stops = advance(
                address(lam, gene * LANES + start), address(gap, start), _F(LARGE_LAMBDA)
            )
            while stops:
                lane = np.uint64(start + lowest_bit(stops))
                stops &= stops - 1
                n = np.uint64(noted[lane])
                genes[lane, n] = first + gene
                noted[lane] += 1
                if lam[np.uint64(gene), lane] > _F(LARGE_LAMBDA):
                    gaps[lane, n] = _LARGE
                else:
                    gaps[lane, n] = _F(gap[lane])
                    gap[lane] = ring[lane, np.uint64(taken[lane]) & np.uint64(GAPS - 1)]
                    taken[lane] += 1
