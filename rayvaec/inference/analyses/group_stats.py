"""Sufficient statistics of groups of cells, in bounded memory.

Of every group: sums over its counts, and the posteriors of a random choice of its cells. The choice
is by a random number keyed by seed and cell; the cells with the smallest are kept (a bottom-k
sketch). So summaries of parts of the data merge, in any grouping, to that of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.kernels.rng import normal_noise
from rayvaec.model.vaec import VAEC

CHOICE_SAMPLE = 2**63 + 1
"""Index of the noise that chooses cells, apart from every index that draws and bounds use."""

PER = 10_000
"""Total to which counts are scaled in `Populations.normalized`."""


class Populations(NamedTuple):
    """Summaries of some groups of cells.

    Parameters
    ----------
    n_cells : array[n_groups] of int64
        Cells of each group.
    raw, nonzero, normalized : array[n_groups, n_genes] of float64
        Sums over them of counts, of whether there is a count, and of counts per `PER`.
    group : array[n_chosen] of int64
        Group of every chosen cell.
    priority : array[n_chosen] of float32
        What they were chosen by; the smallest of a group are here.
    keys : array[n_chosen] of uint64
        Keys of their noise.
    loc, scale : array[n_chosen, n_latent] of float32
        Their q(z | x, y).
    labels, batches : array[n_chosen] of int64
        Their codes; batches are 0 in models without.
    """

    n_cells: NDArray[np.int64]
    raw: NDArray[np.float64]
    nonzero: NDArray[np.float64]
    normalized: NDArray[np.float64]
    group: NDArray[np.int64]
    priority: NDArray[np.float32]
    keys: NDArray[np.uint64]
    loc: NDArray[np.float32]
    scale: NDArray[np.float32]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64]


def summarise(
    module: VAEC, cells: Cells, groups: NDArray[np.int64], n_groups: int, keep: int, seed: int
) -> Populations:
    """Summarise groups of cells.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    groups : array[n_cells] of int64
        Group of each cell, -1 for none.
    n_groups : int
        Number of groups.
    keep : int
        Cells to choose of each group.
    seed : int
        Seed of the choice.

    Returns
    -------
    Populations
    """
    inside = np.flatnonzero(groups >= 0)
    member = csr_array(
        (np.ones(len(inside)), (groups[inside], inside)), shape=(n_groups, len(cells))
    )
    shape = (len(cells), module.config.n_input)
    counts = csr_array((cells.counts.astype(np.float64), cells.indices, cells.indptr), shape=shape)
    totals = counts.sum(axis=1)
    per_count = csr_array(
        (PER / np.maximum(totals[inside], 1), (groups[inside], inside)), shape=member.shape
    )
    raw, normalized = (member @ counts).toarray(), (per_count @ counts).toarray()
    counts.data[:] = cells.counts > 0
    samples = np.full(len(cells), CHOICE_SAMPLE, np.uint64)
    priority = normal_noise(seed, cells.keys, samples, 1)[:, 0]
    chosen = _smallest(groups, priority, cells.keys, keep)
    mean, variance = posterior.latent(module, cells.take(chosen))
    batches = np.zeros_like(cells.labels) if cells.batches is None else cells.batches
    return Populations(
        n_cells=np.bincount(groups[inside], minlength=n_groups),
        raw=raw,
        nonzero=(member @ counts).toarray(),
        normalized=normalized,
        group=groups[chosen],
        priority=priority[chosen],
        keys=cells.keys[chosen],
        loc=mean,
        scale=np.sqrt(variance),
        labels=cells.labels[chosen],
        batches=batches[chosen],
    )


def merge(parts: Iterable[Populations], keep: int) -> Populations:
    """Merge summaries of different cells in the same groups.

    Parameters
    ----------
    parts : iterable of Populations
        At least one.
    keep : int
        As in `summarise`.

    Returns
    -------
    Populations
    """
    parts = iter(parts)
    merged = next(parts)
    for part in parts:
        sums = [a + b for a, b in _pairs(merged[:4], part[:4])]
        lists = [np.concatenate(pair) for pair in _pairs(merged[4:], part[4:])]
        merged = _kept(sums, lists, keep)
    return merged


def pooled(populations: Populations, groups: Sequence[int], keep: int) -> Populations:
    """Return the summary of several groups taken as one.

    Parameters
    ----------
    populations : Populations
    groups : sequence of int
        Which.
    keep : int
        As in `summarise`.

    Returns
    -------
    Populations
        Of a single group.
    """
    sums = [values[list(groups)].sum(0, keepdims=True) for values in populations[:4]]
    inside = np.isin(populations.group, groups)
    group, *lists = [values[inside] for values in populations[4:]]
    return _kept(sums, [np.zeros_like(group), *lists], keep)


def _pairs(one: Sequence[Any], two: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(one, two, strict=True)


def _kept(sums: list[Any], lists: list[Any], keep: int) -> Populations:
    """Return sums and those of the chosen cells that stay chosen."""
    group, priority, keys, *_ = lists
    chosen = _smallest(group, priority, keys, keep)
    return Populations(*sums, *(values[chosen] for values in lists))


def _smallest(
    group: NDArray[np.int64], priority: NDArray[np.float32], keys: NDArray[np.uint64], keep: int
) -> NDArray[np.int64]:
    """Return the positions of the cells with smallest priority of every group, in that order."""
    order = np.lexsort((keys, priority, group))
    order = order[group[order] >= 0]
    ranked = group[order]
    starts = np.searchsorted(ranked, ranked)
    return order[np.arange(len(order)) - starts < keep]
