"""What workers send each other: start values once, and the sum of their gradients every step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayvaec.train.ranks import Ranks


def share_parameters(module: nn.Module, ranks: Ranks) -> None:
    """Give every worker the first one's parameters.

    They are the same already, but for the rounding of other processors.

    Parameters
    ----------
    module : Module
        Is changed in place, on all workers but the first.
    ranks : Ranks
        The workers; every one of them must call.
    """
    if ranks.world_size > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)


def sum_gradients(module: nn.Module, ranks: Ranks) -> list[Tensor]:
    """Add up every parameter's gradient over the workers.

    All gradients go as one message. DistributedDataParallel sends them in buckets, while the rest
    is computed: on workers with one core each, sending then takes from computing what it hides,
    and every bucket is one more message to wait for.

    Parameters
    ----------
    module : Module
        Its gradients are replaced by their sums, the same bits on every worker.
    ranks : Ranks
        The workers; every one of them must call.

    Returns
    -------
    list of Tensor
        The gradients, in the order of the parameters.
    """
    parameters = list(module.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if ranks.world_size > 1:
        joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(joined)
        parts = joined.split([gradient.numel() for gradient in gradients])
        gradients = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return gradients
