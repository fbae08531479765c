"""Second pass of `prepare`: shuffle cells into per-partition spill files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.cell_names import UniqueNames
from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare.job import Workspace
from rayvaec.data.prepare.memory import LEAST_PARTITION, Budget, partition_bytes, show_bytes
from rayvaec.data.prepare.partitions import CountsDtypes
from rayvaec.data.prepare.spill import Scatter
from rayvaec.data.prepare.validate import ValidationResult, aligned_blocks
from rayvaec.errors import ConfigError
from rayvaec.util.atomic import remove
from rayvaec.util.progress import Progress

logger = logging.getLogger("rayvaec")


@dataclass(frozen=True)
class PartitionPlan:
    """How the cells are cut into partitions.

    Parameters
    ----------
    n_cells, nnz : int
        Cells to write, and their stored values.
    elements : int
        Stored values that a partition has, about and at most.
    dtypes : CountsDtypes
        Types of counts and indices.
    """

    n_cells: int
    nnz: int
    elements: int
    dtypes: CountsDtypes

    @property
    def n_partitions(self) -> int:
        """Number of partitions."""
        return min(max(-(-self.nnz // self.elements), 1), self.n_cells)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Where partitions begin and end in the shuffled order, [n_partitions + 1]."""
        return np.arange(self.n_partitions + 1) * self.n_cells // self.n_partitions

    @property
    def mean_row(self) -> float:
        """Mean number of values of a cell."""
        return self.nnz / max(self.n_cells, 1)


def plan_partitions(
    n_cells: int, nnz: int, dtypes: CountsDtypes, budget: Budget, work: Workspace
) -> PartitionPlan:
    """Choose the size of the partitions; what interrupted work chose stays.

    Parameters
    ----------
    n_cells, nnz, dtypes
        As in `PartitionPlan`.
    budget : Budget
        What may be in memory.
    work : Workspace
        Where the choice is noted.

    Returns
    -------
    PartitionPlan

    Raises
    ------
    ConfigError
        If the partitions of interrupted work are too large for this budget.
    """
    record = work.read("layout")
    if record is None:
        size = budget.partition_size(dtypes, n_cells, nnz)
        plan = PartitionPlan(n_cells, nnz, size, dtypes)
        work.write("layout", {"elements": size, "n_partitions": plan.n_partitions})
    else:
        plan = PartitionPlan(n_cells, nnz, record["elements"], dtypes)
        largest = min(plan.elements, nnz)
        missing = partition_bytes(largest, dtypes, plan.mean_row) - budget.free
        if missing > 0 and largest > LEAST_PARTITION:
            raise ConfigError(
                f"the partitions that were begun have {plan.elements:,} values and need "
                f"{show_bytes(missing)} more memory",
                "resume with the --memory of before",
            )
    if plan.elements < min(budget.partition_elements, nnz):
        logger.warning(
            "partitions get %d values instead of %d, as --memory allows no more: the same inputs "
            "give other partitions with more memory",
            plan.elements,
            budget.partition_elements,
        )
    return plan


def shuffled_positions(n: int, seed: int, portion: int = 0) -> NDArray[np.int64]:
    """Return where each of `n` cells goes: a permutation that follows from `seed` and `portion`.

    Sorts the raw output of Philox, which numpy promises never to change.
    """
    words = np.random.Philox(key=seed + (portion << 64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    positions = np.empty(n, np.int64)
    positions[order] = np.arange(n)
    return positions


def deal(
    sources: Sequence[Input],
    found: ValidationResult,
    destinations: NDArray[np.int64],
    old_hashes: NDArray[np.uint64],
    plan: PartitionPlan,
    budget: Budget,
    work: Workspace,
) -> None:
    """Read the inputs again and deal their cells to the partitions' scratch files.

    Parameters
    ----------
    sources : sequence of Input
        Opened for reading.
    found : ValidationResult
        What the first pass found.
    destinations : array[n_cells] of int64
        Where each cell goes in the shuffled order, -1 for nowhere.
    old_hashes : array of uint64
        Hashes of cell names that are taken already.
    plan : PartitionPlan
        How the shuffled order is cut.
    budget : Budget
        What may be in memory.
    work : Workspace
        Scratch files go to ``scratch/partitions``. What is noted as dealt is not dealt again.
    """
    n_cells = len(destinations)
    record = work.read("dealt") or {"cells": 0, "sizes": None}
    if record["cells"] == n_cells:
        return
    kept = np.flatnonzero(destinations >= 0)
    unique = UniqueNames(np.concatenate([old_hashes, found.hashes[kept]]))
    renamed = unique.n_renamed(len(old_hashes))
    if renamed:
        logger.warning("%d cells have the name of another and get a suffix", renamed)
    scatter = Scatter(
        folder=work.scratch / "partitions",
        bounds=plan.bounds,
        dtypes=plan.dtypes,
        buffer_elements=budget.waiting_elements,
        sizes=record["sizes"],
    )
    blocks = aligned_blocks(
        inputs=sources,
        targets=found.targets,
        registry=found.registry,
        elements=budget.block_elements,
        scratch=work.scratch,
        first=record["cells"],
    )
    with Progress(n_cells, "cells", "shuffling", done=record["cells"]) as progress:
        for start, names, x in blocks:
            stop = start + x.shape[0]
            keep = np.flatnonzero(destinations[start:stop] >= 0)
            rows = start + keep
            first = len(old_hashes) + int(np.searchsorted(kept, start))
            scatter.add(
                destinations[rows],
                x if len(keep) == stop - start else x[keep],
                found.labels[rows],
                None if found.batches is None else found.batches[rows],
                unique.rename([names[row] for row in keep], first),
            )
            progress.advance(stop - start)
            if work.is_due():
                work.write("dealt", {"cells": stop, "sizes": scatter.sync()})
    work.write("dealt", {"cells": n_cells, "sizes": scatter.sync()})
    for number in range(len(sources)):
        remove(work.scratch / f"input_{number}")
