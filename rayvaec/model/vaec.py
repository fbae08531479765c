"""VAEC: a label-conditional variational autoencoder for single-cell counts.

The module of scvi-tools' CondSCVI (Lopez et al. 2022, DestVI, Nature Biotechnology, Methods:
"single-cell latent variable model"), in the form that scvi-tools 0.15 to 1.4.0 trained::

    z ~ N(0, I)                                       per cell
    h = decoder(z, y)                                 y: the cell's label
    px_scale = softplus(W h + b)                      per gene
    x ~ NB(total_count=library * px_scale, logits=px_r)

State-dict keys are scvi-tools' own, so that weights move between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from rayvaec.errors import CountsError
from rayvaec.kernels.csr import CsrCounts
from rayvaec.kernels.keys import position_keys
from rayvaec.kernels.nb_loss_interim import nb_reconstruction
from rayvaec.model.checks import check_codes, check_counts
from rayvaec.model.config import VAECConfig
from rayvaec.model.distributions import NegativeBinomial
from rayvaec.model.draws import draw_rows
from rayvaec.model.layers import Encoder, FCLayers

SMALLEST_FRACTION = 1e-8
"""Start value of px_scale for a gene without counts: softplus cannot be zero."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of a minibatch.

    Parameters
    ----------
    loss : Tensor[]
        What the optimiser minimises.
    reconstruction_loss, kl_local : Tensor[n_cells]
        Negative log-likelihood and Kullback-Leibler term of each cell, unweighted.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    kl_local: Tensor


LossRecorder = LossOutput
"""The name that scvi-tools gave `LossOutput` until 0.20."""


class VAEC(nn.Module):
    """Label-conditional VAE for counts.

    Parameters
    ----------
    n_input : int
        Number of genes.
    n_labels : int
        Number of labels; 0 or 1 means that labels carry no information.
    n_hidden, n_latent, n_layers : int
        Width of hidden layers, dimensions of z, number of hidden layers.
    log_variational : bool
        Whether the encoder reads log(1 + x).
    ct_weight : Sequence[float], optional
        Weight of each label's cells in the loss.
    dropout_rate : float
        Dropout of encoder and decoder.
    **module_kwargs
        Further arguments of `VAECConfig`: ``n_batch``, ``encode_covariates``.

    Raises
    ------
    ConfigError
        If an argument is unknown or out of range.
    """

    ct_weight: Tensor

    def __init__(
        self,
        n_input: int,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 5,
        n_layers: int = 2,
        log_variational: bool = True,
        ct_weight: Sequence[float] | NDArray[np.floating] | None = None,
        dropout_rate: float = 0.05,
        **module_kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = config = VAECConfig.from_json(
            {
                "n_input": n_input,
                "n_labels": n_labels,
                "n_hidden": n_hidden,
                "n_latent": n_latent,
                "n_layers": n_layers,
                "log_variational": log_variational,
                "ct_weight": ct_weight,
                "dropout_rate": dropout_rate,
                **module_kwargs,
            }
        )
        encoder_categories = [n_labels, config.n_batch if config.encode_covariates else 0]
        shared = (n_layers, n_hidden, dropout_rate)
        self.px_r = nn.Parameter(torch.randn(n_input))
        self.z_encoder = Encoder(n_input, n_latent, encoder_categories, *shared)
        self.decoder = FCLayers(n_latent, n_hidden, [n_labels, config.n_batch], *shared)
        self.px_decoder = nn.Sequential(nn.Linear(n_hidden, n_input), nn.Softplus())
        weights = torch.ones(n_labels) if ct_weight is None else torch.tensor(config.ct_weight)
        self.register_buffer("ct_weight", weights)

    @property
    def output(self) -> nn.Linear:
        """The decoder's last product, n_hidden to n_input."""
        return cast(nn.Linear, self.px_decoder[0])

    def inference(
        self, x: Tensor, y: Tensor, n_samples: int = 1, *, batch_index: Tensor | None = None
    ) -> dict[str, Any]:
        """Encode cells and draw z from the posterior.

        Parameters
        ----------
        x : Tensor[n_cells, n_input], raw counts
        y : Tensor[n_cells, 1], label codes
        n_samples : int
            Draws of z a cell; more than one adds a leading dimension.
        batch_index : Tensor[n_cells, 1], optional
            Batch codes, in models with batches.

        Returns
        -------
        dict
            ``z`` (Tensor[(n_samples,) n_cells, n_latent]), ``qz`` (Normal) and ``library``
            (Tensor[(n_samples,) n_cells, 1], total counts).

        Raises
        ------
        CountsError
            If `x` is not a matrix of counts, of another width, or a code is out of range.
        """
        self._check_codes(y, batch_index, len(x))
        check_counts(x, self.config.n_input)
        x = x.to(self.px_r.dtype)
        qz = self.z_encoder(torch.log1p(x) if self.config.log_variational else x, y, batch_index)
        library = x.sum(1, keepdim=True)
        if n_samples > 1:
            z = qz.rsample(torch.Size((n_samples,)))
            library = library.expand(n_samples, -1, -1)
        else:
            z = qz.rsample()
        return {"z": z, "qz": qz, "library": library}

    def generative(
        self,
        z: Tensor,
        library: Tensor,
        y: Tensor,
        *,
        batch_index: Tensor | None = None,
        transform_batch: int | None = None,
    ) -> dict[str, Any]:
        """Decode z to the distribution of counts.

        Parameters
        ----------
        z : Tensor[..., n_cells, n_latent]
        library : Tensor[..., n_cells, 1], total counts
        y : Tensor[n_cells, 1], label codes
        batch_index : Tensor[n_cells, 1], optional
            Batch codes, in models with batches.
        transform_batch : int, optional
            Decode every cell as if it came from this batch.

        Returns
        -------
        dict
            ``px_scale`` and ``px_rate`` (Tensor[..., n_cells, n_input]), ``px_r``
            (Tensor[n_input]) and ``px`` (NegativeBinomial).
        """
        if transform_batch is not None:
            batch_index = torch.full_like(y, transform_batch)
        self._check_codes(y, batch_index, z.shape[-2])
        px_scale = self.px_decoder(self.decoder(z, y, batch_index))
        px_rate = library * px_scale
        return {
            "px_scale": px_scale,
            "px_rate": px_rate,
            "px_r": self.px_r,
            "px": NegativeBinomial(px_rate, self.px_r),
        }

    def loss(
        self,
        tensors: Mapping[str, Tensor],
        inference_outputs: Mapping[str, Any],
        generative_outputs: Mapping[str, Any],
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return the negative evidence lower bound, weighted by label.

        Parameters
        ----------
        tensors : Mapping
            ``X`` (Tensor[n_cells, n_input], raw counts) and ``labels`` (Tensor[n_cells, 1]).
        inference_outputs, generative_outputs : Mapping
            What `inference` and `generative` returned.
        kl_weight : float
            Weight of the Kullback-Leibler term.

        Returns
        -------
        LossOutput
        """
        kl_local = _kl_to_standard_normal(inference_outputs["qz"])
        reconstruction = -generative_outputs["px"].log_prob(tensors["X"]).sum(-1)
        weight = self._cell_weight(tensors["labels"])
        loss = torch.mean(weight * (reconstruction + kl_weight * kl_local))
        return LossOutput(loss, reconstruction, kl_local)

    def forward(
        self,
        tensors: Mapping[str, Tensor],
        inference_kwargs: Mapping[str, Any] | None = None,
        generative_kwargs: Mapping[str, Any] | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        compute_loss: bool = True,
    ) -> tuple[Any, ...]:
        """Run inference, generative and, unless told otherwise, the loss.

        Parameters
        ----------
        tensors : Mapping
            ``X`` (Tensor[n_cells, n_input], raw counts), ``labels`` (Tensor[n_cells, 1]) and,
            in models with batches, ``batch`` (Tensor[n_cells, 1]).
        inference_kwargs, generative_kwargs, loss_kwargs : Mapping, optional
            Further arguments of the three.
        compute_loss : bool
            Whether the loss is the third element.

        Returns
        -------
        tuple
            Inference outputs, generative outputs and, if computed, a LossOutput.
        """
        y, batch_index = tensors["labels"], tensors.get("batch")
        inferred = self.inference(
            tensors["X"], y, batch_index=batch_index, **(inference_kwargs or {})
        )
        generated = self.generative(
            inferred["z"],
            inferred["library"],
            y,
            batch_index=batch_index,
            **(generative_kwargs or {}),
        )
        if not compute_loss:
            return inferred, generated
        return inferred, generated, self.loss(tensors, inferred, generated, **(loss_kwargs or {}))

    @torch.no_grad()
    def sample(self, tensors: Mapping[str, Tensor], n_samples: int = 1) -> Tensor:
        r"""Draw counts from the posterior predictive distribution :math:`p(\hat{x} \mid x)`.

        Every draw has its own z. Dropout is off; torch's global generator gives the seed.

        Parameters
        ----------
        tensors : Mapping
            As in `forward`.
        n_samples : int
            Draws a cell.

        Returns
        -------
        Tensor[n_cells, n_input, n_samples], non-negative whole numbers, on the CPU

        Raises
        ------
        CountsError
            If `tensors` do not fit the model.
        """
        if n_samples < 1:
            raise CountsError(f"VAEC.sample: n_samples={n_samples}", "ask for at least one draw")
        was_training = self.training
        self.eval()
        try:
            y, batch_index = tensors["labels"], tensors.get("batch")
            inferred = self.inference(tensors["X"], y, batch_index=batch_index)
        finally:
            self.train(was_training)
        n_cells = len(y)
        cell = torch.arange(n_cells).repeat_interleave(n_samples)
        qz = inferred["qz"]
        draws = draw_rows(
            self,
            qz.loc[cell],
            qz.scale[cell],
            inferred["library"][cell],
            y[cell],
            None if batch_index is None else batch_index[cell],
            seed=int(torch.randint(2**62, ())),
            keys=position_keys(0, n_cells)[cell.numpy()],
            samples=np.tile(np.arange(n_samples, dtype=np.uint64), n_cells),
        )
        rows = torch.from_numpy(np.repeat(np.arange(n_cells * n_samples), np.diff(draws.indptr)))
        counts = torch.zeros(n_cells * n_samples, self.config.n_input)
        counts[rows, torch.from_numpy(draws.indices).long()] = torch.from_numpy(
            draws.counts
        ).float()
        return counts.view(n_cells, n_samples, -1).transpose(1, 2).contiguous()

    def encode(self, x: CsrCounts, y: Tensor, batch_index: Tensor | None = None) -> Normal:
        """Return q(z | x, y) of sparse counts.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of n_cells x n_input.
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.

        Returns
        -------
        Normal
            Mean and standard deviation, Tensor[n_cells, n_latent] each.
        """
        return self.z_encoder.forward_csr(x, y, batch_index, log1p=self.config.log_variational)

    @torch.no_grad()
    def decode(
        self, z: Tensor, library: Tensor, y: Tensor, batch_index: Tensor | None = None
    ) -> Tensor:
        """Return px_rate, the total count of each gene's negative binomial.

        Parameters
        ----------
        z : Tensor[n_cells, n_latent]
        library : Tensor[n_cells, 1], total counts
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.

        Returns
        -------
        Tensor[n_cells, n_input]
        """
        return self.px_decoder(self.decoder(z, y, batch_index)).mul_(library)

    def minibatch_loss(
        self,
        x: CsrCounts,
        y: Tensor,
        batch_index: Tensor | None = None,
        *,
        kl_weight: float = 1.0,
        divisor: float | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Return the loss of a sparse minibatch: what training calls.

        Equal to `loss` of the dense minibatch, without ever making it dense.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of n_cells x n_input.
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.
        kl_weight : float
            Weight of the Kullback-Leibler term.
        divisor : float, optional
            What the sum over cells is divided by; their number by default. A worker that holds
            a share of a global minibatch gives the share that makes the averaged gradient exact.
        generator : torch.Generator, optional
            Source of z's noise; torch's global one by default.

        Returns
        -------
        LossOutput
            Only `loss` carries gradients.
        """
        qz = self.encode(x, y, batch_index)
        noise = torch.randn(qz.loc.shape, generator=generator, device=qz.loc.device)
        h = self.decoder(qz.loc + qz.scale * noise, y, batch_index)
        factor = self._cell_weight(y) / (divisor or x.n_cells)
        weighted_sum, reconstruction = nb_reconstruction(
            h, self.output.weight, self.output.bias, self.px_r, x.library(), x, factor
        )
        kl_local = _kl_to_standard_normal(qz)
        loss = weighted_sum + kl_weight * (factor * kl_local).sum()
        return LossOutput(loss, reconstruction, kl_local.detach())

    @torch.no_grad()
    def init_from_counts(self, mean_fraction: Tensor) -> None:
        """Start px_scale at each gene's mean fraction of a cell's counts.

        Upstream starts at softplus(0) = 0.7 for every gene, an expected total of 0.7 * n_input
        times the library, and spends its first epochs coming down from there.

        Parameters
        ----------
        mean_fraction : Tensor[n_input]
            Share of each gene in the counts of the training cells.
        """
        fraction = mean_fraction.double().clamp_min(SMALLEST_FRACTION)
        self.output.bias.copy_(torch.log(torch.expm1(fraction)))

    def _cell_weight(self, y: Tensor) -> Tensor:
        if self.config.n_labels == 0:
            return torch.ones(len(y), dtype=self.px_r.dtype, device=y.device)
        return self.ct_weight[y.reshape(-1).long()]

    def _check_codes(self, y: Tensor, batch_index: Tensor | None, n_cells: int) -> None:
        check_codes("labels", y, self.config.n_labels, n_cells)
        check_codes("batch", batch_index, self.config.n_batch, n_cells)


def _kl_to_standard_normal(qz: Normal) -> Tensor:
    """KL(qz || N(0, I)) summed over the latent dimensions, Tensor[n_cells]."""
    standard = Normal(torch.zeros_like(qz.loc), torch.ones_like(qz.scale), validate_args=False)
    return kl_divergence(qz, standard).sum(dim=-1)
