from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse, stats

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.datasets import _negative_binomial, simulate, write_atlas
from rayvaec.errors import ConfigError, StoreError


@pytest.fixture(scope="module")
def atlas() -> anndata.AnnData:
    return simulate(n_cells=5000, n_genes=2000, n_labels=6, seed=0)


def log_fractions(adata):
    """Return log(1 + counts per 2,500), [n_cells, n_genes]."""
    library = np.asarray(adata.X.sum(1))
    return np.log1p(adata.X.toarray() / library * 2500)


def test_an_atlas_has_the_form_that_prepare_reads(atlas):
    assert atlas.shape == (5000, 2000)
    assert isinstance(atlas.X, sparse.csr_matrix)
    assert atlas.X.dtype == np.int32
    assert atlas.X.has_canonical_format
    assert atlas.X.data.min() > 0
    assert atlas.obs_names[[0, 4999]].tolist() == ["cell_000000", "cell_004999"]
    assert atlas.var_names[[0, 1999]].tolist() == ["gene_0000", "gene_1999"]
    assert atlas.obs["cell_type"].cat.categories.tolist() == [f"type_{i}" for i in range(6)]
    assert atlas.obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]
    assert atlas.obs["cell_type"].value_counts().min() > 100


def test_counts_look_like_counts(atlas):
    library = np.asarray(atlas.X.sum(1)).ravel()
    assert 2000 < library.mean() < 3000
    assert 0.3 < library.std() / library.mean() < 0.6
    assert 0.9 < 1 - atlas.X.nnz / np.prod(atlas.shape) < 0.97
    means = np.asarray(atlas.X.mean(0)).ravel()
    assert np.quantile(means, 0.99) > 1000 * np.quantile(means, 0.25)


def test_labels_differ_and_cells_vary_within_them(atlas):
    x = log_fractions(atlas)
    labels = atlas.obs["cell_type"].cat.codes.to_numpy()
    centres = np.array([x[labels == label].mean(0) for label in range(6)])
    nearest = (x @ centres.T - (centres**2).sum(1) / 2).argmax(1)
    assert (nearest == labels).mean() > 0.9
    assert np.abs(np.corrcoef(centres)[np.triu_indices(6, 1)]).max() < 0.97
    # Within a label, the first directions must stand out from what independent noise would give.
    within = x[labels == 0][:, np.argsort(x.var(0))[-200:]]
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(within, axis=0)
    top, noise = (np.linalg.eigvalsh(np.cov(part.T))[::-1] for part in (within, shuffled))
    assert top[0] > 4 * noise[0]
    assert top[2] > 2 * noise[2]


def test_batches_differ_less_than_labels(atlas):
    x = log_fractions(atlas)

    def between(column):
        codes = atlas.obs[column].cat.codes.to_numpy()
        centres = np.array([x[codes == code].mean(0) for code in range(codes.max() + 1)])
        return ((centres[codes] - x.mean(0)) ** 2).sum()

    assert 0 < between("batch") < 0.1 * between("cell_type")


def test_an_atlas_follows_from_its_seed():
    first, again, other = (simulate(300, 50, 3, seed=seed) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_the_smallest_atlas():
    adata = simulate(n_cells=1, n_genes=1, n_labels=1, n_batches=1)
    assert adata.shape == (1, 1)
    assert adata.X.sum() > 0


def test_every_label_has_cells_and_every_cell_counts():
    adata = simulate(n_cells=9, n_genes=40, n_labels=9, mean_library=1.0)
    assert sorted(adata.obs["cell_type"]) == [f"type_{i}" for i in range(9)]
    assert np.asarray(adata.X.sum(1)).min() > 0


@pytest.mark.parametrize(("r", "logit"), [(0.05, 0.0), (0.7, 1.5), (4.0, -1.0), (30.0, 0.5)])
def test_draws_are_negative_binomial(r, logit):
    rng = np.random.default_rng(5)
    total_count = np.full((20_000, 2), r)
    draws = _negative_binomial(rng, total_count, np.full(2, logit, "f4"))[:, 1]
    # scipy's p is the chance of a success; torch's probs, sigmoid(logits), that of a failure.
    law = stats.nbinom(r, 1 / (1 + np.exp(logit)))
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 12)))
    observed = np.bincount(np.searchsorted(edges, draws), minlength=len(edges) + 1)
    chances = np.diff(np.concatenate([[0], law.cdf(edges), [1]]))
    assert stats.chisquare(observed, chances * len(draws)).pvalue > 1e-4


@pytest.mark.parametrize("name", ["atlas.h5ad", "atlas.zarr"])
def test_a_written_atlas_can_be_prepared(tmp_path, name):
    out = tmp_path / name
    write_atlas(out, n_cells=300, n_genes=50, n_labels=3, seed=1)
    assert list(tmp_path.iterdir()) == [out]
    config = PrepareConfig("cell_type", batch_key="batch")
    manifest = prepare([out], tmp_path / "store", config)
    adata = simulate(300, 50, 3, seed=1)
    assert manifest.total_counts == adata.X.sum()
    assert manifest.registry.genes == tuple(adata.var_names)
    with pytest.raises(StoreError, match="exists already"):
        write_atlas(out, n_cells=300, n_genes=50)
    write_atlas(out, n_cells=20, n_genes=5, n_labels=2, overwrite=True)
    assert prepare([out], tmp_path / "store", config, overwrite=True).n_cells == 20


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_cells": 0}, "`n_cells` is 0; use 1 or more"),
        ({"n_genes": -3}, "`n_genes` is -3"),
        ({"n_labels": 0}, "`n_labels` is 0"),
        ({"n_batches": 0}, "`n_batches` is 0"),
        ({"n_cells": 3, "n_labels": 4}, "`n_cells` is 3 and `n_labels` is 4"),
        ({"seed": -1}, "`seed` is -1"),
        ({"mean_library": 0.0}, "the mean library is 0.0"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(tmp_path, options, problem):
    with pytest.raises(ConfigError, match=problem):
        write_atlas(tmp_path / "atlas.h5ad", **options)
    assert not list(tmp_path.iterdir())


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"atlas.csv does not end in a format .*ends in .h5ad"):
        write_atlas(tmp_path / "atlas.csv")
