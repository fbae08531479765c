"""Loss terms that do not depend on genes: KL divergences and the classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn import functional

MIXTURE_DRAWS = 30
"""Draws of z that estimate the divergence from a mixture, as in scvi-tools 1.4.2."""

MIXTURE_FLOOR = 1e-4
"""Added to the standard deviation of a mixture's components, as there."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of a minibatch.

    Parameters
    ----------
    loss : Tensor[]
        What the optimiser minimises.
    reconstruction_loss, kl_local : Tensor[n_cells]
        Negative log-likelihood and Kullback-Leibler term of each cell, unweighted.
    kl_global : Tensor[], optional
        Divergence of what all cells share, in scvi-tools' place for it; VAEC has none.
    classification_loss : Tensor[], optional
        Of models with fine labels: the weighted cross-entropy that `loss` holds.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    kl_local: Tensor
    kl_global: Tensor | None = None
    classification_loss: Tensor | None = None


LossRecorder = LossOutput
"""The name that scvi-tools gave `LossOutput` until 0.20."""


def kl_to_standard_normal(qz: Normal) -> Tensor:
    """Return KL(qz || N(0, I)), summed over the latent dimensions.

    Parameters
    ----------
    qz : Normal
        Posterior of z, Tensor[n_cells, n_latent].

    Returns
    -------
    Tensor[n_cells]
    """
    standard = Normal(torch.zeros_like(qz.loc), torch.ones_like(qz.scale), validate_args=False)
    return kl_divergence(qz, standard).sum(dim=-1)


def kl_to_mixture(
    qz: Normal,
    means: Tensor,
    log_std: Tensor,
    logits: Tensor,
    noise: Tensor,
) -> Tensor:
    """Estimate the divergence of qz from a mixture of Gaussians by draws of z.

    Parameters
    ----------
    qz : Normal
        Posterior of z, Tensor[n_cells, n_latent].
    means, log_std : Tensor[n_cells, n_components, n_latent]
        Components of each cell's prior.
    logits : Tensor[n_cells, n_components]
        Their weights.
    noise : Tensor[MIXTURE_DRAWS, n_cells, n_latent]
        Standard normal draws.

    Returns
    -------
    Tensor[n_cells]
    """
    prior = mixture(means, log_std, logits)
    u = qz.loc + qz.scale * noise
    return (qz.log_prob(u).sum(-1) - prior.log_prob(u)).mean(0)


def mixture(means: Tensor, log_std: Tensor, logits: Tensor) -> MixtureSameFamily:
    """Return mixtures of Gaussians, one a cell; parameters as in `kl_to_mixture`."""
    scale = torch.exp(log_std) + MIXTURE_FLOOR
    components = Independent(Normal(means, scale, validate_args=False), 1)
    return MixtureSameFamily(
        Categorical(logits=logits, validate_args=False), components, validate_args=False
    )


def classification_loss(logits: Tensor, fine_labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the cells whose fine label is known.

    Parameters
    ----------
    logits : Tensor[n_cells, n_fine_labels]
    fine_labels : Tensor[n_cells, 1]
        Codes; ``n_fine_labels`` stands for "not known".

    Returns
    -------
    Tensor[]
        Zero where no fine label is known.
    """
    codes = fine_labels.reshape(-1).long()
    known = codes != logits.shape[1]
    if not bool(known.any()):
        return logits.sum() * 0
    return functional.cross_entropy(logits[known], codes[known])
