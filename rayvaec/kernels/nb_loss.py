"""Decoder output layer fused with the negative-binomial loss: dispatch and reference.

Counts are 90 to 97 % zeros. In the softplus form (r = library * softplus(a), l = px_r) ::

    log p(x) = [lgamma(x+r) - lgamma(r) - lgamma(x+1)] + x * logsigmoid(l) - r * softplus(l)

the bracket and the x term vanish where x = 0, and the last term is linear in r. In the softmax form
(mu = library * softmax(a), theta = exp(px_r)) a zero contributes -theta * log1p(mu/theta). So the
loss is a dense part without any lgamma and a sum over the non-zeros; where counts are small
integers that sum needs no lgamma either: the bracket is log of prod_{k<x} (r+k)/(1+k), and its
derivative sum_{k<x} 1/(r+k).

Three versions compute it. `reference` is dense, obvious and differentiated by torch. The other two
work through the cells in chunks and compute the gradients on the way forward, so that
no array of n_cells x n_genes ever exists: `cpu` (nb_loss_cpu: torch products, numba for the rest,
float32) and `cuda` (nb_loss_torch: plain torch, any device, any dtype).

Rates below `RATE_FLOOR` count as `RATE_FLOOR` at the non-zeros, where log(0) would stand otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu import nb_loss as nb_loss_cpu
from rayvaec.kernels.gpu import nb_loss as nb_loss_torch
from rayvaec.kernels.nb_loss_types import RATE_FLOOR, Gradients, Inputs, with_row_bias

__all__ = ["RATE_FLOOR", "VERSIONS", "nb_reconstruction"]

VERSIONS = ("reference", "cpu", "cuda")

_FUSED: dict[str, Callable[[Inputs, bool], tuple[Tensor, Gradients | None]]] = {
    "cpu": nb_loss_cpu.evaluate,
    "cuda": nb_loss_torch.evaluate,
}


def nb_reconstruction(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    px_r: Tensor,
    library: Tensor,
    x: CsrCounts,
    cell_factor: Tensor,
    *,
    generative: str = "softplus",
    row_bias: tuple[Tensor, Tensor] | None = None,
    version: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted reconstruction loss of a minibatch, and each cell's.

    Parameters
    ----------
    h : Tensor[n_cells, n_hidden]
        The decoder's last hidden layer.
    weight, bias : Tensor[n_genes, n_hidden], Tensor[n_genes]
        Its output product: a = h @ weight.T + bias.
    px_r : Tensor[n_genes]
        Logits (softplus form) or log theta (softmax form).
    library : Tensor[n_cells, 1] or Tensor[n_cells]
        What px_scale is multiplied with; no gradient flows to it.
    x : CsrCounts
        Raw counts of n_cells x n_genes.
    cell_factor : Tensor[n_cells]
        Weight of every cell in the sum; no gradient flows to it.
    generative : {"softplus", "softmax"}
        Form of the model.
    row_bias : (Tensor[n_kinds, n_genes], int64 Tensor[n_cells]), optional
        Further biases, and which of them is added to each cell's a (the softmax form's
        per_ct_bias, by label). The table gets gradients.
    version : {"reference", "cpu", "cuda"}, optional
        By default the fastest that fits device and dtype.

    Returns
    -------
    total : Tensor[]
        sum_c cell_factor[c] * reconstruction[c], differentiable once with respect to h, weight,
        bias, px_r and the table of row biases.
    reconstruction : Tensor[n_cells]
        Negative log-likelihood of each cell, without gradient.

    Raises
    ------
    ConfigError
        If a shape, `generative` or `version` does not fit.
    CountsError
        If `x` holds a negative count or a gene beyond n_genes.
    """
    h, weight = with_row_bias(h, weight, row_bias)
    inputs = Inputs(
        h, weight, bias, px_r, library.reshape(-1), x, cell_factor.reshape(-1), generative
    )
    _check_shapes(inputs)
    return _evaluated(inputs, version or _fastest(h))


def _evaluated(inputs: Inputs, version: str) -> tuple[Tensor, Tensor]:
    if version not in VERSIONS:
        raise ConfigError(f"version is {version!r}", f"choose one of {', '.join(VERSIONS)}")
    if version == "reference":
        reconstruction = _reference(inputs)
        return (inputs.factor.detach() * reconstruction).sum(), reconstruction.detach()
    evaluate = _FUSED[version]
    leaves = inputs.h, inputs.weight, inputs.bias, inputs.px_r
    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
        reconstruction, _ = evaluate(inputs, False)
        return inputs.factor @ reconstruction, reconstruction
    return _Fused.apply(*leaves, inputs, evaluate)


def _fastest(h: Tensor) -> str:
    return "cpu" if h.device.type == "cpu" and h.dtype == torch.float32 else "cuda"


def _check_shapes(inputs: Inputs) -> None:
    n_cells, n_genes = inputs.x.n_cells, inputs.x.n_genes
    expected = {
        "h": (n_cells, inputs.weight.shape[-1]),
        "weight": (n_genes, inputs.weight.shape[-1]),
        "bias": (n_genes,),
        "px_r": (n_genes,),
        "library": (n_cells,),
        "factor": (n_cells,),
    }
    for name, shape in expected.items():
        found = tuple(getattr(inputs, name).shape)
        if found != shape:
            raise ConfigError(
                f"{name} has shape {found} for counts of {n_cells} cells x {n_genes} genes",
                f"pass shape {shape}",
            )
    if inputs.generative not in ("softplus", "softmax"):
        raise ConfigError(f"generative is {inputs.generative!r}", "choose softplus or softmax")


def _reference(inputs: Inputs) -> Tensor:
    """Negative log-likelihood of each cell, Tensor[n_cells], dense and term by term."""
    a = functional.linear(inputs.h, inputs.weight, inputs.bias)
    counts = inputs.x.to_dense(a.dtype)
    library = inputs.library[:, None].detach()
    px_r = inputs.px_r
    if inputs.generative == "softplus":
        r = (library * functional.softplus(a)).clamp_min(RATE_FLOOR)
        rest = counts * functional.logsigmoid(px_r) - r * functional.softplus(px_r)
    else:
        r = torch.exp(px_r)
        mu = (library * torch.softmax(a, 1)).clamp_min(RATE_FLOOR)
        log_sum = torch.log(r + mu)
        rest = r * (px_r - log_sum) + counts * (torch.log(mu) - log_sum)
    bracket = torch.lgamma(counts + r) - torch.lgamma(r) - torch.lgamma(counts + 1)
    return -(bracket + rest).sum(1)


class _Fused(torch.autograd.Function):
    """Gradients are computed on the way forward; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        px_r: Tensor,
        inputs: Inputs,
        evaluate: Callable[[Inputs, bool], tuple[Tensor, Gradients | None]],
    ) -> tuple[Tensor, Tensor]:
        reconstruction, gradients = evaluate(inputs, True)
        # The inputs as well: backward refuses those that were changed in place meanwhile.
        ctx.save_for_backward(h, weight, bias, px_r, *(gradients or ()))
        ctx.mark_non_differentiable(reconstruction)
        return inputs.factor @ reconstruction, reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        *_, h, weight, bias, px_r = ctx.saved_tensors
        # A loss is nearly always differentiated as it is; on a GPU looking would cost a wait.
        as_it_is = scale.device.type == "cpu" and scale == 1
        grads = [
            (saved if as_it_is else saved * scale) if need else None
            for saved, need in zip((h, weight, bias, px_r), needed, strict=False)
        ]
        return (*grads, None, None)
