"""Draws of a whole store as sparse layers, one a sample.

How much a region draws is known only when it has been drawn, so this takes two steps: every region
is drawn and kept sample by sample, and then each file of every layer is put together from the
regions that it crosses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from rayvaec.inference.bulk.actors import Crew
from rayvaec.inference.bulk.job import Job
from rayvaec.inference.bulk.worker import BYTES_PER_VALUE, RegionWorker, Task
from rayvaec.inference.bulk.zarr_output import (
    array_at,
    create_layer,
    create_output,
    shards_of,
    write_obs,
    write_pointers,
    write_values,
)
from rayvaec.inference.cells import Cells
from rayvaec.inference.moments import drawn_windows
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.model.vaec import VAEC
from rayvaec.util.atomic import open_whole
from rayvaec.util.numba_cache import compiled


@dataclass(frozen=True)
class Draws(Task):
    """Posterior-predictive draws, each a sparse layer ``sample_<i>``.

    Parameters
    ----------
    n_samples, seed : int
        Draws a cell, and the seed of all of them.
    """

    n_samples: int
    seed: int
    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad")

    def bytes_per_cell(self, model: TrainedModel, nnz: float) -> float:
        """Return what a cell's draws take, if they have as many non-zeros as the cell."""
        return self.n_samples * nnz * BYTES_PER_VALUE

    def begin(self, job: Job) -> None:
        """Create an AnnData without layers."""
        create_output(job, {})

    def region(self, worker: RegionWorker, number: int) -> dict[str, Any]:
        """Draw a region and keep it; return the number of stored values in each layer."""
        region = worker.region(number)
        model, store_cells = worker.models[0]
        rows, names, cells = store_cells.read(region.start, region.stop)
        write_obs(worker.root, worker.store.registry, region.start, names, rows)
        drawn = draw_sample_major(model.module, cells, self.n_samples, self.seed)
        for name, array in drawn._asdict().items():
            with open_whole(worker.part(f"{number}.{name}.npy")) as file:
                np.save(file, array)
        return {"nnz": drawn.lengths.sum(axis=1, dtype=np.int64).tolist()}

    def finish(self, job: Job, crew: Crew, records: dict[int, Any]) -> None:
        """Create the layers, and have the workers write their files."""
        import ray

        nnz = np.array([records[number]["nnz"] for number in range(len(job.regions))], np.int64)
        root = zarr.open_group(job.state.output, mode="r+", use_consolidated=False)
        if not job.state.finished("layers", [0]):
            shape = job.inputs.store.n_cells, job.inputs.model.registry.n_genes
            for sample, values in enumerate(nnz.sum(axis=0).tolist()):
                create_layer(root, f"sample_{sample}", *shape, values, job.regions.size)
            job.state.finish("layers", 0, {})
        reference = ray.put(nnz)
        calls: dict[int, tuple[Any, ...]] = {}
        sizes: dict[int, int] = {}
        for sample in range(self.n_samples):
            for method, key in (("values", "data"), ("pointers", "indptr")):
                for span in shards_of(array_at(root, f"layers/sample_{sample}/{key}")):
                    calls[len(calls)] = (method, sample, span, reference)
                    sizes[len(sizes)] = span[1] - span[0] if method == "values" else 0
        crew.run("files", calls, sizes, "values")

    def values(
        self, worker: RegionWorker, sample: int, span: tuple[int, int], nnz: NDArray[np.int64]
    ) -> dict[str, Any]:
        """Write one file each of a layer's genes and counts.

        Parameters
        ----------
        worker : RegionWorker
            Where this runs.
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
            indices = np.load(worker.part(f"{region}.indices.npy"), mmap_mode="r")
            counts = np.load(worker.part(f"{region}.counts.npy"), mmap_mode="r")
            return indices[rows], counts[rows]

        write_values(worker.root, f"sample_{sample}", span, np.cumsum(nnz[:, sample]), read)
        return {}

    def pointers(
        self, worker: RegionWorker, sample: int, span: tuple[int, int], nnz: NDArray[np.int64]
    ) -> dict[str, Any]:
        """Write one file of a layer's row pointers; parameters as in `values`."""
        start, stop = span
        size = worker.work.regions.size
        lengths = [
            np.load(worker.part(f"{number}.lengths.npy"), mmap_mode="r")[sample]
            for number in range(start // size, -(-(stop - 1) // size))
        ]
        first = int(nnz[: start // size, sample].sum())
        joined = np.concatenate([np.zeros(0, np.int32), *lengths])[: stop - start - 1]
        write_pointers(worker.root, f"sample_{sample}", span, first, joined)
        return {}


class SampleMajor(NamedTuple):
    """Draws of a region, all cells of the first sample, then all of the second, and so on.

    Parameters
    ----------
    lengths : array[n_samples, n_cells] of int32
        Non-zeros of each row.
    indices : array[nnz] of uint16 or uint32
        Genes, ascending within a row.
    counts : array[nnz] of uint8, uint16 or uint32
        Counts, in the smallest type that holds all of them.
    """

    lengths: NDArray[np.int32]
    indices: NDArray[Any]
    counts: NDArray[Any]


def draw_sample_major(module: VAEC, cells: Cells, n_samples: int, seed: int) -> SampleMajor:
    """Draw counts for a region of cells.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
        The region's cells.
    n_samples, seed : int
        As in `rayvaec.inference.posterior.draw`.

    Returns
    -------
    SampleMajor
    """
    windows = list(drawn_windows(module, cells, n_samples, seed))
    lengths = np.empty((n_samples, len(cells)), np.int32)
    for window in windows:
        lengths[window.rows] = np.diff(window.drawn.indptr).reshape(-1, window.n_samples).T
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths.ravel()).reshape(lengths.shape)
    largest = max((int(window.drawn.counts.max(initial=0)) for window in windows), default=0)
    nnz = int(lengths.sum(dtype=np.int64))
    indices = np.empty(nnz, np.min_scalar_type(module.config.n_input - 1))
    counts = np.empty(nnz, np.min_scalar_type(largest))
    for window in windows:
        _scatter(*window.drawn, starts[window.rows], indices, counts)
    return SampleMajor(lengths, indices, counts)


@compiled
def _scatter(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    starts: NDArray[Any],
    out_indices: NDArray[Any],
    out_counts: NDArray[Any],
) -> None:
    """Copy cell-major rows to where their sample and cell begin in the output."""
    n_samples, n_cells = starts.shape
    for cell in range(n_cells):
        for sample in range(n_samples):
            row = cell * n_samples + sample
            to = starts[sample, cell]
            for entry in range(indptr[row], indptr[row + 1]):
                out_indices[to] = indices[entry]
                out_counts[to] = counts[entry]
                to += 1
