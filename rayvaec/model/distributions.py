"""Negative-binomial distribution in both parameterisations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

RATE_FLOOR = 1e-12
"""Smallest total count: below it lgamma(r) overflows though the probability is well defined."""


class NegativeBinomial:
    """Negative binomial with `total_count` failures and the log-odds `logits` of a success.

    Parameters
    ----------
    total_count : Tensor[..., n_genes], > 0
        Inverse dispersion r; in VAEC's softplus form ``library * px_scale``.
    logits : Tensor[n_genes] or broadcastable
        Log-odds of a success; the mean is ``total_count * exp(logits)``.
    scale : Tensor[..., n_genes], optional
        px_scale, where the counts are those of a model: kept as scvi-tools' distributions keep it.
    """

    def __init__(self, total_count: Tensor, logits: Tensor, scale: Tensor | None = None) -> None:
        self.total_count = total_count.clamp_min(RATE_FLOOR)
        self.logits, self.scale = logits, scale

    @classmethod
    def from_mean(
        cls, mean: Tensor, log_dispersion: Tensor, scale: Tensor | None = None
    ) -> NegativeBinomial:
        """Build from the mean and the logarithm of the inverse dispersion (softmax form).

        Parameters
        ----------
        mean : Tensor[..., n_genes], > 0
        log_dispersion : Tensor[n_genes]
        scale : Tensor[..., n_genes], optional
            As in the constructor.

        Returns
        -------
        NegativeBinomial
        """
        logits = torch.log(mean.clamp_min(RATE_FLOOR)) - log_dispersion
        return cls(torch.exp(log_dispersion), logits, scale)

    @property
    def mean(self) -> Tensor:
        """Expected counts, Tensor[..., n_genes]."""
        return self.total_count * torch.exp(self.logits)

    @property
    def mu(self) -> Tensor:
        """Expected counts, under scvi-tools' name."""
        return self.mean

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, under scvi-tools' name: `total_count`."""
        return self.total_count

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of one draw."""
        return torch.broadcast_shapes(self.total_count.shape, self.logits.shape)

    def expand(self, batch_shape: Sequence[int]) -> NegativeBinomial:
        """Return the distribution repeated to another shape of a draw, without copies.

        Parameters
        ----------
        batch_shape : sequence of int
            A shape that `batch_shape` can be expanded to.

        Returns
        -------
        NegativeBinomial
        """
        shape = torch.Size(batch_shape)
        scale = None if self.scale is None else self.scale.expand(shape)
        return NegativeBinomial(self.total_count.expand(shape), self.logits.expand(shape), scale)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, Tensor[..., n_genes]."""
        return self.mean * (1 + torch.exp(self.logits))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-probability of each count.

        Parameters
        ----------
        x : Tensor[..., n_genes], raw counts

        Returns
        -------
        Tensor[..., n_genes]
        """
        r = self.total_count
        return (
            torch.lgamma(x + r)
            - torch.lgamma(r)
            - torch.lgamma(x + 1)
            + x * functional.logsigmoid(self.logits)
            - r * functional.softplus(self.logits)
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw counts as a Poisson of a Gamma, from torch's global generator; float32 holds them.

        Parameters
        ----------
        sample_shape : sequence of int
            Leading dimensions: as many draws, each of `batch_shape`.

        Returns
        -------
        Tensor[*sample_shape, ..., n_genes], whole numbers
        """
        with torch.no_grad():
            r, logits = torch.broadcast_tensors(self.total_count, self.logits)
            gamma = torch.distributions.Gamma(r, torch.exp(-logits))
            return torch.poisson(gamma.sample(torch.Size(sample_shape)))
