"""The distribution of counts."""

from __future__ import annotations

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
    """

    def __init__(self, total_count: Tensor, logits: Tensor) -> None:
        self.total_count = total_count.clamp_min(RATE_FLOOR)
        self.logits = logits

    @classmethod
    def from_mean(cls, mean: Tensor, log_dispersion: Tensor) -> NegativeBinomial:
        """Build from the mean and the logarithm of the inverse dispersion (softmax form).

        Parameters
        ----------
        mean : Tensor[..., n_genes], > 0
        log_dispersion : Tensor[n_genes]

        Returns
        -------
        NegativeBinomial
        """
        logits = torch.log(mean.clamp_min(RATE_FLOOR)) - log_dispersion
        return cls(torch.exp(log_dispersion), logits)

    @property
    def mean(self) -> Tensor:
        """Expected counts, Tensor[..., n_genes]."""
        return self.total_count * torch.exp(self.logits)

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

    def sample(self) -> Tensor:
        """Draw counts as a Poisson of a Gamma, from torch's global generator; float32 holds them.

        Returns
        -------
        Tensor[..., n_genes], whole numbers
        """
        with torch.no_grad():
            r, logits = torch.broadcast_tensors(self.total_count, self.logits)
            return torch.poisson(torch.distributions.Gamma(r, torch.exp(-logits)).sample())
