"""Analyses on their own; test_scvi_analyses.py beside this file compares them with scvi-tools."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from small_cells import N_GENES, N_LABELS, make_module

import rayvaec
from rayvaec.errors import ConfigError, CountsError, ModelError
from rayvaec.inference.analyses import correlation, vamp_prior
from rayvaec.inference.analyses.differential import Shares
from rayvaec.inference.posterior import shares
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC


@pytest.fixture(scope="module")
def model(model_path):
    return rayvaec.load_model(model_path)


@pytest.fixture(scope="module")
def adata(atlas_h5ad):
    adata = anndata.read_h5ad(atlas_h5ad)[:200].copy()
    adata.obs["half"] = np.where(np.arange(200) < 100, "first", "second")
    return adata


@pytest.mark.parametrize("form", [{}, {"generative": "softmax", "n_batch": 2}])
def test_shares_gene_by_gene_are_those_of_whole_rows(form, monkeypatch):
    monkeypatch.setattr("rayvaec.inference.analyses.differential._GENES", 10)
    module = make_module(**form)
    torch.manual_seed(1)
    z, y = torch.randn(100, 5), torch.arange(100)[:, None] % N_LABELS
    batch = torch.arange(100)[:, None] % 2 if form else None
    if form:
        torch.nn.init.normal_(module.per_ct_bias)
    found = Shares(module, z, y, batch)
    parts = [found.of(slice(start, start + 10)) for start in range(0, N_GENES, 10)]
    expected = shares(module, z, y, batch)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-5)


def test_the_genes_that_the_model_shifts_are_called(model, adata, tmp_path):
    module = VAEC(model.registry.n_genes, 4, generative="softmax", n_batch=1)
    with torch.no_grad():
        module.px_decoder.weight.mul_(0.2)
        module.px_decoder.bias.zero_()
        module.per_ct_bias[1, :10] = 1.0
    save_model(tmp_path / "model", module, model.registry.to_json(), {})
    first, second = model.registry.labels[:2]
    table = rayvaec.load_model(tmp_path / "model").differential_expression(
        adata, group1=first, group2=second, delta=0.5, pseudocounts=1e-9
    )
    called = table[table["is_de_fdr_0.05"]]
    assert set(called.index) == set(model.registry.genes[:10])
    assert table["proba_de"].is_monotonic_decreasing
    np.testing.assert_allclose(called["lfc_mean"], -np.log2(np.e), atol=0.3)
    assert (called["bayes_factor"] > 3).all()


def test_batch_correction_leaves_the_batch_out(model, adata, tmp_path):
    registry = model.registry.to_json() | {"batches": ["batch_0", "batch_1"], "batch_key": "half"}
    torch.manual_seed(0)
    module = VAEC(model.registry.n_genes, 4, n_hidden=32, generative="softmax", n_batch=2)
    with torch.no_grad():
        module.px_decoder.weight.mul_(3)
        module._embeddings_dict["batch"].weight.mul_(3)
        module.z_encoder.mean_encoder.weight.mul_(0.01)
        module.z_encoder.mean_encoder.bias.zero_()
    save_model(tmp_path / "model", module, registry, {})
    halves = adata.copy()
    halves.obs["half"] = np.where(np.arange(200) < 100, "batch_0", "batch_1")
    two = rayvaec.load_model(tmp_path / "model")
    tables = [
        two.differential_expression(
            halves, "half", "batch_0", "batch_1", batch_correction=corrected, pseudocounts=1e-9
        )
        for corrected in (False, True)
    ]
    spread = [table["lfc_mean"].abs().mean() for table in tables]
    assert spread[1] < spread[0] / 5


def test_a_comparison_does_not_depend_on_the_order_of_the_cells(model, adata):
    order = np.random.default_rng(0).permutation(adata.n_obs)
    options = {"n_samples_overall": 300, "delta": None}
    one = model.differential_expression(adata, **options)
    two = model.differential_expression(adata[order].copy(), **options)
    columns = [name for name in one if not name.startswith("raw_normalized")]
    assert one[columns].equals(two[columns])
    assert set(one["comparison"]) == {f"{name} vs Rest" for name in model.registry.labels}
    other = model.differential_expression(adata, **options | {"seed": 1})
    assert not one["lfc_mean"].equals(other["lfc_mean"].loc[one.index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group1": "T cells"}, r"no group 'T cells' in cell_type; choose from "),
        ({"groupby": "half", "group1": "first", "group2": "x"}, "no group 'x' in half; choose"),
        ({"groupby": "half", "group1": "first", "group2": "first"}, "with itself"),
        ({"mode": "median"}, "'median'; choose from change, vanilla"),
        ({"delta": -1}, "delta=-1"),
        ({"fdr_target": 1.5}, "fdr=1.5"),
        ({"n_samples_overall": 1}, "n_samples=1"),
        ({"pseudocounts": 0}, "pseudocounts=0"),
        ({"batch_correction": True}, "has no batches"),
        ({"idx1": [1, 2], "idx2": [300]}, "idx2 has the position 300, and there are 200"),
        ({"idx1": [True, False]}, "idx1 is an array of bool of shape \\(2,\\)"),
    ],
)
def test_options_of_a_comparison_that_do_not_fit_are_refused(model, adata, options, message):
    with pytest.raises(ConfigError, match=message):
        model.differential_expression(adata, **options)


def test_groups_of_one_cell_are_left_out_unless_they_are_named(model, adata, caplog):
    few = adata.copy()
    few.obs["kind"] = ["alone", "lone", *["a", "b"] * 99]
    table = model.differential_expression(few, "kind")
    assert set(table["group1"]) == {"a", "b"}
    assert "fewer than 2 cells are not compared with the others: 'alone' (1), 'lone' (1)" in (
        caplog.text
    )
    named = model.differential_expression(few, "kind", group1=["a", "b"])
    assert named.equals(table)  # the rest of the others has all cells
    for group in ("alone", ["a", "alone"]):
        with pytest.raises(CountsError, match="group 'alone' has 1 cell"):
            model.differential_expression(few, "kind", group1=group)


@pytest.mark.parametrize("kind", [str, int, np.int64, np.uint8, bool])
def test_groups_are_named_by_their_text(model, adata, kind):
    plain, typed = adata.copy(), adata.copy()
    typed.obs["kind"] = (np.arange(200) % 2).astype(kind)
    names = [str(value) for value in np.unique(typed.obs["kind"])]
    plain.obs["kind"] = [str(value) for value in typed.obs["kind"]]
    first = kind(0) if kind is not bool else False
    expected = model.differential_expression(plain, "kind", group1=names[0], group2=names[1])
    for one, two in ((first, kind(1)), ([first], names[1]), (np.array([names[0]]), names[1])):
        found = model.differential_expression(typed, "kind", group1=one, group2=two)
        assert found.equals(expected)


def test_groups_need_two_cells(model, adata):
    lonely = adata.copy()
    lonely.obs["kind"] = ["alone", *["many"] * 199]
    with pytest.raises(CountsError, match="group 'alone' has 1 cell, and a comparison needs"):
        model.differential_expression(lonely, "kind")
    with pytest.raises(CountsError, match="group 'alone' has 1 cell, and a comparison needs"):
        model.differential_expression(lonely, "kind", group1="many", group2="alone")
    with pytest.raises(CountsError, match="group 'idx2' has 0 cells"):
        model.differential_expression(adata, idx1=[1, 2], idx2=np.zeros(200, bool))
    lonely.obs["kind"] = "many"
    with pytest.raises(ConfigError, match="kind has the group 'many' alone"):
        model.differential_expression(lonely, "kind")
    with pytest.raises(CountsError, match="no column 'sort'; the columns are"):
        model.differential_expression(adata, "sort")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("get_marginal_ll", {"n_mc_samples": 0}, "n_samples=0"),
        ("get_elbo", {"seed": -1}, "seed=-1"),
        ("get_normalized_expression", {"gene_list": ["Cd4"]}, "no gene 'Cd4'; it has"),
        ("get_normalized_expression", {"library_size": 0}, "library_size=0"),
        ("get_normalized_expression", {"transform_batch": "a"}, "has no batches"),
        ("get_vamp_prior", {"p": 0}, "p=0 clusters"),
        ("get_vamp_prior", {"seed": 2**32}, "seed=4294967296"),
        ("get_feature_correlation_matrix", {"correlation_type": "x"}, "spearman, pearson"),
        ("get_feature_correlation_matrix", {"rna_size_factor": 0}, "rna_size_factor=0"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, adata, method, options, message):
    with pytest.raises(ConfigError, match=message):
        getattr(model, method)(adata, **options)


def test_a_model_without_fine_labels_predicts_none(model, adata):
    with pytest.raises(ModelError, match="no fine labels"):
        model.predict(adata)


def test_results_per_cell_do_not_depend_on_the_cells_beside_them(model, adata):
    some = [150, 3, 70]
    for compute in (
        lambda **chosen: model.get_marginal_ll(adata, n_mc_samples=20, return_mean=False, **chosen),
        lambda **chosen: model.get_normalized_expression(
            adata, n_samples=2, return_numpy=True, **chosen
        ),
        lambda **chosen: model.get_latent_representation(adata, give_mean=False, **chosen),
    ):
        np.testing.assert_array_equal(compute()[some], compute(indices=some))


def test_correlations_are_numpys_own():
    rng = np.random.default_rng(0)
    rows = (rng.normal(1000, 1, (600, 8)) @ rng.normal(size=(8, 8))).astype(np.float32)
    rows[:, 3] = 5
    found = correlation.pearson(iter(rows.reshape(6, 4, 25, 8)))
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert np.isnan(found[3]).all()


def test_merged_points_keep_the_moments(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(vamp_prior, "MOST_POINTS", 500)
    monkeypatch.setattr(vamp_prior, "FEWEST_POINTS", 64)
    centres = rng.normal(0, 10, (4, 3))
    mean = centres[np.arange(2000) % 4] + rng.normal(0, 0.3, (2000, 3))
    every = vamp_prior.Points(
        np.arange(2000) % 2, np.ones(2000), mean, rng.gamma(2.0, 0.1, (2000, 3))
    )
    parts = [every.chosen(slice(start, start + 300)) for start in range(0, 2000, 300)]
    points = vamp_prior.gathered(parts)
    assert len(points.label) < 1100
    assert np.bincount(points.label, points.weight).tolist() == [1000, 1000]
    merged, exact = (vamp_prior.prior_of(p, 3, 2, seed=0) for p in (points, every))
    for label in range(2):
        order = [np.argsort(side["mean_vprior"][label, :, 0]) for side in (merged, exact)]
        for name in exact:
            np.testing.assert_allclose(
                merged[name][label][order[0]], exact[name][label][order[1]], rtol=1e-8
            )
    # A label without cells.
    assert exact["weights_vprior"][2].tolist() == [0, 0]
    assert (exact["var_vprior"][2] == 1).all()
