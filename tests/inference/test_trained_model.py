from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse

import rayvaec
from rayvaec.errors import ConfigError, CountsError, ModelError


@pytest.fixture(scope="module")
def model(model_path):
    return rayvaec.load_model(model_path)


@pytest.fixture(scope="module")
def adata(atlas_h5ad):
    return anndata.read_h5ad(atlas_h5ad)[:50].copy()


def test_a_model_knows_its_names(model, adata):
    assert model.registry.labels_key == "cell_type"
    assert set(model.registry.genes) == set(adata.var_names)
    assert set(model.registry.labels) == set(adata.obs["cell_type"])
    assert len(model.hash) == 64


def test_results_have_the_promised_shapes(model, adata):
    n_genes = adata.n_vars
    mean, variance = model.latent(adata, return_dist=True)
    np.testing.assert_array_equal(mean, model.latent(adata))
    assert mean.shape == variance.shape == (50, 5)
    assert model.elbo(adata).shape == (50,)
    assert model.expression(adata).shape == (50, n_genes)
    counts = model.sample(adata, n_samples=3, seed=1)
    assert counts.shape == (50, n_genes, 3)
    assert counts.dtype == np.int32
    assert counts.min() == 0 < counts.max()
    layers = model.sample(adata, n_samples=3, seed=1, sparse=True)
    for i, layer in enumerate(layers):
        assert isinstance(layer, sparse.csr_array)
        np.testing.assert_array_equal(layer.toarray(), counts[:, :, i])


def test_one_draw_keeps_its_dimension(model, adata):
    assert model.sample(adata).shape == (50, adata.n_vars, 1)


def test_genes_are_aligned_by_name(model, adata):
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    np.testing.assert_array_equal(model.elbo(adata), model.elbo(shuffled))
    np.testing.assert_array_equal(model.sample(adata, 2), model.sample(shuffled, 2))


def test_draws_follow_the_cell_not_its_place(model, adata):
    order = np.random.default_rng(0).permutation(adata.n_obs)
    np.testing.assert_array_equal(
        model.sample(adata, 2)[order], model.sample(adata[order].copy(), 2)
    )


def test_missing_genes_are_an_error_unless_allowed(model, adata, caplog):
    part = adata[:, 3:].copy()
    with pytest.raises(CountsError, match=f"lacks 3 of {adata.n_vars} genes: {adata.var_names[0]}"):
        model.latent(part)
    assert model.latent(part, allow_missing=True).shape == (50, 5)
    assert "3 genes of the model are missing" in caplog.text


def test_extra_genes_are_ignored_and_reported(model, adata, caplog):
    another = adata[:, :1].copy()
    another.var_names = ["another"]
    extra = anndata.concat([adata, another], axis=1)
    extra.obs = adata.obs
    np.testing.assert_array_equal(model.latent(extra), model.latent(adata))
    assert "1 genes are not in it" in caplog.text


def test_another_labels_column_can_be_named(model, adata):
    renamed = adata.copy()
    renamed.obs = renamed.obs.rename(columns={"cell_type": "kind"})
    np.testing.assert_array_equal(model.latent(renamed, labels_key="kind"), model.latent(adata))
    with pytest.raises(CountsError, match=r"'cell_type'.*kind"):
        model.latent(renamed)


def test_an_unknown_label_is_named(model, adata):
    other = adata.copy()
    other.obs["cell_type"] = ["Neuron", *other.obs["cell_type"].astype(str)[1:]]
    with pytest.raises(CountsError, match="unknown label 'Neuron'"):
        model.sample(other)


def test_log_normalised_counts_are_refused(model, adata):
    logged = adata.copy()
    logged.X = logged.X.astype(np.float32).log1p()
    with pytest.raises(CountsError, match=r"0\.69"):
        model.sample(logged)


def test_bad_numbers_of_draws_and_seeds_are_refused(model, adata):
    with pytest.raises(ConfigError, match="n_samples=0"):
        model.sample(adata, 0)
    with pytest.raises(ConfigError, match="seed=-1"):
        model.sample(adata, 1, -1)


def test_a_registry_that_does_not_fit_is_refused(model_path, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    text = (copy / "registry.json").read_text()
    first = rayvaec.load_model(model_path).registry.genes[0]
    (copy / "registry.json").write_text(text.replace(f'"{first}",', ""))
    with pytest.raises(ModelError, match="weights are for 120 genes"):
        rayvaec.load_model(copy)
    (copy / "registry.json").write_text("{}")
    with pytest.raises(ModelError, match=r"registry\.json.*'genes'"):
        rayvaec.load_model(copy)
