"""Driver of a run: checks, TorchTrainer, progress, final messages."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayvaec.cluster import check_job_paths, check_seen, ray_session, starts_ray
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.store.open import DESCRIPTION, Store, open_again, open_store, share
from rayvaec.errors import ConfigError, RayvaecError, StoreError
from rayvaec.training import run_dir as folder
from rayvaec.training.checkpoint import drop_old_checkpoints
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.scaling import check_resources
from rayvaec.training.driver.storage_retry import GO_ON, StorageLostError
from rayvaec.training.export import BEST, LAST, save_summaries
from rayvaec.training.monitor.console import Follower
from rayvaec.training.worker_range import workers_text
from rayvaec.util.atomic import check_suffix, remove
from rayvaec.util.location import Location, Url, location
from rayvaec.util.lock import WriteLock

logger = logging.getLogger("rayvaec")
CHECKPOINTS_KEPT = 2
_FINISHED = {
    "max_epochs": "the run %s is finished after %d epochs, the best was epoch %d: a larger "
    "--max-epochs goes on with it",
    "patience": "the run %s stopped early after %d epochs, the best was epoch %d: a larger "
    "--set patience=N goes on with it, 0 until max_epochs",
}
RAY_SETTINGS = {
    # How often the controller looks: checkpoints are taken over, and lost workers noticed, at
    # this pace.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


@dataclass(frozen=True)
class RunResult:
    """What a training came to.

    Parameters
    ----------
    run, model, last : Path
        The run folder, its best and its last model.
    epochs, best_epoch : int
        Finished epochs, and the best of them, from 1.
    best_elbo : float or None
        Its validation ELBO in nats a cell; None for a store without validation cells.
    stopped : str
        ``"max_epochs"`` or ``"patience"``.
    seconds : float
        Time spent on training, over all resumes.
    startup_seconds : float
        From the call to the first step: Ray, workers, imports; 0 where nothing was left to do.
    """

    run: Path
    model: Path
    last: Path
    epochs: int
    best_epoch: int
    best_elbo: float | None
    stopped: str
    seconds: float
    startup_seconds: float


def train(
    store: Path | str | Url,
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Train a model on a store.

    Joins the Ray that is connected or that RAY_ADDRESS names; starts a local one otherwise.

    Parameters
    ----------
    store : Path, str or Url
        The training store; a URL may be ``s3://``, ``gs://`` or ``https://``.
    out : Path or str
        The run folder.
    config : TrainConfig, optional
        How to train; by default the default recipe or, with `resume`, what the run was started
        with.
    labels_key, batch_key : str, optional
        The obs columns of labels and batches of an AnnData Zarr or annbatch collection that
        `prepare` did not write; a store has its own.
    layer : str, optional
        Its layer with the counts; X by default, ``"raw"`` for `AnnData.raw`.
    resume : bool
        Go on with the run in `out` from its last checkpoint.
    overwrite : bool
        Replace a run that stands in `out`.

    Returns
    -------
    RunResult

    Raises
    ------
    StoreError
        If the store cannot be trained on, `out` is in the way or another process writes it, or
        there is nothing to resume.
    ConfigError
        If the configuration contradicts the resumed run, or asks for more CPUs or GPUs than
        there are.
    RayvaecError
        If the training failed: a loss that is not finite, workers lost too often.
    """
    called = time.monotonic()
    where = location(store)
    check_job_paths([Path(out)], [where])
    out = Path(out).absolute()
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other", "give one of them")
    if not resume:
        check_suffix(out)
    with WriteLock(out):
        keys = (labels_key, batch_key, layer)
        summary, started_at = _train(where, out, config, keys, resume, overwrite)
    # Nothing was left to do where there was no first step.
    startup = 0.0 if started_at is None else started_at - called
    return _result(out, summary, startup_seconds=startup)


def _train(
    where: Location,
    out: Path,
    config: TrainConfig | None,
    keys: tuple[str | None, str | None, str | None],
    resume: bool,
    overwrite: bool,
) -> tuple[dict[str, Any], float | None]:
    """Train as `train` does, whose caller holds the run's lock; as `_fit_and_follow`."""
    if not resume:
        folder.check_new(out, overwrite)  # before a store is surveyed, which may take long
    opened = _open(where, out if resume else None, *keys)
    if resume:
        config = folder.check_resumable(out, opened, config)
    config = (config or TrainConfig()).resolved(opened.n_train)
    done = folder.finished(out, config) if resume else None
    if done is not None:
        logger.info(_FINISHED[done["stopped"]], out, done["epoch"], done["best_epoch"])
        return done, None
    if starts_ray():
        check_resources(config)  # now, not when Ray has been started
    with ray_session():
        summary, started_at = _run(opened, out, config, resume)
    with suppress(OSError):  # storage that goes away now takes nothing that is still needed
        drop_old_checkpoints(out / folder.CHECKPOINTS, CHECKPOINTS_KEPT)
    return summary, started_at


def _run(
    store: Store, out: Path, config: TrainConfig, resume: bool
) -> tuple[dict[str, Any], float]:
    """Begin a run, or begin it again, on the Ray that is connected; as `_fit_and_follow`."""
    cpus = check_resources(config)
    check_seen([store.path], [out])
    resume_from = None
    if resume:
        resume_from = folder.resume_run(out, config)
    else:
        folder.create_run(out, store, config)
    return _fit_and_follow(store, out, config, cpus, resume_from)


def _result(out: Path, summary: dict[str, Any], startup_seconds: float) -> RunResult:
    return RunResult(
        out,
        out / BEST,
        out / LAST,
        epochs=summary["epoch"],
        best_epoch=summary["best_epoch"],
        best_elbo=summary["best_elbo"],
        stopped=summary["stopped"],
        seconds=summary["seconds"],
        startup_seconds=startup_seconds,
    )


def _open(
    where: Location,
    resumed: Path | None,
    labels_key: str | None,
    batch_key: str | None,
    layer: str | None = None,
) -> Store:
    """Open a store, for a resumed run with the cells that it began with."""
    keys = None if labels_key is None else ObsKeys(labels_key, batch_key, layer)
    described = None if resumed is None else resumed / DESCRIPTION
    if described is not None and described.is_file():
        store = open_again(described, where, keys)
    else:
        store = open_store(where, keys)
    registry = store.registry
    read = None if store.manifest.partitions[0].files else store.manifest.sources[0]["layer"]
    for option, wanted, found in (
        ("--labels-key", labels_key, registry.labels_key),
        ("--batch-key", batch_key, registry.batch_key),
        ("--layer", layer, read),
    ):
        if wanted is not None and wanted != found:
            raise ConfigError(
                f"{option} is {wanted} and the store {store.path} was made with {found or 'none'}",
                f"leave out {option}, or prepare the store again",
            )
    if store.n_train < 1:
        raise StoreError(
            f"the store {store.path} has no training cells",
            "prepare it again with a smaller --val-fraction",
        )
    return store


def _fit_and_follow(
    store: Store, out: Path, config: TrainConfig, cpus: int, resume_from: Path | None
) -> tuple[dict[str, Any], float]:
    """Run the workers, show how far they are, note how the run ended.

    Returns what the workers returned, and when they took their first step.
    """
    try:
        with Follower(out, config, store.n_train) as follower:
            summary = _fit_through_outages(store, out, config, cpus, resume_from)
        save_summaries(out, store)
        folder.end_run(out, "finished", summary)
    except BaseException as error:
        _leave(out, error)
        raise
    return summary, follower.started_at or time.monotonic()


def _leave(out: Path, error: BaseException) -> None:
    """Note how a run ended that did not finish, as far as its storage lets us.

    A failed run without anything worth keeping is removed, and the error does not advise to resume.
    """
    interrupted = isinstance(error, KeyboardInterrupt)
    with suppress(OSError, StoreError):
        folder.note_end(out, "interrupted" if interrupted else "failed")
        if not interrupted and not folder.has_results(out):
            remove(out)
            if isinstance(error, RayvaecError):
                error.args = tuple(
                    part.replace(GO_ON, "start the run again") for part in error.args
                )


def _fit_through_outages(
    store: Store, out: Path, config: TrainConfig, cpus: int, resume_from: Path | None
) -> dict[str, Any]:
    """Run the workers; again if Ray's own controller could not write to the run.

    Workers wait for storage by themselves. The controller does not, and nothing but its end tells
    us; it has little to write, so that this is rare.
    """
    while True:
        try:
            return _fit(store, out, config, cpus)
        except StorageLostError as lost:
            newest = folder.resume_run(out, config)
            if newest is None or newest == resume_from:
                raise
            logger.warning("%s: going on from the last checkpoint", lost.detail)
            resume_from = newest


def _fit(store: Store, out: Path, config: TrainConfig, cpus: int) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    from rayvaec.training.driver.failures import (
        MaxFailuresCallback,
        PlacementTimeoutCallback,
        as_own_error,
    )
    from rayvaec.training.driver.interrupt import InterruptibleTrainer
    from rayvaec.training.driver.train_fn import train_worker

    fewest, most = config.fewest_workers, config.num_workers
    api: Any = ray.train  # Ray's annotations are those of Train V1
    trainer_class: Any = InterruptibleTrainer
    trainer = trainer_class(
        train_worker,
        train_loop_config={
            "store": share(store, out),
            "location": str(store.path),
            "run": str(out),
            "config": config.to_json(),
        },
        torch_config=api.torch.TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=(fewest, most) if fewest < most else most,
            elastic_resize_monitor_interval_s=config.resize_seconds,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=api.RunConfig(
            name=folder.CHECKPOINTS,
            storage_path=str(out),
            checkpoint_config=api.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            # Both limits are ours: Ray's count over the whole run, and have no end of waiting.
            failure_config=api.FailureConfig(max_failures=-1, controller_failure_limit=-1),
            callbacks=[
                MaxFailuresCallback(config.max_failures, out),
                PlacementTimeoutCallback(config.max_wait, workers_text(fewest, most)),
            ],
        ),
    )
    try:
        with _ray_settings(), _interruptible():
            result = trainer.fit()
    except api.TrainingFailedError as error:
        raise as_own_error(error) from error
    if result.return_value is None:
        raise RayvaecError(f"the training in {out} ended without a result", GO_ON)
    return dict(result.return_value)


@contextmanager
def _ray_settings() -> Iterator[None]:
    """Set what Ray Train reads from the environment, where the user has not, for a while."""
    added = {name: value for name, value in RAY_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a fit as it ends other work.

    Ray puts its own handler in place, which stops the workers, exits with code 0, and stays.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
