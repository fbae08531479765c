"""Inputs and gradients of the fused loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rayvaec.kernels.counts import CsrCounts

RATE_FLOOR = 1e-30
"""Smallest total count (softplus form) or mean (softmax form) at a count above zero."""

CHUNK_ENTRIES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Cells x genes that are worked on at a time, by device: 32 MiB and 1 GiB of float32."""


class Inputs(NamedTuple):
    """Arguments of the loss; see `nb_loss.nb_reconstruction`.

    Parameters
    ----------
    h : Tensor[n_cells, n_hidden]
    weight : Tensor[n_genes, n_hidden]
    bias, px_r : Tensor[n_genes]
    library, factor : Tensor[n_cells]
    x : CsrCounts
    generative : {"softplus", "softmax"}
    """

    h: Tensor
    weight: Tensor
    bias: Tensor
    px_r: Tensor
    library: Tensor
    x: CsrCounts
    factor: Tensor
    generative: str


class Gradients(NamedTuple):
    """Gradients of the weighted sum, in the order of `Inputs`.

    Parameters
    ----------
    h : Tensor[n_cells, n_hidden]
    weight : Tensor[n_genes, n_hidden]
    bias, px_r : Tensor[n_genes]
    """

    h: Tensor
    weight: Tensor
    bias: Tensor
    px_r: Tensor


def with_row_bias(
    h: Tensor, weight: Tensor, row_bias: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return h and weight with the biases in them that `nb_reconstruction` takes by kind.

    Parameters
    ----------
    h, weight, row_bias
        As there.

    Returns
    -------
    h : Tensor[n_cells, n_hidden + n_kinds]
    weight : Tensor[n_genes, n_hidden + n_kinds]
    """
    if row_bias is None:
        return h, weight
    # A bias chosen by kind is the weight of the kind's one-hot code.
    table, kind = row_bias
    codes = functional.one_hot(kind, len(table)).to(h.dtype)
    return torch.cat((h, codes), 1), torch.cat((weight, table.t().to(weight.dtype)), 1)


def chunk_rows(x: CsrCounts) -> int:
    """Return how many cells are worked on at a time, at least one.

    Parameters
    ----------
    x : CsrCounts
        The minibatch; its device tells how much memory a chunk may take.

    Returns
    -------
    int
    """
    entries = CHUNK_ENTRIES.get(x.device.type, CHUNK_ENTRIES["cuda"])
    return max(1, min(x.n_cells, entries // max(1, x.n_genes)))
