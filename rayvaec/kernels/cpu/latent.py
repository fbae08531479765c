"""Fused encoder heads, reparameterised z and KL divergence as one autograd function.

A cell has a handful of latent dimensions: the twenty small operations that torch needs for them,
and as many on the way back, cost far more in being called than in their arithmetic. With hidden
layer h, noise e and a floor f (scvi-tools' ``var_eps``)::

    mean = M h + m                        z  = mean + sqrt(var) e
    var  = exp(V h + v) + f               KL = sum (mean^2 + var - 1 - log var) / 2
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayvaec.errors import ConfigError
from rayvaec.kernels.simd import Distinct
from rayvaec.util.numba_cache import compiled

_F = np.float32
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
# Sums in several lanes. What is not a number stays so: training looks for it.
_SUMS = {"contract", "nsz", "reassoc"}


class Heads(NamedTuple):
    """Linear layers from the encoder's last hidden layer to the posterior.

    Parameters
    ----------
    mean_weight, variance_weight : Tensor[n_latent, n_hidden]
    mean_bias, variance_bias : Tensor[n_latent]
    """

    mean_weight: Tensor
    mean_bias: Tensor
    variance_weight: Tensor
    variance_bias: Tensor


@compiled(error_model="numpy", fastmath=_SUMS, pipeline_class=Distinct)
def _forward(
    hidden: NDArray[Any],
    mean_weight: NDArray[Any],
    mean_bias: NDArray[Any],
    variance_weight: NDArray[Any],
    variance_bias: NDArray[Any],
    noise: NDArray[Any],
    floor: np.float32,
    mean: NDArray[Any],
    above: NDArray[Any],
    z: NDArray[Any],
    kl: NDArray[Any],
) -> None:
    """Set means, what variances have above the floor, z, and each cell's divergence."""
    n_hidden = hidden.shape[1]
    for row in range(len(hidden)):
        total = 0.0
        for k in range(mean.shape[1]):
            m, v = mean_bias[k], variance_bias[k]
            for i in range(n_hidden):
                m += hidden[row, i] * mean_weight[k, i]
                v += hidden[row, i] * variance_weight[k, i]
            e = _F(math.exp(v))
            variance = e + floor
            mean[row, k], above[row, k] = m, e
            z[row, k] = m + _F(math.sqrt(variance)) * noise[row, k]
            total += m * m + variance - _ONE - _F(math.log(variance))
        kl[row] = 0.5 * total


@compiled(error_model="numpy", fastmath=_SUMS, pipeline_class=Distinct)
def _backward(
    hidden: NDArray[Any],
    mean_weight: NDArray[Any],
    variance_weight: NDArray[Any],
    noise: NDArray[Any],
    floor: np.float32,
    mean: NDArray[Any],
    above: NDArray[Any],
    grad_z: NDArray[Any],
    grad_kl: NDArray[Any],
    grad_hidden: NDArray[Any],
    grad_mean_weight: NDArray[Any],
    grad_mean_bias: NDArray[Any],
    grad_variance_weight: NDArray[Any],
    grad_variance_bias: NDArray[Any],
) -> None:
    """Set the gradient of the hidden layer, and add those of the heads to zeros."""
    n_hidden = hidden.shape[1]
    for row in range(len(hidden)):
        for i in range(n_hidden):
            grad_hidden[row, i] = _F(0.0)
        for k in range(mean.shape[1]):
            variance = above[row, k] + floor
            m = grad_z[row, k] + grad_kl[row] * mean[row, k]
            v = grad_z[row, k] * noise[row, k] / _F(math.sqrt(variance))
            v += grad_kl[row] * (_ONE - _ONE / variance)
            v *= _HALF * above[row, k]
            grad_mean_bias[k] += m
            grad_variance_bias[k] += v
            for i in range(n_hidden):
                h = hidden[row, i]
                grad_hidden[row, i] += m * mean_weight[k, i] + v * variance_weight[k, i]
                grad_mean_weight[k, i] += m * h
                grad_variance_weight[k, i] += v * h


def draw_latent(
    hidden: Tensor, heads: Heads, noise: Tensor, factor: Tensor, *, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw z from the posterior of each cell, on the CPU in float32.

    Parameters
    ----------
    hidden : Tensor[n_cells, n_hidden]
        The encoder's last hidden layer.
    heads : Heads
        What makes mean and variance of it.
    noise : Tensor[n_cells, n_latent]
        Standard normal noise; no gradient flows to it.
    factor : Tensor[n_cells]
        Weight of each cell's divergence in the sum; no gradient flows to it.
    floor : float
        Added to the variance.

    Returns
    -------
    z : Tensor[n_cells, n_latent]
        Differentiable once with respect to `hidden` and `heads`, as the next.
    total : Tensor[]
        The weighted sum of the divergences from N(0, I).
    kl : Tensor[n_cells]
        Each cell's divergence, without gradient.

    Raises
    ------
    ConfigError
        If shapes contradict each other.
    """
    n_latent = len(heads.mean_bias)
    expected = ((n_latent, hidden.shape[1]), (n_latent,))
    shapes = [tuple(tensor.shape) for tensor in heads]
    cells = (tuple(noise.shape), tuple(factor.shape))
    if shapes != [*expected, *expected] or cells != ((len(hidden), n_latent), (len(hidden),)):
        raise ConfigError(
            f"heads of shapes {shapes}, noise and factor of {cells} for a hidden layer of "
            f"{tuple(hidden.shape)}",
            "pass one row of noise and one factor a cell, and heads as wide as the hidden layer",
        )
    return _DrawLatent.apply(hidden, *heads, noise, factor, np.float32(floor))


class _DrawLatent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *heads, noise, factor, floor = arguments
        inputs = [_values(tensor) for tensor in (hidden, *heads, noise)]
        mean, above, z = np.empty((3, *noise.shape), _F)
        kl = np.empty(len(noise), _F)
        _forward(*inputs, floor, mean, above, z, kl)
        mean_weight, _, variance_weight, _ = heads
        ctx.save_for_backward(hidden, mean_weight, variance_weight, noise, factor)
        ctx.kept = floor, mean, above
        cells = torch.from_numpy(kl)
        ctx.mark_non_differentiable(cells)
        return torch.from_numpy(z), factor.detach() @ cells, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, mean_weight, variance_weight, noise, factor = map(_values, ctx.saved_tensors)
        n_latent = len(mean_weight)
        grads = [np.empty_like(hidden)]
        for _head in range(2):
            grads += [np.zeros_like(mean_weight), np.zeros(n_latent, _F)]
        inputs = hidden, mean_weight, variance_weight, noise
        grad_kl = factor * _F(scale.item())
        _backward(*inputs, *ctx.kept, grad_z.contiguous().numpy(), grad_kl, *grads)
        return *(torch.from_numpy(grad) for grad in grads), None, None, None


def _values(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().contiguous().numpy()
