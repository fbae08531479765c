"""Export a model as scvi-tools saves CondSCVI."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rayvaec.errors import ModelError
from rayvaec.model.config import VAECConfig
from rayvaec.model.saved import read_model
from rayvaec.model.scvi.versions import standard_mixture
from rayvaec.model.vaec import VAEC
from rayvaec.util.atomic import whole_output

MODEL = "model.pt"

DEFAULT_BATCH = "_scvi_batch"
"""The obs column that scvi-tools makes up for data without batches."""

WRITTEN_AS = {"softplus": "1.4.0", "softmax": "1.4.2"}
"""The newest scvi-tools of each form that the export was checked with; it stands in the file."""

OPENED_BY = {
    "softplus": "scvi-tools 1.3.0 to 1.4.0 opens it; later ones compute the softmax form only",
    "softmax": "scvi-tools 1.4.1 and later opens it",
}

AS_MIXTURE = (
    "; its standard normal prior is written as a mixture of one component, the only kind of prior "
    "that DestVI.from_rna_model of 1.4.2 takes"
)


class NamedModel(Protocol):
    """A VAEC and its names: `ImportedModel`, `SavedModel` or `rayvaec.TrainedModel`."""

    @property
    def module(self) -> VAEC:
        """The model."""

    @property
    def registry(self) -> Any:
        """Genes, labels and batches: a dict as in registry.json, or what has a `to_json`."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the model comes from."""


def export_condscvi(
    model: NamedModel | str | Path,
    path: str | Path,
    *,
    layer: str | None = None,
    keep_prior: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a folder that ``scvi.model.CondSCVI.load(path, adata=adata)`` opens.

    Parameters
    ----------
    model : NamedModel, or path of a model folder
        The model.
    path : str or Path
        The folder to write.
    layer : str, optional
        Layer of ``adata`` in which scvi-tools shall find the counts; by default the one that an
        imported model was trained on, or else X.
    keep_prior : bool
        Whether the softmax form's standard normal prior is written plainly. By default it is
        written as a mixture of one component, which is the same distribution, because scvi-tools
        1.4.2 makes a DestVI of models with a mixture prior alone.
    overwrite : bool
        Whether an existing folder is replaced.

    Returns
    -------
    str
        Which scvi-tools opens the folder, in a sentence.

    Raises
    ------
    ModelError
        If no scvi-tools that saves model.pt computes the model's form, or names are missing.
    StoreError
        If `path` exists and may not be replaced.
    """
    if isinstance(model, str | Path):
        model = read_model(Path(model))
    config, registry = model.module.config, model.registry
    if not isinstance(registry, dict):
        registry = registry.to_json()
    _check(config, registry)
    as_mixture = config.generative == "softmax" and config.prior == "normal" and not keep_prior
    state = {name: value.cpu().contiguous() for name, value in model.module.state_dict().items()}
    init_params = _init_params(config)
    if as_mixture:
        state |= standard_mixture(config.n_labels, config.n_latent)
        init_params["kwargs"]["module_kwargs"] |= {"prior": "mog", "num_classes_mog": 1}
    content = {
        "model_state_dict": state,
        "var_names": np.array(registry["genes"], object),
        "attr_dict": {
            "is_trained_": True,
            "init_params_": init_params,
            "registry_": _registry(config, registry, layer or model.provenance.get("layer")),
        },
    }
    with whole_output(Path(path), overwrite) as partial:
        partial.mkdir()
        torch.save(content, partial / MODEL)
    return OPENED_BY[config.generative] + (AS_MIXTURE if as_mixture else "")


def _check(config: VAECConfig, registry: dict[str, Any]) -> None:
    if config.library == "log":
        raise ModelError(
            "the model takes the logarithm of the library, which scvi-tools ended with 0.16",
            "no export is possible; keep the folder that it was imported from",
        )
    for what, names, needed in (
        ("genes", registry["genes"], config.n_input),
        ("labels", registry["labels"], config.n_labels),
        ("batches", registry["batches"] or [0], max(config.n_batch, 1)),
        ("fine labels", registry.get("fine_labels", []), config.n_fine_labels or 0),
    ):
        if len(names) != needed:
            raise ModelError(
                f"the registry names {len(names)} {what} and the weights are for {needed}",
                "export a model whose registry is whole",
            )


def _init_params(config: VAECConfig) -> dict[str, Any]:
    names = ["log_variational"]
    if config.generative == "softmax":
        # DestVI.from_rna_model looks the prior up here, also where it is the default.
        names += ["prior", "num_classes_mog"]
    if config.encode_covariates:
        names += ["encode_covariates"]
    own = ("n_hidden", "n_latent", "n_layers", "dropout_rate")
    return {
        "kwargs": {"module_kwargs": {name: getattr(config, name) for name in names}},
        # The weights of labels are saved as a buffer: weight_obs would compute them from the data.
        "non_kwargs": {**{name: getattr(config, name) for name in own}, "weight_obs": False},
    }


def _registry(config: VAECConfig, registry: dict[str, Any], layer: str | None) -> dict[str, Any]:
    """Return what ``CondSCVI.setup_anndata`` would have recorded about the training data."""
    n_genes = len(registry["genes"])
    labels_key, batch_key = registry["labels_key"], registry["batch_key"]
    batches = registry["batches"] if batch_key is not None else [0]
    arguments = {"labels_key": labels_key, "batch_key": batch_key, "layer": layer}
    fields = {
        "X": {
            "data_registry": {"attr_name": "layers" if layer else "X", "attr_key": layer},
            "state_registry": {
                "n_obs": 0,
                "n_vars": n_genes,
                "column_names": np.array(registry["genes"], object),
            },
            "summary_stats": {"n_vars": n_genes, "n_cells": 0},
        },
        "labels": _column("labels", labels_key, registry["labels"]),
        "batch": _column("batch", batch_key or DEFAULT_BATCH, batches),
    }
    fine_key = registry.get("fine_labels_key")
    if fine_key is not None:
        fine = registry["fine_labels"]
        fields["fine_labels"] = _column("fine_labels", fine_key, fine, unlabeled_category=fine[-1])
        arguments |= {"fine_labels_key": fine_key, "unlabeled_category": fine[-1]}
    return {
        "scvi_version": WRITTEN_AS[config.generative],
        "model_name": "CondSCVI",
        "setup_method_name": "setup_anndata",
        "setup_args": arguments,
        "field_registries": fields,
    }


def _column(field: str, key: str, names: list[Any], **more: Any) -> dict[str, Any]:
    """Return what is recorded about a column of obs and its categories."""
    categories = np.array(names, int if names == [0] else object)
    return {
        "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{field}"},
        "state_registry": {"categorical_mapping": categories, "original_key": key, **more},
        "summary_stats": {f"n_{field}": len(names)},
    }
