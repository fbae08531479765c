"""Fused negative-binomial loss on the CPU: torch matrix products, numba in between."""

from __future__ import annotations

import torch
from torch import Tensor

from rayvaec.errors import ConfigError
from rayvaec.kernels.cpu import nb_loss_softmax, nb_loss_softplus
from rayvaec.kernels.nb_loss_types import Gradients, Inputs
from rayvaec.kernels.threads import single_threaded_torch


def evaluate(inputs: Inputs, want_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Compute the loss of every cell and, if wanted, the gradients of the weighted sum.

    Parameters
    ----------
    inputs : Inputs
        On the CPU, in float32.
    want_gradients : bool
        Whether to compute gradients.

    Returns
    -------
    reconstruction : Tensor[n_cells]
        Negative log-likelihood of each cell.
    gradients : Gradients or None
        Equal, bit for bit, in every call with the same inputs, whatever the number of threads.

    Raises
    ------
    ConfigError
        If the inputs are on another device or of another dtype.
    CountsError
        If a count is negative or a gene beyond n_genes.
    """
    for name, tensor in zip(("h", "weight", "bias", "px_r"), inputs[:4], strict=True):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {tensor.dtype} on {tensor.device}",
                "the cpu version takes float32 on the CPU; choose version cuda or reference",
            )
    form = nb_loss_softplus if inputs.generative == "softplus" else nb_loss_softmax
    with torch.no_grad(), single_threaded_torch():
        return form.evaluate(inputs, want_gradients)
