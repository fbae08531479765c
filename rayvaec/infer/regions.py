"""The worker of bulk inference: computes regions of cells and writes them to the output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from rayvaec.data.store import Store, open_store
from rayvaec.errors import RayvaecError
from rayvaec.infer.output import write_obs, write_pointers, write_values
from rayvaec.infer.quantities import Draws, Quantity, draw_sample_major
from rayvaec.infer.reductions import Reduction
from rayvaec.infer.store_cells import StoreCells
from rayvaec.infer.trained import TrainedModel, load_model


@dataclass(frozen=True)
class Work:
    """What the workers of one piece of bulk work need to know.

    Parameters
    ----------
    model, store : str
        Absolute path; absolute path, URL or what `Store.share` returned.
    model_hash, store_hash : str
        What must lie there.
    quantity : Quantity, Draws or Reduction
        What to compute.
    output, parts : str
        Absolute paths of the AnnData to fill and of the folder for drawn parts.
    region : int
        Cells of a region.
    device : str
        Where the model computes.
    """

    model: str
    store: str
    model_hash: str
    store_hash: str
    quantity: Quantity | Draws | Reduction
    output: str
    parts: str
    region: int
    device: str = "cpu"


class RegionWorker:
    """Computes regions and writes them; every method may be repeated.

    Parameters
    ----------
    work : Work
        What to do.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    # Opened at first use: what a task raises reaches the command as it is, what a constructor
    # raises only as the death of the actor.

    @cached_property
    def _model(self) -> TrainedModel:
        model = load_model(self._work.model, self._work.device)
        self._check("model", self._work.model, model.hash, self._work.model_hash)
        return model

    @cached_property
    def _store(self) -> Store:
        store = open_store(self._work.store).as_stored()
        self._check("store", self._work.store, store.hash, self._work.store_hash)
        return store

    @cached_property
    def _cells(self) -> StoreCells:
        return StoreCells(self._store, self._model.registry)

    @cached_property
    def _root(self) -> zarr.Group:
        return zarr.open_group(self._work.output, mode="r+", use_consolidated=False)

    @staticmethod
    def _check(what: str, path: str, found: str, expected: str) -> None:
        if found != expected:
            raise RayvaecError(
                f"a worker finds another {what} at {path} than the command does",
                "put it where every node of the cluster sees it, and leave it alone meanwhile",
            )

    def region(self, number: int) -> dict[str, Any]:
        """Compute one region.

        Parameters
        ----------
        number : int
            Which one.

        Returns
        -------
        dict
            Of draws, the number of stored values in each layer (``nnz``); empty otherwise.
        """
        start = number * self._work.region
        stop = min(start + self._work.region, self._store.n_cells)
        quantity = self._work.quantity
        rows, names, cells = self._cells.read(start, stop, keyed=quantity.keyed)
        if isinstance(quantity, Reduction):
            part = quantity.part(self._model.module, cells, rows)
            np.savez(part_path(self._work.parts, number), allow_pickle=False, **part)
            return {}
        write_obs(self._root, self._store.registry, start, names, rows.labels, rows.batches)
        if not isinstance(quantity, Draws):
            for path, values in quantity.values(self._model.module, cells).items():
                self._root[path][start:stop] = values  # type: ignore[index]
            return {}
        drawn = draw_sample_major(self._model.module, cells, quantity.n_samples, quantity.seed)
        for name, array in drawn._asdict().items():
            np.save(_part(self._work.parts, number, name), array)
        return {"nnz": drawn.lengths.sum(axis=1, dtype=np.int64).tolist()}

    def values(self, sample: int, span: tuple[int, int], nnz: NDArray[np.int64]) -> dict[str, Any]:
        """Write one file each of a layer's genes and counts.

        Parameters
        ----------
        sample : int
            Which layer.
        span : (int, int)
            First and one-past-last stored value.
        nnz : array[n_regions, n_samples] of int64
            Stored values of every region in every layer.

        Returns
        -------
        dict
            Empty.
        """
        before = nnz[:, :sample].sum(axis=1)

        def read(region: int, first: int, last: int) -> tuple[NDArray[Any], NDArray[Any]]:
            rows = slice(int(before[region]) + first, int(before[region]) + last)
            indices = np.load(_part(self._work.parts, region, "indices"), mmap_mode="r")
            counts = np.load(_part(self._work.parts, region, "counts"), mmap_mode="r")
            return indices[rows], counts[rows]

        write_values(self._root, f"sample_{sample}", span, np.cumsum(nnz[:, sample]), read)
        return {}

    def pointers(
        self, sample: int, span: tuple[int, int], nnz: NDArray[np.int64]
    ) -> dict[str, Any]:
        """Write one file of a layer's row pointers; parameters as in `values`."""
        start, stop = span
        region = self._work.region
        lengths = [
            np.load(_part(self._work.parts, number, "lengths"), mmap_mode="r")[sample]
            for number in range(start // region, -(-(stop - 1) // region))
        ]
        first = int(nnz[: start // region, sample].sum())
        joined = np.concatenate([np.zeros(0, np.int32), *lengths])[: stop - start - 1]
        write_pointers(self._root, f"sample_{sample}", span, first, joined)
        return {}


def part_path(parts: str | Path, region: int) -> Path:
    """Return where a region's part of a reduction stands."""
    return Path(parts) / f"{region}.npz"


def _part(parts: str, region: int, name: str) -> Path:
    return Path(parts) / f"{region}.{name}.npy"
