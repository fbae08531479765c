"""Run as a script: one rank of trainings over gloo, without Ray; each is a line of its input."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the process group that there is at their import as a default. Imported later,
# as by Adam, they keep it when it is destroyed: gloo's threads then run into the interpreter's end,
# which aborts the process where one of them still holds a tensor. Ray's workers have no such end.
import torch.distributed.nn

from rayvaec.train.checkpoint import newest_checkpoint
from rayvaec.train.config import TrainConfig
from rayvaec.train.loop import Task, TrainLoop
from rayvaec.train.ranks import Ranks


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


def train_rank(
    rank: int, world_size: int, store: str, run: str, settings: dict[str, Any], dies_at: str = ""
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{run}/sync", rank=rank, world_size=world_size
    )
    config = TrainConfig.from_json(settings)
    sink = FolderSink(Path(run) / "checkpoints", dies_at)
    with suppress(InterruptedError):
        TrainLoop(Task(Path(store), Path(run), config), Ranks(rank, world_size), sink).run()
    dist.barrier()
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None, "gloo's threads go on"


if __name__ == "__main__":
    for line in sys.stdin:
        train_rank(**json.loads(line))
        print("done", flush=True)
