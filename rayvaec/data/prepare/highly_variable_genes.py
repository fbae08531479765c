"""Highly variable genes, flavour ``seurat_v3``, out of core on raw counts.

For every batch, a curve of log variance over log mean says how much a gene of that mean varies
(Stuart et al. 2019, "Comprehensive Integration of Single-Cell Data", Methods); counts are scaled
by it and clipped, and genes are ranked by the variance of what results. Two passes over the cells
suffice: one for sums and sums of squares, one for what the clipping takes away. Both add up whole
numbers, so that neither the order of the cells nor the size of the blocks changes the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skmisc.loess import loess

from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare.validate import Names, aligned_blocks
from rayvaec.errors import ConfigError, CountsError
from rayvaec.util.numba_cache import compiled
from rayvaec.util.progress import Progress

FLAVOUR = "seurat_v3"
SPAN = 0.3
# With fewer points, a local curve over this span has fewer points than it has parameters; loess
# then raises, or ends the process.
LEAST_GENES = 14


@dataclass(frozen=True)
class GeneMoments:
    """What a pass over the cells adds up, for every batch and gene.

    Parameters
    ----------
    cells : array[n_batches] of int64
        Number of cells.
    sums, squares : array[n_batches, n_genes] of float64
        Sums of the counts and of their squares; exact below 2**53.
    """

    cells: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean count, [n_batches, n_genes]."""
        return self.sums / self.cells[:, None]

    @property
    def variances(self) -> NDArray[np.float64]:
        """Unbiased variance, [n_batches, n_genes]; 0 for a gene that does not vary."""
        n = self.cells[:, None].astype(np.float64)
        # Both products are rounded from exact numbers: equal ones cancel to zero.
        return (n * self.squares - self.sums**2) / (n * (n - 1))


def most_variable(
    inputs: Sequence[Input], names: Names, n_top_genes: int, block_elements: int, scratch: Path
) -> tuple[str, ...]:
    """Choose the genes that vary most.

    Memory holds a block of cells and some ten numbers for every batch and gene.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    names : Names
        The genes to choose from and, where they are to be ranked per batch, each cell's batch.
    n_top_genes : int
        How many to choose.
    block_elements, scratch
        As in `rayvaec.data.prepare.validate.validate`.

    Returns
    -------
    tuple of str
        `n_top_genes` genes in the order of ``names.registry``.

    Raises
    ------
    ConfigError
        If there are fewer genes.
    CountsError
        If a batch has too few cells or varying genes; or for a value that is no count.
    """
    registry = names.registry
    if n_top_genes > registry.n_genes:
        raise ConfigError(
            f"--n-top-genes is {n_top_genes} and there are {registry.n_genes} genes",
            f"use at most {registry.n_genes}, or leave it out to keep every gene",
        )
    batches = np.zeros(len(names.labels), np.int64) if names.batches is None else names.batches
    called = [f"batch {batch!r}" for batch in registry.batches] or ["the inputs"]
    cells = np.bincount(batches, minlength=len(called))
    shape = len(called), registry.n_genes
    sums, squares = np.zeros(shape), np.zeros(shape)
    work = (inputs, names, batches, block_elements, scratch)
    _each_block(*work, 1, lambda *block: add_moments(*block, sums, squares))
    moments = GeneMoments(cells, sums, squares)
    deviations = expected_deviations(moments, called)
    limits = deviations * np.sqrt(cells)[:, None] + moments.means
    over = np.zeros((3, *shape))
    _each_block(*work, 2, lambda *block: add_above(*block, limits, over))
    scores = clipped_variances(moments, deviations, limits, over)
    return tuple(registry.genes[gene] for gene in top_genes(scores, n_top_genes))


def _each_block(
    inputs: Sequence[Input],
    names: Names,
    batches: NDArray[np.int64],
    block_elements: int,
    scratch: Path,
    number: int,
    add: Callable[..., None],
) -> None:
    """Call ``add(batches, indptr, indices, counts)`` for blocks of all cells."""
    blocks = aligned_blocks(inputs, names.targets, names.registry, block_elements, scratch)
    with Progress(len(batches), "cells", f"finding variable genes, pass {number} of 2") as progress:
        for start, _, x in blocks:
            add(batches[start : start + x.shape[0]], x.indptr, x.indices, x.data)
            progress.advance(x.shape[0])


@compiled
def add_moments(
    batches: NDArray[np.int64],
    indptr: NDArray[np.int32],
    indices: NDArray[np.int32],
    counts: NDArray[np.int32],
    sums: NDArray[np.float64],
    squares: NDArray[np.float64],
) -> None:
    """Add a block of CSR counts to the sums of its cells' batches."""
    for row in range(len(batches)):
        for k in range(indptr[row], indptr[row + 1]):
            count = float(counts[k])
            sums[batches[row], indices[k]] += count
            squares[batches[row], indices[k]] += count * count


@compiled
def add_above(
    batches: NDArray[np.int64],
    indptr: NDArray[np.int32],
    indices: NDArray[np.int32],
    counts: NDArray[np.int32],
    limits: NDArray[np.float64],
    over: NDArray[np.float64],
) -> None:
    """Add the counts above their limit to `over`: how many, their sum, their squares' sum."""
    for row in range(len(batches)):
        for k in range(indptr[row], indptr[row + 1]):
            batch, gene, count = batches[row], indices[k], float(counts[k])
            if count > limits[batch, gene]:
                over[0, batch, gene] += 1
                over[1, batch, gene] += count
                over[2, batch, gene] += count * count


def expected_deviations(moments: GeneMoments, called: Sequence[str]) -> NDArray[np.float64]:
    """Return the standard deviation that is expected of genes with these means.

    A local quadratic regression of log10 variance on log10 mean over the genes that vary; 1 for
    those that do not.

    Parameters
    ----------
    moments : GeneMoments
        Of every batch.
    called : sequence of str
        What to call each batch in messages.

    Returns
    -------
    array[n_batches, n_genes] of float64

    Raises
    ------
    CountsError
        If no curve can be fitted to a batch.
    """
    for n, name in zip(moments.cells.tolist(), called, strict=True):
        if n < 2:
            raise _no_curve(name, n, "a variance needs two")
    means, variances = moments.means, moments.variances
    logs = np.zeros_like(means)
    for batch, name in enumerate(called):
        varies = variances[batch] > 0
        n, n_varying = int(moments.cells[batch]), int(varies.sum())
        if n_varying < LEAST_GENES:
            raise _no_curve(name, n, f"{n_varying} genes vary and {LEAST_GENES} are needed")
        try:
            model = loess(
                np.log10(means[batch, varies]),
                np.log10(variances[batch, varies]),
                span=SPAN,
                degree=2,
            )
            model.fit()
        except ValueError as error:
            reason = str(error).removeprefix("b'").rstrip("'. ")
            how = f"{n_varying} genes vary and loess says: {reason}"
            raise _no_curve(name, n, how) from error
        logs[batch, varies] = model.outputs.fitted_values
    return np.sqrt(10**logs)


def _no_curve(name: str, n_cells: int, how: str) -> CountsError:
    return CountsError(
        f"no curve of variance over mean fits {name}, {n_cells} cells ({how})",
        "leave this batch or rare genes out, rank without --batch-key, or name the genes "
        "with --genes FILE",
    )


def clipped_variances(
    moments: GeneMoments,
    deviations: NDArray[np.float64],
    limits: NDArray[np.float64],
    over: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return each gene's variance of scaled counts clipped at sqrt(n_cells).

    Parameters
    ----------
    moments : GeneMoments
        Of the counts as they are.
    deviations, limits : array[n_batches, n_genes]
        By what counts are scaled, and where they are clipped.
    over : array[3, n_batches, n_genes]
        How many counts are above their limit, their sum, and their squares' sum.

    Returns
    -------
    array[n_batches, n_genes] of float64
    """
    n, means = moments.cells[:, None], moments.means
    sums = moments.sums - over[1] + over[0] * limits
    squares = moments.squares - over[2] + over[0] * limits**2
    return (n * means**2 + squares - 2 * sums * means) / ((n - 1) * deviations**2)


def top_genes(scores: NDArray[np.float64], n_top_genes: int) -> NDArray[np.int64]:
    """Return the genes that rank highest in the median batch.

    Parameters
    ----------
    scores : array[n_batches, n_genes]
        The larger, the more variable.
    n_top_genes : int
        How many genes to choose; also, how many count as highly variable in a batch.

    Returns
    -------
    array[n_top_genes] of int64
        In ascending order. A gene's rank is its median over the batches in which it is highly
        variable; of equal ranks, more such batches win, then the gene that stands first.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1], dtype=float)[None], axis=1)
    high = ranks < n_top_genes
    medians = np.ma.median(np.ma.masked_array(ranks, ~high), axis=0).filled(np.inf)
    return np.sort(np.lexsort((-high.sum(axis=0), medians))[:n_top_genes])
