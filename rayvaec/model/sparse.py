"""VAEC on CSR counts: loss and inference without dense minibatches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

from rayvaec.kernels.counts import CsrCounts
from rayvaec.model.losses import MIXTURE_DRAWS, LossOutput
from rayvaec.model.network import VAECNetwork
from rayvaec.model.precision import working_precision


class SparseVAEC(VAECNetwork):
    """The pieces of `VAECNetwork` put together for counts in compressed sparse rows.

    Parameters
    ----------
    config : VAECConfig
        Sizes and form.
    """

    @working_precision
    def encode(
        self,
        x: CsrCounts,
        y: Tensor,
        batch_index: Tensor | None = None,
        *,
        rows_per_product: int | None = None,
    ) -> Normal:
        """Return q(z | x, y) of sparse counts.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of n_cells x n_input.
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.
        rows_per_product : int, optional
            As in `rayvaec.model.layers.FCLayers.forward`.

        Returns
        -------
        Normal
            Mean and standard deviation, Tensor[n_cells, n_latent] each.
        """
        return self.z_encoder.forward_csr(
            x,
            *self._encoder_categories(y, batch_index),
            log1p=self.config.log_variational,
            beside=self._encoded_batch(y, batch_index),
            rows_per_product=rows_per_product,
        )

    @torch.no_grad()
    @working_precision
    def decode(
        self, z: Tensor, library: Tensor, y: Tensor, batch_index: Tensor | None = None
    ) -> Tensor:
        """Return px_rate: library times px_scale.

        Parameters
        ----------
        z : Tensor[n_cells, n_latent]
        library : Tensor[n_cells, 1], from `library_of`
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.

        Returns
        -------
        Tensor[n_cells, n_input]
        """
        return self._px_scale(self.decoder_hidden(z, y, batch_index), y).mul_(library)

    @property
    def n_noise(self) -> int:
        """Draws of noise a cell that `minibatch_loss` needs: z's, and those behind the prior."""
        return 1 + MIXTURE_DRAWS * (self.config.prior == "mog")

    @working_precision
    def minibatch_loss(
        self,
        x: CsrCounts,
        y: Tensor,
        batch_index: Tensor | None = None,
        *,
        kl_weight: float | Tensor = 1.0,
        divisor: float | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of a sparse minibatch: what training calls.

        Equal to `VAEC.loss` of the dense minibatch, without ever making it dense.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of n_cells x n_input.
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.
        kl_weight : float or Tensor[]
            Weight of the Kullback-Leibler term.
        divisor : float or Tensor[n_cells], optional
            What the sum over cells, or each cell's part, is divided by; their number by default.
            A worker that holds a share of a global minibatch gives the size of the whole.
        generator : torch.Generator, optional
            Source of z's noise; torch's global one by default.
        noise : Tensor[n_noise, n_cells, n_latent], optional
            Standard normal noise, where it is not to be drawn here.

        Returns
        -------
        LossOutput
            Only `loss` carries gradients.
        """
        if noise is None:
            shape = (self.n_noise, x.n_cells, self.config.n_latent)
            noise = torch.randn(
                shape, generator=generator, device=self.px_r.device, dtype=self.px_r.dtype
            )
        factor = self._cell_weight(y) / (x.n_cells if divisor is None else divisor)
        z, kl_sum, kl_local = self._draw(x, y, batch_index, noise, factor)
        weighted_sum, reconstruction = self.reconstruction(z, x, y, batch_index, factor)
        return LossOutput(weighted_sum + kl_weight * kl_sum, reconstruction, kl_local)

    def _draw(
        self, x: CsrCounts, y: Tensor, batch_index: Tensor | None, noise: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return z, the weighted sum of its divergences and, without gradient, each cell's."""
        on_cpu = noise.device.type == "cpu" and self.px_r.dtype == torch.float32
        if on_cpu and self.config.prior == "normal":
            return self.z_encoder.draw_csr(
                x,
                *self._encoder_categories(y, batch_index),
                noise=noise[0],
                factor=factor,
                log1p=self.config.log_variational,
                beside=self._encoded_batch(y, batch_index),
            )
        qz = self.encode(x, y, batch_index)
        kl = self.kl(qz, y, noise[1:])
        return qz.loc + qz.scale * noise[0], (factor * kl).sum(), kl.detach()
