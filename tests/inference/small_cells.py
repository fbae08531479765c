"""A small model without names, and cells for it."""

from __future__ import annotations

import numpy as np
import torch

from rayvaec.inference.cells import Cells
from rayvaec.kernels.rng import cell_keys
from rayvaec.model.vaec import VAEC

N_CELLS, N_GENES, N_LABELS = 150, 37, 3


def make_module(**kwargs):
    torch.manual_seed(0)
    module = VAEC(N_GENES, N_LABELS, n_hidden=24, **kwargs).eval()
    module.init_from_counts(torch.full((N_GENES,), 1 / N_GENES))
    return module


def make_cells(n_cells=N_CELLS, batches=None):
    dense = np.random.default_rng(0).poisson(1.5, (n_cells, N_GENES))
    return Cells(
        np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64),
        np.nonzero(dense)[1].astype(np.int32),
        dense[dense > 0].astype(np.int32),
        np.arange(n_cells) % N_LABELS,
        batches,
        cell_keys([f"cell{i}" for i in range(n_cells)]),
    )


def take(cells, order):
    """The cells at the positions `order`."""
    parts = [np.arange(cells.indptr[i], cells.indptr[i + 1]) for i in order]
    entries = np.concatenate(parts)
    return Cells(
        np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        cells.indices[entries],
        cells.counts[entries],
        cells.labels[order],
        None if cells.batches is None else cells.batches[order],
        cells.keys[order],
    )
