from __future__ import annotations

import anndata
import numpy as np
import pytest

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_store
from rayvaec.data.store.summarize import summarize
from rayvaec.model.training_summary import COUNT_EDGES


@pytest.fixture(scope="module")
def store(store_path):
    return open_store(store_path)


def dense(store, start, stop):
    rows = store.read(start, stop)
    x = np.zeros((len(rows), store.n_genes), np.int64)
    x[np.repeat(np.arange(len(rows)), np.diff(rows.indptr)), rows.indices] = rows.counts
    return x, rows.labels


def test_it_is_what_numpy_says_of_the_training_cells(store):
    summary = summarize(store)
    x, labels = dense(store, 0, store.n_train)
    assert summary.cells.sum() == store.n_train
    for label in range(store.registry.n_labels):
        own = x[labels == label]
        assert summary.cells[label] == len(own)
        np.testing.assert_allclose(summary.mean[:, label], own.mean(0), rtol=1e-6)
        np.testing.assert_allclose(summary.zero_fraction[:, label], (own == 0).mean(0))
        percentiles = np.percentile(own.sum(1), range(101))
        np.testing.assert_allclose(summary.library[label], percentiles, rtol=1e-6)
        for gene in (0, 17, store.n_genes - 1):
            expected, _ = np.histogram(own[:, gene], [*COUNT_EDGES, np.inf])
            assert summary.histogram[gene, label].tolist() == expected.tolist()


def test_a_sample_is_bounded(store, monkeypatch):
    monkeypatch.setattr("rayvaec.data.store.summarize.BLOCK_ROWS", 100)
    read, whole = [], store.read_runs
    monkeypatch.setattr(store, "read_runs", lambda runs: read.append(runs) or whole(runs))
    summary = summarize(store, max_cells=350)
    assert summary.cells.sum() == 350
    assert [sum(map(len, runs)) for runs in read] == [100, 100, 100, 50]
    np.testing.assert_allclose(summary.mean.mean(), summarize(store).mean.mean(), rtol=0.1)


def test_a_label_without_training_cells_has_zeros(tmp_path):
    adata = anndata.AnnData(np.ones((40, 3), np.float32) * [[0, 1, 700]])
    adata.obs["cell_type"] = ["common"] * 39 + ["rare"]
    adata.obs_names = [f"cell {i}" for i in range(40)]
    adata.write_h5ad(tmp_path / "atlas.h5ad")
    for seed in range(100):  # until the rare cell falls among the validation cells
        config = PrepareConfig(labels_key="cell_type", val_fraction=0.5, seed=seed)
        prepare([tmp_path / "atlas.h5ad"], tmp_path / "store", config, overwrite=True)
        store = open_store(tmp_path / "store")
        summary = summarize(store)
        if not summary.cells[1]:
            break
    assert summary.cells.tolist() == [store.n_train, 0]
    assert summary.mean.tolist() == [[0, 0], [1, 0], [700, 0]]
    assert summary.library[1].tolist() == [0] * 101
    assert summary.zero_fraction.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert summary.histogram[2, 0].tolist() == [0] * 15 + [store.n_train]
    assert summary.telling_genes(2) == [2, 1]
