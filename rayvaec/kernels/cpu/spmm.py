"""Products of CSR counts with a dense weight, forward and backward.

They go by tiles of genes whose part of the weight, or of its gradient, stays in cache. Every row of
the output, and every gene's column of the gradient, adds up in one fixed order: the number of
threads does not change a bit, and a row's genes do not depend on other rows.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.kernels.counts import CsrCounts, checked_arrays, tile_places
from rayvaec.kernels.simd import PRODUCT_WIDTH, address, gathers, scatters
from rayvaec.kernels.threads import run_all, spans, thread_count, threads_for
from rayvaec.util.numba_cache import compiled

_F = np.float32
_TABLE = np.log1p(np.arange(256, dtype=np.float64)).astype(np.float32)
_TILE_GENES = 512  # 256 KiB of a weight with 128 outputs: a tile stays in a core's own cache

_PANEL = 8 * PRODUCT_WIDTH  # columns whose sums stay in registers over a row's non-zeros
_gather_panel, _gather, _gather_one = gathers(8), gathers(1), gathers(1, 1)
_scatter_panel, _scatter, _scatter_one = scatters(8), scatters(1), scatters(1, 1)

_workspace = threading.local()


@compiled
def _values(counts: NDArray[Any], log1p: bool, values: NDArray[Any]) -> None:
    """Set the entries of the matrix: counts, or their log1p."""
    for i in range(len(counts)):
        x = counts[i]
        if not log1p:
            values[i] = _F(x)
        elif x < len(_TABLE):
            values[i] = _TABLE[x]
        else:
            values[i] = _F(math.log1p(float(x)))


@compiled
def _forward(
    places: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    columns: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Add every row's weighted sum of `columns` to `out`, tile of genes by tile."""
    width = columns.shape[1]
    vectors = width // PRODUCT_WIDTH * PRODUCT_WIDTH
    panels = vectors // _PANEL * _PANEL
    for tile in range(places.shape[1] - 1):
        for row in range(len(out)):
            first, last = places[row, tile], places[row, tile + 1]
            genes, factors, n = address(indices, first), address(values, first), last - first
            total = row * width
            for g in range(0, panels, _PANEL):
                _gather_panel(
                    address(columns, g), width, genes, factors, n, address(out, total + g)
                )
            for g in range(panels, vectors, PRODUCT_WIDTH):
                _gather(address(columns, g), width, genes, factors, n, address(out, total + g))
            for g in range(vectors, width):
                _gather_one(address(columns, g), width, genes, factors, n, address(out, total + g))


@compiled
def _backward(
    places: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    grad_out: NDArray[Any],
    columns: NDArray[Any],
    tile: int,
    first: int,
) -> None:
    """Set the gradient of one tile's columns of the weight, a row each."""
    columns[:] = _F(0.0)
    width = columns.shape[1]
    vectors = width // PRODUCT_WIDTH * PRODUCT_WIDTH
    panels = vectors // _PANEL * _PANEL
    for row in range(len(grad_out)):
        start, stop = places[row, tile], places[row, tile + 1]
        genes, factors, n = address(indices, start), address(values, start), stop - start
        source, origin = row * width, -first * width
        for g in range(0, panels, _PANEL):
            at = address(columns, origin + g)
            _scatter_panel(at, width, genes, factors, n, address(grad_out, source + g))
        for g in range(panels, vectors, PRODUCT_WIDTH):
            at = address(columns, origin + g)
            _scatter(at, width, genes, factors, n, address(grad_out, source + g))
        for g in range(vectors, width):
            at = address(columns, origin + g)
            _scatter_one(at, width, genes, factors, n, address(grad_out, source + g))


class SparseProducts:
    """A minibatch's counts, ready to be multiplied with the encoder's first weight.

    Parameters
    ----------
    x : CsrCounts
        Raw counts of n_cells x n_genes, on the CPU.
    log1p : bool
        Whether log(1 + x) is multiplied instead of x.

    Raises
    ------
    CountsError
        If a count is negative or a gene beyond n_genes.
    """

    def __init__(self, x: CsrCounts, log1p: bool) -> None:
        indptr, self._indices, counts = checked_arrays(x)
        self._values = np.empty(len(counts), _F)
        _values(counts, log1p, self._values)
        self._places = tile_places(indptr, self._indices, _TILE_GENES, x.n_genes)
        self.n_genes, self.n_threads = x.n_genes, threads_for(x.n_cells * x.n_genes)

    def columns(self, weight: Tensor) -> NDArray[np.float32]:
        """Return the genes' columns of a weight as rows, in a buffer that this thread keeps.

        Fresh memory would cost as much on its first touch as the product itself.

        Parameters
        ----------
        weight : Tensor[n_out, n_in], n_in >= n_genes

        Returns
        -------
        NDArray[n_genes, n_out]
            Valid until the next call.
        """
        kept, shape = getattr(_workspace, "columns", None), (self.n_genes, len(weight))
        if kept is None or kept.shape != shape:
            kept = _workspace.columns = torch.empty(shape, dtype=torch.float32)
        source = weight.detach()

        def copy(first: int, last: int) -> None:
            kept[first:last].copy_(source[:, first:last].t())

        run_all([partial(copy, *span) for span in self._gene_spans()], self.n_threads)
        return kept.numpy()

    def add_to(self, out: NDArray[np.float32], columns: NDArray[np.float32], rows: slice) -> None:
        """Add some rows' products to `out`, NDArray[n_rows, n_out].

        Parameters
        ----------
        out : NDArray[n_rows, n_out], C-contiguous
        columns : NDArray[n_genes, n_out], from `columns`
        rows : slice
            Of the cells.
        """
        if not out.flags.c_contiguous:  # its rows are addressed in memory
            raise ValueError(f"out with strides {out.strides} is not C-contiguous")
        _forward(self._places[rows], self._indices, self._values, columns, out)

    def gradient_into(self, grad_out: NDArray[np.float32], grad: Tensor) -> None:
        """Set the genes' columns of the weight's gradient.

        Parameters
        ----------
        grad_out : NDArray[n_cells, n_out]
            Gradient of the product.
        grad : Tensor[n_out, n_in], n_in >= n_genes
            Columns beyond the genes stay as they are.
        """
        grad_out = np.ascontiguousarray(grad_out)  # its rows are addressed in memory

        def tile(number: int, first: int, last: int) -> None:
            kept = getattr(_workspace, "tile", None)
            if kept is None or kept.shape[1] != len(grad):
                kept = _workspace.tile = torch.empty(_TILE_GENES, len(grad), dtype=torch.float32)
            block = kept[: last - first]
            arguments = self._places, self._indices, self._values, grad_out
            _backward(*arguments, block.numpy(), number, first)
            grad[:, first:last].copy_(block.t())

        starts = range(0, self.n_genes, _TILE_GENES)
        tiles = [(a, min(a + _TILE_GENES, self.n_genes)) for a in starts]
        with torch.no_grad():
            run_all([partial(tile, i, *t) for i, t in enumerate(tiles)], self.n_threads)

    def _gene_spans(self) -> list[tuple[int, int]]:
        return spans(self.n_genes, 2 * thread_count() if self.n_threads > 1 else 1)
