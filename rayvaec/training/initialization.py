"""Initial values of a model from the counts it will be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rayvaec.data.store.open import Rows, Store
from rayvaec.data.store.row_sample import sample_rows
from rayvaec.model.vaec import VAEC

START_CELLS = 4096
"""Training cells that variances are estimated from."""
BLOCK_CELLS = 256
LABEL_PRIOR = 200.0
"""Counts of all cells that are added to those of every label: labels may have few cells."""
GENE_PRIOR = 5.0
"""Weight of `START_EXCESS`, or of theta = 1, in expected counts of a gene (or their squares)."""
START_EXCESS = 0.3
LEAST, MOST = 0.05, 100.0
"""Range of the start values of excess and theta."""


@dataclass(frozen=True)
class Moments:
    """What the counts of each gene sum to, against the means of their labels.

    With mu the library of a cell times its label's share of the gene:

    Parameters
    ----------
    excess : NDArray[n_genes] of float64
        Sum over cells of (x - mu)^2 - mu: what a Poisson distribution would not have.
    mean, square : NDArray[n_genes] of float64
        Sums of mu and of mu^2.
    """

    excess: NDArray[np.float64]
    mean: NDArray[np.float64]
    square: NDArray[np.float64]


def start_from_counts(module: VAEC, store: Store) -> None:
    """Start output and dispersions at what the counts show.

    Every gene's expected share of a cell's counts becomes its share in the store, and its
    dispersion that of the training cells around the means of their labels, by the method of
    moments. Left at their random start values, dispersions would be off by a factor of three, and
    Adam moves them by no more than the learning rate a step.

    Parameters
    ----------
    module : VAEC
        Is changed in place.
    store : Store
        What it is to be trained on.
    """
    manifest = store.manifest
    # Half a count for a gene without any: its share is small, but not zero.
    share = np.maximum(np.array(manifest.gene_totals, np.float64), 0.5)
    share /= max(manifest.total_counts, 1)
    rows = store.read_runs(sample_rows(store, "train", START_CELLS).runs)
    set_start_values(module, share, moments(rows, share, max(store.registry.n_labels, 1)))


@torch.no_grad()
def set_start_values(module: VAEC, share: NDArray[np.float64], found: Moments) -> None:
    """Set output biases and dispersions.

    Parameters
    ----------
    module : VAEC
        Is changed in place.
    share : NDArray[n_genes] of float64
        Each gene's share of all counts.
    found : Moments
        Of cells of the store.
    """
    if module.is_softplus:  # variance = mean * (1 + exp(px_r)), mean = px_rate * exp(px_r)
        start = (found.excess + GENE_PRIOR * START_EXCESS) / (found.mean + GENE_PRIOR)
        start = start.clip(LEAST, MOST)
        share = share / start
    else:  # variance = mean + mean^2 / exp(px_r)
        start = (found.square + GENE_PRIOR) / (found.excess + GENE_PRIOR).clip(GENE_PRIOR / MOST)
        start = start.clip(LEAST, MOST)
    module.init_from_counts(torch.from_numpy(share))
    module.px_r.copy_(torch.from_numpy(np.log(start)))


def moments(rows: Rows, share: NDArray[np.float64], n_labels: int) -> Moments:
    """Sum up cells, gene by gene, without making their counts dense.

    Parameters
    ----------
    rows : Rows
        Cells of a store.
    share : NDArray[n_genes] of float64
        Each gene's share of all counts.
    n_labels : int
        Number of labels.

    Returns
    -------
    Moments
    """
    n_genes, library = len(share), np.zeros(len(rows))
    shares = np.zeros(n_labels * n_genes)
    for cells, genes, x in _blocks(rows):
        library += np.bincount(cells, x, len(rows))
        shares += np.bincount(rows.labels[cells] * n_genes + genes, x, len(shares))
    libraries = np.bincount(rows.labels, library, n_labels)[:, None]
    shares = shares.reshape(n_labels, n_genes) + LABEL_PRIOR * share
    shares /= libraries + LABEL_PRIOR
    mean = (libraries * shares).sum(0)
    square = np.bincount(rows.labels, library**2, n_labels) @ shares**2
    excess = square - mean
    for cells, genes, x in _blocks(rows):
        mu = library[cells] * shares[rows.labels[cells], genes]
        excess += np.bincount(genes, x * (x - 2 * mu), n_genes)
    return Moments(excess, mean, square)


def _blocks(rows: Rows) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Yield cell, gene and count of the entries of a few cells at a time, 8 bytes each."""
    for start in range(0, len(rows), BLOCK_CELLS):
        ends = rows.indptr[start : start + BLOCK_CELLS + 1]
        cells = np.repeat(np.arange(start, start + len(ends) - 1), np.diff(ends))
        genes, counts = (part[ends[0] : ends[-1]] for part in (rows.indices, rows.counts))
        yield cells, genes.astype(np.int64), counts.astype(np.int64)
