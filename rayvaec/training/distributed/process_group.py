"""Process group: the collectives of a run as one worker sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """A worker's place among all, and the process group's collectives.

    A collective returns when every worker has called it, and the workers must call the same ones in
    the same order: one that waits in `sums` while another waits in `gather` waits for ever. So
    whether a collective is called may depend only on what all workers have alike: the
    configuration, the number of the step, and what a collective has returned. A worker that alone
    meets an error raises it and leaves without a further collective; its driver ends the others.

    With one worker nothing is sent, and no process group needs to exist.

    Parameters
    ----------
    rank : int
        Number of this worker, from 0.
    world_size : int
        Number of workers.
    device : torch.device
        Where this worker computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this worker writes for all."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Return the sums of values over all workers, the same bits on each."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_in_place(total)
        return total.tolist()

    def any(self, happened: bool) -> bool:
        """Return whether something has happened on any worker."""
        return self.sums(float(happened))[0] > 0

    def decision(self, wanted: bool) -> bool:
        """Return what the first worker wants."""
        if self.world_size == 1:
            return wanted
        flag = torch.tensor([wanted], dtype=torch.uint8, device=self.device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first worker."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def sum_in_place(self, numbers: Tensor) -> None:
        """Replace a tensor by its sum over all workers, on the stream at hand."""
        if self.world_size > 1:
            dist.all_reduce(numbers)

    def exchange(self, numbers: Tensor) -> Tensor:
        """Send every worker its part of Tensor[n], and return the parts that this one was sent.

        `n` is a multiple of `world_size`; row r of the result, Tensor[world_size, n / world_size],
        is from worker r.
        """
        rows = torch.empty_like(numbers)
        dist.all_to_all_single(rows, numbers)
        return rows.view(self.world_size, -1)

    def join(self, part: Tensor, joined: Tensor) -> None:
        """Write the parts of all workers, Tensor[n / world_size] each, to Tensor[n]."""
        dist.all_gather(list(joined.chunk(self.world_size)), part)

    def wait(self) -> None:
        """Return when every worker has called; raise RuntimeError when one has died."""
        if self.world_size > 1:
            dist.barrier()
