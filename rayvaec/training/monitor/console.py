"""Console output of a run: one line an epoch, and a summary."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from rayvaec.training.config import TrainConfig, read_config
from rayvaec.training.export import BEST, LAST
from rayvaec.training.monitor.trackers import Mirror, trackers_for
from rayvaec.training.records import (
    RecordTail,
    read_attempts,
    read_epochs,
    read_progress,
    read_worker_failures,
)
from rayvaec.training.run_dir import read_run
from rayvaec.training.worker_range import workers_text
from rayvaec.util.progress import Progress

logger = logging.getLogger("rayvaec")
POLL_SECONDS = 0.5
MOST_STARTS = 5
"""Starts of workers that the description of a run tells of, at most."""


def epoch_line(record: dict[str, Any], max_epochs: int | None) -> str:
    """Say in one line what an epoch brought.

    Parameters
    ----------
    record : dict
        A record of metrics.jsonl that closes an epoch.
    max_epochs : int, optional
        Epochs that the run takes at most.

    Returns
    -------
    str
    """
    elbo = "" if record["val_elbo"] is None else f", validation ELBO {record['val_elbo']:.2f}"
    best = " (best)" if record["best"] else ""
    return (
        f"epoch {record['epoch']} of {max_epochs}: train loss {record['train_loss']:.2f}"
        f"{elbo}{best}, {record['cells_per_second']:,.0f} cells/s, {record['time']:.1f} s"
    )


class Follower:
    """Show how far a run is, from the files that its first worker writes.

    Parameters
    ----------
    run : Path
        The run folder, seen from here and from the worker.
    config : TrainConfig
        The run's configuration.
    n_train : int
        Cells of an epoch.

    Attributes
    ----------
    started_at : float or None
        When the first step was seen to begin, on the clock of `time.monotonic`.
    """

    def __init__(self, run: Path, config: TrainConfig, n_train: int) -> None:
        self._run, self._config, self._n_train = run, config, n_train
        self._epoch, self._attempts = len(read_epochs(run)), len(read_attempts(run))
        self._losses = len(read_worker_failures(run))
        self._first_attempt, self._tail, self._note = self._attempts, RecordTail(run), ""
        self._cells = self._epoch * n_train
        self._progress: Progress | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rayvaec-follow", daemon=True)
        self._mirrors = [Mirror(run, tracker) for tracker in trackers_for(run, config)]
        self._open = ExitStack()
        self.started_at: float | None = None

    def __enter__(self) -> Self:
        config = self._config
        logger.info("starting %s", workers_text(config.fewest_workers, config.num_workers))
        self._thread.start()
        for mirror in self._mirrors:
            self._open.enter_context(mirror)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        if self._progress is not None:
            self._progress.__exit__(*exc_info)
        self._open.close()

    def _follow(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            self._try_to_look()
        self._try_to_look()

    def _try_to_look(self) -> None:
        with suppress(OSError):  # storage that is away: the workers say so if it stays away
            self._look()

    def _look(self) -> None:
        within = read_progress(self._run)
        if within is None:
            return
        if self._progress is None:
            # Only now: speed and time left are not to count the start of Ray and the workers.
            self.started_at = time.monotonic()
            left = max((self._config.max_epochs or 0) * self._n_train - within["cells"], 0)
            self._progress, self._cells = Progress(left, "cells", "training"), within["cells"]
        self._show_attempts()
        self._show_epochs()
        cells = max(self._epoch * self._n_train, within["cells"])
        if cells > self._cells:
            self._progress.advance(cells - self._cells, self._note)
            self._cells = cells

    def _show_attempts(self) -> None:
        """Log that workers were lost, that they have started again, and from where."""
        losses = read_worker_failures(self._run)
        for loss in losses[self._losses :]:
            logger.warning("%s: starting the workers again", loss)
        self._losses = max(self._losses, len(losses))
        attempts = read_attempts(self._run)
        for attempt in attempts[max(self._attempts, self._first_attempt + 1) :]:
            workers = workers_text(attempt["num_workers"], attempt["num_workers"])
            logger.info("went on from step %d with %s", attempt["step"], workers)
        self._attempts = max(self._attempts, len(attempts))

    def _show_epochs(self) -> None:
        """Log the epochs that have been finished since the last look."""
        # A run that lost a worker goes back a little; nothing is shown until it is as far again.
        for record in self._tail.read():
            if "val_elbo" not in record:
                continue
            if record["epoch"] > self._epoch:
                self._epoch = record["epoch"]
                logger.info("%s", epoch_line(record, self._config.max_epochs))
            if record["val_elbo"] is not None:
                self._note = f"epoch {record['epoch']}, ELBO {record['val_elbo']:.2f}"


def describe_run(path: Path) -> str:
    """Describe a run: what was trained, how it went, where the model is, what to do next.

    Parameters
    ----------
    path : Path
        A run folder.

    Returns
    -------
    str
        Several lines.

    Raises
    ------
    StoreError
        If the folder is not a run's.
    """
    path = Path(path)
    info, config, epochs = read_run(path), read_config(path), read_epochs(path)
    status = "running, or killed" if info.status == "running" else info.status
    lines = [
        f"run         {path}",
        f"status      {status}, started {info.created}",
        f"store       {info.store} ({info.store_hash[:12]})",
        f"epochs      {len(epochs)} of {config.max_epochs}",
    ]
    if info.result is not None:
        lines.append(f"stopped     {stopped_text(info.result, config)}")
    if epochs:
        lines += _course(epochs)
    lines += _starts(read_attempts(path))
    lines += [
        f"network     {config.n_layers} x {config.n_hidden} hidden, {config.n_latent} latent",
        f"recipe      batch size {config.batch_size}, lr {config.peak_lr:g}, seed {config.seed}",
        *(f"{name:<11} {path / name}" for name in (BEST, LAST) if (path / name).is_dir()),
        *_next_commands(path, info.status, info.store),
    ]
    return "\n".join(lines)


def stopped_text(result: Mapping[str, Any], config: TrainConfig) -> str:
    """Say why a finished run went no further.

    Parameters
    ----------
    result : Mapping
        ``stopped``, ``epoch`` and ``best_epoch``, as `TrainLoop.run` returned them.
    config : TrainConfig
        The run's configuration.
    """
    if result["stopped"] == "max_epochs":
        return f"after max_epochs={result['epoch']}"
    waited = result["epoch"] - result["best_epoch"]
    return f"early: no better validation ELBO in {waited} epochs (patience={config.patience})"


def _course(epochs: list[dict[str, Any]]) -> list[str]:
    last = epochs[-1]
    first_loss, last_loss = epochs[0]["train_loss"], last["train_loss"]
    lines = [f"train loss  {first_loss:.2f} in epoch 1, {last_loss:.2f} in epoch {last['epoch']}"]
    judged = [record for record in epochs if record["val_elbo"] is not None]
    if judged:
        best = max(judged, key=lambda record: record["val_elbo"])
        lines.append(f"best ELBO   {best['val_elbo']:.2f} nats a cell, in epoch {best['epoch']}")
    workers = workers_text(last["num_workers"], last["num_workers"])
    speed = f"{last['cells_per_second']:,.0f} cells/s, {workers}"
    return [*lines, f"speed       {speed}, {last['time']:.1f} s in all"]


def _starts(attempts: list[dict[str, Any]]) -> list[str]:
    """Say how often workers had to start, and the last few times when and from where."""
    if len(attempts) < 2:
        return []
    shown = attempts[-MOST_STARTS:]
    lines = [f"starts      {len(attempts)}" + (", the last" if shown != attempts else "") + ":"]
    for attempt in shown:
        workers = workers_text(attempt["num_workers"], attempt["num_workers"])
        lines.append(f"            {attempt['started']} from step {attempt['step']}, {workers}")
        lines += [f"              after: {loss}" for loss in attempt["losses"]]
    return lines


def _next_commands(path: Path, status: str, store: str) -> list[str]:
    commands = []
    if status != "finished":
        commands.append(f"rayvaec train {store} --out {path} --resume")
    if (path / BEST).is_dir():
        commands.append(f"rayvaec sample {path / BEST} {store} --out OUT.zarr --n-samples 1")
        commands.append(f"rayvaec serve {path / BEST}")
    return [f"next        {command}" for command in commands]
