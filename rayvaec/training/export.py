"""Models that a run exports: ``RUN/model`` (best) and ``RUN/last``."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayvaec.data.store.open import Store
from rayvaec.data.store.summarize import summarize
from rayvaec.errors import StoreError
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.storage_retry import retry_io
from rayvaec.training.objective import model_registry

logger = logging.getLogger("rayvaec")
BEST, LAST = "model", "last"


def save_best(
    run: Path, module: VAEC, store: Store, config: TrainConfig, record: dict[str, Any]
) -> None:
    """Write RUN/model.

    Parameters
    ----------
    run : Path
        The run folder.
    module : VAEC
        The model.
    store : Store
        What it was trained on.
    config : TrainConfig
        How it was trained.
    record : dict
        ``epoch``, ``step`` and ``val_elbo`` of the model.
    """
    _save(run / BEST, module, store, config, record)


def save_last(
    run: Path, module: VAEC, store: Store, config: TrainConfig, record: dict[str, Any]
) -> None:
    """Write RUN/last; parameters as in `save_best`."""
    _save(run / LAST, module, store, config, record)


def save_summaries(run: Path, store: Store) -> None:
    """Put a summary of the training data beside the models; without one they are as good.

    Parameters
    ----------
    run : Path
        The run folder, with its models.
    store : Store
        What they were trained on.
    """
    try:
        summary = summarize(store)
        for name in (BEST, LAST):
            if (run / name).is_dir():
                summary.save(run / name)
    except (OSError, StoreError) as error:
        logger.warning("%s has no summary of the training data: %s", run / BEST, error)


def _save(
    path: Path, module: VAEC, store: Store, config: TrainConfig, record: dict[str, Any]
) -> None:
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("rayvaec", "torch", "ray", "numpy")},
        "seed": config.seed,
        "store": str(store.path),
        "store_hash": store.hash,
        "metrics": {name: record[name] for name in ("epoch", "step", "val_elbo")},
        "training": config.to_json(),
    }
    registry = model_registry(store, config).to_json()

    def save() -> None:
        path.parent.stat()  # save_model would make a folder in the place of one that is away
        save_model(path, module, registry, provenance, overwrite=True)

    retry_io(f"{path}", save, path.parent)
