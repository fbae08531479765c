from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rayvaec.data.store.open import Rows, open_store
from rayvaec.model.vaec import VAEC
from rayvaec.training.initialization import (
    BLOCK_CELLS,
    LABEL_PRIOR,
    START_EXCESS,
    Moments,
    moments,
    set_start_values,
)


def dense(rows: Rows, n_genes: int) -> np.ndarray:
    x = np.zeros((len(rows), n_genes))
    for cell in range(len(rows)):
        entries = slice(rows.indptr[cell], rows.indptr[cell + 1])
        x[cell, rows.indices[entries].astype(int)] = rows.counts[entries]
    return x


def drawn(generative: str, value: float, n_cells: int = 2000, n_genes: int = 200) -> Rows:
    """Cells of two labels whose counts have one dispersion; the entries hold zeros too."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n_cells).astype(np.int32)
    mean = rng.uniform(2, 20, (2, n_genes))[labels]
    theta = mean / value if generative == "softplus" else value
    counts = rng.negative_binomial(theta, theta / (theta + mean)).astype(np.uint16)
    genes = np.tile(np.arange(n_genes, dtype=np.uint16), n_cells)
    return Rows(np.arange(n_cells + 1) * n_genes, genes, counts.ravel(), labels, None)


def test_moments_are_those_of_the_dense_counts(store_path: Path) -> None:
    store = open_store(store_path)
    rows, n_labels = store.read(0, 300), store.registry.n_labels  # more than one block
    assert len(rows) > BLOCK_CELLS
    share = np.array(store.manifest.gene_totals) / store.manifest.total_counts
    found = moments(rows, share, n_labels)
    x = dense(rows, store.n_genes)
    shares = np.stack(
        [
            (x[rows.labels == label].sum(0) + LABEL_PRIOR * share)
            / (x[rows.labels == label].sum() + LABEL_PRIOR)
            for label in range(n_labels)
        ]
    )
    mu = x.sum(1, keepdims=True) * shares[rows.labels]
    np.testing.assert_allclose(found.mean, mu.sum(0))
    np.testing.assert_allclose(found.square, (mu**2).sum(0))
    np.testing.assert_allclose(found.excess, ((x - mu) ** 2 - mu).sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.5, 3.0])
@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_dispersions_start_at_those_of_the_counts(generative: str, value: float) -> None:
    rows = drawn(generative, value)
    counts = dense(rows, 200)
    share = counts.sum(0) / counts.sum()
    module = VAEC(200, 2, generative=generative, n_batch=int(generative == "softmax"))
    set_start_values(module, share, moments(rows, share, 2))
    found = module.px_r.detach().exp().numpy()
    assert np.median(found) == pytest.approx(value, rel=0.1)
    assert (abs(np.log(found / value)) < 0.5).mean() > 0.95


def test_genes_without_counts_start_at_finite_values() -> None:
    module, nothing = VAEC(3, 2), np.zeros(3)
    set_start_values(module, np.full(3, 1e-9), Moments(nothing, nothing, nothing))
    np.testing.assert_allclose(module.px_r.detach().exp(), START_EXCESS, rtol=1e-6)
    assert torch.isfinite(module.output.bias).all()
