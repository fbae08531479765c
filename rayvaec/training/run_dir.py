"""Run directory: its paths, creation, resumption, status.

::

    RUN/run.json         store, its hash, state of the run, result
    RUN/store.json       the store as it was when the run began
    RUN/config.json      the resolved configuration, fit for --config
    RUN/metrics.jsonl    records                 RUN/progress.json   how far it is
    RUN/attempts.jsonl   when workers started    RUN/tensorboard/    the records as events
    RUN/checkpoints/     what it resumes from
    RUN/model  RUN/last  best and last model
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayvaec.data.store.open import Store
from rayvaec.errors import ConfigError, StoreError
from rayvaec.training.checkpoint import (
    RunState,
    clear_checkpoints,
    drop_partial_checkpoints,
    newest_checkpoint,
)
from rayvaec.training.config import TrainConfig, read_config
from rayvaec.training.driver.storage_retry import retry_io
from rayvaec.training.export import BEST, LAST
from rayvaec.training.records import METRICS, PROGRESS
from rayvaec.util.atomic import bring_back, check_free, remove, write_json

RUN, CONFIG, CHECKPOINTS = "run.json", "config.json", "checkpoints"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunInfo:
    """What run.json says.

    Parameters
    ----------
    store, store_hash : str
        What is trained on.
    created : str
        When the run was started, ISO 8601.
    status : str
        ``"running"`` (or killed), ``"interrupted"``, ``"failed"`` or ``"finished"``.
    result : dict
        What `TrainLoop.run` returned last, empty before.
    format_version : int
        Version of the folder's layout.
    """

    store: str
    store_hash: str
    created: str
    status: str = "running"
    result: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's."""
    return (path / RUN).is_file()


def read_run(path: Path) -> RunInfo:
    """Read run.json.

    Parameters
    ----------
    path : Path
        A run folder.

    Returns
    -------
    RunInfo

    Raises
    ------
    StoreError
        If the folder is not a run's, or of a newer version.
    """
    try:
        values = json.loads((path / RUN).read_text())
        if values["format_version"] > FORMAT_VERSION:
            raise StoreError(
                f"the run {path} has format version {values['format_version']} and this rayvaec "
                f"reads up to {FORMAT_VERSION}",
                "upgrade rayvaec",
            )
        return RunInfo(**values)
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is not a run folder", "give the folder that a training wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path / RUN} is damaged: {error}",
            "start a new run, or replace this one with --overwrite",
        ) from error


def write_run(path: Path, info: RunInfo) -> None:
    """Write run.json."""
    write_json(path / RUN, asdict(info))


def check_new(out: Path, overwrite: bool) -> None:
    """Refuse an output that is in the way of a new run.

    Parameters
    ----------
    out : Path
        Where the run shall go.
    overwrite : bool
        Whether an existing run may be replaced.

    Raises
    ------
    StoreError
        If something is there, or is no run and shall be overwritten.
    """
    if is_run(out) and not overwrite:
        raise StoreError(
            f"the output {out} exists already: a run",
            "choose another --out, go on with --resume, or replace the run with --overwrite",
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    check_free(out, overwrite)
    if out.exists() and not is_run(out):
        raise StoreError(
            f"{out} is not a run folder and is not overwritten", "choose another --out"
        )


def check_resumable(out: Path, store: Store, config: TrainConfig | None) -> TrainConfig:
    """Return the configuration with which a run can be resumed.

    Parameters
    ----------
    out : Path
        The run folder.
    store : Store
        What shall be trained on.
    config : TrainConfig, optional
        What shall be done; by default the same as before.

    Returns
    -------
    TrainConfig
        With the run's own number of epochs where `config` leaves it open.

    Raises
    ------
    StoreError
        If there is no run, or it was trained on another store.
    ConfigError
        If `config` contradicts the run's.
    """
    if not out.exists():
        raise StoreError(f"there is no run at {out} to resume", "leave --resume out to start one")
    info = read_run(out)
    if info.store_hash != store.hash:
        raise StoreError(
            f"the run {out} was trained on {info.store}, which is not the same as {store.path}",
            "resume it with its own store, or start a new run with another --out",
        )
    saved = read_config(out)
    if config is None:
        return saved
    conflicts = config.conflicts(saved)
    if conflicts:
        raise ConfigError(
            f"the run {out} cannot be resumed with {', '.join(conflicts)}",
            "resume with the run's own settings, or start a new run with another --out",
        )
    if config.max_epochs is None:
        return replace(config, max_epochs=saved.max_epochs)
    return config


def finished(out: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the result of a run that has nothing left to do, None for any other.

    Parameters
    ----------
    out : Path
        The run folder; `check_resumable` has passed.
    config : TrainConfig
        How the run would go on, resolved.

    Returns
    -------
    dict or None
        What `TrainLoop.run` returned, with what ends the run by this configuration.
    """
    info = read_run(out)
    if info.status != "finished" or info.result is None:
        return None
    stopped = RunState.from_json(info.result).stopped(config)
    return {**info.result, "stopped": stopped} if stopped else None


def create_run(out: Path, store: Store, config: TrainConfig) -> None:
    """Make the folder of a new run; an older one there is removed.

    Parameters
    ----------
    out : Path
        Where; `check_new` has passed.
    store : Store
        What is trained on.
    config : TrainConfig
        How, resolved.
    """
    if out.exists():
        remove(out)
    (out / CHECKPOINTS).mkdir(parents=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(out / CONFIG, config.to_json())
    write_run(out, RunInfo(str(store.path), store.hash, now))


def resume_run(out: Path, config: TrainConfig) -> Path | None:
    """Prepare the folder of a run for resuming.

    Parameters
    ----------
    out : Path
        The run folder; `check_resumable` has passed.
    config : TrainConfig
        How the run goes on.

    Returns
    -------
    Path or None
        The checkpoint to go on from; None where the run was killed before its first.
    """

    def prepare() -> Path | None:
        (out / CHECKPOINTS).mkdir(exist_ok=True)
        for name in (RUN, CONFIG):  # which a killed driver may have been writing
            bring_back(out / name)
        newest = newest_checkpoint(out / CHECKPOINTS)
        clear_checkpoints(out / CHECKPOINTS, keep=newest)
        remove(out / PROGRESS)
        write_json(out / CONFIG, config.to_json())
        write_run(out, replace(read_run(out), status="running"))
        return newest

    return retry_io(f"{out}", prepare, out)


def end_run(out: Path, status: str, result: dict[str, Any] | None = None) -> None:
    """Note how a run ended; waits for storage that is away.

    Parameters
    ----------
    out : Path
        The run folder.
    status : str
        ``"interrupted"``, ``"failed"`` or ``"finished"``.
    result : dict, optional
        What `TrainLoop.run` returned.
    """
    retry_io(f"{out}", lambda: note_end(out, status, result), out)


def note_end(out: Path, status: str, result: dict[str, Any] | None = None) -> None:
    """Note how a run ended, without waiting; parameters as in `end_run`."""
    out.stat()
    remove(out / PROGRESS)
    write_run(out, replace(read_run(out), status=status, result=result))


def sweep(out: Path) -> None:
    """Remove what a killed worker was writing, bring back what it replaced.

    Call it while no worker is at work.

    Parameters
    ----------
    out : Path
        The run folder.
    """
    for name in (BEST, LAST, METRICS, PROGRESS):
        bring_back(out / name)
    drop_partial_checkpoints(out / CHECKPOINTS)


def has_results(out: Path) -> bool:
    """Return whether a run left anything that is worth keeping."""
    kept = (out / METRICS, out / BEST, out / LAST)
    return any((out / CHECKPOINTS).glob("step_*")) or any(path.exists() for path in kept)
