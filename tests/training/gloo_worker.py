"""Run as a script: one rank of trainings over gloo, without Ray; each is a line of its input.

It answers each with a line: "done", or the error that rayvaec raised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Its functions have the process group that there is at their import as a default. Imported later,
# as by Adam, they keep it when it is destroyed: gloo's threads then run into the interpreter's end,
# which aborts the process where one of them still holds a tensor. Ray's workers have no such end.
import torch.distributed.nn

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.errors import RayvaecError
from rayvaec.training import loop as loop_module
from rayvaec.training.backends.cuda import DeviceSteps
from rayvaec.training.checkpoint import newest_checkpoint
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.loop import Task, TrainLoop


class FolderSink:
    """Checkpoints in a folder; `dies_at` is the name of the one after which the worker dies."""

    def __init__(self, folder: Path, dies_at: str = "") -> None:
        self.folder, self.dies_at = folder, dies_at
        self.names: list[str] = []

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield newest_checkpoint(self.folder)

    def busy(self) -> bool:
        return False

    def put(self, folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
        self.names.append(name)
        if folder is not None:
            shutil.copytree(folder, self.folder / name)
            shutil.rmtree(folder)
        if name == self.dies_at:
            raise InterruptedError(name)


@contextmanager
def device_steps() -> Iterator[None]:
    """Have steps taken as on a GPU: in float64, for which CPUs have torch's operations."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop_module, "HostSteps", DeviceSteps)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def poison(steps: Any, at: int) -> None:
    """Make the loss of a step, and so its gradient, not finite."""
    take = steps.take

    def take_poisoned(minibatch: Minibatch, prepared: Any) -> None:
        if minibatch.step == at and isinstance(steps, DeviceSteps):
            prepared.layout.rows(prepared.there).rates[1] = math.nan
        elif minibatch.step == at:
            prepared = prepared._replace(kl_weight=math.nan)
        take(minibatch, prepared)

    steps.take = take_poisoned


def outgrow(steps: Any, at: int) -> None:
    """Have a minibatch need more rows and entries than there is room for."""
    prepare = steps.prepare

    def prepare_outgrown(minibatch: Minibatch, step: int) -> Any:
        if minibatch.step == at:
            layout = steps._staging._layout
            more = {"n_rows": layout.n_rows + 7, "n_entries": 2 * layout.n_entries}
            steps._staging._layout = dataclasses.replace(layout, **more)
        return prepare(minibatch, step)

    steps.prepare = prepare_outgrown


def train_rank(
    rank: int,
    world_size: int,
    store: str,
    run: str,
    settings: dict[str, Any],
    dies_at: str = "",
    on_device: bool = False,
    poisoned: dict[str, int] | None = None,
    outgrown: dict[str, int] | None = None,
) -> str:
    """Train as one rank.

    `poisoned` and `outgrown` say by the number of a rank in which of its steps that happens.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{run}/sync",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),  # a rank that waits for another in vain then fails
    )
    config = TrainConfig.from_json(settings)
    sink = FolderSink(Path(run) / "checkpoints", dies_at)
    said = "done"
    with device_steps() if on_device else nullcontext():
        loop = TrainLoop(Task(Path(store), Path(run), config), Ranks(rank, world_size), sink)
        for change, steps in ((poison, poisoned), (outgrow, outgrown)):
            if steps and str(rank) in steps:
                change(loop.steps, steps[str(rank)])
        try:
            loop.run()
        except InterruptedError:
            pass
        except RayvaecError as error:
            said = str(error)
        del loop
    dist.barrier()
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None, "gloo's threads go on"
    return said


if __name__ == "__main__":
    for line in sys.stdin:
        print(train_rank(**json.loads(line)), flush=True)
