"""Training objective: the model built from store and configuration, and its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayvaec.data.registry import Registry
from rayvaec.data.store.open import Store
from rayvaec.kernels.counts import CsrCounts
from rayvaec.model.inputs import CellTensors
from rayvaec.model.vaec import VAEC
from rayvaec.training.config import TrainConfig
from rayvaec.training.initialization import start_from_counts
from rayvaec.training.schedule import noise_seed

SMALLEST_SHARE = 0.05
"""Labels rarer than this weigh no more with `weight_obs`, as in scvi-tools' CondSCVI."""


def model_registry(store: Store, config: TrainConfig) -> Registry:
    """Return the names that the model knows: the store's, without batches if not conditioned."""
    if config.use_batches:
        return store.registry
    return replace(store.registry, batches=(), batch_key=None)


def build_module(store: Store, config: TrainConfig) -> VAEC:
    """Build a VAEC for a store, with its start values.

    Parameters
    ----------
    store : Store
        Gives genes, labels, batches and their totals.
    config : TrainConfig
        Gives the architecture and the seed.

    Returns
    -------
    VAEC
        On the CPU; the same for every worker.
    """
    manifest, registry = store.manifest, model_registry(store, config)
    ct_weight = label_weights(np.array(manifest.cells_per_label)) if config.weight_obs else None
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it is
        torch.manual_seed(noise_seed(config.seed, "weights"))
        module = VAEC(
            registry.n_genes,
            registry.n_labels,
            n_hidden=config.n_hidden,
            n_latent=config.n_latent,
            n_layers=config.n_layers,
            log_variational=config.log_variational,
            ct_weight=ct_weight,
            dropout_rate=config.dropout_rate,
            generative=config.generative,
            prior=config.prior,
            # The softmax form embeds the batch, even where there is but one.
            n_batch=max(registry.n_batches, int(config.generative == "softmax")),
            encode_covariates=config.encode_covariates and registry.n_batches > 0,
        )
    if config.start_from_counts:
        start_from_counts(module, store)
    return module


def label_weights(cells_per_label: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return a weight for the cells of each label, inverse to how common it is.

    As `weight_obs` of scvi-tools' CondSCVI: shares below 0.05 count as 0.05, and the weights are
    one over the shares thus raised, normalised to sum to one.

    Parameters
    ----------
    cells_per_label : NDArray[n_labels] of int
        Number of cells of each label.

    Returns
    -------
    NDArray[n_labels] of float64
    """
    share = np.maximum(cells_per_label / cells_per_label.sum(), SMALLEST_SHARE)
    return share.sum() / share


class Replica(nn.Module):
    """A VAEC whose forward pass is its loss on a part of a global minibatch.

    Parameters
    ----------
    module : VAEC
        The model.
    """

    def __init__(self, module: VAEC) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        x: CsrCounts,
        y: Tensor,
        batch_index: Tensor | None,
        noise: Tensor,
        kl_weight: float,
        n_global: int,
    ) -> tuple[Tensor, Tensor]:
        """Return a loss whose gradient, summed over workers, is that of the global minibatch.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of this worker's share, n_cells x n_input; may be empty.
        y, batch_index : Tensor[n_cells, 1], int64
            Label and batch codes.
        noise : Tensor[n_noise, n_cells, n_latent]
            Standard normal noise.
        kl_weight : float
            Weight of the Kullback-Leibler term.
        n_global : int
            Cells of the minibatch over all workers. The sum over this worker's cells is divided
            by it: unequal shares then still add up to the exact mean.

        Returns
        -------
        loss : Tensor[]
            To be differentiated.
        per_cell : Tensor[n_cells]
            Unweighted loss of each cell, without gradient.
        """
        if x.n_cells == 0:
            # A worker without cells takes part in the all-reduce with zero gradients.
            zero = torch.stack([p.sum() for p in self.parameters()]).sum() * 0.0
            return zero, zero.detach().new_empty(0)
        output = self.module.minibatch_loss(
            x, y, batch_index, kl_weight=kl_weight, divisor=n_global, noise=noise
        )
        return output.loss, output.reconstruction_loss + kl_weight * output.kl_local


def as_tensors(rows: Any, module: VAEC) -> tuple[CsrCounts, Tensor, Tensor | None]:
    """Bring a minibatch, or rows of a store, to where the model is.

    Parameters
    ----------
    rows : Minibatch or Rows
        ``indptr, indices, counts, labels, batches`` as numpy arrays.
    module : VAEC
        The model.

    Returns
    -------
    x : CsrCounts
        Raw counts of n_cells x n_input, in the stored dtypes.
    y, batch_index : Tensor[n_cells, 1], int64
        Label and batch codes; None where the model is not conditioned on batches.
    """
    x, y, batch_index = CellTensors.of(rows, module.config.n_input, module.px_r.device)
    return x, y, batch_index if module.config.n_batch > 1 else None
