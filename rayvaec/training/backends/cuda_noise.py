"""Training noise drawn on the device.

The same numbers come out, so that runs on GPUs and on CPUs take the same steps but for rounding.
Shapes are fixed, and nothing is looked up on the host while drawing: a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayvaec.kernels.rng import NOISE
from rayvaec.kernels.rng_torch import KeyedStreams, normal_noise, weyl_steps
from rayvaec.model.vaec import VAEC
from rayvaec.training.noise import DROPOUT, DROPOUT_LEVELS, replace_dropout
from rayvaec.training.schedule import noise_seed


class DeviceNoise:
    """The noise of the step at hand, on the model's device.

    Parameters
    ----------
    seed : int
        Seed of the run.
    module : VAEC
        The model; its dropout layers are replaced by ones that draw from here.
    """

    def __init__(self, seed: int, module: VAEC) -> None:
        word, device = noise_seed(seed, "noise"), module.px_r.device
        rates = replace_dropout(module, self.mask)
        self._shape = module.n_noise, module.config.n_latent
        self._width = module.config.n_hidden
        # Masks and noise from one pass over all streams: more numbers than needed, fewer kernels.
        masks = [(int(DROPOUT), word + layer) for layer in range(len(rates))]
        self._streams = KeyedStreams([*masks, (int(NOISE), word)], device)
        n_noise = module.n_noise * module.config.n_latent
        of_masks = torch.arange(0, self._width, 3, device=device)
        of_noise = torch.arange(n_noise + n_noise % 2, device=device)
        self._steps = weyl_steps(torch.cat((of_masks, of_noise)))
        self._n_words = len(of_masks)
        self._shifts = torch.tensor([16, 32, 48], device=device)
        levels = torch.tensor([round(rate * DROPOUT_LEVELS) for rate in rates], device=device)
        self._dropped = levels.view(-1, 1, 1)
        self._keep = DROPOUT_LEVELS / (DROPOUT_LEVELS - self._dropped).float()
        self._masks = torch.empty(0, device=device)

    def at(self, step: Tensor, cells: Tensor) -> Tensor:
        """Go to a step and its cells.

        Parameters
        ----------
        step : Tensor[1], int64
            Steps taken before.
        cells : Tensor[n_cells], int64
            Row in the store of each cell of this worker's share.

        Returns
        -------
        Tensor[n_noise, n_cells, n_latent]
            Standard normal noise, for `VAEC.minibatch_loss`.
        """
        words = self._streams.words(cells, step, self._steps)
        of_masks = words[:-1, :, : self._n_words, None]
        parts = (of_masks >> self._shifts) & (DROPOUT_LEVELS - 1)
        stays = parts.flatten(-2)[..., : self._width] >= self._dropped
        self._masks = stays * self._keep
        n_noise, n_latent = self._shape
        noise = normal_noise(words[-1, :, self._n_words :])[:, : n_noise * n_latent]
        return noise.view(len(cells), n_noise, n_latent).transpose(0, 1)

    def mask(self, layer: int, width: int, rate: float) -> Tensor:
        """Return what a dropout layer multiplies its input by; arguments as in `CellNoise.mask`.

        Returns
        -------
        Tensor[n_cells, width]
        """
        return self._masks[layer, :, :width]
