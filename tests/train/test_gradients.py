from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rayvaec.train import gradients
from rayvaec.train.gradients import GradientSum, _new_file
from rayvaec.train.ranks import Ranks

RANK = """
import sys
import torch, torch.distributed as dist
from pathlib import Path
from rayvaec.train import gradients
from rayvaec.train.gradients import GradientSum
from rayvaec.train.ranks import Ranks

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=3)
module = torch.nn.Linear(5, 3)
module.unused = torch.nn.Parameter(torch.ones(2))
shared = GradientSum(module, Ranks(rank, 3))
gradients.SHARED = Path(folder) / "not there"
sockets = GradientSum(module, Ranks(rank, 3))
assert shared.in_shared_memory and not sockets.in_shared_memory
for add in (shared, sockets, shared, shared):
    for step in range(20):
        module.weight.grad = torch.full((3, 5), float(rank + step))
        module.bias.grad = torch.full((3,), -1.0) if rank else None  # a worker without cells
        module.unused.grad = None
        weight, bias, unused = (gradient.clone() for gradient in add())
        assert (weight == 3 + 3 * step).all() and (bias == -2).all() and (unused == 0).all()
        assert (module.weight.grad == weight).all() and (module.bias.grad == bias).all()
        module.weight.grad.mul_(0)  # as clipping does: the others must not see it
dist.barrier()
dist.destroy_process_group()
"""


def test_workers_add_up_in_shared_memory_and_over_sockets(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], "".join(errors)


def test_one_worker_keeps_its_gradients() -> None:
    module = nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    before = module.weight.grad
    assert GradientSum(module, Ranks())()[0] is before


def test_no_file_is_left_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "SHARED", tmp_path)
    path = _new_file(100)
    assert path is not None
    assert path.stat().st_size == 100
    path.unlink()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert _new_file(100) is None
    assert list(tmp_path.iterdir()) == []
