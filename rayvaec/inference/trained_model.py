"""Trained model: the public methods `sample`, `latent`, `expression`, `elbo`, ..."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rayvaec.data.registry import Registry
from rayvaec.errors import CountsError, ModelError
from rayvaec.inference import posterior
from rayvaec.inference.analyses.cell_methods import CellAnalyses
from rayvaec.inference.analyses.group_methods import GroupAnalyses
from rayvaec.inference.posterior import check_draws
from rayvaec.model.saved import read_model

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("rayvaec")


class TrainedModel(CellAnalyses, GroupAnalyses):
    """A VAEC with the names of its genes, labels and batches.

    AnnData is aligned by gene name; the labels are read from the registry's own column of obs
    unless ``labels_key`` names another. A cell's random numbers are keyed by its obs name: the
    same name, counts and seed give the same draws wherever they are computed. scvi-tools' names for
    what follows from the model are in `CellAnalyses` (``get_elbo``, ...) and `GroupAnalyses`
    (``differential_expression``, ...); its attributes are those of `NamedModel`.
    """

    def latent(
        self, adata: AnnData, *, return_dist: bool = False, **alignment: Any
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the posterior mean of z, and its variance if asked.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        return_dist : bool
            Whether to return mean and variance.
        **alignment
            ``labels_key``, ``layer``, ``allow_missing``, ``indices`` of `cells`.

        Returns
        -------
        NDArray[n_cells, n_latent], or two of them
        """
        mean, variance = posterior.latent(self.module, self.cells(adata, **alignment))
        return (mean, variance) if return_dist else mean

    def expression(self, adata: AnnData, **alignment: Any) -> NDArray[np.float32]:
        """Return denoised expression: each gene's share of the expected counts.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        **alignment
            ``labels_key``, ``layer``, ``allow_missing``, ``indices`` of `cells`.

        Returns
        -------
        NDArray[n_cells, n_genes], rows sum to 1
        """
        return posterior.expression(self.module, self.cells(adata, **alignment))

    def elbo(self, adata: AnnData, *, seed: int = 0, **alignment: Any) -> NDArray[np.float64]:
        """Return each cell's evidence lower bound.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        seed : int
            Seed of z's noise.
        **alignment
            ``labels_key``, ``layer``, ``allow_missing``, ``indices`` of `cells`.

        Returns
        -------
        NDArray[n_cells], in nats, higher is better
        """
        return posterior.elbo(self.module, self.cells(adata, **alignment), seed)

    def sample(
        self,
        adata: AnnData,
        n_samples: int = 1,
        seed: int = 0,
        *,
        sparse: bool = False,
        **alignment: Any,
    ) -> NDArray[np.int32] | list[csr_array]:
        """Draw counts from the posterior predictive distribution.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        n_samples : int
            Draws a cell.
        seed : int
            Seed of all draws, >= 0.
        sparse : bool
            Whether to return one CSR matrix a draw instead of a dense array.
        **alignment
            ``labels_key``, ``layer``, ``allow_missing``, ``indices`` of `cells`.

        Returns
        -------
        NDArray[n_cells, n_genes, n_samples] of int32, or n_samples csr_array[n_cells, n_genes]

        Raises
        ------
        ConfigError
            If `n_samples` is below 1 or `seed` below 0.
        CountsError
            If counts, genes or labels do not fit.
        """
        check_draws(n_samples, seed)
        cells = self.cells(adata, **alignment)
        if sparse:
            return [
                _csr(posterior.draw(self.module, cells, 1, seed, first_sample=i), self.registry)
                for i in range(n_samples)
            ]
        counts = np.zeros((len(cells), self.registry.n_genes, n_samples), np.int32)
        for i in range(n_samples):
            draws = posterior.draw(self.module, cells, 1, seed, first_sample=i)
            rows = np.repeat(np.arange(len(cells)), np.diff(draws.indptr))
            counts[rows, draws.indices, i] = draws.counts
        return counts


def load_model(path: str | Path, device: str = "cpu") -> TrainedModel:
    """Open a saved model.

    Parameters
    ----------
    path : str or Path
        The model folder, such as ``RUN/model``.
    device : str
        Where the model shall compute, ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    TrainedModel

    Raises
    ------
    ModelError
        If there is no model at `path`, or it is damaged or of a newer format.
    """
    saved = read_model(Path(path), device)
    try:
        return TrainedModel(saved)
    except CountsError as error:
        raise ModelError(f"{path}/registry.json: {error}", "copy the model folder again") from error


def _csr(draws: Any, registry: Registry) -> csr_array:
    shape = (len(draws.indptr) - 1, registry.n_genes)
    return csr_array((draws.counts, draws.indices, draws.indptr), shape=shape)
