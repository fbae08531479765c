"""The encoder's first layer: counts in CSR times a dense weight.

On the CPU in float32 the product runs over the non-zeros alone, by tiles of genes whose part of the
weight, or of its gradient, stays in cache. Every row of the output, and every gene's column of the
gradient, adds up in one fixed order: the number of threads does not change a bit, and a row's
genes do not depend on other rows. Elsewhere chunks of cells are made dense.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayvaec.compiled import compiled
from rayvaec.errors import ConfigError
from rayvaec.kernels.csr import CsrCounts, checked_arrays, tile_places
from rayvaec.kernels.nb_loss_terms import chunk_rows
from rayvaec.kernels.special import add_scaled
from rayvaec.kernels.threads import (
    run_all,
    single_threaded_torch,
    spans,
    thread_count,
    threads_for,
)

_F = np.float32
_TABLE = np.log1p(np.arange(256, dtype=np.float64)).astype(np.float32)
_TILE_GENES = 512  # 256 KiB of a weight with 128 outputs: a tile stays in a core's own cache
_LINE = 16  # float32s of one cache line: transposing goes line by line

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
def _transpose(weight: NDArray[Any], columns: NDArray[Any], first: int, last: int) -> None:
    """Copy columns [first, last) of the weight to rows of `columns`."""
    for start in range(first, last, _LINE):
        stop = min(start + _LINE, last)
        for row in range(weight.shape[0]):
            for gene in range(start, stop):
                columns[gene, row] = weight[row, gene]


@compiled
def _forward(
    places: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    columns: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Add every row's weighted sum of `columns` to `out`, tile of genes by tile."""
    for tile in range(places.shape[1] - 1):
        for row in range(len(out)):
            for i in range(places[row, tile], places[row, tile + 1]):
                add_scaled(out[row], columns[np.uint32(indices[i])], values[i])


@compiled
def _backward(
    places: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    grad_out: NDArray[Any],
    grad_weight: NDArray[Any],
    tile: int,
    first: int,
    last: int,
) -> None:
    """Set one tile's columns [first, last) of the weight's gradient."""
    n_out = grad_out.shape[1]
    block = np.zeros((last - first, n_out), _F)
    for row in range(len(grad_out)):
        for i in range(places[row, tile], places[row, tile + 1]):
            add_scaled(block[np.uint32(indices[i] - first)], grad_out[row], values[i])
    for start in range(0, len(block), _LINE):
        stop = min(start + _LINE, len(block))
        for j in range(n_out):
            for gene in range(start, stop):
                grad_weight[j, first + gene] = block[gene, j]


def sparse_linear(
    x: CsrCounts, weight: Tensor, bias: Tensor | None, *, log1p: bool, beside: Tensor | None = None
) -> Tensor:
    """Multiply counts, and dense inputs beside them, with a weight.

    Parameters
    ----------
    x : CsrCounts
        Raw counts of n_cells x n_genes.
    weight : Tensor[n_out, n_in], n_in >= n_genes
        Of a linear layer whose first inputs are the genes. Columns beyond those of `beside` are
        not read and get a gradient of zero.
    bias : Tensor[n_out], optional
        Added to every row.
    log1p : bool
        Whether the layer reads log(1 + x) instead of x.
    beside : Tensor[n_cells, n_beside], optional
        Inputs of the columns after the genes (labels, batches). Passing them here spares a second
        gradient of the weight's size.

    Returns
    -------
    Tensor[n_cells, n_out]
        Differentiable once with respect to weight, bias and `beside`.

    Raises
    ------
    ConfigError
        If the weight has fewer columns than there are inputs.
    CountsError
        If a count is negative or a gene beyond n_genes.
    """
    n_in = x.n_genes + (0 if beside is None else beside.shape[1])
    if weight.ndim != 2 or weight.shape[1] < n_in:
        raise ConfigError(
            f"weight has shape {tuple(weight.shape)} for {n_in} inputs, {x.n_genes} of them genes",
            "pass a weight with one column an input, genes first",
        )
    fused = weight.device.type == "cpu" and weight.dtype == torch.float32
    out = (_Sparse if fused else _DenseChunks).apply(weight, beside, x, log1p)
    return out if bias is None else out + bias


def _beside_columns(weight: Tensor, beside: Tensor, n_genes: int) -> Tensor:
    return weight[:, n_genes : n_genes + beside.shape[1]]


def _finish_gradient(ctx: Any, grad: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Fill in what lies beside the genes; return the gradients of weight and `beside`."""
    grad[:, ctx.x.n_genes :] = 0
    if ctx.beside is None:
        return grad, None
    torch.mm(grad_out.t(), ctx.beside, out=_beside_columns(grad, ctx.beside, ctx.x.n_genes))
    if not ctx.needs_input_grad[1]:
        return grad, None
    return grad, grad_out @ _beside_columns(ctx.weight, ctx.beside, ctx.x.n_genes)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, beside: Tensor | None, x: CsrCounts, log1p: bool
    ) -> Tensor:
        indptr, indices, counts = checked_arrays(x)
        values = np.empty(len(counts), _F)
        _values(counts, log1p, values)
        places = tile_places(indptr, indices, _TILE_GENES, x.n_genes)
        columns = _columns(weight, x.n_genes, x.n_cells)
        with single_threaded_torch():
            if beside is None:
                out = torch.zeros(x.n_cells, len(weight))
            else:
                out = beside @ _beside_columns(weight, beside, x.n_genes).t()
        into = out.numpy()
        run_all(
            [
                partial(_forward, places[a:b], indices, values, columns, into[a:b])
                for a, b in spans(x.n_cells, 4 * thread_count())
            ],
            threads_for(x.n_cells * x.n_genes),
        )
        ctx.weight, ctx.beside, ctx.x = weight, beside, x
        ctx.entries = places, indices, values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grad_out.contiguous()
        grad = torch.empty_like(ctx.weight)
        outer, into = grad_out.numpy(), grad.numpy()
        places, indices, values = ctx.entries
        starts = range(0, ctx.x.n_genes, _TILE_GENES)
        run_all(
            [
                partial(_backward, places, indices, values, outer, into, tile, first, last)
                for tile, first in enumerate(starts)
                for last in [min(first + _TILE_GENES, ctx.x.n_genes)]
            ],
            threads_for(ctx.x.n_cells * ctx.x.n_genes),
        )
        with single_threaded_torch():
            return *_finish_gradient(ctx, grad, grad_out), None, None


def _columns(weight: Tensor, n_genes: int, n_cells: int) -> NDArray[np.float32]:
    """Return the weight's columns as rows, in a buffer that this thread keeps.

    Fresh memory would cost as much on its first touch as the product itself.
    """
    kept = getattr(_workspace, "columns", None)
    if kept is None or kept.shape != (n_genes, len(weight)):
        kept = _workspace.columns = np.empty((n_genes, len(weight)), _F)
    source = weight.detach().contiguous().numpy()
    run_all(
        [
            partial(_transpose, source, kept, a * _LINE, min(b * _LINE, n_genes))
            for a, b in spans(-(-n_genes // _LINE), 4 * thread_count())
        ],
        threads_for(n_cells * n_genes),
    )
    return kept


class _DenseChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, beside: Tensor | None, x: CsrCounts, log1p: bool
    ) -> Tensor:
        ctx.weight, ctx.beside, ctx.x, ctx.log1p = weight, beside, x, log1p
        out = weight.new_empty(x.n_cells, len(weight))
        columns = weight[:, : x.n_genes].t()
        for rows, dense in _dense_chunks(x, log1p, weight.dtype):
            torch.mm(dense, columns, out=out[rows])
        if beside is not None:
            out.addmm_(beside, _beside_columns(weight, beside, x.n_genes).t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.zeros_like(ctx.weight)
        for rows, dense in _dense_chunks(ctx.x, ctx.log1p, grad.dtype):
            grad[:, : ctx.x.n_genes].addmm_(grad_out[rows].t(), dense)
        return *_finish_gradient(ctx, grad, grad_out), None, None


def _dense_chunks(x: CsrCounts, log1p: bool, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    height = chunk_rows(x)
    for start in range(0, x.n_cells, height):
        stop = min(start + height, x.n_cells)
        first, last = x.indptr[start], x.indptr[stop]
        part = x._replace(
            indptr=x.indptr[start : stop + 1] - first,
            indices=x.indices[first:last],
            counts=x.counts[first:last],
        )
        dense = part.to_dense(dtype)
        yield slice(start, stop), dense.log1p_() if log1p else dense
