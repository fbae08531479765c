"""Broadcast of start values and all-reduce of gradients."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex

import torch
from torch import Tensor, nn

from rayvaec.training.distributed.barrier import BARRIER_WORDS, SharedBarrier
from rayvaec.training.distributed.process_group import Ranks


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
    ranks.spread(parameter.detach() for parameter in module.parameters())


class GradientSum:
    """Adds up every parameter's gradient over workers on CPUs.

    All gradients go as one message. DistributedDataParallel sends them in buckets, while the rest
    is computed: on workers with one core each, sending then takes from computing what it hides,
    and every bucket is one more message to wait for. Workers on one machine, on CPUs, add in
    memory that they share, which takes a third of the time that gloo's sockets do.
    Either way a worker adds up one part of the numbers, in the order of the workers: on CPUs the
    sum has the same bits wherever they are placed.

    Parameters
    ----------
    module : Module
        Whose gradients.
    ranks : Ranks
        The workers; every one of them must make one.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self._parameters, self._ranks = list(module.parameters()), ranks
        self._sizes = [parameter.numel() for parameter in self._parameters]
        n_numbers = sum(self._sizes)
        # Filled up with zeros, so that every worker's part is of the same size.
        self._filling = torch.zeros(-n_numbers % ranks.world_size)
        self._shared: _SharedMemory | None = None
        if ranks.world_size > 1:
            self._shared = _shared_memory(ranks, n_numbers + len(self._filling))

    @property
    def in_shared_memory(self) -> bool:
        """Whether the workers add in memory that they share."""
        return self._shared is not None

    def __call__(self) -> list[Tensor]:
        """Replace the gradients by their sums; every worker must call.

        Returns
        -------
        list of Tensor
            The gradients, in the order of the parameters, the same bits on every worker. They may
            lie in memory of all workers: see `own` for changing them.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        if self._ranks.world_size > 1:
            flat = [*(gradient.reshape(-1) for gradient in gradients), self._filling]
            shared = self._shared
            joined = self._sum_sent(flat) if shared is None else self._sum_shared(flat, shared)
            parts = joined.split([*self._sizes, len(self._filling)])
            pairs = zip(parts, self._parameters, strict=False)  # the last part is the filling
            gradients = [part.view_as(parameter) for part, parameter in pairs]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return gradients

    def own(self) -> None:
        """Give this worker gradients that it may change, of the same values."""
        if self._shared is not None:
            for parameter in self._parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def _sum_shared(self, flat: list[Tensor], shared: _SharedMemory) -> Tensor:
        """Write one's own row, add up one's part of all rows, give the whole.

        Nobody adds before all have written, or reads before all have added; and nobody adds the
        next time before all have come back with their next row, and so have read.
        """
        rows, rank = shared.rows, self._ranks.rank
        size = rows.shape[1] // self._ranks.world_size
        torch.cat(flat, out=rows[rank])
        shared.barrier()
        part = slice(rank * size, (rank + 1) * size)
        torch.sum(rows[:-1, part], 0, out=rows[-1, part])
        shared.barrier()
        return rows[-1]

    def _sum_sent(self, flat: list[Tensor]) -> Tensor:
        """Send every worker its part of one's numbers, add up one's own part, send that to all.

        A ring's all-reduce sends as many numbers, but adds them in an order of its own.
        """
        joined = torch.cat(flat)
        self._ranks.join(torch.sum(self._ranks.exchange(joined), 0), joined)
        return joined


@dataclass(frozen=True)
class _SharedMemory:
    """Rows of numbers, one for each worker and one for the sum; where the workers meet."""

    rows: Tensor
    barrier: SharedBarrier


def _shared_memory(ranks: Ranks, n_numbers: int) -> _SharedMemory | None:
    """Return memory of all workers for a sum of `n_numbers`, None where there is none.

    No file system holds the memory: it goes with its last worker, however that ends.
    """
    n_rows, head = ranks.world_size + 1, 2 * BARRIER_WORDS  # a word is as long as two numbers
    size = head + n_rows * n_numbers
    own = _new_memory(4 * size) if ranks.is_first else None
    where, name = ranks.gather(own and (f"/proc/{os.getpid()}/fd/{own[0]}", own[1]))[0] or ("", "")
    memory = None
    # On another host, or of a process that may not be looked into; torch's own error is of mmap.
    with suppress(OSError, RuntimeError):
        # Elsewhere the path may be another process's: the drawn name tells.
        if name and name in os.readlink(where):
            memory = torch.from_file(where, shared=True, size=size)
    opened = ranks.gather(memory is not None)
    if own is not None:
        os.close(own[0])
    if memory is None or not all(opened):
        return None
    barrier = SharedBarrier(memory[:head].view(torch.int64).numpy(), ranks)
    return _SharedMemory(memory[head:].view(n_rows, n_numbers), barrier)


def _new_memory(size: int) -> tuple[int, str] | None:
    """Return descriptor and name of anonymous memory of `size` bytes, None where there is none."""
    name = f"rayvaec-gradients-{token_hex(8)}"
    try:
        number = os.memfd_create(name)
    except (AttributeError, OSError):  # not on Linux, or not allowed
        return None
    try:
        os.posix_fallocate(number, 0, size)
    except OSError:  # no room, which would end the process at its first write
        os.close(number)
        return None
    return number, name
