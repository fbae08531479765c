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
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cells' losses, and each cell's loss without gradients."""
    r = (library * functional.softplus(functional.linear(h, weight, bias))).clamp_min(1e-12)
    counts = x.to_dense()
    log_prob = (
        torch.lgamma(counts + r)
        - torch.lgamma(r)
        - torch.lgamma(counts + 1)
        + counts * functional.logsigmoid(px_r)
        - r * functional.softplus(px_r)
    )
    reconstruction = -log_prob.sum(1)
    return (cell_factor * reconstruction).sum(), reconstruction.detach()
