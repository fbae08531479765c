"""The fused loss in the softplus form on the CPU: r = library * softplus(a), l = px_r.

Genes are independent here, so the work goes by blocks of genes over all cells of a chunk: a product
into a buffer that stays in cache, a sweep over it that turns it in place into its gradient, and two
products back. The weight and its gradient are thus read and written once.

The sweep goes by tiles of genes and pieces of cells, so that what is kept per gene stays in the
nearest cache. Within a tile's row the zeros are dealt with by vectorised float32 loops, and the
non-zeros after them, one by one, in float64. Into how many pieces the cells go depends on their
number alone: no sum depends on the number of threads (those inside torch's products may).
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rayvaec.kernels.csr import checked_arrays, tile_places
from rayvaec.kernels.nb_loss_terms import RATE_FLOOR, Gradients, Inputs
from rayvaec.kernels.special import (
    FAST,
    add_scaled,
    bracket,
    exp_negative,
    log1p_unit,
    product_into,
    short_dot,
)
from rayvaec.kernels.threads import run_all, spans

_F = np.float32
CHUNK_CELLS = 2048
"""Cells that are worked on at a time."""
BLOCK_ENTRIES = 1 << 19
"""Cells x genes of a product: 2 MiB."""
_TILE_GENES = 1024
_MOST_PIECES = 8
_PIECE_CELLS = 64

_workspace = threading.local()


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _softplus_sigmoid(
    a: NDArray[Any], bias: NDArray[Any], scale: NDArray[Any], slope: NDArray[Any]
) -> None:
    """Set scale = softplus(a + bias) and slope = sigmoid(a + bias)."""
    for g in range(len(a)):
        v = a[g] + bias[g]
        e = exp_negative(-abs(v))
        scale[g] = max(v, _F(0.0)) + log1p_unit(e)
        slope[g] = (_F(1.0) if v >= _F(0.0) else e) / (_F(1.0) + e)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _counts(
    indices: NDArray[Any],
    counts: NDArray[Any],
    origin: int,
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
    """Add one row's non-zeros within a tile to the gradients; return their log-likelihood.

    The tile's genes begin at `origin`; the arrays per gene hold the tile alone.
    """
    value, product = 0.0, 1.0
    weight = factor * library
    for i in range(len(indices)):
        g, x = np.uint32(indices[i] - origin), counts[i]
        if x <= 0:
            continue
        p, v, ratio = bracket(max(library * scale[g], RATE_FLOOR), x)
        value += v + x * log_p[g]
        product *= p
        if product < 1e-100 or product > 1e100:
            value += math.log(product)
            product = 1.0
        if want:
            delta = _F(weight * slope[g] * ratio)
            grad_a[g] -= delta
            sum_a[g] -= delta
            sum_x[g] += _F(factor * x)
    return value + math.log(product)


@njit(nogil=True, cache=True, error_model="numpy")
def _tile(
    a: NDArray[Any],
    bias: NDArray[Any],
    log_q: NDArray[Any],
    log_p: NDArray[Any],
    library: NDArray[Any],
    factor: NDArray[Any],
    places: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    origin: int,
    column: int,
    want: bool,
    loss: NDArray[Any],
    sum_a: NDArray[Any],
    sum_r: NDArray[Any],
    sum_x: NDArray[Any],
) -> None:
    """Compute each row's loss within a tile of genes, and turn its part of `a` into its gradient.

    The tile's first gene is `origin`, in column `column` of `a`; the arrays per gene hold the tile
    alone. Row c's entries are [places[c, 0], places[c, 1]). Added up over rows: the gradient of
    the bias, f*r and f*x.
    """
    width = len(bias)
    scale, slope = np.empty(width, _F), np.empty(width, _F)
    for c in range(len(a)):
        weight = factor[c] * library[c]
        row = a[c, column : column + width]
        _softplus_sigmoid(row, bias, scale, slope)
        dense = float(library[c]) * float(short_dot(scale, log_q))
        if want:
            product_into(row, slope, log_q, weight, sum_a)
            add_scaled(sum_r, scale, weight)
        start, stop = places[c, 0], places[c, 1]
        loss[c] = dense - _counts(
            indices[start:stop],
            counts[start:stop],
            origin,
            scale,
            slope,
            log_p,
            float(library[c]),
            float(factor[c]),
            want,
            row,
            sum_a,
            sum_x,
        )


def evaluate(inputs: Inputs, want_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Compute the loss of every cell and, if wanted, the gradients of the weighted sum.

    Parameters
    ----------
    inputs : Inputs
        On the CPU, in float32.
    want_gradients : bool
        Whether to compute gradients.

    Returns
    -------
    reconstruction : Tensor[n_cells]
        Negative log-likelihood of each cell.
    gradients : Gradients or None
    """
    n_cells = inputs.x.n_cells
    sweep = _Sweep(inputs, want_gradients)
    grads = Gradients(*(torch.empty_like(leaf) for leaf in inputs[:4]))
    for start in range(0, n_cells, CHUNK_CELLS):
        rows = slice(start, min(start + CHUNK_CELLS, n_cells))
        _chunk(inputs, rows, sweep, grads)
    if not want_gradients:
        return sweep.loss, None
    if not n_cells:
        grads.weight.zero_()
    bias, zeros, rest = torch.from_numpy(sweep.sums).sum(0)
    grads.bias.copy_(bias)
    torch.sub(
        torch.sigmoid(inputs.px_r) * zeros, torch.sigmoid(-inputs.px_r) * rest, out=grads.px_r
    )
    return sweep.loss, grads


def _chunk(inputs: Inputs, rows: slice, sweep: _Sweep, grads: Gradients) -> None:
    """Work through a chunk of cells, block of genes by block."""
    n_genes, h = inputs.x.n_genes, inputs.h[rows]
    sweep.begin(rows)
    step = max(1, BLOCK_ENTRIES // (len(h) * _TILE_GENES)) * _TILE_GENES
    buffer = _buffer(len(h) * min(step, n_genes))
    for first in range(0, n_genes, step):
        genes = slice(first, min(first + step, n_genes))
        a = buffer[: len(h) * (genes.stop - first)].view(len(h), genes.stop - first)
        weight = inputs.weight[genes]
        torch.mm(h, weight.t(), out=a)
        sweep.run(a, genes)
        if sweep.want:
            grads.h[rows].addmm_(a, weight, beta=float(first > 0))
            grads.weight[genes].addmm_(a.t(), h, beta=float(rows.start > 0))
    sweep.end(rows)


class _Sweep:
    """Runs the kernel over the tiles of a block, on several threads."""

    def __init__(self, inputs: Inputs, want: bool) -> None:
        self.indptr, self.indices, self.counts = checked_arrays(inputs.x)
        logits = inputs.px_r.double()
        self.bias = inputs.bias.contiguous().numpy()
        # In float32 for the zeros, in float64 for the rest.
        self.log_q = functional.softplus(logits).float().numpy()
        self.log_p = functional.logsigmoid(logits).numpy()
        self.library = inputs.library.float().contiguous().numpy()
        self.factor = inputs.factor.float().contiguous().numpy()
        self.sums = np.zeros((_MOST_PIECES, 3, inputs.x.n_genes), np.float32)
        self.loss = torch.empty(inputs.x.n_cells)
        self.want = want

    def begin(self, rows: slice) -> None:
        """Cut these rows into pieces, and find where their entries of every tile lie."""
        n_rows = rows.stop - rows.start
        self.start = rows.start
        self.pieces = spans(n_rows, min(_MOST_PIECES, n_rows // _PIECE_CELLS))
        indptr = self.indptr[rows.start : rows.stop + 1]
        self.places = tile_places(indptr, self.indices, _TILE_GENES, self.sums.shape[2])
        self.losses = np.empty((self.places.shape[1] - 1, n_rows))

    def run(self, a: Tensor, genes: slice) -> None:
        """Turn the activations of these rows and genes into gradients."""
        activations = a.numpy()
        run_all(
            [
                partial(self._tile, activations, first, first - genes.start, piece)
                for first in range(genes.start, genes.stop, _TILE_GENES)
                for piece in range(len(self.pieces))
            ]
        )

    def _tile(self, a: NDArray[np.float32], first: int, column: int, piece: int) -> None:
        genes = slice(first, first + _TILE_GENES)
        tile = first // _TILE_GENES
        rows = slice(*self.pieces[piece])
        cells = slice(self.start + rows.start, self.start + rows.stop)
        _tile(
            a[rows],
            self.bias[genes],
            self.log_q[genes],
            self.log_p[genes],
            self.library[cells],
            self.factor[cells],
            self.places[rows, tile : tile + 2],
            self.indices,
            self.counts,
            first,
            column,
            self.want,
            self.losses[tile, rows],
            *self.sums[piece, :, genes],
        )

    def end(self, rows: slice) -> None:
        """Add up the rows' losses over the tiles."""
        self.loss[rows] = torch.from_numpy(self.losses.sum(0))


def _buffer(n_entries: int) -> Tensor:
    """Return at least so many numbers of memory that this thread keeps.

    The first touch of fresh memory costs as much as a product.
    """
    kept = getattr(_workspace, "buffer", None)
    if kept is None or len(kept) < n_entries:
        kept = _workspace.buffer = torch.empty(n_entries)
    return kept
