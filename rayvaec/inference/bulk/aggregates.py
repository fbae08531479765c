"""Aggregates over a whole store: one partial result a region, then a reduction.

Parts are folded in the order of the regions, so that the result does not depend on which worker
was done first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.store.open import Rows
from rayvaec.inference import posterior
from rayvaec.inference.analyses import vamp_prior
from rayvaec.inference.analyses.contrasts import Contrast, compare_all
from rayvaec.inference.analyses.differential import Comparison
from rayvaec.inference.analyses.group_stats import Populations, merge, summarise
from rayvaec.inference.bulk.actors import Crew
from rayvaec.inference.bulk.formats import write_table
from rayvaec.inference.bulk.job import Job
from rayvaec.inference.bulk.worker import RegionWorker, Task
from rayvaec.inference.bulk.zarr_output import write_means
from rayvaec.inference.cells import Cells
from rayvaec.model.vaec import VAEC
from rayvaec.util.atomic import open_whole, remove

Arrays = Mapping[str, NDArray[Any]]

_CELLS_AT_ONCE = 1024


class Aggregate(Task):
    """A result whose size does not depend on the number of cells."""

    keyed: ClassVar[bool] = False
    """Whether it depends on the keys of the cells' noise."""

    @abstractmethod
    def part(self, module: VAEC, cells: Cells, rows: Rows) -> Arrays:
        """Return what is kept of a region: of its cells, and of what the store says of them."""

    @abstractmethod
    def write(self, job: Job, parts: Iterator[Arrays]) -> None:
        """Write the result of all parts, which come in the order of the regions."""

    def region(self, worker: RegionWorker, number: int) -> dict[str, Any]:
        """Keep a region's part; return an empty record."""
        region = worker.region(number)
        model, store_cells = worker.models[0]
        rows, _, cells = store_cells.read(region.start, region.stop, keyed=self.keyed)
        part = self.part(model.module, cells, rows)
        with open_whole(worker.part(f"{number}.npz")) as file:
            np.savez(file, allow_pickle=False, **part)
        return {}

    def finish(self, job: Job, crew: Crew, records: dict[int, Any]) -> None:
        """Write the result."""
        for path in (job.state.output, job.state.result):
            remove(path)  # what an earlier run may have begun
        self.write(job, self._parts(job))

    @staticmethod
    def _parts(job: Job) -> Iterator[Arrays]:
        for number in range(len(job.regions)):
            with np.load(job.state.parts / f"{number}.npz", allow_pickle=False) as part:
                yield dict(part)


@dataclass(frozen=True)
class LabelMeans(Aggregate):
    """Denoised expression averaged over the cells of every label, as an AnnData.

    Parameters
    ----------
    n_labels : int
        Labels of the store.
    """

    n_labels: int
    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad", ".csv", ".parquet")

    def part(self, module: VAEC, cells: Cells, rows: Rows) -> Arrays:
        """Return number of cells and sums of expression by the store's labels."""
        sums = np.zeros((self.n_labels, module.config.n_input))
        for start in range(0, len(cells), _CELLS_AT_ONCE):
            some = cells.part(start, min(start + _CELLS_AT_ONCE, len(cells)))
            expression = posterior.expression(module, some)
            labels = rows.labels[start : start + len(some)]
            for label in np.unique(labels):
                sums[label] += expression[labels == label].sum(0, dtype=np.float64)
        return {"n_cells": np.bincount(rows.labels, minlength=self.n_labels), "sums": sums}

    def write(self, job: Job, parts: Iterator[Arrays]) -> None:
        """Write X, [n_labels with cells, n_genes], and ``obs["n_cells"]``."""
        n_cells: Any = 0
        sums: Any = 0
        for part in parts:
            n_cells, sums = n_cells + part["n_cells"], sums + part["sums"]
        present = n_cells > 0
        mean = (sums[present] / n_cells[present, None]).astype(np.float32)
        own, genes = job.inputs.store.registry.labels, job.inputs.model.registry.genes
        labels = [name for name, here in zip(own, present, strict=True) if here]
        write_means(job.state.output, labels, genes, n_cells[present], mean)


@dataclass(frozen=True)
class VampPrior(Aggregate):
    """The empirical prior of every label, as npz.

    Parameters
    ----------
    p, seed : int
        As in `rayvaec.inference.analyses.vamp_prior.prior_of`.
    """

    p: int
    seed: int
    formats: ClassVar[tuple[str, ...]] = (".npz",)

    def part(self, module: VAEC, cells: Cells, rows: Rows) -> Arrays:
        """Return the cells' posteriors."""
        return vamp_prior.points_of(module, cells)._asdict()

    def write(self, job: Job, parts: Iterator[Arrays]) -> None:
        """Write what `TrainedModel.get_vamp_prior` returns, and ``labels``, its first axis."""
        points = vamp_prior.gathered(vamp_prior.Points(**part) for part in parts)
        registry = job.inputs.model.registry
        prior = vamp_prior.prior_of(points, registry.n_labels, self.p, self.seed)
        with job.state.result.open("wb") as file:
            np.savez(file, allow_pickle=False, labels=np.array(registry.labels), **prior)


@dataclass(frozen=True)
class DifferentialExpression(Aggregate):
    """Comparisons of groups of cells, as a table.

    Parameters
    ----------
    by_batch : bool
        Whether the groups are the store's batches instead of its labels.
    groups : tuple of int
        Codes of the groups that are looked at.
    names : tuple of str
        Their names.
    contrasts : tuple of Contrast
        What to compare, by position in `groups`.
    how : Comparison
        Options.
    """

    by_batch: bool
    groups: tuple[int, ...]
    names: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    how: Comparison
    keyed: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = (".csv", ".parquet")

    def part(self, module: VAEC, cells: Cells, rows: Rows) -> Arrays:
        """Return the region's summary of the groups."""
        codes = rows.batches if self.by_batch else rows.labels
        position = {code: number for number, code in enumerate(self.groups)}
        groups = np.array([position.get(code, -1) for code in codes.tolist()], np.int64)  # type: ignore[union-attr]
        n_groups, how = len(self.groups), self.how
        return summarise(module, cells, groups, n_groups, how.n_samples, how.seed)._asdict()

    def write(self, job: Job, parts: Iterator[Arrays]) -> None:
        """Write the table, a row a gene and comparison."""
        populations = merge((Populations(**part) for part in parts), self.how.n_samples)
        model = job.inputs.model
        table = compare_all(
            model.module, model.registry.genes, populations, self.names, self.contrasts, self.how
        )
        write_table(job.state.result, table.rename_axis("gene"))
