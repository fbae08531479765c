"""Training step on a GPU, replayed as CUDA graphs.

A step is some four hundred small operations. To launch them one by one takes several times as long
as to compute them; a graph is launched at once. What a graph holds has fixed shapes and addresses
and never waits for the host, and so

- minibatches are filled up to one shape (`rayvaec.training.backends.host_to_device`),
- noise is drawn on the device (`rayvaec.training.backends.cuda_noise`),
- rates and weights are read from the device,
- a gradient that is not finite stops all updates from there on, on the device. The host looks
  some steps later, and finds the model as it was before that step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.data.store.open import Store
from rayvaec.model.vaec import VAEC
from rayvaec.training.backends.cpu import Numbers, not_finite
from rayvaec.training.backends.cuda_noise import DeviceNoise
from rayvaec.training.backends.host_to_device import Block, DeviceRows, Layout, Staging
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks

EAGER_STEPS = 3
"""Steps before a graph is made: libraries and allocator get what they need, Adam its moments."""
NO_STEP = -1


class DeviceSteps:
    """Steps of a worker with a GPU.

    Parameters
    ----------
    module : VAEC
        The model, on the device.
    optimizer : Adam
        Fused and capturable, of its parameters, in groups with a ``relative_lr``.
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
        optimizer: torch.optim.Adam,
        config: TrainConfig,
        numbers: Numbers,
        ranks: Ranks,
    ) -> None:
        self._module, self._optimizer, self._config = module, optimizer, config
        self._numbers, self._ranks = numbers, ranks
        self._noise = DeviceNoise(config.seed, module)
        self._staging = Staging(ranks.device)
        self._stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._gradient = _flat_gradient(module)
        self._bookkeeping = _Bookkeeping(ranks.device, optimizer)
        self._program: _Program | None = None

    def warm_up(self, store: Store) -> None:
        """Do nothing: the first steps are taken without a graph."""

    def prepare(self, minibatch: Minibatch, step: int) -> Block:
        """Begin to send a minibatch."""
        return self._staging.send(minibatch, self._numbers(step))

    def take(self, minibatch: Minibatch, prepared: Block) -> None:
        """Have one step taken in the background; what is wrong with it, `check` will say."""
        program = self._program
        if program is None or prepared.layout != program.layout:
            # Steps under way read what is about to be replaced. What came of them, the others ask
            # later: their minibatches may still have room.
            self._wait()
            program = self._program = self._program_for(prepared.layout)
        with _on(self._stream):
            self._staging.take(prepared, program.block)
            program.compute()
            self._ranks.sum_in_place(self._gradient)
            program.update()

    def check(self) -> None:
        """Wait for the steps taken so far, and raise what is wrong with one."""
        self._wait()
        step, cells = self._bookkeeping.failure()
        if self._ranks.any(step is not None):
            raise not_finite(self._ranks, step, cells)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def last_loss(self) -> float:
        """Return the sum of the loss over this worker's cells of the last step."""
        self.check()
        return float(self._bookkeeping.own_sum)

    def loss_sum(self) -> float:
        """Return the sum over its cells of all steps since the last call."""
        self.check()
        total = float(self._bookkeeping.loss_sum)
        self._bookkeeping.loss_sum.zero_()
        return total

    def _program_for(self, layout: Layout) -> _Program:
        block = torch.empty(layout.n_bytes, dtype=torch.uint8, device=self._ranks.device)
        rows = layout.rows(block)
        self._bookkeeping.size(layout.n_rows)
        return _Program(
            layout,
            block,
            _Replayed(partial(self._set_gradient, rows), self._stream),
            _Replayed(partial(self._set_weights, rows), self._stream),
        )

    def _set_gradient(self, rows: DeviceRows) -> None:
        self._gradient.zero_()
        noise = self._noise.at(rows.step, rows.cells)
        conditioned = self._module.config.n_batch > 1
        kl_weight = rows.rates[1]
        output = self._module.minibatch_loss(
            rows.x,
            rows.labels,
            rows.batches if conditioned else None,
            kl_weight=kl_weight,
            divisor=rows.divisor,
            noise=noise,
        )
        output.loss.backward()
        per_cell = output.reconstruction_loss + kl_weight * output.kl_local
        self._bookkeeping.note(rows, output.loss.detach(), per_cell.detach())

    def _set_weights(self, rows: DeviceRows) -> None:
        norm = torch.linalg.vector_norm(self._gradient)
        self._bookkeeping.judge(rows, norm)
        clip = self._config.gradient_clip
        if clip is not None:
            self._gradient.mul_((clip / (norm + 1e-6)).clamp_max(1.0))
        for group in self._optimizer.param_groups:
            group["lr"].copy_(rows.rates[0] * group["relative_lr"])
        self._optimizer.step()


class _Bookkeeping:
    """What the device remembers of steps.

    Parameters
    ----------
    device : torch.device
        Where.
    optimizer : Adam
        Is made to leave all parameters alone once a step has failed.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Adam) -> None:
        self.own_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        # Adam's kernel reads this and the rates in float32, whatever the parameters are.
        self._failed = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.full((1,), NO_STEP, device=device)
        self._bad_losses = torch.zeros(0, device=device)
        self._bad_cells = torch.zeros(0, dtype=torch.int64, device=device)
        self.size(1)
        # torch's name for what automatic mixed precision uses to the same end.
        optimizer.found_inf = self._failed  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), dtype=torch.float32, device=device)

    def size(self, n_rows: int) -> None:
        """Make room for minibatches of so many rows, at least as many as before."""
        device, before = self.own_sum.device, len(self._bad_cells)
        self._per_cell = torch.zeros(n_rows, device=device)
        self._bad_losses = functional.pad(self._bad_losses, (0, n_rows - before))
        self._bad_cells = functional.pad(self._bad_cells, (0, n_rows - before))

    def note(self, rows: DeviceRows, loss: Tensor, per_cell: Tensor) -> None:
        """Note the loss of a minibatch, and of its cells."""
        self.own_sum.copy_(loss.double() * rows.rates[2].double())
        self.loss_sum.add_(self.own_sum)
        self._per_cell.copy_(torch.where(rows.divisor.isfinite(), per_cell, 0))

    def judge(self, rows: DeviceRows, norm: Tensor) -> None:
        """Note where the gradient of a step is the first that is not finite."""
        first = (self._failed == 0) & ~norm.isfinite()
        self._bad_losses.copy_(torch.where(first, self._per_cell, self._bad_losses))
        self._bad_cells.copy_(torch.where(first, rows.cells, self._bad_cells))
        self._step.copy_(torch.where(first, rows.step, self._step))
        self._failed.add_(first)

    def failure(self) -> tuple[int | None, list[int]]:
        """Return the step that has failed and its cells whose loss is not finite, or None."""
        step = int(self._step)
        bad = self._bad_cells[~self._bad_losses.isfinite()].tolist()
        return (None if step == NO_STEP else step), bad


class _Replayed:
    """A function that is run a few times as it is, and replayed as a CUDA graph from then on.

    Parameters
    ----------
    function : callable
        Reads and writes the same memory each time.
    stream : Stream, optional
        Where it runs; None on a CPU, where nothing is replayed.
    """

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
        self._function, self._stream = function, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_runs = 0

    def __call__(self) -> None:
        """Run or replay, on the stream."""
        if self._graph is not None:
            self._graph.replay()
            return
        self._function()
        self._eager_runs += 1
        if self._stream is not None and self._eager_runs == EAGER_STEPS:
            self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads send minibatches meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function()
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            warnings.warn(f"steps are not replayed as a CUDA graph: {first_line}", stacklevel=2)
            return
        self._graph = graph


class _Program(NamedTuple):
    """Steps on minibatches of one layout: what computes gradients, and what changes weights."""

    layout: Layout
    block: Tensor
    compute: _Replayed
    update: _Replayed


def _flat_gradient(module: VAEC) -> Tensor:
    """Give every parameter a part of one tensor as its gradient; return the whole."""
    parameters = list(module.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def _on(stream: torch.cuda.Stream | None) -> torch.cuda.StreamContext:
    """Return a context in which work goes to a stream, after what was asked for before."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)
