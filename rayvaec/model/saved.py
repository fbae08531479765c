"""Saved models: a folder of JSON and safetensors, without pickle.

::

    config.json          format version and the arguments of VAEC
    model.safetensors    weights, under scvi-tools' names
    registry.json        genes, labels, batches
    provenance.json      versions, seed, store, metrics, date
    summary.safetensors  what the training data looks like; not in every model
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save

from rayvaec.errors import ModelError, RayvaecError
from rayvaec.model.config import VAECConfig
from rayvaec.model.scvi.versions import fill, form_of, without_memory
from rayvaec.model.training_summary import TrainingSummary, read_summary
from rayvaec.model.vaec import VAEC
from rayvaec.util.atomic import whole_output, write_json

FORMAT_VERSION = 1
CONFIG, WEIGHTS, REGISTRY, PROVENANCE = (
    "config.json",
    "model.safetensors",
    "registry.json",
    "provenance.json",
)


@dataclass(frozen=True)
class SavedModel:
    """What a saved-model folder holds.

    Parameters
    ----------
    module : VAEC
        The model in evaluation mode.
    registry, provenance : dict
        The contents of registry.json and provenance.json.
    hash : str
        SHA-256 over configuration, registry and weights: the identity of the model.
    summary : TrainingSummary, optional
        What its training data looks like.
    """

    module: VAEC
    registry: dict[str, Any]
    provenance: dict[str, Any]
    hash: str
    summary: TrainingSummary | None = None


def save_model(
    path: Path,
    module: VAEC,
    registry: dict[str, Any],
    provenance: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a model folder, whole or not at all.

    Parameters
    ----------
    path : Path
        The folder to write.
    module : VAEC
        The model.
    registry, provenance : dict
        JSON values to be kept beside the weights.
    overwrite : bool
        Whether an existing folder is replaced.

    Raises
    ------
    StoreError
        If `path` exists and may not be replaced.
    """
    with whole_output(path, overwrite) as partial:
        partial.mkdir()
        weights = {name: value.cpu().contiguous() for name, value in module.state_dict().items()}
        # Not save_file, which makes a file that nobody but its owner may read.
        (partial / WEIGHTS).write_bytes(save(weights))
        config = {"format_version": FORMAT_VERSION, **module.config.to_json()}
        write_json(partial / CONFIG, config)
        write_json(partial / REGISTRY, registry)
        write_json(partial / PROVENANCE, provenance)


def read_model(path: Path, device: str | torch.device = "cpu") -> SavedModel:
    """Read a model folder.

    Parameters
    ----------
    path : Path
        A folder that `save_model` wrote.
    device : str or torch.device
        Where the model shall lie.

    Returns
    -------
    SavedModel

    Raises
    ------
    ModelError
        If the folder is missing, not a model, damaged, or of a newer format.
    """
    path = Path(path)
    _check_folder(path)
    config = _read_json(path / CONFIG)
    version = config.pop("format_version", None)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"{path / CONFIG} has format_version {version!r} and this rayvaec reads up to "
            f"{FORMAT_VERSION}",
            "install a newer rayvaec",
        )
    try:
        arguments = VAECConfig.from_json(config)
    except (RayvaecError, TypeError) as error:
        raise ModelError(f"{path / CONFIG} does not describe a VAEC: {error}") from error
    module = without_memory(arguments.to_json())
    try:
        state = load_file(path / WEIGHTS)
        found, wanted = form_of(state), form_of(module.state_dict())
        if found != wanted:
            raise ModelError(
                f"{path / WEIGHTS} looks like {found} and {CONFIG} describes {wanted}",
                "copy the model folder again",
            )
        fill(module, state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path / WEIGHTS} does not hold the weights that {CONFIG} describes: {reason}",
            "copy the model folder again",
        ) from error
    return SavedModel(
        module.eval().to(device),
        _read_json(path / REGISTRY),
        _read_json(path / PROVENANCE),
        _hash(path),
        read_summary(path, arguments.n_input, arguments.n_labels),
    )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no model folder at {path}", "give the folder RUN/model")
    missing = [n for n in (CONFIG, WEIGHTS, REGISTRY, PROVENANCE) if not (path / n).is_file()]
    if missing:
        hint = path / "model"
        raise ModelError(
            f"{path} is not a model folder: it has no {', '.join(missing)}",
            f"give {hint}, the run's best model" if hint.is_dir() else "give the folder RUN/model",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "copy the model folder again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "copy the model folder again")
    return value


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, REGISTRY, WEIGHTS):
        digest.update(hashlib.sha256((path / name).read_bytes()).digest())
    return digest.hexdigest()
