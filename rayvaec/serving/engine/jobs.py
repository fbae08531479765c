"""Jobs: parts of requests, computed in batches across requests.

A cell's result depends on (model, cell, seed) alone, so that what is computed beside it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import CountsError
from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.kernels.nb_sample import Draws
from rayvaec.model.vaec import VAEC

JOB_VALUES = 2 * 2**20
"""Rows * genes of a job: some milliseconds of work, so that large requests let small ones pass."""


@dataclass(frozen=True)
class Job:
    """Some draws of some cells.

    Parameters
    ----------
    kind : str
        What to compute.
    cells : Cells
        Of what; without counts for new cells.
    finish : callable
        Turns the cells' rows of the result into what the request wants, in the same thread.
    n_samples, first_sample, seed : int
        As in `rayvaec.inference.posterior.draw`.
    library : array[n_cells] of float32, optional
        Expected total counts of new cells.
    """

    kind: Literal["draw", "generate", "latent", "expression"]
    cells: Cells
    finish: Callable[[Any], Any]
    n_samples: int = 1
    first_sample: int = 0
    seed: int = 0
    library: NDArray[np.float32] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the result."""
        return len(self.cells) * self.n_samples

    @property
    def group(self) -> Hashable:
        """Jobs that agree in this can be computed in one call."""
        return (self.kind, self.n_samples, self.first_sample, self.seed)


def run_jobs(module: VAEC, jobs: Sequence[Job]) -> list[Any]:
    """Compute several jobs, those of one group together.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    jobs : sequence of Job
        In any order.

    Returns
    -------
    list
        What each job's `finish` returned, or the `CountsError` for cells that the model cannot
        draw for, in the order of `jobs`.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.group, []).append(number)
    results: list[Any] = [None] * len(jobs)
    for numbers in groups.values():
        outcomes = _run_group(module, [jobs[number] for number in numbers])
        for number, outcome in zip(numbers, outcomes, strict=True):
            results[number] = outcome
    return results


def _run_group(module: VAEC, jobs: Sequence[Job]) -> list[Any]:
    try:
        parts = list(_compute(module, jobs))
    except CountsError as error:
        if len(jobs) == 1:
            return [error]
        # One request's cells must not spoil what others asked for.
        return [outcome for job in jobs for outcome in _run_group(module, [job])]
    return [job.finish(part) for job, part in zip(jobs, parts, strict=True)]


def windows(n_cells: int, n_samples: int, n_genes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a request into jobs.

    Parameters
    ----------
    n_cells, n_samples, n_genes : int
        The request's size.

    Yields
    ------
    tuple of int
        First cell, one past the last, first draw, one past the last; cell by cell, in order.
    """
    rows = max(JOB_VALUES // n_genes, posterior.BLOCK_ROWS)
    step, window = max(rows // n_samples, 1), min(n_samples, rows)
    for start in range(0, n_cells, step):
        for first in range(0, n_samples, window):
            stop, last = min(start + step, n_cells), min(first + window, n_samples)
            yield start, stop, first, last


def _compute(module: VAEC, jobs: Sequence[Job]) -> Iterator[Any]:
    """Yield each job's part of the result of all of a group."""
    cells, first = _joined([job.cells for job in jobs]), jobs[0]
    starts = np.cumsum([0, *(len(job.cells) for job in jobs)])
    if first.kind in ("draw", "generate"):
        draws = _draws(module, cells, jobs)
        rows = starts * first.n_samples
        for start, stop in pairwise(rows):
            yield _rows(draws, start, stop)
        return
    compute = posterior.latent if first.kind == "latent" else _expression
    columns = compute(module, cells)
    for start, stop in pairwise(starts):
        yield tuple(values[start:stop] for values in columns)


def _draws(module: VAEC, cells: Cells, jobs: Sequence[Job]) -> Draws:
    first = jobs[0]
    if first.kind == "draw":
        return posterior.draw(
            module=module,
            cells=cells,
            n_samples=first.n_samples,
            seed=first.seed,
            first_sample=first.first_sample,
        )
    library = np.concatenate([job.library for job in jobs if job.library is not None])
    return posterior.generate(
        module,
        cells.labels,
        library,
        cells.keys,
        first.n_samples,
        first.seed,
        first_sample=first.first_sample,
        batches=cells.batches,
    )


def _expression(module: VAEC, cells: Cells) -> tuple[NDArray[np.float32]]:
    return (posterior.expression(module, cells),)


def _rows(draws: Draws, start: int, stop: int) -> Draws:
    ends = draws.indptr[start : stop + 1]
    first, last = ends[0], ends[-1]
    return Draws(ends - first, draws.indices[first:last], draws.counts[first:last])


def _joined(parts: Sequence[Cells]) -> Cells:
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(part.indptr[-1] for part in parts)])
    ends = [part.indptr[1:] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    batches = [part.batches for part in parts if part.batches is not None]
    return Cells(
        indptr=np.concatenate([np.zeros(1, np.int64), *ends]),
        indices=np.concatenate([part.indices for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        batches=np.concatenate(batches) if batches else None,
        keys=np.concatenate([part.keys for part in parts]),
    )
