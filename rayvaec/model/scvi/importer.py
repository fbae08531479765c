"""Import CondSCVI models saved by scvi-tools.

scvi-tools 0.15 on saves one file, model.pt; before that (2021) it was model_params.pt, attr.pkl and
var_names.csv. All are pickles: `rayvaec.model.scvi.unpickle` reads them without running them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rayvaec.errors import ModelError
from rayvaec.model.config import VAECConfig
from rayvaec.model.saved import CONFIG, save_model
from rayvaec.model.scvi.exporter import DEFAULT_BATCH, MODEL, export_condscvi
from rayvaec.model.scvi.unpickle import read_pickle, read_torch_archive
from rayvaec.model.scvi.versions import arguments_of, build, without_standard_mixture
from rayvaec.model.vaec import VAEC
from rayvaec.util.atomic import check_free

__all__ = ["ImportedModel", "export_condscvi", "import_condscvi", "import_model"]

LEGACY = ("model_params.pt", "attr.pkl", "var_names.csv")

KNOWN_ARGUMENTS = {
    *("n_hidden", "n_latent", "n_layers", "dropout_rate", "log_variational", "encode_covariates"),
    *("prior", "num_classes_mog", "weight_obs", "ct_weight", "ct_prop", "use_gpu", "use_cuda"),
    *("dispersion", "gene_likelihood", "extra_encoder_kwargs", "extra_decoder_kwargs"),
}
"""Arguments of CondSCVI and VAEC in all releases; another one could mean anything."""

ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "dispersion": ("gene",),
    "gene_likelihood": ("nb",),
    "extra_encoder_kwargs": (None, {}),
    "extra_decoder_kwargs": (None, {}),
}
"""Arguments that this VAEC does not have, and the values under which it is the same model."""


@dataclass(frozen=True)
class ImportedModel:
    """A CondSCVI model, read.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    registry : dict
        ``genes``, ``labels``, ``labels_key``, ``batches`` and ``batch_key``, as in registry.json;
        models with fine labels also have ``fine_labels`` and ``fine_labels_key``.
    provenance : dict
        Where the model comes from: file, its SHA-256, scvi-tools' version, layer of the counts.
    """

    module: VAEC
    registry: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """A column of obs: its name and its categories, in the order of their codes."""

    key: str
    names: list[str]


@dataclass(frozen=True)
class _Saved:
    """What both layouts hold."""

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    genes: list[str]
    labels: _Column
    batch: _Column | None
    fine_labels: _Column | None
    layer: str | None
    scvi_version: str
    quirks: dict[str, Any]


def import_condscvi(path: str | Path) -> ImportedModel:
    """Read a folder that scvi-tools' ``CondSCVI.save`` wrote.

    Parameters
    ----------
    path : str or Path
        A folder with model.pt, or with model_params.pt, attr.pkl and var_names.csv.

    Returns
    -------
    ImportedModel

    Raises
    ------
    ModelError
        If the folder is not there, lacks a part, is damaged, names foreign code, or holds another
        model than CondSCVI or one that VAEC cannot compute.
    """
    path = Path(path)
    weights = _weights_file(path)
    content = read_torch_archive(weights)
    legacy = weights.name != MODEL
    attributes = read_pickle(path / LEGACY[1]) if legacy else None
    try:
        saved = _legacy(content, attributes, path / LEGACY[2]) if legacy else _current(content)
        module = _module(saved)
        registry = _registry(saved, module.config)
    except ModelError as error:
        raise ModelError(f"{path}: {error.detail}", error.fix) from error
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("rayvaec", "torch")},
        "imported_from": str(path.absolute()),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "scvi_tools": saved.scvi_version,
        "layer": saved.layer,
    }
    return ImportedModel(module, registry, provenance)


def import_model(path: str | Path, out: str | Path, overwrite: bool = False) -> ImportedModel:
    """Read a CondSCVI folder and write it as a model folder that `rayvaec.load_model` opens.

    Parameters
    ----------
    path : str or Path
        As in `import_condscvi`.
    out : str or Path
        The model folder to write.
    overwrite : bool
        Whether an existing folder is replaced.

    Returns
    -------
    ImportedModel

    Raises
    ------
    StoreError
        If `out` exists and may not be replaced.
    ModelError
        As in `import_condscvi`.
    """
    check_free(Path(out), overwrite)
    model = import_condscvi(path)
    save_model(Path(out), model.module, model.registry, model.provenance, overwrite)
    return model


def _weights_file(path: Path) -> Path:
    """Return the file with the weights; refuse a folder that lacks a part."""
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}", "give the folder that CondSCVI.save wrote")
    if (path / MODEL).is_file():
        return path / MODEL
    if (path / CONFIG).is_file():
        raise ModelError(f"{path} is a model of rayvaec already", "use it as it is")
    missing = [name for name in LEGACY if not (path / name).is_file()]
    if len(missing) == len(LEGACY):
        raise ModelError(
            f"{path} holds no saved CondSCVI: it has neither {MODEL} nor {', '.join(LEGACY)}",
            "give the folder that CondSCVI.save wrote; a prefix of its files must be removed",
        )
    if missing:
        raise ModelError(f"{path} has no {', '.join(missing)}", "copy the whole folder")
    return path / LEGACY[0]


def _current(content: Any) -> _Saved:
    registry = _dict(_at(content, "attr_dict", "registry_"), "registry_")
    name = registry.get("model_name", "CondSCVI")
    if name != "CondSCVI":
        raise ModelError(f"it holds a model {str(name)[:40]!r}", "only CondSCVI can be imported")
    scvi_version = str(_at(registry, "scvi_version"))
    fields = _dict(_at(registry, "field_registries"), "field_registries")
    layer = _dict(registry.get("setup_args", {}), "setup_args").get("layer")
    return _Saved(
        state=_state(_at(content, "model_state_dict")),
        arguments=_arguments(_at(content, "attr_dict", "init_params_")),
        genes=_names(_at(content, "var_names"), "genes"),
        labels=_column(_at(fields, "labels", "state_registry"), "labels"),
        batch=_optional_column(fields, "batch"),
        fine_labels=_optional_column(fields, "fine_labels"),
        layer=layer if isinstance(layer, str) else None,
        scvi_version=scvi_version,
        quirks=_quirks(scvi_version),
    )


def _legacy(state: Any, attributes: Any, var_names: Path) -> _Saved:
    setup = _at(attributes, "scvi_setup_dict_")
    counts = _dict(_at(setup, "data_registry", "X"), "data_registry.X")
    layer = counts.get("attr_key") if counts.get("attr_name") == "layers" else None
    try:
        genes = var_names.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ModelError(f"{var_names.name} is no text: {error}", "copy it again") from error
    return _Saved(
        state=_state(state),
        arguments=_arguments(_at(attributes, "init_params_")),
        genes=[gene.strip() for gene in genes],
        labels=_column(_at(setup, "categorical_mappings", "_scvi_labels"), "labels", "mapping"),
        # These releases registered a batch column, which VAEC did not look at.
        batch=None,
        fine_labels=None,
        layer=layer if isinstance(layer, str) else None,
        scvi_version=str(_at(setup, "scvi_version")),
        quirks={"library": "log"},
    )


def _quirks(scvi_version: str) -> dict[str, Any]:
    """Return the arguments that a release computed with, whatever it was told."""
    numbers = re.match(r"(\d+)\.(\d+)", scvi_version)
    release = tuple(map(int, numbers.groups())) if numbers else (1, 4)
    if release < (0, 16):
        return {"library": "log"}
    if release == (1, 2):
        # The encoder was given x, though log(1 + x) had been computed a line before.
        return {"log_variational": False}
    return {}


def _module(saved: _Saved) -> VAEC:
    _check_arguments(saved.arguments, arguments_of(saved.state))
    state = without_standard_mixture(saved.state)
    arguments = arguments_of(state)
    if arguments["n_batch"] == 0 and saved.batch is not None and len(saved.batch.names) == 1:
        arguments["n_batch"] = 1
    dropout_rate = saved.arguments.get("dropout_rate", 0.05)
    log_variational = saved.arguments.get("log_variational", True)
    if isinstance(dropout_rate, bool) or not isinstance(dropout_rate, int | float):
        raise ModelError("its dropout_rate is no number", "save the model anew")
    if not isinstance(log_variational, bool):
        raise ModelError("its log_variational is neither true nor false", "save the model anew")
    arguments |= {"dropout_rate": float(dropout_rate), "log_variational": log_variational}
    if arguments["generative"] == "softplus":
        arguments |= saved.quirks
    return build(arguments, state)


def _check_arguments(given: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the arguments that were saved with those that the weights' shapes show."""
    unknown = sorted(set(given) - KNOWN_ARGUMENTS)
    if unknown:
        raise ModelError(
            f"it was built with the argument {unknown[0]!r}, whose meaning is not known here",
            "install a newer rayvaec if there is one",
        )
    for name, values in ONLY_VALUE.items():
        if name in given and not any(_same(given[name], value) for value in values):
            raise ModelError(
                f"it was built with {name}={str(given[name])[:60]}, which VAEC here does not have",
                "only models without it can be imported",
            )
    found = {"prior": "normal", **found}
    for name in ("n_hidden", "n_latent", "n_layers", "prior"):
        if name in given and not _same(given[name], found[name]):
            raise ModelError(
                f"it says {name}={str(given[name])[:40]} and its weights show {found[name]}",
                "save the model anew",
            )


def _same(given: Any, value: Any) -> bool:
    """Compare what a pickle gave, which may be an array, with a plain value."""
    return type(given) is type(value) and given == value


def _registry(saved: _Saved, config: VAECConfig) -> dict[str, Any]:
    batch, fine = saved.batch, saved.fine_labels
    if batch is None and config.n_batch > 1:
        raise ModelError(
            f"its weights are for {config.n_batch} batches and it names none", "save the model anew"
        )
    _check_names("genes", saved.genes, config.n_input)
    _check_names("labels", saved.labels.names, config.n_labels)
    if batch is not None:
        _check_names("batches", batch.names, config.n_batch)
    registry: dict[str, Any] = {
        "genes": saved.genes,
        "labels": saved.labels.names,
        "labels_key": saved.labels.key,
        "batches": batch.names if batch else [],
        "batch_key": batch.key if batch else None,
    }
    if fine is not None and config.n_fine_labels is not None:
        _check_names("fine labels", fine.names, config.n_fine_labels)
        registry |= {"fine_labels": fine.names, "fine_labels_key": fine.key}
    return registry


def _check_names(what: str, names: list[str], expected: int) -> None:
    if len(names) != expected:
        raise ModelError(
            f"it names {len(names)} {what} and its weights are for {expected}",
            "save the model anew",
        )
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ModelError(
            f"it names {twice!r} more than once among its {what}", f"make {what} unique and retrain"
        )


def _at(value: Any, *names: str) -> Any:
    """Walk down nested dicts; a ModelError names what is not there."""
    for depth, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            raise ModelError(f"it has no {'.'.join(names[: depth + 1])}", "save the model anew")
        value = value[name]
    return value


def _dict(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"its {what} is no dict", "save the model anew")
    return value


def _state(value: Any) -> dict[str, Tensor]:
    # Pyro's parameters are saved along; CondSCVI has none.
    state = {
        name: weight
        for name, weight in _dict(value, "state dict").items()
        if name != "pyro_param_store"
    }
    for name, weight in state.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ModelError(f"its weight {str(name)[:60]!r} is no tensor", "save the model anew")
    return state


def _arguments(value: Any) -> dict[str, Any]:
    """Lay the arguments of CondSCVI and those that it passed on to VAEC side by side."""
    value = _dict(value, "init_params_")
    given = dict(_dict(value.get("non_kwargs", value), "non_kwargs"))
    passed_on = _dict(value.get("kwargs", value), "kwargs").get("module_kwargs", {})
    given |= _dict(passed_on, "module_kwargs")
    given.pop("module_kwargs", None)
    return {str(name): argument for name, argument in given.items()}


def _column(value: Any, what: str, names: str = "categorical_mapping") -> _Column:
    return _Column(str(_at(value, "original_key")), _names(_at(value, names), what))


def _optional_column(fields: dict[Any, Any], what: str) -> _Column | None:
    """Return a column that the user named; scvi-tools makes one up where there is none."""
    state = _dict(fields.get(what, {}), what).get("state_registry")
    if not state:
        return None
    column = _column(state, what)
    return None if column.key == DEFAULT_BATCH else column


def _names(value: Any, what: str) -> list[str]:
    values = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    plain = isinstance(values, list) and all(isinstance(v, str | int | float) for v in values)
    if not plain:
        raise ModelError(f"its {what} are no list of names", "save the model anew")
    return [str(name) for name in values]
