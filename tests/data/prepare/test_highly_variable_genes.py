from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata
import numpy as np
import pytest
from skmisc.loess import loess

from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare.highly_variable_genes import most_variable, top_genes
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.prepare.validate import read_names
from rayvaec.data.store.describe import describe_store
from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, CountsError

RECORDED = Path(__file__).parent / "seurat_v3_pbmc.json"


def draw(n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    """Counts of genes that differ in mean and in how much they vary; two do not vary at all."""
    rng = np.random.default_rng(seed)
    shape, scale = rng.gamma(2.0, 1.0, n_genes) + 0.5, rng.gamma(2.0, 3.0, n_genes) + 1.0
    rate = rng.gamma(shape, scale, (n_cells, n_genes))
    x = rng.poisson(rate)
    x[:, 0], x[:, 1] = 0, 3
    return x


def scores(x: np.ndarray) -> np.ndarray:
    """Return the variances of clipped, scaled counts, from the dense matrix of one batch."""
    n = len(x)
    mean, variance = x.mean(axis=0), x.var(axis=0, ddof=1)
    varies = variance > 0
    log_variance = np.zeros(x.shape[1])
    model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
    model.fit()
    log_variance[varies] = model.outputs.fitted_values
    z = (x - mean) / np.sqrt(10**log_variance)
    return (np.minimum(z, np.sqrt(n)) ** 2).sum(axis=0) / (n - 1)


def chosen(paths, n_top_genes, batch_key=None, genes=None, block_elements=10**6) -> tuple[str, ...]:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        inputs = [stack.enter_context(Input(path, None)) for path in paths]
        names = read_names(inputs, "cell_type", batch_key, genes)
        return most_variable(inputs, names, n_top_genes, block_elements, scratch)


@pytest.mark.parametrize("n_top_genes", [1, 20, 150])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_the_choice_is_that_of_the_formula(write_input, form, n_top_genes):
    x = draw(90, 150, n_top_genes)
    order = np.argsort(-scores(x), kind="stable")[:n_top_genes]
    expected = tuple(f"g{gene}" for gene in np.sort(order))
    path = write_input(x, form=form)
    for block_elements in (500, 10**6):
        assert chosen([path], n_top_genes, block_elements=block_elements) == expected


def test_large_counts_are_clipped(write_input):
    # One cell's outlier makes a gene vary most, unless it is clipped.
    x = draw(400, 150, 3)
    x[7, 40] = 10**6
    unclipped = (x.var(axis=0, ddof=1) / np.maximum(x.mean(axis=0), 1)).argmax()
    assert unclipped == 40
    order = np.argsort(-scores(x), kind="stable")[:10]
    assert chosen([write_input(x)], 10) == tuple(f"g{gene}" for gene in np.sort(order))


def test_genes_are_ranked_per_batch(write_input):
    rng = np.random.default_rng(5)
    x, donor = draw(300, 150, 5), rng.integers(0, 3, 300)
    x[:, 10:20] += 5 * donor[:, None] ** 2  # these differ between batches and not within
    parts = np.array([scores(x[donor == batch]) for batch in range(3)])
    ranks = (-parts).argsort(axis=1, kind="stable").argsort(axis=1).astype(float)
    ranks[ranks >= 30] = np.nan
    ever = np.flatnonzero(~np.isnan(ranks).all(axis=0))
    median = np.nanmedian(ranks[:, ever], axis=0)
    n_batches = (~np.isnan(ranks[:, ever])).sum(axis=0)
    order = ever[np.lexsort((ever, -n_batches, median))][:30]
    halves = [slice(0, 130), slice(130, 300)]  # every batch lies in both files
    paths = [
        write_input(x[rows], f"{name}.h5ad", obs={"donor": [f"d{k}" for k in donor[rows]]})
        for name, rows in zip("ab", halves, strict=True)
    ]
    found = chosen(paths, 30, "donor", block_elements=700)
    assert found == tuple(f"g{gene}" for gene in np.sort(order))
    assert found != chosen(paths, 30)


def test_ties_and_genes_that_are_never_high():
    values = np.array([[5.0, 1.0, 1.0, 0.0, 9.0], [0.0, 4.0, 4.0, 0.0, 9.0]])
    assert top_genes(values, 1).tolist() == [4]
    assert top_genes(values, 2).tolist() == [0, 4]  # both 0 and 1 rank second in one batch
    assert top_genes(values, 3).tolist() == [0, 1, 4]
    assert top_genes(values, 5).tolist() == [0, 1, 2, 3, 4]
    # 0 ranks second in one batch of three, 1 in two.
    assert top_genes(np.array([[0.0, 5, 9], [0.0, 5, 9], [5.0, 0, 9]]), 2).tolist() == [1, 2]


def test_the_choice_is_scanpys_on_real_counts(shared, tmp_path):
    recorded = json.loads(RECORDED.read_text())
    path = shared / "data" / "pbmc_10x_200.h5ad"
    assert chosen([path], 500, block_elements=50_000) == tuple(recorded["whole"])
    adata = anndata.read_h5ad(path)
    adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel() >= 5].copy()
    adata.obs["third"] = [["yes", "no", "no"][row % 3] for row in range(adata.n_obs)]
    adata.write_h5ad(tmp_path / "batches.h5ad")
    found = chosen([tmp_path / "batches.h5ad"], 300, "third")
    assert found == tuple(recorded["batches"])


def test_a_store_holds_the_chosen_genes_alone(write_input, tmp_path):
    x = draw(120, 150, 7)
    x[[3, 50]] = 0
    x[[3, 50], 1] = 3  # these cells have counts, and none in a gene that varies
    path = write_input(x)
    genes = chosen([path], 25)
    kept = x[:, [int(gene[1:]) for gene in genes]]
    assert not kept[[3, 50]].any()
    with pytest.raises(CountsError, match=r"have no counts in the 25 genes, .*a_3 in .*drop_empty"):
        prepare([path], tmp_path / "store", PrepareConfig("cell_type", n_top_genes=25))
    config = PrepareConfig("cell_type", n_top_genes=25, drop_empty=True, block_elements=400)
    manifest = prepare([path], tmp_path / "store", config)
    assert manifest.registry.genes == genes
    assert manifest.gene_totals == tuple(kept.sum(axis=0))
    assert manifest.nnz == np.count_nonzero(kept)
    assert manifest.n_cells == np.count_nonzero(kept.any(axis=1)) == 118
    store = open_store(tmp_path / "store")
    rows = store.read(0, store.n_cells)
    assert int(rows.counts.max()) == kept.max()
    assert int(rows.counts.sum()) == kept.sum()
    order = [int(name.removeprefix("a_")) for name in store.obs_names(0, store.n_cells)]
    for row, cell in enumerate(order):
        values = slice(rows.indptr[row], rows.indptr[row + 1])
        assert rows.indices[values].tolist() == np.flatnonzero(kept[cell]).tolist()
        assert rows.counts[values].tolist() == kept[cell][kept[cell] > 0].tolist()


def test_the_choice_is_among_the_genes_asked_for(write_input, tmp_path):
    x = draw(90, 150, 2)
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join(f"g{gene}" for gene in range(149, 49, -1)))
    found = chosen([write_input(x)], 10, genes=listed)
    order = np.argsort(-scores(x[:, 149:49:-1]), kind="stable")[:10]
    assert found == tuple(f"g{149 - gene}" for gene in np.sort(order))


def test_numbers_of_genes_that_cannot_be_are_refused(write_input, tmp_path):
    for n in (0, -3):
        with pytest.raises(ConfigError, match=f"`n_top_genes` is {n}; use 1 or more"):
            PrepareConfig("cell_type", n_top_genes=n)
    path = write_input(draw(30, 40, 0))
    config = PrepareConfig("cell_type", n_top_genes=41)
    with pytest.raises(ConfigError, match=r"is 41 and there are 40 genes; use at most 40"):
        prepare([path], tmp_path / "store", config)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rows", "donors", "problem"),
    [
        (1, ["x"], r"fits batch 'x', 1 cells \(a variance needs two\); leave"),
        (9, ["x"] * 8 + ["y"], r"fits batch 'y', 1 cells \(a variance needs two\)"),
    ],
)
def test_too_few_cells_are_refused(write_input, tmp_path, rows, donors, problem):
    path = write_input(draw(rows, 40, 1), obs={"donor": donors})
    config = PrepareConfig("cell_type", batch_key="donor", n_top_genes=5)
    with pytest.raises(CountsError, match=problem):
        prepare([path], tmp_path / "store", config)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("n_genes", [1, 3, 9])
def test_too_few_genes_that_vary_are_refused(write_input, n_genes):
    path = write_input(draw(50, 12, 1)[:, : 2 + n_genes])
    with pytest.raises(CountsError, match=f"{n_genes} genes vary and 14 are needed"):
        chosen([path], 1)


def test_genes_of_one_mean_are_refused(write_input):
    x = np.tile(np.eye(40, dtype=int), (2, 1))
    with pytest.raises(CountsError, match=r"fits the inputs, 80 cells \(40 genes vary and loess"):
        chosen([write_input(x)], 1)


def test_the_file_is_named_where_a_value_is_no_count(write_input, tmp_path):
    x = draw(30, 40, 0).astype("f4")
    x[17, 5] = 0.5
    path = write_input(x)
    with pytest.raises(CountsError, match=r"a.h5ad, X: 0.5 at cell a_17, gene g5"):
        prepare([path], tmp_path / "store", PrepareConfig("cell_type", n_top_genes=5))


def test_the_store_says_how_its_genes_were_chosen(write_input, tmp_path):
    path = write_input(draw(120, 150, 7))
    config = PrepareConfig("cell_type", n_top_genes=25, drop_empty=True)
    manifest = prepare([path], tmp_path / "store", config)
    choice = {"flavour": "seurat_v3", "n_top_genes": 25, "n_genes": 150, "batch_key": None}
    assert manifest.gene_choice == choice
    store = open_store(tmp_path / "store")
    assert store.manifest == manifest
    assert "the 25 of 150 that vary most (seurat_v3)" in describe_store(store)
