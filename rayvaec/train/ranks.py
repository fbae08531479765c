"""The workers of a run as one of them sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """A worker's place among all, and what they tell each other.

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
        dist.all_reduce(total)
        return total.tolist()

    def decision(self, wanted: bool) -> bool:
        """Return what the first worker wants; every worker must ask."""
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
