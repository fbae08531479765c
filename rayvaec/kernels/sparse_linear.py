"""The encoder's first layer: counts in CSR times a dense weight.

On the CPU in float32 the product runs over the non-zeros alone, and its gradient over the same
non-zeros sorted by gene, so that each gene's column is written once, by one thread. Every
output depends on its own row (or gene) only and adds up in one fixed order: neither the number of
threads nor the other rows change a bit. Elsewhere chunks of cells are made dense.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayvaec.errors import ConfigError
from rayvaec.kernels.csr import CsrCounts, checked_arrays
from rayvaec.kernels.nb_loss_terms import chunk_rows
from rayvaec.kernels.threads import run_all, spans, thread_count

_F = np.float32
_TABLE = np.log1p(np.arange(256, dtype=np.float64)).astype(np.float32)
_GENES = 16  # float32s of one cache line: a block of genes is transposed through it
_FAST = {"contract", "nsz"}

_workspace = threading.local()


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _transpose(weight: NDArray[Any], columns: NDArray[Any], first: int, last: int) -> None:
    """Copy columns [first, last) of the weight to rows of `columns`."""
    for start in range(first, last, _GENES):
        stop = min(start + _GENES, last)
        for row in range(weight.shape[0]):
            for gene in range(start, stop):
                columns[gene, row] = weight[row, gene]


@njit(nogil=True, fastmath=_FAST)
def _add_scaled(total: NDArray[Any], values: NDArray[Any], factor: np.float32) -> None:
    for i in range(len(total)):
        total[i] += factor * values[i]


@njit(nogil=True, cache=True)
def _forward(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    columns: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Add every row's weighted sum of `columns` to `out`."""
    for row in range(len(out)):
        for i in range(indptr[row], indptr[row + 1]):
            _add_scaled(out[row], columns[np.uint32(indices[i])], values[i])


@njit(nogil=True, cache=True)
def _by_gene(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    ends: NDArray[Any],
    cells: NDArray[Any],
    sorted_values: NDArray[Any],
) -> None:
    """Sort entries by gene, stably; gene g's are [ends[g], ends[g + 1]) afterwards."""
    for i in range(len(indices)):
        ends[np.uint32(indices[i]) + 2] += 1
    for gene in range(2, len(ends)):
        ends[gene] += ends[gene - 1]
    for cell in range(len(indptr) - 1):
        for i in range(indptr[cell], indptr[cell + 1]):
            slot = np.uint32(indices[i]) + 1
            place = ends[slot]
            cells[place] = cell
            sorted_values[place] = values[i]
            ends[slot] = place + 1


@njit(nogil=True, cache=True)
def _backward(
    ends: NDArray[Any],
    cells: NDArray[Any],
    values: NDArray[Any],
    grad_out: NDArray[Any],
    grad_weight: NDArray[Any],
    first: int,
    last: int,
) -> None:
    """Set columns [first, last) of the weight's gradient."""
    n_out = grad_out.shape[1]
    block = np.empty((_GENES, n_out), _F)
    for start in range(first, last, _GENES):
        stop = min(start + _GENES, last)
        block[:] = 0
        for gene in range(start, stop):
            for i in range(ends[gene], ends[gene + 1]):
                _add_scaled(block[gene - start], grad_out[np.uint32(cells[i])], values[i])
        for row in range(n_out):
            for gene in range(start, stop):
                grad_weight[row, gene] = block[gene - start, row]


def sparse_linear(x: CsrCounts, weight: Tensor, bias: Tensor | None, *, log1p: bool) -> Tensor:
    """Multiply counts with the first n_genes columns of a weight.

    Parameters
    ----------
    x : CsrCounts
        Raw counts of n_cells x n_genes.
    weight : Tensor[n_out, n_in], n_in >= n_genes
        Of a linear layer whose first inputs are the genes; the other columns (labels, batches) are
        not read and get a gradient of zero.
    bias : Tensor[n_out], optional
        Added to every row.
    log1p : bool
        Whether the layer reads log(1 + x) instead of x.

    Returns
    -------
    Tensor[n_cells, n_out]
        Differentiable once with respect to weight and bias.

    Raises
    ------
    ConfigError
        If the weight has fewer columns than there are genes.
    CountsError
        If a count is negative or a gene beyond n_genes.
    """
    if weight.ndim != 2 or weight.shape[1] < x.n_genes:
        raise ConfigError(
            f"weight has shape {tuple(weight.shape)} for counts of {x.n_genes} genes",
            "pass a weight with one column a gene, and more only after those",
        )
    fused = weight.device.type == "cpu" and weight.dtype == torch.float32
    out = (_Sparse if fused else _DenseChunks).apply(weight, x, log1p)
    return out if bias is None else out + bias


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: CsrCounts, log1p: bool) -> Tensor:
        indptr, indices, counts = checked_arrays(x)
        values = np.empty(len(counts), _F)
        _values(counts, log1p, values)
        columns = _columns(weight.detach(), x.n_genes)
        out = torch.zeros(x.n_cells, len(weight))
        into = out.numpy()
        run_all(
            [
                partial(_forward, indptr[a : b + 1], indices, values, columns, into[a:b])
                for a, b in spans(x.n_cells, 4 * thread_count())
            ]
        )
        ctx.entries = indptr, indices, values
        ctx.shape = weight.shape
        ctx.n_genes = x.n_genes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        indptr, indices, values = ctx.entries
        ends = np.zeros(ctx.n_genes + 2, np.int64)
        cells, by_gene = np.empty(len(indices), np.int32), np.empty(len(indices), _F)
        _by_gene(indptr, indices, values, ends, cells, by_gene)
        grad = torch.empty(ctx.shape)
        grad[:, ctx.n_genes :] = 0
        grads, into = grad_out.contiguous().numpy(), grad.numpy()
        blocks = spans(-(-ctx.n_genes // _GENES), 8 * thread_count())
        run_all(
            [
                partial(
                    _backward,
                    ends,
                    cells,
                    by_gene,
                    grads,
                    into,
                    a * _GENES,
                    min(b * _GENES, ctx.n_genes),
                )
                for a, b in blocks
            ]
        )
        return grad, None, None


def _columns(weight: Tensor, n_genes: int) -> NDArray[np.float32]:
    """Return the weight's columns as rows, in a buffer that this thread keeps.

    Fresh memory would cost as much on its first touch as the product itself.
    """
    kept = getattr(_workspace, "columns", None)
    if kept is None or kept.shape != (n_genes, len(weight)):
        kept = _workspace.columns = np.empty((n_genes, len(weight)), _F)
    source = weight.contiguous().numpy()
    blocks = spans(-(-n_genes // _GENES), 4 * thread_count())
    run_all(
        [partial(_transpose, source, kept, a * _GENES, min(b * _GENES, n_genes)) for a, b in blocks]
    )
    return kept


class _DenseChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: CsrCounts, log1p: bool) -> Tensor:
        ctx.x, ctx.log1p = x, log1p
        ctx.shape = weight.shape
        out = weight.new_empty(x.n_cells, len(weight))
        columns = weight[:, : x.n_genes].t()
        for rows, dense in _dense_chunks(x, log1p, weight.dtype):
            torch.mm(dense, columns, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        grad = grad_out.new_zeros(ctx.shape)
        for rows, dense in _dense_chunks(ctx.x, ctx.log1p, grad.dtype):
            grad[:, : ctx.x.n_genes].addmm_(grad_out[rows].t(), dense)
        return grad, None, None


def _dense_chunks(x: CsrCounts, log1p: bool, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    height = chunk_rows(x.n_cells, x.n_genes)
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
