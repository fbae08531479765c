"""Model with its registry: aligns an AnnData to the model's genes, labels and batches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from rayvaec.data.inputs.memory import positions
from rayvaec.data.registry import Registry
from rayvaec.errors import ConfigError, ModelError
from rayvaec.inference.cells import Cells
from rayvaec.kernels.rng import cell_keys
from rayvaec.model.saved import SavedModel
from rayvaec.util.messages import Names, as_names, join_names

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import Index

logger = logging.getLogger("rayvaec")


class NamedModel:
    """A VAEC with the names of its genes, labels and batches.

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
    fine_labels : tuple of str
        Names of the fine labels, in models that tell some apart.
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
        self.fine_labels = tuple(map(str, saved.registry.get("fine_labels", ())))
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
        labels, batches = join_names(registry.labels), join_names(registry.batches)
        lines = {
            "model": f"VAEC, {config.generative} form, hash {self.hash[:12]}",
            "genes": f"{registry.n_genes}: {join_names(registry.genes, 3)}",
            "labels": f"{registry.n_labels} in {registry.labels_key}: {labels}",
            "batches": f"{registry.n_batches} in {registry.batch_key}: {batches}",
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
        indices: ArrayLike | None = None,
    ) -> Cells:
        """Bring an AnnData into the model's gene order and codes.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes, in any gene order.
        labels_key : str, optional
            Column of obs with the labels; by default the registry's own.
        layer : str, optional
            Layer with the counts; X by default, ``"raw"`` for the counts and genes of
            ``adata.raw``.
        allow_missing : bool
            Whether genes that `adata` lacks count as zero instead of being an error.
        indices : array-like, optional
            Positions or mask of the cells to take; all by default. A cell that is named several
            times gets several draws.

        Returns
        -------
        Cells

        Raises
        ------
        ConfigError
            If `indices` leads outside `adata`.
        CountsError
            If `adata` is not an AnnData in memory, or counts, genes or labels do not fit; the
            message names them.
        """
        aligned = self.registry.align(
            adata,
            labels_key=labels_key,
            layer=layer,
            allow_missing=allow_missing,
            rows=indices,
        )
        if aligned.missing or aligned.extra:
            logger.warning(
                "adata: %d genes of the model are missing (taken as zero), %d genes are not in it",
                len(aligned.missing),
                len(aligned.extra),
            )
        return Cells(
            indptr=aligned.indptr,
            indices=aligned.indices,
            counts=aligned.counts,
            labels=aligned.labels,
            batches=aligned.batches,
            keys=cell_keys(aligned.names),
        )

    def batch_codes(self, names: Names | None) -> tuple[int | None, ...]:
        """Return the codes of batches to decode as if from; ``(None,)`` of none named.

        Parameters
        ----------
        names : str, number or sequence of them, optional
            A scalar is one name; numbers are read as their text.

        Raises
        ------
        ConfigError
            If the model has no batches.
        CountsError
            If it does not know one; the valid ones are listed.
        """
        if names is None:
            return (None,)
        if not self.registry.batches:
            raise ConfigError(f"transform_batch={names!r} and the model has no batches", "leave it")
        return tuple(self.registry.encode_batches(as_names(names), "transform_batch").tolist())


def chosen_names(adata: AnnData, indices: ArrayLike | None) -> Index[str]:
    """Return the obs names of the cells at some positions or under a mask, by default of all."""
    if indices is None:
        return adata.obs_names
    return adata.obs_names[positions(indices, adata.n_obs, "indices")]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)
