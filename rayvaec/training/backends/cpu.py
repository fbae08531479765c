"""Training step on CPUs: gradient, all-reduce, Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.data.store.open import Store
from rayvaec.kernels.threads import single_threaded_torch
from rayvaec.model.vaec import VAEC
from rayvaec.training.backends.host_to_device import StepNumbers
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.gradients import GradientSum
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.noise import CellNoise
from rayvaec.training.objective import Replica, as_tensors

Numbers = Callable[[int], StepNumbers]


class NotFiniteError(Exception):
    """A loss or gradient is not finite; raised by all workers, whose models are as before the step.

    Parameters
    ----------
    step : int
        Steps taken before.
    cells : list of int
        Rows in the store of the cells whose loss is not finite, of all workers.
    """

    def __init__(self, step: int, cells: list[int]) -> None:
        super().__init__(step, cells)
        self.step, self.cells = step, cells


def not_finite(ranks: Ranks, step: int | None, cells: list[int]) -> NotFiniteError:
    """Return the error that all workers raise; every one of them must call.

    Parameters
    ----------
    ranks : Ranks
        The workers.
    step : int or None
        Steps taken before the one that failed, None for a worker that noticed nothing.
    cells : list of int
        This worker's cells whose loss is not finite.
    """
    found = ranks.gather((step, cells))
    first = min(step for step, _ in found if step is not None)
    return NotFiniteError(first, sorted(cell for _, share in found for cell in share))


class Steps(Protocol):
    """How a worker takes steps; every worker takes them alike.

    All methods but `prepare` may be collectives (see `Ranks`): every worker must call them.
    """

    def warm_up(self, store: Store) -> None:
        """Have kernels compiled before the clock runs."""

    def prepare(self, minibatch: Minibatch, step: int) -> Any:
        """Do what can be done ahead; called in another thread, in the order of the steps.

        Parameters
        ----------
        minibatch : Minibatch
            What the step is to be taken on.
        step : int
            Steps taken before it.

        Returns
        -------
        object
            What `take` takes.
        """

    def take(self, minibatch: Minibatch, prepared: Any) -> None:
        """Take one step.

        Raises
        ------
        NotFiniteError
            If the loss or the gradient is not finite. Where steps are taken in the background,
            the methods below raise it instead.
        """

    def check(self) -> None:
        """Wait for the steps taken so far, and raise what is wrong with one."""

    def last_loss(self) -> float:
        """Return the sum of the loss over this worker's cells of the last step."""

    def loss_sum(self) -> float:
        """Return the sum over its cells of all steps since the last call."""


class HostSteps:
    """Steps as torch and our own kernels take them on a CPU.

    Parameters
    ----------
    module : VAEC
        The model.
    optimizer : Optimizer
        Of its parameters, in groups with a ``relative_lr``.
    config : TrainConfig
        Gives seed and clipping.
    numbers : callable
        Tells rate and weights of a step.
    ranks : Ranks
        This worker and the others.
    """

    def __init__(
        self,
        module: VAEC,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        numbers: Numbers,
        ranks: Ranks,
    ) -> None:
        self._module, self._optimizer, self._config = module, optimizer, config
        self._numbers, self._ranks = numbers, ranks
        self._sum_gradients = GradientSum(module, ranks)
        self._noise = CellNoise(config.seed, module)
        self._replica = Replica(module)
        self._last_loss = torch.zeros((), dtype=torch.float64)
        self._loss_sum = torch.zeros((), dtype=torch.float64)

    def warm_up(self, store: Store) -> None:
        """Compute a gradient and forget it."""
        cells = np.arange(min(self._config.batch_size, store.n_train))
        with single_threaded_torch():
            loss, _ = self._loss(store.read(0, len(cells)), cells, len(cells), self._numbers(0))
            loss.backward()
        self._optimizer.zero_grad(set_to_none=True)

    def prepare(self, minibatch: Minibatch, step: int) -> StepNumbers:
        """Return what goes with a step."""
        return self._numbers(step)

    def take(self, minibatch: Minibatch, prepared: StepNumbers) -> None:
        """Take one step, as `Steps.take`."""
        with single_threaded_torch():
            for group in self._optimizer.param_groups:
                group["lr"] = prepared.lr * group["relative_lr"]
            self._optimizer.zero_grad(set_to_none=True)
            loss, per_cell = self._loss(minibatch, minibatch.cells, minibatch.n_global, prepared)
            loss.backward()
            norm = get_total_norm(self._sum_gradients())
            # The sum is the same on every worker, so that all of them stop here or none.
            if not math.isfinite(norm):
                bad = minibatch.cells[~per_cell.isfinite().numpy()]
                raise not_finite(self._ranks, prepared.step, bad.tolist())
            clip = self._config.gradient_clip
            if clip is not None and norm > clip:
                self._sum_gradients.own()
                clip_grads_with_norm_(self._module.parameters(), clip, norm)
            self._optimizer.step()
            self._last_loss = loss.detach().double() * minibatch.n_global
            self._loss_sum += self._last_loss

    def check(self) -> None:
        """Do nothing: `take` raises at once."""

    def last_loss(self) -> float:
        """Return the sum of the loss over this worker's cells of the last step."""
        return float(self._last_loss)

    def loss_sum(self) -> float:
        """Return the sum over its cells of all steps since the last call."""
        total = float(self._loss_sum)
        self._loss_sum.zero_()
        return total

    def _loss(
        self, rows: Any, cells: NDArray[np.int64], n_global: int, numbers: StepNumbers
    ) -> tuple[Tensor, Tensor]:
        tensors, noise = as_tensors(rows, self._module), self._noise.at(numbers.step, cells)
        loss, per_cell = self._replica(*tensors, noise, numbers.kl_weight, n_global)
        return loss, per_cell
