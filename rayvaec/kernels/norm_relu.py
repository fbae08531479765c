"""LayerNorm without parameters, ReLU and dropout in one pass, forward and backward.

At the widths of VAEC's hidden layers every operation of torch costs more in being called than in
its arithmetic; between two products these three are all there is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayvaec.compiled import compiled
from rayvaec.kernels.distinct import Distinct
from rayvaec.kernels.special import SUMS

_F = np.float32


@compiled(error_model="numpy", fastmath=SUMS, pipeline_class=Distinct)
def _forward(
    a: NDArray[Any],
    mask: NDArray[Any],
    eps: float,
    normed: NDArray[Any],
    rstd: NDArray[Any],
    out: NDArray[Any],
) -> None:
    n = a.shape[1]
    for row in range(len(a)):
        total, squares = _F(0.0), _F(0.0)
        for i in range(n):
            total += a[row, i]
        mean = _F(total / n)
        for i in range(n):
            centred = a[row, i] - mean
            normed[row, i] = centred
            squares += centred * centred
        scale = _F(1.0 / math.sqrt(squares / n + eps))
        rstd[row] = scale
        for i in range(n):
            value = normed[row, i] * scale
            normed[row, i] = value
            out[row, i] = max(value, _F(0.0)) * mask[row, i]


@compiled(error_model="numpy", fastmath=SUMS, pipeline_class=Distinct)
def _backward(
    grad_out: NDArray[Any],
    mask: NDArray[Any],
    normed: NDArray[Any],
    rstd: NDArray[Any],
    grad: NDArray[Any],
) -> None:
    n = grad.shape[1]
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


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, mask: Tensor, eps: float) -> Tensor:
        a = a.contiguous()
        normed, out, rstd = torch.empty_like(a), torch.empty_like(a), a.new_empty(len(a))
        _forward(*(t.numpy() for t in (a, mask)), eps, *(t.numpy() for t in (normed, rstd, out)))
        ctx.save_for_backward(mask, normed, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grad_out.contiguous()
        grad = torch.empty_like(grad_out)
        saved = (t.numpy() for t in ctx.saved_tensors)
        _backward(grad_out.numpy(), *saved, grad.numpy())
        return grad, None, None


def norm_relu(a: Tensor, mask: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Return relu(layer_norm(a)) * mask.

    Parameters
    ----------
    a : Tensor[..., n]
        Normalised over the last dimension, to mean 0 and variance 1.
    mask : Tensor like `a`, optional
        What dropout multiplies by; None where nothing is dropped.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor like `a`
        Differentiable with respect to `a`.
    """
    if mask is None or a.ndim != 2 or a.device.type != "cpu" or a.dtype != torch.float32:
        out = functional.relu(functional.layer_norm(a, a.shape[-1:], eps=eps))
        return out if mask is None else out * mask
    return _NormRelu.apply(a, mask, eps)
