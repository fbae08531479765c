"""Checkpoints: weights, Adam moments and position, without pickle.

::

    state.safetensors    model/<name>, adam/<parameter>/<moment>
    state.json           position, counters, and the SHA-256 of the file above

A checkpoint whose two files do not fit together is not one: a half-written or damaged folder is
passed over, never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from rayvaec.errors import RayvaecError, StoreError
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.storage_retry import retry_io
from rayvaec.util.atomic import remove, write_json

TENSORS, STATE = "state.safetensors", "state.json"
PREFIX, PARTIAL = "step_", ".partial"


@dataclass
class RunState:
    """Where a run is.

    Parameters
    ----------
    epoch : int
        Finished epochs.
    epoch_step : int
        Steps taken in the unfinished epoch.
    step : int
        Steps taken since the beginning.
    seconds : float
        Time spent on training since the beginning, over all resumes.
    epoch_seconds : float
        Time spent on steps of the unfinished epoch.
    epoch_cells : int
        Cells of the unfinished epoch, over all workers.
    loss_sum : float
        Sum of their loss.
    best_elbo : float or None
        Best validation ELBO so far.
    best_epoch : int
        Its epoch, from 1; 0 before there is one.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    epoch_cells: int = 0
    loss_sum: float = 0.0
    best_elbo: float | None = None
    best_epoch: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build from values by name, of which those that are not known here are left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def stopped(self, config: TrainConfig) -> str:
        """Return which setting ends the run here, ``"max_epochs"`` or ``"patience"``, or ``""``."""
        if self.epoch >= (config.max_epochs or 0):
            return "max_epochs"
        waited = self.epoch - self.best_epoch
        return "patience" if config.patience and waited >= config.patience else ""


def checkpoint_name(state: RunState) -> str:
    """Return the folder name of a checkpoint; names sort by step."""
    return f"{PREFIX}{state.step:010d}"


def write_checkpoint(
    folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: RunState
) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    folder : Path
        An existing empty folder.
    module : Module
        The model.
    optimizer : Optimizer
        The optimiser of all its parameters, in their order.
    state : RunState
        Where the run is.
    """
    tensors = {f"model/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{name}/{key}"] = value
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write() -> None:
        save_file(on_cpu, folder / TENSORS)
        write_json(folder / STATE, {**asdict(state), "sha256": _digest(folder / TENSORS)})

    try:
        retry_io(f"the checkpoint {folder}", write)
    except RayvaecError:
        remove(folder)
        raise


def store_checkpoint(folder: Path, checkpoints: Path, name: str) -> Path:
    """Copy a checkpoint to the checkpoints of a run: whole under its name, or not at all.

    Parameters
    ----------
    folder : Path
        What `write_checkpoint` wrote, on this machine.
    checkpoints : Path
        The folder of all checkpoints of the run; exists.
    name : str
        What it shall be called there.

    Returns
    -------
    Path
        Where it is.

    Raises
    ------
    RayvaecError
        If there is no room for it, or the storage does not come back; nothing is left then.
    """
    partial = checkpoints / f".{name}{PARTIAL}"

    def copy() -> None:
        remove(partial)
        partial.mkdir()
        for file in (TENSORS, STATE):
            shutil.copyfile(folder / file, partial / file)
            with (partial / file).open("rb+") as written:
                os.fsync(written.fileno())
        remove(checkpoints / name)  # what a lost worker left, and nobody was told of
        partial.rename(checkpoints / name)

    try:
        retry_io(f"the checkpoint {checkpoints / name}", copy, checkpoints)
    except RayvaecError:
        with suppress(OSError):
            remove(partial)
        raise
    return checkpoints / name


def read_checkpoint(
    folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> RunState:
    """Bring model and optimiser back to where a checkpoint was taken.

    Parameters
    ----------
    folder : Path
        What `write_checkpoint` wrote.
    module, optimizer : Module, Optimizer
        Are changed in place.

    Returns
    -------
    RunState

    Raises
    ------
    StoreError
        If the checkpoint is damaged, or of another model.
    """
    values = _read_state(folder)
    if values is None:
        raise StoreError(
            f"the checkpoint {folder} is damaged",
            "remove it, and go on from the one before with --resume",
        )
    tensors = load_file(folder / TENSORS)
    weights = _under("model/", tensors)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise StoreError(
            f"the checkpoint {folder} is of another model: {' '.join(str(error).split())}",
            "resume with the store and the configuration that the run was started with",
        ) from error
    moments = {
        position: _under(f"adam/{name}/", tensors)
        for position, (name, _) in enumerate(module.named_parameters())
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return RunState.from_json(values)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with most steps that is whole, None where there is none.

    Parameters
    ----------
    folder : Path
        The folder of all checkpoints of a run.

    Returns
    -------
    Path or None

    Raises
    ------
    StoreError
        If there are several, and none is whole: to start anew is not ours to decide. A single one
        that is not whole was the first, and is none yet.
    OSError
        If the folder cannot be reached.
    """
    candidates = sorted(_checkpoints(folder), reverse=True)
    for candidate in candidates:
        if _read_state(candidate) is not None:
            return candidate
    folder.stat()  # where it has gone meanwhile, nothing is known about its checkpoints
    if len(candidates) > 1:
        raise StoreError(
            f"no checkpoint in {folder} is whole, the newest is {candidates[0].name}",
            "bring the folder back from a copy, or start the run again with --overwrite",
        )
    return None


def clear_checkpoints(folder: Path, keep: Path | None) -> None:
    """Remove everything from the folder of checkpoints but one.

    Ray's own record of checkpoints goes too. It can be broken by a kill, and would then stop Ray;
    the checkpoint that stays is handed to the workers by its path.

    Parameters
    ----------
    folder : Path
        The folder of all checkpoints of a run.
    keep : Path, optional
        The checkpoint that stays.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry != keep:
            remove(entry)


def drop_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ones.

    Parameters
    ----------
    folder : Path
        The folder of all checkpoints of a run.
    keep : int
        How many stay.
    """
    for old in sorted(_checkpoints(folder))[:-keep]:
        remove(old)


def drop_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a killed worker was storing.

    Parameters
    ----------
    folder : Path
        The folder of all checkpoints of a run.
    """
    for partial in folder.glob(f".{PREFIX}*{PARTIAL}"):
        remove(partial)


def _checkpoints(folder: Path) -> list[Path]:
    return [e for e in folder.iterdir() if e.name.startswith(PREFIX) and e.is_dir()]


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Return the contents of state.json if the checkpoint is whole."""
    try:
        values = json.loads((folder / STATE).read_text())
        whole = values.pop("sha256") == _digest(folder / TENSORS)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError):
        return None
    return values if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
