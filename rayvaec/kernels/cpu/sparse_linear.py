"""Linear layer on CSR counts (the encoder's first layer) as an autograd function.

On the CPU in float32 the product runs over the non-zeros alone (`sparse_products`). Elsewhere
chunks of cells are made dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayvaec.errors import ConfigError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu.spmm import SparseProducts
from rayvaec.kernels.nb_loss_types import chunk_rows
from rayvaec.kernels.threads import run_all, single_threaded_torch, spans, thread_count


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


def _finish_gradient(
    ctx: Any, grad: Tensor, grad_out: Tensor, weight: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fill in what lies beside the genes; return the gradients of weight and `beside`."""
    grad[:, ctx.n_genes :] = 0
    if beside is None:
        return grad, None
    torch.mm(grad_out.t(), beside, out=_beside_columns(grad, beside, ctx.n_genes))
    if not ctx.needs_input_grad[1]:
        return grad, None
    return grad, grad_out @ _beside_columns(weight, beside, ctx.n_genes)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, beside: Tensor | None, x: CsrCounts, log1p: bool
    ) -> Tensor:
        products = SparseProducts(x, log1p)
        columns = products.columns(weight)
        with single_threaded_torch():
            if beside is None:
                out = weight.new_zeros(x.n_cells, len(weight))
            else:
                out = beside @ _beside_columns(weight, beside, x.n_genes).t()
        into = out.numpy()
        rows = [slice(*span) for span in spans(x.n_cells, 4 * thread_count())]
        run_all(
            [partial(products.add_to, into[piece], columns, piece) for piece in rows],
            products.n_threads,
        )
        # The products read the counts' own memory.
        ctx.save_for_backward(weight, beside, *x.tensors)
        ctx.n_genes, ctx.products = x.n_genes, products
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, beside, *_ = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad = torch.empty_like(weight)
        ctx.products.gradient_into(grad_out.numpy(), grad)
        with single_threaded_torch():
            return *_finish_gradient(ctx, grad, grad_out, weight, beside), None, None


class _DenseChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, beside: Tensor | None, x: CsrCounts, log1p: bool
    ) -> Tensor:
        out = weight.new_empty(x.n_cells, len(weight))
        columns = weight[:, : x.n_genes].t()
        only_chunk = None
        for rows, dense in _dense_chunks(x, log1p, weight.dtype):
            torch.mm(dense, columns, out=out[rows])
            if len(dense) == x.n_cells:
                only_chunk = dense
        ctx.save_for_backward(weight, beside, only_chunk, *x.tensors)
        ctx.n_genes, ctx.log1p = x.n_genes, log1p
        if beside is not None:
            out.addmm_(beside, _beside_columns(weight, beside, x.n_genes).t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, beside, only_chunk, *counts = ctx.saved_tensors
        grad = torch.zeros_like(weight)
        if only_chunk is None:
            indptr, indices, values = counts
            x = CsrCounts(indptr, indices, values, ctx.n_genes)
            chunks = _dense_chunks(x, ctx.log1p, grad.dtype)
        else:
            chunks = iter([(slice(None), only_chunk)])
        for rows, dense in chunks:
            grad[:, : ctx.n_genes].addmm_(grad_out[rows].t(), dense)
        return *_finish_gradient(ctx, grad, grad_out, weight, beside), None, None


def _dense_chunks(x: CsrCounts, log1p: bool, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    height = chunk_rows(x)
    for start in range(0, x.n_cells, height):
        stop = min(start + height, x.n_cells)
        dense = _rows(x, start, stop).to_dense(dtype)
        yield slice(start, stop), dense.log1p_() if log1p else dense


def _rows(x: CsrCounts, start: int, stop: int) -> CsrCounts:
    if stop - start == x.n_cells:  # to look up where they begin would be to wait for the device
        return x
    first, last = x.indptr[start], x.indptr[stop]
    return x._replace(
        indptr=x.indptr[start : stop + 1] - first,
        indices=x.indices[first:last],
        counts=x.counts[first:last],
    )
