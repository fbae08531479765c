"""Worker of bulk inference: computes regions of cells and writes them to the output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import zarr

from rayvaec.data.inputs.cell_names import Repetitions
from rayvaec.data.store.open import Store, open_store
from rayvaec.errors import RayvaecError
from rayvaec.inference.bulk.actors import Crew
from rayvaec.inference.bulk.job import Inputs, Job, Region, Regions
from rayvaec.inference.store_cells import StoreCells
from rayvaec.inference.trained_model import TrainedModel, load_model

REGION_BYTES = 64 * 2**20
MIN_REGION, MAX_REGION = 64, 16384

BYTES_PER_VALUE = 16
"""An index and a count: as stored or drawn, and as kept."""


class Task(ABC):
    """Something to compute of every region of a store.

    Workers get the task pickled, and may run every method they have a part in more than once.
    """

    formats: ClassVar[tuple[str, ...]]
    """Suffixes that the output may have; none for a folder."""

    as_stored: ClassVar[bool] = True
    """Whether rows are in the order in which they lie; else validation cells come last."""

    keyed: ClassVar[bool] = True
    """Whether it depends on the keys of the cells' noise, and so on their names."""

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the task from others, JSON-able."""
        return {"quantity": type(self).__name__.lower(), **asdict(cast(Any, self))}

    def bytes_per_cell(self, model: TrainedModel, nnz: float) -> float:
        """Return what a cell's result takes beside its counts, of which `nnz` are stored."""
        return 0.0

    def regions(self, inputs: Inputs) -> Regions:
        """Cut the cells so that a region takes about REGION_BYTES: a power of two of them."""
        store = inputs.store
        nnz = store.manifest.nnz / max(store.n_cells, 1)
        a_cell = nnz * BYTES_PER_VALUE + self.bytes_per_cell(inputs.model, nnz)
        rows = 2 ** int(np.log2(max(REGION_BYTES / max(a_cell, 1), 1)))
        return Regions(range(store.n_cells), int(np.clip(rows, MIN_REGION, MAX_REGION)))

    def begin(self, job: Job) -> None:  # noqa: B027
        """Create the output that workers fill, where they do."""

    @abstractmethod
    def region(self, worker: RegionWorker, number: int) -> dict[str, Any]:
        """Compute one region in a worker; return a JSON-able record of it."""

    @abstractmethod
    def finish(self, job: Job, crew: Crew, records: dict[int, Any]) -> Any:
        """Make the output of all regions and return the result, if it has one."""


@dataclass(frozen=True)
class Work:
    """What the workers of one piece of bulk work need to know.

    Parameters
    ----------
    models : tuple of (str, str)
        Absolute path of each model, and the hash of what must lie there.
    store, store_hash : str
        What `share` returned, and the hash of what must lie there.
    task : Task
        What to compute.
    regions : Regions
        How the cells are cut.
    output, parts : str
        Absolute paths of the AnnData to fill and of the folder for parts of regions.
    device : str
        Where the models compute.
    repetitions : Repetitions, optional
        Cells whose name an earlier one has, where results depend on names.
    """

    models: tuple[tuple[str, str], ...]
    store: str
    store_hash: str
    task: Task
    regions: Regions
    output: str
    parts: str
    device: str = "cpu"
    repetitions: Repetitions | None = None


class RegionWorker:
    """Calls the task's methods in a process of its own; every call may be repeated.

    Parameters
    ----------
    work : Work
        What to do.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of the task with this worker and some arguments.

        Parameters
        ----------
        method : str
            Its name.
        *arguments
            JSON-able, or an array.

        Returns
        -------
        dict
            The JSON-able record that the task returned.
        """
        return getattr(self.work.task, method)(self, *arguments)

    # Opened at first use: what a task raises reaches the command as it is, what a constructor
    # raises only as the death of the actor.

    @cached_property
    def models(self) -> list[tuple[TrainedModel, StoreCells]]:
        """The models, and the store's cells as each of them sees these."""
        opened = []
        for path, expected in self.work.models:
            model = load_model(path, self.work.device)
            _check_same("model", path, model.hash, expected)
            cells = StoreCells(self.store, model.registry, self.work.repetitions)
            opened.append((model, cells))
        return opened

    @cached_property
    def store(self) -> Store:
        """The store."""
        store = open_store(self.work.store)
        if self.work.task.as_stored:
            store = store.as_stored()
        _check_same("store", self.work.store, store.hash, self.work.store_hash)
        return store

    @cached_property
    def root(self) -> zarr.Group:
        """The AnnData to fill."""
        return zarr.open_group(self.work.output, mode="r+", use_consolidated=False)

    def region(self, number: int) -> Region:
        """Return a region by its number."""
        return self.work.regions[number]

    def part(self, name: str) -> Path:
        """Return where a part of a region is kept."""
        return Path(self.work.parts) / name


def _check_same(what: str, path: str, found: str, expected: str) -> None:
    if found != expected:
        raise RayvaecError(
            f"a worker finds another {what} at {path} than the command does",
            "put it where every node of the cluster sees it, and leave it alone meanwhile",
        )
