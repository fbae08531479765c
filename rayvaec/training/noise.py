"""Training noise keyed by cell, independent of workers and resumption.

Every number depends on (seed, step, row of the cell in the store) and on its place in the model
alone. One worker and eight therefore take the same steps but for rounding, and a run that lost
workers goes on as if it had not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayvaec.kernels.rng import normal_noise, stream_keys, uniform
from rayvaec.model.vaec import VAEC
from rayvaec.training.schedule import noise_seed
from rayvaec.util.numba_cache import compiled

DROPOUT = np.uint64(0x64726F70)
DROPOUT_LEVELS = 2**16
"""Rates of dropout are rounded to one of so many."""
_BITS = np.uint64(DROPOUT_LEVELS - 1)
_SHIFTS = (np.uint64(0), np.uint64(16), np.uint64(32))

DrawMask = Callable[[int, int, float], NDArray[np.float32] | Tensor]


class CellNoise:
    """The noise of the step at hand.

    Parameters
    ----------
    seed : int
        Seed of the run.
    module : VAEC
        The model; its dropout layers are replaced by ones that draw from here.
    """

    def __init__(self, seed: int, module: VAEC) -> None:
        self._seed, self._module = noise_seed(seed, "noise"), module
        self._step, self._cells = 0, np.empty(0, np.int64)
        replace_dropout(module, self.mask)

    def at(self, step: int, cells: NDArray[np.int64]) -> Tensor:
        """Go to a step and its cells.

        Parameters
        ----------
        step : int
            Steps taken before.
        cells : NDArray[n_cells] of int64
            Row in the store of each cell of this worker's share.

        Returns
        -------
        Tensor[n_noise, n_cells, n_latent]
            Standard normal noise, for `VAEC.minibatch_loss`.
        """
        self._step, self._cells = step, cells
        return latent_noise(self._module, self._seed, cells, step)

    def mask(self, layer: int, width: int, rate: float) -> NDArray[np.float32]:
        """Return what a dropout layer multiplies its input by.

        Parameters
        ----------
        layer : int
            Number of the layer in the model.
        width : int
            Its units.
        rate : float
            Share of them to drop, rounded to a multiple of 2**-16.

        Returns
        -------
        NDArray[n_cells, width] of float32
            0, or one over the share that stays.
        """
        dropped = round(rate * DROPOUT_LEVELS)
        mask = np.empty((len(self._cells), width), np.float32)
        keep = np.float32(DROPOUT_LEVELS / (DROPOUT_LEVELS - dropped))
        words = np.uint64(self._seed + layer), np.uint64(self._step)
        _fill_mask(*words, self._cells.astype(np.uint64), np.uint64(dropped), keep, mask)
        return mask


class CellDropout(nn.Module):
    """Dropout that is drawn by cell.

    Parameters
    ----------
    draw : callable
        Draws the mask of a layer: `CellNoise.mask`, or one of the same arguments.
    layer : int
        Number of this layer in the model.
    rate : float
        Share of units to drop.
    """

    def __init__(self, draw: DrawMask, layer: int, rate: float) -> None:
        super().__init__()
        self._draw, self.layer, self.rate = draw, layer, rate

    def mask(self, x: Tensor) -> Tensor:
        """Return what Tensor[n_cells, width] is multiplied by, 0 in units that are dropped."""
        return torch.as_tensor(self._draw(self.layer, x.shape[-1], self.rate), device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        """Drop units of Tensor[n_cells, width], while training."""
        return x * self.mask(x) if self.training else x


def latent_noise(module: VAEC, seed: int, cells: NDArray[np.int64], step: int) -> Tensor:
    """Return standard normal noise for z, and what the prior needs.

    Parameters
    ----------
    module : VAEC
        The model.
    seed : int
        Seed of the noise.
    cells : NDArray[n_cells] of int64
        Row of each cell in the store.
    step : int
        What else the noise depends on.

    Returns
    -------
    Tensor[n_noise, n_cells, n_latent]
        On the model's device.
    """
    n_noise, n_latent = module.n_noise, module.config.n_latent
    noise = normal_noise(seed, cells, np.full(len(cells), step), n_noise * n_latent)
    by_cell = torch.from_numpy(noise).view(len(cells), n_noise, n_latent)
    return by_cell.transpose(0, 1).to(module.px_r.device)


def replace_dropout(module: nn.Module, draw: DrawMask) -> list[float]:
    """Replace the dropout layers of a model by ones that are drawn by cell.

    Parameters
    ----------
    module : Module
        Is changed in place.
    draw : callable
        As in `CellDropout`.

    Returns
    -------
    list of float
        The rate of each layer that was replaced, by its number.
    """
    layers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout) and child.p > 0
    ]
    for number, (parent, name, child) in enumerate(layers):
        parent.add_module(name, CellDropout(draw, number, child.p))
    return [child.p for _, _, child in layers]


@compiled
def _fill_mask(
    seed: np.uint64,
    step: np.uint64,
    cells: NDArray[Any],
    dropped: np.uint64,
    keep: np.float32,
    mask: NDArray[Any],
) -> None:
    """Take three 16-bit numbers from every random word; those below `dropped` drop a unit."""
    width = mask.shape[1]
    for row in range(mask.shape[0]):
        k0, k1 = stream_keys(DROPOUT, seed, cells[row], step)
        for first in range(0, width, 3):
            word = np.uint64(uniform(k0, k1, np.uint64(first)) * 2.0**48)
            for i in range(min(3, width - first)):
                stays = ((word >> _SHIFTS[i]) & _BITS) >= dropped
                mask[row, first + i] = keep if stays else np.float32(0)
