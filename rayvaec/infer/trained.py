"""A trained model and its names: what it says about an AnnData."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rayvaec.data.names import listing
from rayvaec.data.registry import Registry
from rayvaec.errors import ConfigError, CountsError, ModelError
from rayvaec.infer import posterior
from rayvaec.infer.posterior import Cells
from rayvaec.kernels.keys import cell_keys
from rayvaec.model.saved import SavedModel, read_model

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("rayvaec")


class TrainedModel:
    """A VAEC with the names of its genes, labels and batches.

    AnnData is aligned by gene name; the labels are read from the registry's own column of obs
    unless ``labels_key`` names another. A cell's random numbers are keyed by its obs name: the
    same name, counts and seed give the same draws wherever they are computed.

    Parameters
    ----------
    saved : SavedModel
        What `rayvaec.model.saved.read_model` returned.

    Attributes
    ----------
    module : VAEC
        The model, in evaluation mode.
    registry : Registry
        Genes, labels and batches, in the order of the model's codes.
    provenance : dict
        How the model came to be: versions, seed, store hash, metrics, date.
    hash : str
        Identity of configuration, registry and weights.
    summary : TrainingSummary or None
        What the training data looks like, where the model knows.
    """

    def __init__(self, saved: SavedModel) -> None:
        self.module = saved.module
        self.registry = Registry.from_json(saved.registry)
        self.provenance = saved.provenance
        self.hash, self.summary = saved.hash, saved.summary
        config = saved.module.config
        if (config.n_input, config.n_labels) != (self.registry.n_genes, self.registry.n_labels):
            raise ModelError(
                f"the weights are for {config.n_input} genes and {config.n_labels} labels, the "
                f"registry has {self.registry.n_genes} and {self.registry.n_labels}",
                "copy the model folder again",
            )

    def describe(self) -> str:
        """Return what the model is, in a few lines for a person."""
        config, registry = self.module.config, self.registry
        lines = {
            "model": f"VAEC, {config.generative} form, hash {self.hash[:12]}",
            "genes": f"{registry.n_genes}: {listing(registry.genes, 3)}",
            "labels": f"{registry.n_labels} in {registry.labels_key}: {listing(registry.labels)}",
            "batches": f"{registry.n_batches} in {registry.batch_key}: {listing(registry.batches)}",
            "network": f"{config.n_layers} x {config.n_hidden} hidden, {config.n_latent} latent",
            **{name: _shown(value) for name, value in self.provenance.items()},
        }
        if not registry.batches:
            del lines["batches"]
        width = max(map(len, lines)) + 2
        return "\n".join(f"{name:{width}}{text}" for name, text in lines.items())

    def cells(
        self,
        adata: AnnData,
        *,
        labels_key: str | None = None,
        layer: str | None = None,
        allow_missing: bool = False,
    ) -> Cells:
        """Bring an AnnData into the model's gene order and codes.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes, in any gene order.
        labels_key : str, optional
            Column of obs with the labels; by default the registry's own.
        layer : str, optional
            Layer with the counts; X by default.
        allow_missing : bool
            Whether genes that `adata` lacks count as zero instead of being an error.

        Returns
        -------
        Cells

        Raises
        ------
        CountsError
            If counts, genes or labels do not fit; the message names them.
        """
        aligned = self.registry.align(
            adata, labels_key=labels_key, layer=layer, allow_missing=allow_missing
        )
        if aligned.missing or aligned.extra:
            logger.warning(
                "adata: %d genes of the model are missing (taken as zero), %d genes are not in it",
                *(len(aligned.missing), len(aligned.extra)),
            )
        return Cells(
            *(aligned.indptr, aligned.indices, aligned.counts),
            *(aligned.labels, aligned.batches, cell_keys(aligned.names)),
        )

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
            ``labels_key``, ``layer``, ``allow_missing`` of `cells`.

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
            ``labels_key``, ``layer``, ``allow_missing`` of `cells`.

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
            ``labels_key``, ``layer``, ``allow_missing`` of `cells`.

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
            ``labels_key``, ``layer``, ``allow_missing`` of `cells`.

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


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)


def check_draws(n_samples: int, seed: int) -> None:
    """Refuse a number of draws below 1 and a negative seed, with a `ConfigError`."""
    if n_samples < 1:
        raise ConfigError(f"n_samples={n_samples} draws nothing", "give a whole number >= 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} is out of range", "give a whole number from 0 to 2**63 - 1")


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
