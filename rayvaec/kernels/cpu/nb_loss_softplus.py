"""CPU loss of the softplus form: r = library * softplus(a), logits = px_r.

Genes are independent here, so the work goes by tiles of genes over all cells of a chunk, each in
one thread: a product into a buffer that stays in the core's cache, a sweep over it that turns it in
place into its gradient, and two products back. The weight and its gradient are thus read and
written once. Within a tile's row the zeros are dealt with by vectorised float32 loops, and the
non-zeros after them, one by one, in float64.

Only the gradient of h adds up over tiles. They are dealt to a fixed number of groups, and the
groups' sums are added in order: no bit depends on the number of threads.
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

from rayvaec.kernels.counts import checked_arrays, tile_places
from rayvaec.kernels.math32 import (
    FAST,
    add_scaled,
    bracket,
    exp_negative,
    log1p_unit,
    product_into,
    short_dot,
)
from rayvaec.kernels.nb_loss_types import RATE_FLOOR, Gradients, Inputs
from rayvaec.kernels.threads import run_all, spans, threads_for
from rayvaec.util.numba_cache import compiled

_F = np.float32
CHUNK_CELLS = 1024
"""Cells that are worked on at a time."""
# A tile's activations, 1 MiB, stay in the core's own cache. With few cells tiles are wide: every
# one costs four calls, between which threads wait for each other.
_TILE_ENTRIES = 1 << 18
_TILES = 4
_GROUPS = 8
_LINE = 16  # float32s of a cache line

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


@compiled(error_model="numpy")
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
    want: bool,
    loss: NDArray[Any],
    sum_a: NDArray[Any],
    sum_r: NDArray[Any],
    sum_x: NDArray[Any],
) -> None:
    """Add each row's loss within a tile of genes, and turn `a` into its gradient.

    The tile's first gene is `origin`; the arrays per gene hold the tile alone. Row c's entries are
    [places[c, 0], places[c, 1]). Added up over rows: the gradient of the bias, f*r and f*x.
    """
    scale, slope = np.empty(len(bias), _F), np.empty(len(bias), _F)
    for c in range(len(a)):
        weight = factor[c] * library[c]
        row = a[c]
        _softplus_sigmoid(row, bias, scale, slope)
        dense = float(library[c]) * float(short_dot(scale, log_q))
        if want:
            product_into(row, slope, log_q, weight, sum_a)
            add_scaled(sum_r, scale, weight)
        start, stop = places[c, 0], places[c, 1]
        loss[c] += dense - _counts(
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
    work = _Work(inputs, want_gradients)
    for start in range(0, n_cells, CHUNK_CELLS):
        work.run(slice(start, min(start + CHUNK_CELLS, n_cells)))
    if not want_gradients:
        return work.loss, None
    if not n_cells:
        work.grads.weight.zero_()
    bias, zeros, rest = torch.from_numpy(work.sums)
    work.grads.bias.copy_(bias)
    torch.sub(
        torch.sigmoid(inputs.px_r) * zeros,
        torch.sigmoid(-inputs.px_r) * rest,
        out=work.grads.px_r,
    )
    return work.loss, work.grads


class _Work:
    """What the tiles of one call share."""

    def __init__(self, inputs: Inputs, want: bool) -> None:
        self.indptr, self.indices, self.counts = checked_arrays(inputs.x)
        logits = inputs.px_r.double()
        self.h, self.weight = inputs.h, inputs.weight
        self.bias = inputs.bias.contiguous().numpy()
        # In float32 for the zeros, in float64 for the rest.
        self.log_q = functional.softplus(logits).float().numpy()
        self.log_p = functional.logsigmoid(logits).numpy()
        self.library = inputs.library.float().contiguous().numpy()
        self.factor = inputs.factor.float().contiguous().numpy()
        self.sums = np.zeros((3, inputs.x.n_genes), _F)
        self.loss = torch.empty(inputs.x.n_cells, dtype=torch.float32)
        self.grads = Gradients(*(torch.empty_like(leaf) for leaf in inputs[:4]))
        self.want = want

    def run(self, rows: slice) -> None:
        """Work through one chunk of cells."""
        n_rows, n_genes = rows.stop - rows.start, self.sums.shape[1]
        width = _tile_width(n_rows, n_genes)
        places = tile_places(self.indptr[rows.start : rows.stop + 1], self.indices, width, n_genes)
        tiles = [slice(a, min(a + width, n_genes)) for a in range(0, n_genes, width)]
        groups = spans(len(tiles), _GROUPS)
        losses = np.zeros((len(groups), n_rows))
        sums_h = _buffer("h", (len(groups), n_rows, self.h.shape[1]))
        run_all(
            [
                partial(self._group, rows, tiles[a:b], places[:, a:], losses[i], sums_h[i])
                for i, (a, b) in enumerate(groups)
            ],
            threads_for(n_rows * n_genes),
        )
        self.loss[rows] = torch.from_numpy(losses.sum(0))
        if self.want:
            torch.sum(sums_h, 0, out=self.grads.h[rows])

    def _group(
        self,
        rows: slice,
        tiles: list[slice],
        places: NDArray[np.int64],
        loss: NDArray[np.float64],
        sum_h: Tensor,
    ) -> None:
        """Work through some tiles: their columns of the gradients, and what they add to h's."""
        with torch.no_grad():  # which is a setting per thread
            h = self.h[rows]
            for tile, genes in enumerate(tiles):
                weight = self.weight[genes]
                a = _buffer("a", (len(h), len(weight)))
                torch.mm(h, weight.t(), out=a)
                self._sweep(a.numpy(), rows, genes, places[:, tile : tile + 2], loss)
                if self.want:
                    sum_h.addmm_(a, weight, beta=float(tile > 0))
                    self.grads.weight[genes].addmm_(a.t(), h, beta=float(rows.start > 0))

    def _sweep(
        self,
        a: NDArray[np.float32],
        rows: slice,
        genes: slice,
        places: NDArray[np.int64],
        loss: NDArray[np.float64],
    ) -> None:
        _tile(
            a,
            self.bias[genes],
            self.log_q[genes],
            self.log_p[genes],
            self.library[rows],
            self.factor[rows],
            places,
            self.indices,
            self.counts,
            genes.start,
            self.want,
            loss,
            *self.sums[:, genes],
        )


def _tile_width(n_rows: int, n_genes: int) -> int:
    """Return how many genes a tile has: even pieces, whole cache lines."""
    n_tiles = max(_TILES, -(-n_rows * n_genes // _TILE_ENTRIES))
    return -(-n_genes // n_tiles // _LINE) * _LINE


def _buffer(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return memory that this thread keeps.

    The first touch of fresh memory costs as much as a product.
    """
    kept, size = getattr(_workspace, name, None), math.prod(shape)
    if kept is None or len(kept) < size:
        kept = torch.empty(size, dtype=torch.float32)
        setattr(_workspace, name, kept)
    return kept[:size].view(shape)
