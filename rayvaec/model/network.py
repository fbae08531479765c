"""Parameters of VAEC in either generative form, and the layers that use them.

`rayvaec.model.vaec.VAEC` puts the pieces together. Which form a model has is known here alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rayvaec.errors import ModelError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.nb_loss import nb_reconstruction
from rayvaec.model.config import VAECConfig
from rayvaec.model.distributions import NegativeBinomial
from rayvaec.model.layers import Encoder, FCLayers
from rayvaec.model.losses import (
    MIXTURE_DRAWS,
    MIXTURE_FLOOR,
    kl_to_mixture,
    kl_to_standard_normal,
    mixture,
)
from rayvaec.model.precision import working_precision

BATCH_DIMENSIONS = 5
"""Dimensions of the softmax form's batch embedding, as in scvi-tools."""

SMALLEST_FRACTION = 1e-8
"""Start value of px_scale for a gene without counts: neither form can give zero."""


class VAECNetwork(nn.Module):
    """Encoder, decoder and dispersion of VAEC, under scvi-tools' parameter names.

    Parameters
    ----------
    config : VAECConfig
        Sizes and form.
    """

    ct_weight: Tensor

    def __init__(self, config: VAECConfig) -> None:
        super().__init__()
        self.config = config
        weights = [1.0] * config.n_labels if config.ct_weight is None else config.ct_weight
        self.register_buffer("ct_weight", torch.tensor(weights, dtype=torch.get_default_dtype()))
        self.px_r = nn.Parameter(torch.randn(config.n_input))
        if self.is_softplus:
            self._build_softplus()
        else:
            self._build_softmax()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.px_r.device

    @property
    def n_input(self) -> int:
        """Number of genes."""
        return self.config.n_input

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return self.config.n_labels

    @property
    def n_batch(self) -> int:
        """Number of experimental batches."""
        return self.config.n_batch

    @property
    def n_latent(self) -> int:
        """Dimensions of z."""
        return self.config.n_latent

    @property
    def is_softplus(self) -> bool:
        """Whether the generative form is the softplus one."""
        return self.config.generative == "softplus"

    def _build_softplus(self) -> None:
        config = self.config
        shared = (config.n_layers, config.n_hidden)
        encoded = [config.n_labels, config.n_batch if config.encode_covariates else 0]
        decoded = [config.n_labels, config.n_batch]
        decoder_dropout = 0.0 if config.library == "log" else config.dropout_rate
        self.z_encoder = Encoder(
            config.n_input, config.n_latent, encoded, *shared, config.dropout_rate
        )
        self.decoder = FCLayers(config.n_latent, config.n_hidden, decoded, *shared, decoder_dropout)
        output = nn.Linear(config.n_hidden, config.n_input)
        self.px_decoder: nn.Module = nn.Sequential(output, nn.Softplus())

    def _build_softmax(self) -> None:
        config = self.config
        shared = (config.n_layers, config.n_hidden, config.dropout_rate)
        labels = [config.n_labels]
        n_encoded = config.n_input + BATCH_DIMENSIONS * config.encode_covariates
        n_decoded = config.n_latent + BATCH_DIMENSIONS
        self._embeddings_dict = nn.ModuleDict(
            {"batch": nn.Embedding(config.n_batch, BATCH_DIMENSIONS)}
        )
        self.z_encoder = Encoder(n_encoded, config.n_latent, labels, *shared)
        self.decoder = FCLayers(n_decoded, config.n_hidden, labels, *shared)
        self.px_decoder = nn.Linear(config.n_hidden, config.n_input)
        self.per_ct_bias = nn.Parameter(torch.zeros(config.n_labels, config.n_input))
        if config.prior == "mog":
            shape = (config.n_labels, config.num_classes_mog)
            self.prior_means = nn.Parameter(torch.randn(*shape, config.n_latent))
            self.prior_log_std = nn.Parameter(torch.full((*shape, config.n_latent), -2.0))
            self.prior_logits = nn.Parameter(torch.zeros(shape))
        if config.n_fine_labels is not None:
            self.linear_mapping = FCLayers(
                n_in=config.n_latent,
                n_out=config.n_hidden,
                n_cat_list=labels,
                n_layers=1,
                n_hidden=config.n_hidden,
                dropout_rate=0.0,
                batch_norm=True,
            )
            head = nn.Sequential(nn.Linear(config.n_hidden, config.n_fine_labels))
            self.classifier = nn.ModuleDict({"classifier": head})

    @property
    def output(self) -> nn.Linear:
        """The decoder's last product, n_hidden to n_input."""
        output = cast(nn.Sequential, self.px_decoder)[0] if self.is_softplus else self.px_decoder
        return cast(nn.Linear, output)

    def library_of(self, total: Tensor) -> Tensor:
        """Return what scales px_scale: the total counts, or their logarithm in old models.

        Parameters
        ----------
        total : Tensor[n_cells, 1], total counts

        Returns
        -------
        Tensor[n_cells, 1]
        """
        return torch.log(total.clamp_min(1)) if self.config.library == "log" else total

    @working_precision
    def mean_of_rate(self, rate: Tensor) -> Tensor:
        """Return the expected counts of px_rate, Tensor[..., n_input] both."""
        return rate * torch.exp(self.px_r) if self.is_softplus else rate

    @working_precision
    def reconstruction(
        self, z: Tensor, x: CsrCounts, y: Tensor, batch_index: Tensor | None, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of sparse counts given z.

        Parameters
        ----------
        z : Tensor[n_cells, n_latent]
        x : CsrCounts
            Raw counts of n_cells x n_input.
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.
        factor : Tensor[n_cells]
            Weight of each cell in the sum.

        Returns
        -------
        tuple of Tensor[] and Tensor[n_cells]
            The weighted sum, and each cell's own without gradients.
        """
        biases = self.row_biases
        row_bias = None if biases is None else (biases, y.reshape(-1).long())
        return nb_reconstruction(
            self.decoder_hidden(z, y, batch_index),
            weight=self.output.weight,
            bias=self.output.bias,
            px_r=self.px_r,
            library=self.library_of(x.library()),
            x=x,
            cell_factor=factor,
            generative=self.config.generative,
            row_bias=row_bias,
        )

    @property
    def row_biases(self) -> Tensor | None:
        """Biases of the output by label, Tensor[n_labels, n_input]; None where there are none."""
        return None if self.is_softplus or not self.config.n_labels else self.per_ct_bias

    @working_precision
    def kl(self, qz: Normal, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return each cell's divergence of qz from its prior.

        Parameters
        ----------
        qz : Normal
            Posterior of z, Tensor[n_cells, n_latent].
        y : Tensor[n_cells, 1], label codes
        noise : Tensor[MIXTURE_DRAWS, n_cells, n_latent], optional
            Standard normal draws that a mixture prior needs; by default from torch's global
            generator.

        Returns
        -------
        Tensor[n_cells]
        """
        if self.config.prior == "normal":
            return kl_to_standard_normal(qz)
        if noise is None:
            shape, like = (MIXTURE_DRAWS, *qz.loc.shape), qz.loc
            noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        return kl_to_mixture(qz, *self._components(y), noise)

    @working_precision
    def prior_of(self, y: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z's prior, of one component of a mixture.

        Parameters
        ----------
        y : Tensor[n_cells, 1], label codes
        choice : Tensor[n_cells], float64
            Uniform on [0, 1): picks the component, each as often as its weight says.

        Returns
        -------
        tuple of Tensor[n_cells, n_latent]
        """
        if self.config.prior == "normal":
            loc = self.px_r.new_zeros(len(y), self.config.n_latent)
            return loc, torch.ones_like(loc)
        means, log_std, logits = self._components(y)
        reached = torch.softmax(logits.double(), 1).cumsum(1) <= choice[:, None]
        # Rounding may leave the last sum a little below 1.
        component = reached.sum(1).clamp_max(logits.shape[1] - 1)
        rows = torch.arange(len(y), device=y.device)
        return means[rows, component], torch.exp(log_std[rows, component]) + MIXTURE_FLOOR

    @working_precision
    def prior_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of z's prior.

        Parameters
        ----------
        y : Tensor[n_cells, 1], label codes

        Returns
        -------
        tuple of Tensor[n_cells, n_latent] and Tensor[n_cells, n_latent, n_latent]
        """
        n_latent = self.config.n_latent
        if self.config.prior == "normal":
            mean = self.px_r.new_zeros(len(y), n_latent)
            return mean, torch.eye(n_latent).to(mean).expand(len(y), -1, -1)
        means, log_std, logits = self._components(y)
        weights = torch.softmax(logits, 1)[:, :, None]
        mean = (weights * means).sum(1)
        around = means - mean[:, None]
        within = (weights * (torch.exp(log_std) + MIXTURE_FLOOR) ** 2).sum(1)
        return mean, torch.diag_embed(within) + (weights * around).mT @ around

    @working_precision
    def prior_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the log-density of the prior.

        Parameters
        ----------
        z : Tensor[..., n_cells, n_latent]
        y : Tensor[n_cells, 1], label codes

        Returns
        -------
        Tensor[..., n_cells]
        """
        if self.config.prior == "normal":
            return Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
        return mixture(*self._components(y)).log_prob(z)

    def _components(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, log standard deviations and logits of each cell's mixture prior."""
        label = y.reshape(-1).long()
        return self.prior_means[label], self.prior_log_std[label], self.prior_logits[label]

    @working_precision
    def classify(self, z: Tensor, label_index: Tensor) -> Tensor:
        """Return the logits of the fine labels.

        Parameters
        ----------
        z : Tensor[n_cells, n_latent]
        label_index : Tensor[n_cells] or Tensor[n_cells, 1], label codes

        Returns
        -------
        Tensor[n_cells, n_fine_labels]

        Raises
        ------
        ModelError
            If the model has no fine labels.
        """
        if self.config.n_fine_labels is None:
            raise ModelError("this model has no fine labels", "train with n_fine_labels")
        return self.classifier["classifier"](self.linear_mapping(z, label_index))

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
        self.output.bias.copy_(torch.log(torch.expm1(fraction) if self.is_softplus else fraction))

    def _encoder_categories(
        self, y: Tensor, batch_index: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return (y, batch_index) if self.is_softplus else (y,)

    def _encoded_batch(self, y: Tensor, batch_index: Tensor | None) -> Tensor | None:
        """Return the batch as the softmax form's encoder reads it, None in the softplus form."""
        if self.is_softplus or not self.config.encode_covariates:
            return None
        return self._batch_embedding(y, batch_index)

    def _batch_embedding(self, y: Tensor, batch_index: Tensor | None) -> Tensor:
        codes = torch.zeros_like(y) if batch_index is None else batch_index
        return self._embeddings_dict["batch"](codes.reshape(-1).long())

    @working_precision
    def decoder_hidden(
        self,
        z: Tensor,
        y: Tensor,
        batch_index: Tensor | None,
        rows_per_product: int | None = None,
    ) -> Tensor:
        """Return the decoder's last hidden layer.

        Parameters
        ----------
        z : Tensor[..., n_cells, n_latent]
        y, batch_index : Tensor[n_cells, 1]
            Label and batch codes.
        rows_per_product : int, optional
            As in `FCLayers.forward`.

        Returns
        -------
        Tensor[..., n_cells, n_hidden]
        """
        z = z.to(self.px_r.dtype)
        if self.is_softplus:
            return self.decoder(z, y, batch_index, rows_per_product=rows_per_product)
        embedded = self._batch_embedding(y, batch_index).expand(*z.shape[:-1], -1)
        joined = torch.cat((z, embedded), dim=-1)
        return self.decoder(joined, y, rows_per_product=rows_per_product)

    def _px_scale(self, h: Tensor, y: Tensor) -> Tensor:
        if self.is_softplus:
            return self.px_decoder(h)
        logits = self.px_decoder(h)
        if self.config.n_labels:
            logits = logits + self.per_ct_bias[y.reshape(-1).long()]
        return torch.softmax(logits, dim=-1)

    def _cell_weight(self, y: Tensor) -> Tensor:
        if self.config.n_labels == 0:
            return torch.ones(len(y), dtype=self.px_r.dtype, device=y.device)
        return self.ct_weight[y.reshape(-1).long()]

    def _counts(self, px_rate: Tensor, px_scale: Tensor) -> NegativeBinomial:
        if self.is_softplus:
            return NegativeBinomial(px_rate, self.px_r, px_scale)
        return NegativeBinomial.from_mean(px_rate, self.px_r, px_scale)
