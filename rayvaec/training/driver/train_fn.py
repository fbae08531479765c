"""Training function that Ray Train runs in every worker."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from rayvaec.data.store.open import open_store
from rayvaec.errors import RayvaecError
from rayvaec.training.checkpoint import newest_checkpoint, store_checkpoint
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.driver.storage_retry import is_outage, retry_io
from rayvaec.training.loop import Task, TrainLoop
from rayvaec.training.records import append_attempt
from rayvaec.training.run_dir import CHECKPOINTS, sweep
from rayvaec.util.atomic import remove
from rayvaec.util.location import Location, location


class RaySink:
    """Checkpoints through Ray Train, uploaded in the background.

    Parameters
    ----------
    checkpoints : Path
        Where they go to: the folder that Ray was told to keep them in.
    ranks : Ranks
        This worker and the others, which must go on from the same one.
    """

    def __init__(self, checkpoints: Path, ranks: Ranks) -> None:
        self._checkpoints, self._ranks = checkpoints, ranks
        self._sent: str | None = None

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """Give the newest whole checkpoint, as the first worker sees it.

        Ray's own latest may be older: it does not know of one whose worker was lost between
        writing and telling.
        """
        newest = None
        if self._ranks.is_first:
            what = f"the checkpoints {self._checkpoints}"
            newest = retry_io(what, lambda: newest_checkpoint(self._checkpoints), self._checkpoints)
        yield self._ranks.gather(newest)[0]

    def busy(self) -> bool:
        """Return whether Ray is still uploading what this worker sent."""
        if self._sent is None:
            return False
        arrived = ray.train.get_checkpoint()
        return arrived is None or Path(arrived.path).name != self._sent

    def put(self, folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
        """Report to Ray; it has the folder copied to the run and removes it."""
        self._sent = name
        ray.train.report(
            metrics,
            checkpoint=None if folder is None else Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Copy a checkpoint to its place: unlike Ray itself, whole or not at all."""
        folder = Path(checkpoint.path)
        try:
            return Checkpoint.from_directory(store_checkpoint(folder, self._checkpoints, name))
        except RayvaecError:
            remove(folder)
            raise


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train as one of several workers.

    Parameters
    ----------
    arguments : dict
        ``store`` (its description), ``location`` (where it lies) and ``run`` as texts, and
        ``config`` as JSON values: Ray's controller unpickles them too, and need not import what
        classes of ours would.

    Returns
    -------
    dict
        As `TrainLoop.run`.

    Raises
    ------
    RayvaecError
        As `TrainLoop.run`.
    OSError
        If the store can no longer be read: Ray starts the workers again, and they wait for it.
    """
    config = TrainConfig.from_json(arguments["config"])
    task = Task(location(arguments["store"]), Path(arguments["run"]), config)
    lies = location(arguments["location"])
    use_given_cpus()
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Products of float32 with TF32's mantissa: as good an ELBO (docs/training.md), sooner.
        torch.set_float32_matmul_precision("high")
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    sink = RaySink(task.run / CHECKPOINTS, ranks)
    _wait_for_store(task.store, lies)
    if ranks.is_first:
        retry_io(f"{task.run}", lambda: sweep(task.run), task.run)
    try:
        loop = TrainLoop(task, ranks, sink)
        if ranks.is_first:
            append_attempt(task.run, loop.state.step, ranks.world_size)
        return loop.run()
    except RayvaecError as error:
        if is_outage(error, lies):
            raise ConnectionError(str(error)) from error
        raise


def _wait_for_store(store: Location, lies: Location) -> None:
    """Return when a store that was there before can be read, or raise what is wrong with it.

    Parameters
    ----------
    store : Path or Url
        What it is opened by: its description in the run folder, or itself.
    lies : Path or Url
        Where it lies.
    """
    folders = [lies, store.parent] if isinstance(store, Path) else [lies]

    def look() -> None:
        try:
            open_store(store)
        except RayvaecError as error:
            if any(is_outage(error, folder) for folder in folders):
                raise OSError(errno.EIO, str(error)) from error
            raise

    retry_io(f"the store {lies}", look)


def use_given_cpus() -> None:
    """Compute with as many threads as this worker was given CPUs.

    Ray sets OMP_NUM_THREADS=1 for actors that do not say how many CPUs they need, and torch would
    otherwise take every core of a machine that several workers share.
    """
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(int(cpus), 1))
