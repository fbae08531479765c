"""Training loop of one worker: steps, validation, records, checkpoints.

It knows nothing of Ray. Who the other workers are is told by a `Ranks`, where checkpoints go by a
`CheckpointSink`; one worker runs in any process as it is.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NoReturn, Protocol

import torch

from rayvaec.data.loading.loader import Loader
from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.data.store.open import open_store
from rayvaec.errors import RayvaecError
from rayvaec.model.vaec import VAEC
from rayvaec.training.backends.cpu import HostSteps, NotFiniteError, Steps
from rayvaec.training.backends.cuda import DeviceSteps
from rayvaec.training.backends.host_to_device import StepNumbers
from rayvaec.training.checkpoint import (
    RunState,
    checkpoint_name,
    read_checkpoint,
    write_checkpoint,
)
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.gradients import share_parameters
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.export import BEST, LAST, save_best, save_last
from rayvaec.training.objective import build_module
from rayvaec.training.records import append_record, cut_records, write_progress
from rayvaec.training.schedule import kl_weight, learning_rate
from rayvaec.training.validation import validation_elbo
from rayvaec.util.location import Location
from rayvaec.util.messages import join_names

CLOCK_STEPS = 16
"""Steps between two looks at the clock: the workers must agree, and that takes a message."""
EPOCH_CHECKPOINT_SECONDS = 5.0
"""An epoch's end is not worth a checkpoint this soon after the one before."""
PROGRESS_SECONDS = 1.0


class CheckpointSink(Protocol):
    """Where checkpoints come from and go to."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """Give the folder of the checkpoint to go on from, None to start anew."""

    def busy(self) -> bool:
        """Return whether the last checkpoint is still on its way; asked of the first worker."""

    def put(self, folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
        """Take a checkpoint's folder over, under a name; workers but the first give None."""


@dataclass(frozen=True)
class Task:
    """What a run is to do.

    Parameters
    ----------
    store : Path or Url
        The training store.
    run : Path
        The run folder; exists.
    config : TrainConfig
        How to train.
    """

    store: Location
    run: Path
    config: TrainConfig


class TrainLoop:
    """One worker of a run.

    Parameters
    ----------
    task : Task
        Store, run folder and configuration.
    ranks : Ranks
        This worker's place among all.
    sink : CheckpointSink
        Where checkpoints come from and go to.
    """

    def __init__(self, task: Task, ranks: Ranks, sink: CheckpointSink) -> None:
        self.task, self.ranks, self.sink = task, ranks, sink
        self.store = open_store(task.store)
        self.config = task.config.resolved(self.store.n_train)
        self.max_epochs = self.config.max_epochs or 0
        self.module = build_module(self.store, self.config).to(ranks.device)
        self.optimizer = _adam(self.module, self.config)
        self.loader = _loader(self.config, self.store, ranks)
        self.state = self._restore()
        share_parameters(self.module, ranks)
        # On a device a step reads its rates there, and must be able to be replayed.
        kind = HostSteps if ranks.device.type == "cpu" else DeviceSteps
        self.steps: Steps = kind(self.module, self.optimizer, self.config, self._numbers, ranks)
        self._waited = 0.0
        self._began = self._epoch_began = self._last_checkpoint = self._last_progress = 0.0

    def run(self) -> dict[str, Any]:
        """Train until the end.

        Returns
        -------
        dict
            The final `RunState` by name, and ``stopped``: ``"max_epochs"`` or ``"patience"``.

        Raises
        ------
        RayvaecError
            If loss or gradient stop being finite; the last good model is kept.
        """
        self.module.train()
        self.steps.warm_up(self.store)
        now = time.monotonic()
        self._began, self._last_checkpoint = now - self.state.seconds, now
        if self.ranks.is_first:
            self._show_progress()
        while not self.stopped:
            self._train_epoch()
            self._close_epoch()
        return {**vars(self.state), "stopped": self.stopped}

    @property
    def stopped(self) -> str:
        """Why the run is over, empty while it is not."""
        return self.state.stopped(self.config)

    def _restore(self) -> RunState:
        with self.sink.latest() as folder:
            state = RunState()
            if folder is not None:
                state = read_checkpoint(folder, self.module, self.optimizer)
        if self.ranks.is_first:
            cut_records(self.task.run, state.step)
        return state

    def _train_epoch(self) -> None:
        state = self.state
        self._waited, asked = 0.0, time.monotonic()
        self._epoch_began = asked - state.epoch_seconds
        first = state.step - state.epoch_step

        def prepare(minibatch: Minibatch) -> tuple[Minibatch, Any]:
            return minibatch, self.steps.prepare(minibatch, first + minibatch.step)

        for minibatch, prepared in self.loader.prepared(state.epoch, prepare, state.epoch_step):
            self._waited += time.monotonic() - asked
            try:
                self._step(minibatch, prepared)
            except NotFiniteError as error:
                self._give_up(error)
            asked = time.monotonic()

    def _step(self, minibatch: Minibatch, prepared: Any) -> None:
        state = self.state
        self.steps.take(minibatch, prepared)
        state.step += 1
        state.epoch_step += 1
        state.epoch_cells += minibatch.n_global
        if state.epoch_step < self.loader.steps_per_epoch:
            self._between_steps(minibatch.n_global)
        else:
            self.steps.check()

    def _between_steps(self, n_global: int) -> None:
        """Log, show progress and take a checkpoint where one of them is due."""
        state, config, now = self.state, self.config, time.monotonic()
        if config.log_steps and state.step % config.log_steps == 0:
            self._log_step(self.ranks.sums(self.steps.last_loss())[0] / n_global)
        if self.ranks.is_first and now - self._last_progress >= PROGRESS_SECONDS:
            self._show_progress()
        by_step = bool(config.checkpoint_steps) and state.step % (config.checkpoint_steps or 1) == 0
        if by_step or state.step % CLOCK_STEPS == 0:
            self.steps.check()
            by_time = now - self._last_checkpoint >= config.checkpoint_seconds
            if self.ranks.decision((by_step or by_time) and not self.sink.busy()):
                self._checkpoint()

    def _show_progress(self) -> None:
        self._last_progress = time.monotonic()
        cells = self.state.epoch * self.store.n_train + self.state.epoch_cells
        write_progress(self.task.run, self.state.epoch + 1, cells)

    def _close_epoch(self) -> None:
        """Validate, keep the model if it is the best, record, take a checkpoint."""
        state, config, run = self.state, self.config, self.task.run
        self._sync()
        elbo = validation_elbo(self.module, self.store, self.ranks, config.seed, config.val_cells)
        if elbo is not None and not math.isfinite(elbo):
            raise self._not_finite(
                f"the validation ELBO became {elbo} after epoch {state.epoch + 1}"
            )
        record = self._epoch_record(elbo)
        state.epoch, state.epoch_step, state.epoch_cells = state.epoch + 1, 0, 0
        state.loss_sum = state.epoch_seconds = 0.0
        if record["best"]:
            state.best_elbo, state.best_epoch = elbo, state.epoch
        if self.ranks.is_first:
            if record["best"]:
                save_best(run, self.module, self.store, config, record)
            append_record(run, record)
            if self.stopped:
                save_last(run, self.module, self.store, config, record)
        elapsed = time.monotonic() - self._last_checkpoint
        soon = elapsed < min(EPOCH_CHECKPOINT_SECONDS, config.checkpoint_seconds)
        if self.ranks.decision(bool(self.stopped) or not (soon or self.sink.busy())):
            self._checkpoint()

    def _epoch_record(self, elbo: float | None) -> dict[str, Any]:
        state = self.state
        best = elbo is None or state.best_elbo is None or elbo > state.best_elbo
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "time": round(time.monotonic() - self._began, 3),
            "train_loss": state.loss_sum / state.epoch_cells,
            "val_elbo": elbo,
            "best": best,
            "cells_per_second": round(state.epoch_cells / state.epoch_seconds, 1),
            "wait_share": round(self._waited / state.epoch_seconds, 4),
            "kl_weight": self._kl(state.step - 1),
            "lr": self._rate(state.step - 1),
            "num_workers": self.ranks.world_size,
        }

    def _log_step(self, train_loss: float) -> None:
        if self.ranks.is_first:
            state = self.state
            record = {
                "epoch": state.epoch + 1,
                "step": state.step,
                "time": round(time.monotonic() - self._began, 3),
                "train_loss": train_loss,
                "kl_weight": self._kl(state.step - 1),
                "lr": self._rate(state.step - 1),
            }
            append_record(self.task.run, record)

    def _sync(self) -> None:
        """Bring the epoch's time, and its loss summed over all workers, up to date."""
        state = self.state
        state.epoch_seconds = time.monotonic() - self._epoch_began
        state.loss_sum += self.ranks.sums(self.steps.loss_sum())[0]

    def _checkpoint(self) -> None:
        if self.state.epoch_step:
            self._sync()
        self.state.seconds = time.monotonic() - self._began
        folder = None
        if self.ranks.is_first:
            folder = Path(mkdtemp(prefix="rayvaec-checkpoint-"))
            write_checkpoint(folder, self.module, self.optimizer, self.state)
        name = checkpoint_name(self.state)
        self.sink.put(folder, name, {"epoch": self.state.epoch, "step": self.state.step})
        self._last_checkpoint = time.monotonic()

    def _give_up(self, error: NotFiniteError) -> NoReturn:
        """Raise the error that names the step and the cells, on every worker alike."""
        cells, epoch = error.cells, self.state.epoch
        if self.ranks.is_first and all(p.isfinite().all() for p in self.module.parameters()):
            record = {"epoch": epoch, "step": error.step, "val_elbo": None}
            save_last(self.task.run, self.module, self.store, self.config, record)
        names = [self.store.obs_names(cell, cell + 1)[0] for cell in cells[:3]]
        what = f"the loss of {len(cells)} cells ({join_names(names)})" if cells else "the gradient"
        raise self._not_finite(
            f"{what} stopped being finite at step {error.step + 1}, in epoch {epoch + 1}"
        )

    def _not_finite(self, what: str) -> RayvaecError:
        """Return the error, with the models that are there as the first worker sees them."""
        run = self.task.run
        kept = self.ranks.gather([f"{run / n}" for n in (BEST, LAST) if (run / n).is_dir()])[0]
        models = f"{' and '.join(kept)} hold{'s' * (len(kept) == 1)} a good model; " if kept else ""
        return RayvaecError(
            what, f"{models}try a lower --set lr=..., or a lower --set gradient_clip=..."
        )

    def _numbers(self, step: int) -> StepNumbers:
        return StepNumbers(step, self._rate(step), self._kl(step))

    def _rate(self, step: int) -> float:
        return learning_rate(self.config, step, self._total_steps)

    def _kl(self, step: int) -> float:
        return kl_weight(self.config, step, self.loader.steps_per_epoch, self._total_steps)

    @property
    def _total_steps(self) -> int:
        return self.max_epochs * self.loader.steps_per_epoch


def _adam(module: VAEC, config: TrainConfig) -> torch.optim.Adam:
    """Return the optimiser; checkpoints number its parameters as the module names them."""
    groups: list[dict[str, Any]] = []
    for name, parameter in module.named_parameters():
        relative_lr = config.dispersion_lr if name == "px_r" else 1.0
        if not groups or groups[-1]["relative_lr"] != relative_lr:
            groups.append({"params": [], "relative_lr": relative_lr})
        groups[-1]["params"].append(parameter)
    return torch.optim.Adam(
        groups,
        lr=config.peak_lr,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=module.px_r.is_cuda,
    )


def _loader(config: TrainConfig, store: Any, ranks: Ranks) -> Loader:
    return Loader(
        store,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        lanes=config.lanes,
        block_rows=config.block_rows,
        buffer_rows=config.buffer_rows,
        prefetch=config.prefetch,
    )
