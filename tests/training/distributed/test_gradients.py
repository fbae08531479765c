from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rayvaec.training.distributed.gradients import GradientSum, _new_memory
from rayvaec.training.distributed.process_group import Ranks

RANK = """
import os, sys
import torch, torch.distributed as dist
from rayvaec.training.distributed.gradients import GradientSum
from rayvaec.training.distributed.process_group import Ranks

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=3)
module = torch.nn.Linear(5, 3)
module.unused = torch.nn.Parameter(torch.ones(2))
descriptors = len(os.listdir("/proc/self/fd"))
shared = GradientSum(module, Ranks(rank, 3))
assert len(os.listdir("/proc/self/fd")) == descriptors
if rank == 1:
    os.readlink = lambda path: "/dev/null"  # another host's process of that number
elsewhere = GradientSum(module, Ranks(rank, 3))
del os.memfd_create
without = GradientSum(module, Ranks(rank, 3))
assert shared.in_shared_memory
assert not elsewhere.in_shared_memory and not without.in_shared_memory
for step in range(20):
    sums = []
    for add in (shared, elsewhere, shared, shared):
        gradients = torch.randn(3, 20, generator=torch.Generator().manual_seed(step))
        gradients[0, 15:] = 0
        gradients[:, 18:] = 0
        module.weight.grad = gradients[rank, :15].view(3, 5).clone()
        module.bias.grad = gradients[rank, 15:18].clone() if rank else None  # without cells
        module.unused.grad = None
        result = torch.cat([gradient.flatten() for gradient in add()])
        assert torch.allclose(result, gradients.sum(0), atol=1e-6)
        sums.append(result.clone())
        assert (result == sums[0]).all(), "the same bits, wherever the workers are"
        assert (torch.cat([p.grad.flatten() for p in module.parameters()]) == result).all()
        results = [torch.empty_like(result) for _ in range(3)]
        dist.all_gather(results, result)
        assert all((other == result).all() for other in results)
        if rank == 0:
            add.own()
            assert (torch.cat([p.grad.flatten() for p in module.parameters()]) == result).all()
            module.weight.grad.mul_(0)  # as clipping does: the others must not see it
        dist.barrier()
        if rank > 0:
            assert (module.weight.grad.flatten() == result[:15]).all()
if rank == 2:
    os._exit(0)  # without a word
for add in (shared, without):
    try:
        add()
    except RuntimeError:
        continue
    raise AssertionError("a worker has died, and nobody says so")
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


def test_memory_is_given_up_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = _new_memory(100)
    assert memory is not None
    assert os.fstat(memory[0]).st_size == 100
    os.close(memory[0])

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = os.listdir("/proc/self/fd")
    assert _new_memory(100) is None
    assert os.listdir("/proc/self/fd") == before
