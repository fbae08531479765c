"""Per-cell analyses of CondSCVI as methods of a trained model.

Arguments keep scvi-tools' names and meaning. What scvi-tools draws from its global generator is
keyed here by ``seed`` and the cells' names; ``batch_size`` and ``dataloader`` have no counterpart,
since memory is bounded anyway. Where a method of scvi-tools 1.4.2 fails or means something else,
docs/analyses.md says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rayvaec.errors import ConfigError, ModelError
from rayvaec.inference import posterior
from rayvaec.inference.analyses import marginal_likelihood
from rayvaec.inference.analyses.normalized_expression import (
    Wanted,
    normalized_expression,
    positions,
)
from rayvaec.inference.cells import Cells
from rayvaec.inference.named_model import NamedModel, chosen_names
from rayvaec.inference.posterior import blocks, check_draws
from rayvaec.kernels import transfer
from rayvaec.util.messages import Names, as_names, suggest

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame


class CellAnalyses(NamedModel):
    """What is computed of every cell by itself, under scvi-tools' names.

    Every method takes ``labels_key``, ``layer``, ``allow_missing`` and ``indices`` of
    `TrainedModel.cells` as further arguments.
    """

    def get_latent_representation(
        self,
        adata: AnnData,
        *,
        give_mean: bool = True,
        return_dist: bool = False,
        seed: int = 0,
        **alignment: Any,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return where the cells lie in latent space.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        give_mean : bool
            Whether to return the mean of q(z | x, y) instead of a draw from it.
        return_dist : bool
            Whether to return mean and variance, whatever `give_mean` says.
        seed : int
            Seed of the draw.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        NDArray[n_cells, n_latent], or two of them
        """
        check_draws(1, seed)
        cells = self.cells(adata, **alignment)
        mean, variance = posterior.latent(self.module, cells)
        if return_dist:
            return mean, variance
        return mean if give_mean else np.concatenate(list(self._drawn_z(cells, seed)))

    def get_elbo(
        self, adata: AnnData, *, return_mean: bool = True, seed: int = 0, **alignment: Any
    ) -> float | NDArray[np.float64]:
        """Return the evidence lower bound: of a cell on average, or of each.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        return_mean : bool
            Whether to average over the cells.
        seed : int
            Seed of z's noise.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        float or NDArray[n_cells], in nats, higher is better
        """
        check_draws(1, seed)
        bound = posterior.elbo(self.module, self.cells(adata, **alignment), seed)
        return float(bound.mean()) if return_mean else bound

    def get_reconstruction_error(
        self, adata: AnnData, *, return_mean: bool = True, seed: int = 0, **alignment: Any
    ) -> dict[str, float | NDArray[np.float64]]:
        """Return -log p(x | z, y) at one draw of z: of a cell on average, or of each.

        Parameters and units as in `get_elbo`; lower is better.

        Returns
        -------
        dict
            ``reconstruction_loss``: float or NDArray[n_cells].
        """
        check_draws(1, seed)
        error, _ = posterior.bound_terms(self.module, self.cells(adata, **alignment), seed)
        return {"reconstruction_loss": float(error.mean()) if return_mean else error}

    def get_marginal_ll(
        self,
        adata: AnnData,
        *,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        seed: int = 0,
        **alignment: Any,
    ) -> float | NDArray[np.float64]:
        """Estimate log p(x | y) by importance sampling: of a cell on average, or of each.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        n_mc_samples : int
            Samples of z a cell.
        return_mean : bool
            Whether to average over the cells.
        seed : int
            Seed of z's noise.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        float or NDArray[n_cells], in nats, higher is better
        """
        check_draws(n_mc_samples, seed)
        cells = self.cells(adata, **alignment)
        found = marginal_likelihood.marginal_ll(self.module, cells, n_mc_samples, seed)
        return float(found.mean()) if return_mean else found

    def get_normalized_expression(
        self,
        adata: AnnData,
        *,
        transform_batch: Names | None = None,
        gene_list: Names | None = None,
        library_size: float | Literal["latent"] = 1.0,
        n_samples: int = 1,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        use_posterior_mean: bool = False,
        seed: int = 0,
        **alignment: Any,
    ) -> DataFrame | NDArray[np.float32]:
        """Return denoised expression at draws of z.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        transform_batch : str, number or sequence of them, optional
            Batch to decode every cell as if from; the average over several. Numbers are read as
            their text.
        gene_list : str or sequence of str, optional
            Genes to return, in this order.
        library_size : float or "latent"
            What a cell's expression sums to; ``"latent"`` gives expected counts.
        n_samples : int
            Draws of z a cell.
        return_mean : bool
            Whether to average over the draws.
        return_numpy : bool, optional
            Whether to return an array; several draws always come as one.
        use_posterior_mean : bool
            Whether to decode the mean of z instead of draws: what `TrainedModel.expression` does.
        seed : int
            Seed of the draws.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        DataFrame[n_cells, n_genes], an array of the same, or an array [n_samples, n_cells, n_genes]

        Raises
        ------
        ConfigError
            If a batch or gene is unknown (valid ones are listed) or a number out of range.
        """
        check_draws(n_samples, seed)
        if library_size != "latent" and not float(library_size) > 0:
            raise ConfigError(f"library_size={library_size}", "give a number > 0, or 'latent'")
        genes = None if gene_list is None else as_names(gene_list)
        wanted = Wanted(
            n_samples=0 if use_posterior_mean else n_samples,
            seed=seed,
            library_size=library_size,
            batches=self.batch_codes(transform_batch),
            genes=None if genes is None else self._columns(genes),
            average=return_mean,
        )
        found = normalized_expression(self.module, self.cells(adata, **alignment), wanted)
        if return_numpy or found.ndim == 3:
            return found
        from pandas import DataFrame

        return DataFrame(
            found,
            index=chosen_names(adata, alignment.get("indices")),
            columns=list(self.registry.genes if genes is None else genes),
        )

    @torch.no_grad()
    def predict(
        self,
        adata: AnnData,
        *,
        soft: bool = False,
        use_posterior_mean: bool = True,
        seed: int = 0,
        **alignment: Any,
    ) -> NDArray[Any] | DataFrame:
        """Predict fine labels, with a model that was trained on some.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes, with their (coarse) labels.
        soft : bool
            Whether to return probabilities.
        use_posterior_mean : bool
            Whether to classify the mean of z instead of a draw.
        seed : int
            Seed of the draw.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        array[n_cells] of str, or DataFrame[n_cells, n_fine_labels] whose rows sum to 1

        Raises
        ------
        ModelError
            If the model has no fine labels.
        """
        if self.module.config.n_fine_labels is None:
            raise ModelError("this model has no fine labels", "train with n_fine_labels")
        check_draws(1, seed)
        cells = self.cells(adata, **alignment)
        wanted = Wanted(0 if use_posterior_mean else 1, seed)
        probability = np.empty((len(cells), self.module.config.n_fine_labels), np.float32)
        for block in blocks(self.module, cells):
            (z,) = positions(self.module, block, cells.keys[block.rows], wanted)
            logits = self.module.classify(z, block.y)[: block.n]
            probability[block.rows] = transfer.to_host(logits.softmax(1))
        if not soft:
            return np.array(self.fine_labels)[probability.argmax(1)]
        from pandas import DataFrame

        index = chosen_names(adata, alignment.get("indices"))
        return DataFrame(probability, index=index, columns=list(self.fine_labels))

    def _drawn_z(self, cells: Cells, seed: int) -> Any:
        with torch.no_grad():
            for block in blocks(self.module, cells):
                (z,) = positions(self.module, block, cells.keys[block.rows], Wanted(1, seed))
                yield transfer.to_host(z[: block.n])

    def _columns(self, genes: Sequence[str]) -> NDArray[np.int64]:
        column = {gene: number for number, gene in enumerate(self.registry.genes)}
        for gene in genes:
            if gene not in column:
                near = suggest(gene, self.registry.genes, 5)
                raise ConfigError(f"the model has no gene {gene!r}", f"it has {near}")
        return np.array([column[gene] for gene in genes], np.int64)
