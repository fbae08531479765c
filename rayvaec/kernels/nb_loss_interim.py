"""Dense reconstruction loss, until the fused one stands beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayvaec.kernels.csr import CsrCounts


def nb_reconstruction(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    px_r: Tensor,
    library: Tensor,
    x: CsrCounts,
    cell_factor: Tensor,
    generative: str = "softplus",
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cells' losses, and each cell's loss without gradients."""
    a = functional.linear(h, weight, bias)
    counts = x.to_dense()
    if generative == "softplus":
        r, logits = (library * functional.softplus(a)).clamp_min(1e-12), px_r
    else:
        r = torch.exp(px_r)
        logits = torch.log((library * torch.softmax(a, 1)).clamp_min(1e-12)) - px_r
    log_prob = (
        torch.lgamma(counts + r)
        - torch.lgamma(r)
        - torch.lgamma(counts + 1)
        + counts * functional.logsigmoid(logits)
        - r * functional.softplus(logits)
    )
    reconstruction = -log_prob.sum(1)
    return (cell_factor * reconstruction).sum(), reconstruction.detach()
