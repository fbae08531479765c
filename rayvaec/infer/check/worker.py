"""The worker of a check: measures regions of cells and keeps what it found beside the report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.store import Store, open_store
from rayvaec.errors import RayvaecError
from rayvaec.infer.check.measure import measure
from rayvaec.infer.check.tally import Panel, Tally
from rayvaec.infer.store_cells import StoreCells
from rayvaec.infer.trained import TrainedModel, load_model


@dataclass(frozen=True)
class CheckedModel:
    """A model, and which of its genes are looked at closely.

    Parameters
    ----------
    path : str
        Absolute path.
    hash : str
        What must lie there.
    panel : Panel
        Of `panel_of`.
    """

    path: str
    hash: str
    panel: Panel


@dataclass(frozen=True)
class CheckWork:
    """What the workers of a check need to know.

    Parameters
    ----------
    models : tuple of CheckedModel
        The model, and the one it is compared with.
    store, store_hash : str
        What `Store.share` returned, and what must lie there.
    first, n_cells : int
        The first row of the store that is checked, and how many.
    region : int
        Cells of a region.
    n_samples, seed : int
        Draws a cell, and their seed.
    point_stride : int
        Every so many cells, one is kept for the latent map.
    parts : str
        Absolute path of the folder for what regions give.
    device : str
        Where the models compute.
    """

    models: tuple[CheckedModel, ...]
    store: str
    store_hash: str
    first: int
    n_cells: int
    region: int
    n_samples: int
    seed: int
    point_stride: int
    parts: str
    device: str


class CheckWorker:
    """Measures regions; every method may be repeated.

    Parameters
    ----------
    work : CheckWork
        What to do.
    """

    def __init__(self, work: CheckWork) -> None:
        self._work = work

    # Opened at first use: what a task raises reaches the command as it is, what a constructor
    # raises only as the death of the actor.

    @cached_property
    def _store(self) -> Store:
        store = open_store(self._work.store)
        _same("store", self._work.store, store.hash, self._work.store_hash)
        return store

    @cached_property
    def _models(self) -> list[tuple[TrainedModel, StoreCells, Panel]]:
        opened = []
        for checked in self._work.models:
            model = load_model(checked.path, self._work.device)
            _same("model", checked.path, model.hash, checked.hash)
            opened.append((model, StoreCells(self._store, model.registry), checked.panel))
        return opened

    def region(self, number: int) -> dict[str, Any]:
        """Measure one region with every model.

        Parameters
        ----------
        number : int
            Which one.

        Returns
        -------
        dict
            Empty.
        """
        work = self._work
        start = number * work.region
        stop = min(start + work.region, work.n_cells)
        kept = np.arange(start, stop) % work.point_stride == 0
        for which, (model, store_cells, panel) in enumerate(self._models):
            rows, _, cells = store_cells.read(work.first + start, work.first + stop)
            module = model.module
            tally = Tally.empty(
                *(module.config.n_input, len(self._store.registry.labels)),
                *(module.config.n_latent, panel),
            )
            mean = measure(
                *(module, cells, rows.labels, panel, work.n_samples, work.seed, tally),
            )
            tally.save(part(work.parts, number, which, "tally"))
            points = {"labels": rows.labels[kept], "means": mean[kept]}
            np.savez(part(work.parts, number, which, "points"), **points)
        return {}


def part(parts: str | Path, region: int, model: int, what: str) -> Path:
    """Return the file of what a region gave with a model: ``tally`` or ``points``."""
    return Path(parts) / f"{region}.{model}.{what}.npz"


@dataclass(frozen=True)
class Points:
    """Some of the cells, for the latent map.

    Parameters
    ----------
    labels : NDArray[n] of int
        The store's label codes.
    means : NDArray[n, n_latent]
        Means of q(z | x, y).
    """

    labels: NDArray[Any]
    means: NDArray[np.float32]


def read_points(parts: Path, n_regions: int, model: int) -> Points:
    """Return the cells that the regions kept, in the store's order."""
    found = []
    for region in range(n_regions):
        with np.load(part(parts, region, model, "points")) as arrays:
            found.append((arrays["labels"], arrays["means"]))
    return Points(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _same(what: str, path: str, found: str, expected: str) -> None:
    if found != expected:
        raise RayvaecError(
            f"a worker finds another {what} at {path} than the command does",
            "put it where every node of the cluster sees it, and leave it alone meanwhile",
        )
