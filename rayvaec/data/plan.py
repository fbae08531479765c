"""What a piece of `prepare`'s work is made of: an interrupted one goes on only with the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rayvaec import __version__
from rayvaec.data.prepare_config import PrepareConfig

SHAPING = (
    *("labels_key", "batch_key", "layer", "genes", "n_top_genes", "drop_empty", "new_labels"),
    *("val_fraction", "seed", "codec", "rows_per_chunk", "partition_elements"),
)
"""The fields of a configuration that the result depends on."""


def work_plan(
    inputs: Sequence[tuple[Path, str | None]], config: PrepareConfig, store_hash: str | None
) -> dict[str, object]:
    """Describe a piece of work by what messages call its parts.

    Parameters
    ----------
    inputs : sequence of tuple of Path and str
        Files and folders, and the layer that is read of each; of a file, path, size and time of
        the last change matter.
    config : PrepareConfig
        Of which the fields that the result depends on.
    store_hash : str, optional
        Hash of the store that cells are appended to.

    Returns
    -------
    dict of str to JSON-able
    """
    plan: dict[str, object] = {
        f"--{field.replace('_', '-')}": getattr(config, field) for field in SHAPING
    }
    if config.genes is not None:
        plan["--genes"] = _genes(config.genes)
    for number, (path, layer) in enumerate(inputs, 1):
        own = "" if layer == config.layer else f", layer {layer or 'X'}"
        plan[f"input {number}"] = _state(path) + own
    plan["the store appended to"] = store_hash
    plan["rayvaec's version"] = __version__
    return plan


def _genes(genes: str | Path) -> str:
    if genes in ("intersect", "union"):
        return str(genes)
    try:
        digest = hashlib.sha256(Path(genes).read_bytes()).hexdigest()
    except OSError:
        return str(genes)  # whoever reads it says what is wrong
    return f"{Path(genes).absolute()} ({digest[:12]})"


def _state(path: Path) -> str:
    """Return what changes when a file, or anything in a folder, does."""
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
    stats = [os.stat(file) for file in files]
    size = sum(stat.st_size for stat in stats)
    latest = max((stat.st_mtime_ns for stat in stats), default=0)
    moment = datetime.fromtimestamp(latest // 10**9, UTC).isoformat(sep=" ").removesuffix("+00:00")
    many = f"{len(files)} files, " if path.is_dir() else ""
    return f"{path.absolute()} ({many}{size} bytes, changed {moment}.{latest % 10**9:09d})"
