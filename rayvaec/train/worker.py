"""The loop as Ray Train runs it: one call a worker process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from rayvaec.train.config import TrainConfig
from rayvaec.train.loop import Task, TrainLoop
from rayvaec.train.ranks import Ranks


class RaySink:
    """Checkpoints through Ray Train, uploaded in the background.

    Parameters
    ----------
    resume_from : Path, optional
        Checkpoint that the run goes on from until Ray knows one of its own: after a lost worker,
        Ray's latest is newer.
    """

    def __init__(self, resume_from: Path | None) -> None:
        self._resume_from = resume_from
        self._sent: str | None = None

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """Give Ray's latest checkpoint, or else the one to resume from."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield self._resume_from
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def busy(self) -> bool:
        """Return whether Ray is still uploading what this worker sent."""
        if self._sent is None:
            return False
        arrived = ray.train.get_checkpoint()
        return arrived is None or Path(arrived.path).name != self._sent

    def put(self, folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
        """Report to Ray; it copies the folder to the run and removes it."""
        self._sent = name
        ray.train.report(
            metrics,
            checkpoint=None if folder is None else Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train as one of several workers.

    Parameters
    ----------
    arguments : dict
        ``store``, ``run`` and ``resume_from`` (or None), as texts, and ``config``, as JSON values:
        Ray's controller unpickles them too, and need not import what classes of ours would.

    Returns
    -------
    dict
        As `TrainLoop.run`.

    Raises
    ------
    RayvaecError
        As `TrainLoop.run`.
    """
    config = TrainConfig.from_json(arguments["config"])
    task = Task(Path(arguments["store"]), Path(arguments["run"]), config)
    resume_from = arguments["resume_from"]
    use_given_cpus()
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    sink = RaySink(None if resume_from is None else Path(resume_from))
    return TrainLoop(task, ranks, sink).run()


def use_given_cpus() -> None:
    """Compute with as many threads as this worker was given CPUs.

    Ray sets OMP_NUM_THREADS=1 for actors that do not say how many CPUs they need, and torch would
    otherwise take every core of a machine that several workers share.
    """
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(int(cpus), 1))
