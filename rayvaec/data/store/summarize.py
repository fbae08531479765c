"""Summary of a store's training cells, from a bounded sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.store.open import Store
from rayvaec.data.store.row_sample import sample_rows
from rayvaec.model.training_summary import COUNT_EDGES, MOST_CELLS, N_QUANTILES, TrainingSummary

BLOCK_ROWS = 1024


def summarize(store: Store, max_cells: int = MOST_CELLS) -> TrainingSummary:
    """Summarise training cells: per label library sizes, per label and gene counts.

    Which of them, `sample_rows` says; they are read in blocks.

    Parameters
    ----------
    store : Store
        The store, with a training cell at least.
    max_cells : int
        Most cells to read, up to `MOST_CELLS`.

    Returns
    -------
    TrainingSummary

    Raises
    ------
    StoreError
        If a file is missing, cut short or damaged; the message names it.
    """
    n_genes, n_labels = store.n_genes, store.registry.n_labels
    sums = np.zeros(n_genes * n_labels, np.int64)
    histogram = np.zeros((n_genes * n_labels, len(COUNT_EDGES)), np.uint16)
    libraries: list[NDArray[np.int64]] = []
    labels: list[NDArray[np.int32]] = []
    for block in sample_rows(store, "train", min(max_cells, MOST_CELLS)).parts(BLOCK_ROWS):
        rows = store.read_runs(block.runs)
        counts = rows.counts.astype(np.int64)
        cells = np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
        pairs = rows.indices.astype(np.int64) * n_labels + rows.labels[cells]
        bins = np.searchsorted(COUNT_EDGES, counts, side="right") - 1
        np.add.at(sums, pairs, counts)
        np.add.at(histogram.reshape(-1), pairs * len(COUNT_EDGES) + bins, np.uint16(1))
        libraries.append(np.bincount(cells, counts, len(rows)).astype(np.int64))
        labels.append(rows.labels)
    library, label = np.concatenate(libraries), np.concatenate(labels)
    n_cells = np.bincount(label, minlength=n_labels)
    per_gene = histogram.reshape(n_genes, n_labels, len(COUNT_EDGES))
    # Only counts are stored: what is left of a label's cells has none.
    per_gene[..., 0] += (n_cells - per_gene.sum(axis=2, dtype=np.int64)).astype(np.uint16)
    return TrainingSummary(
        cells=n_cells.astype(np.int64),
        library=_quantiles(library, label, n_labels),
        mean=(sums.reshape(n_genes, n_labels) / np.maximum(n_cells, 1)).astype(np.float32),
        histogram=per_gene,
    )


def _quantiles(
    library: NDArray[np.int64], label: NDArray[np.int32], n_labels: int
) -> NDArray[np.float32]:
    quantiles = np.zeros((n_labels, N_QUANTILES), np.float32)
    for code in np.unique(label):
        at = np.linspace(0, 1, N_QUANTILES)
        quantiles[code] = np.quantile(library[label == code], at)
    return quantiles
