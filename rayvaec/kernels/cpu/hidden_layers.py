"""Fused hidden layers: linear, covariates, LayerNorm, ReLU and dropout as one autograd function.

At the widths of VAEC's hidden layers every operation of torch costs more in being called than in
its arithmetic. Here a layer is two calls, a product and one pass over its output, and two products
and a pass on the way back. A covariate's one-hot code picks a column of the weight, which is added
like the bias: the bias is the column of a category that every cell has.

Cells are independent, so they go in pieces through all layers, each piece in one thread. Their
number is fixed by that of the cells: no bit depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayvaec.errors import ConfigError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu.spmm import SparseProducts
from rayvaec.kernels.math32 import SUMS
from rayvaec.kernels.simd import Distinct
from rayvaec.kernels.threads import run_all, spans, threads_for
from rayvaec.util.numba_cache import compiled

_F = np.float32
_PIECE_CELLS = 64
_PIECES = 8


class Layer(NamedTuple):
    """One hidden layer.

    Parameters
    ----------
    weight : Tensor[n_out, n_in + n_codes]
        Columns of the input, then those of the covariates' one-hot codes.
    bias : Tensor[n_out]
    mask : Tensor[n_cells, n_out], optional
        What dropout multiplies by; None where nothing is dropped.
    """

    weight: Tensor
    bias: Tensor
    mask: Tensor | None


@compiled(error_model="numpy", fastmath=SUMS, pipeline_class=Distinct)
def _forward(
    a: NDArray[Any],
    table: NDArray[Any],
    codes: NDArray[Any],
    mask: NDArray[Any],
    eps: float,
    rstd: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Turn products into normalised activations, in place, and set `out` to what leaves a layer."""
    n = a.shape[1]
    for row in range(len(a)):
        for j in range(codes.shape[1]):
            code = np.uint64(codes[row, j])
            for i in range(n):
                a[row, i] += table[code, i]
        total, squares = _F(0.0), _F(0.0)
        for i in range(n):
            total += a[row, i]
        mean = _F(total / n)
        for i in range(n):
            centred = a[row, i] - mean
            a[row, i] = centred
            squares += centred * centred
        scale = _F(1.0 / math.sqrt(squares / n + eps))
        rstd[row] = scale
        for i in range(n):
            value = a[row, i] * scale
            a[row, i] = value
            out[row, i] = max(value, _F(0.0)) * mask[row, i]


@compiled(error_model="numpy", fastmath=SUMS, pipeline_class=Distinct)
def _backward(
    grad_out: NDArray[Any],
    mask: NDArray[Any],
    normed: NDArray[Any],
    rstd: NDArray[Any],
    codes: NDArray[Any],
    grad: NDArray[Any],
    grad_table: NDArray[Any],
) -> None:
    """Set the gradient of a layer's products, and that of its table of columns."""
    n = grad.shape[1]
    grad_table[:] = _F(0.0)
    for row in range(len(grad)):
        total, along = _F(0.0), _F(0.0)
        for i in range(n):
            value = grad_out[row, i] * mask[row, i] if normed[row, i] > _F(0.0) else _F(0.0)
            grad[row, i] = value
            total += value
            along += value * normed[row, i]
        mean, slope, scale = _F(total / n), _F(along / n), rstd[row]
        for i in range(n):
            grad[row, i] = scale * (grad[row, i] - mean - normed[row, i] * slope)
        for j in range(codes.shape[1]):
            code = np.uint64(codes[row, j])
            for i in range(n):
                grad_table[code, i] += grad[row, i]


def hidden_layers(
    x: Tensor | CsrCounts,
    codes: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    log1p: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Run layers of relu(layer_norm(product + columns)) * mask, on the CPU in float32.

    Parameters
    ----------
    x : Tensor[n_cells, n_in] or CsrCounts
        Input of the first layer.
    codes : sequence of int64 Tensor[n_cells]
        Which of its one-hot columns, counted from the first after the input, each covariate adds
        to a cell; the same in every layer.
    layers : sequence of Layer
        At least one.
    log1p : bool
        Whether the first layer reads log(1 + x) of counts.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor[n_cells, n_out]
        Differentiable once with respect to weights, biases and a dense `x`.

    Raises
    ------
    ConfigError
        If a weight's width does not fit, or a code is beyond it.
    CountsError
        If a count is negative or a gene beyond n_genes.
    """
    dense = None if isinstance(x, CsrCounts) else x
    products = SparseProducts(x, log1p) if isinstance(x, CsrCounts) else None
    n_cells = x.n_cells if isinstance(x, CsrCounts) else len(x)
    n_in = x.n_genes if isinstance(x, CsrCounts) else x.shape[1]
    # Code 0 is the bias's.
    table_codes = np.zeros((n_cells, 1 + len(codes)), np.int64)
    for j, code in enumerate(codes, 1):
        table_codes[:, j] = code.numpy()
        table_codes[:, j] += 1
    _check(n_in, table_codes, layers)
    masks = [
        bias.new_ones(n_cells, len(bias)) if mask is None else mask for _, bias, mask in layers
    ]
    stack = _Stack(products, table_codes, len(layers), eps)
    counts = x.tensors if isinstance(x, CsrCounts) else (None, None, None)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return _HiddenLayers.apply(stack, dense, *counts, *weights, *biases, *masks)


def _check(n_in: int, codes: NDArray[np.int64], layers: Sequence[Layer]) -> None:
    n_codes = layers[0].weight.shape[1] - n_in
    for weight, bias, _ in layers:
        if weight.shape != (len(bias), n_in + n_codes) or n_codes < 0:
            raise ConfigError(
                f"a weight has shape {tuple(weight.shape)} for {n_in} inputs and {n_codes} codes",
                "pass weights with the input's columns first and a column a code after them",
            )
        n_in = len(bias)
    given = codes[:, 1:]
    if given.size and (given.min() < 1 or given.max() > n_codes):
        outside = given[(given < 1) | (given > n_codes)]
        raise ConfigError(
            f"code {outside[0] - 1} is none of {n_codes} columns",
            f"give codes from 0 to {n_codes - 1}",
        )


class _Tensors(NamedTuple):
    """Tensors of one call: a dense input, and of every layer its weight, mask and outputs."""

    x: Tensor | None
    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    normed: Sequence[Tensor]
    outs: Sequence[Tensor] = ()

    def inputs(self, layer: int, rows: slice) -> Tensor:
        """Return some rows of a layer's dense input."""
        x = self.outs[layer - 1] if layer else self.x
        return x[rows]  # type: ignore[index]


class _Stack:
    """What the pieces of one call share beside tensors, which autograd keeps."""

    def __init__(
        self,
        products: SparseProducts | None,
        codes: NDArray[np.int64],
        n_layers: int,
        eps: float,
    ) -> None:
        self.products, self.codes, self.eps = products, codes, eps
        pieces = min(_PIECES, max(1, len(codes) // _PIECE_CELLS))
        self.rows = [slice(*span) for span in spans(len(codes), pieces)]
        # A dense product of few inputs is not worth a second thread at some hundred cells.
        self.n_threads = products.n_threads if products else threads_for(len(codes) * 512)
        self.rstd = np.empty((n_layers, len(codes)), _F)

    def forward(self, tensors: _Tensors, biases: Sequence[Tensor]) -> None:
        """Fill in what every layer gives."""
        x, weights = tensors.x, tensors.weights
        self.n_in = [
            self.products.n_genes if x is None else x.shape[1],  # type: ignore[union-attr]
            *(len(bias) for bias in biases[:-1]),
        ]
        tables = [
            torch.cat((bias[None], weight[:, n:].t())).numpy()
            for weight, bias, n in zip(weights, biases, self.n_in, strict=True)
        ]
        columns = self.products.columns(weights[0]) if self.products else None
        run_all(
            [partial(self._forward_piece, tensors, rows, tables, columns) for rows in self.rows],
            self.n_threads,
        )

    def _forward_piece(
        self,
        tensors: _Tensors,
        rows: slice,
        tables: list[NDArray[np.float32]],
        columns: NDArray[np.float32] | None,
    ) -> None:
        with torch.no_grad():  # which is a setting per thread
            for layer, (weight, n_in) in enumerate(zip(tensors.weights, self.n_in, strict=True)):
                a = tensors.normed[layer][rows]
                if layer == 0 and columns is not None:
                    a.zero_()
                    self.products.add_to(a.numpy(), columns, rows)  # type: ignore[union-attr]
                else:
                    torch.mm(tensors.inputs(layer, rows), weight[:, :n_in].t(), out=a)
                _forward(
                    a.numpy(),
                    tables[layer],
                    self.codes[rows],
                    tensors.masks[layer][rows].numpy(),
                    self.eps,
                    self.rstd[layer, rows],
                    tensors.outs[layer][rows].numpy(),
                )

    def backward(
        self, tensors: _Tensors, grad_out: Tensor, want_x: bool
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """Return the gradients of the input, the weights and the biases."""
        # Every piece adds to all weights: they have a sum each, added up in order.
        parts = [weight.new_empty(len(self.rows), *weight.shape) for weight in tensors.weights]
        if self.products:
            parts[0] = parts[0].new_empty(0)
        tables = [
            np.empty((len(self.rows), 1 + weight.shape[1] - n_in, len(weight)), _F)
            for weight, n_in in zip(tensors.weights, self.n_in, strict=True)
        ]
        grads = [torch.empty_like(normed) for normed in tensors.normed]
        grad_x = torch.empty_like(tensors.x) if want_x and tensors.x is not None else None
        run_all(
            [
                partial(
                    self._backward_piece, tensors, number, grad_out, grads, parts, tables, grad_x
                )
                for number in range(len(self.rows))
            ],
            self.n_threads,
        )
        weights = []
        for layer, (weight, n_in) in enumerate(zip(tensors.weights, self.n_in, strict=True)):
            total = torch.empty_like(weight)
            if layer == 0 and self.products:
                self.products.gradient_into(grads[0].numpy(), total)
            else:
                torch.sum(parts[layer], 0, out=total)
            table = tables[layer] = tables[layer].sum(0)
            total[:, n_in:].copy_(torch.from_numpy(table[1:]).t())
            weights.append(total)
        return grad_x, weights, [torch.from_numpy(table[0]) for table in tables]

    def _backward_piece(
        self,
        tensors: _Tensors,
        number: int,
        grad_out: Tensor,
        grads: list[Tensor],
        parts: list[Tensor],
        tables: list[NDArray[np.float32]],
        grad_x: Tensor | None,
    ) -> None:
        rows = self.rows[number]
        grad = grad_out[rows]
        with torch.no_grad():
            for layer in reversed(range(len(grads))):
                weight, n_in = tensors.weights[layer], self.n_in[layer]
                grad_a = grads[layer][rows]
                _backward(
                    grad.numpy(),
                    tensors.masks[layer][rows].numpy(),
                    tensors.normed[layer][rows].numpy(),
                    self.rstd[layer, rows],
                    self.codes[rows],
                    grad_a.numpy(),
                    tables[layer][number],
                )
                if layer == 0 and self.products:
                    return
                part = parts[layer][number, :, :n_in]
                torch.mm(grad_a.t(), tensors.inputs(layer, rows), out=part)
                if layer:
                    grad = grad_a @ weight[:, :n_in]
                elif grad_x is not None:
                    torch.mm(grad_a, weight[:, :n_in], out=grad_x[rows])


class _HiddenLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stack: _Stack,
        x: Tensor | None,
        indptr: Tensor | None,
        indices: Tensor | None,
        counts: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        weights, biases, masks = _by_layer(tensors, len(stack.rstd))
        normed = [mask.new_empty(mask.shape) for mask in masks]
        outs = [mask.new_empty(mask.shape) for mask in masks]
        stack.forward(_detached(x, weights, masks, normed, outs), [b.detach() for b in biases])
        # The result refers to this node, which must not keep it: it would close a cycle, and a
        # step's memory, its minibatch included, would wait for a garbage collection.
        result = outs.pop()
        ctx.save_for_backward(x, indptr, indices, counts, *weights, *masks, *normed, *outs)
        ctx.stack = stack
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, _, *saved = ctx.saved_tensors
        stack: _Stack = ctx.stack
        n_layers = len(stack.rstd)
        tensors = _detached(x, *_by_layer(saved, n_layers))
        want_x = ctx.needs_input_grad[1]
        grad_x, weights, biases = stack.backward(tensors, grad_out.contiguous(), want_x)
        return None, grad_x, None, None, None, *weights, *biases, *[None] * n_layers


def _by_layer(tensors: Sequence[Tensor], n_layers: int) -> list[Sequence[Tensor]]:
    """Cut tensors of several kinds, of every layer each, into the kinds."""
    starts = range(0, len(tensors), n_layers)
    return [tensors[start : start + n_layers] for start in starts]


def _detached(x: Tensor | None, *each: Sequence[Tensor]) -> _Tensors:
    """Return tensors as the kernels read them; they are not copied where they are contiguous."""
    plain = ([tensor.detach().contiguous() for tensor in tensors] for tensors in each)
    return _Tensors(None if x is None else x.detach().contiguous(), *plain)
