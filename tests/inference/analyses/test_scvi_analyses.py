"""Analyses under scvi-tools' names, held to scvi-tools 1.4.2 on the same weights and cells.

What is deterministic agrees to 1e-4. What is sampled is computed several times on either side, with
as many seeds, and the difference of the two means, entry by entry, is divided by its standard
error: z = (mean - mean') / sqrt((var + var') / n), with the variances over the repetitions. If both
sides estimate the same, z follows Student's t with 2n - 2 degrees of freedom, so that its mean
square is about (n - 1) / (n - 2).
"""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import t as student

import rayvaec
from rayvaec.model.saved import save_model
from rayvaec.model.scvi.importer import ImportedModel, export_condscvi
from rayvaec.model.vaec import VAEC

pytestmark = pytest.mark.filterwarnings("ignore")  # scvi-tools warns of many things of its own

GENES = [f"gene {i}" for i in range(40)]
LABELS = ["T cells", "B cells", "NK cells"]
SITES = ["north", "east"]
FINE = ["CD4", "CD8", "other", "unlabeled"]
N_CELLS, REPETITIONS = 90, 8


def _module(wide=False, **changes):
    """A model whose labels and cells differ: larger weights than at the start of training.

    A wide one has posteriors about as wide as the prior, and a decoder that they fit.
    """
    torch.manual_seed(0)
    config = {"generative": "softmax", "n_batch": 2, "encode_covariates": True, "n_latent": 3}
    module = VAEC(len(GENES), len(LABELS), n_hidden=16, **(config | changes)).eval()
    with torch.no_grad():
        module.px_decoder.weight.mul_(4)
        module.per_ct_bias.normal_(0, 0.7)
        module.px_r.fill_(0.5)
        module.z_encoder.mean_encoder.weight.mul_(3)
        if wide:
            module.px_decoder.weight.mul_(0.1)
            module.z_encoder.mean_encoder.weight.mul_(0.1)
            module.z_encoder.var_encoder.weight.zero_()
            module.z_encoder.var_encoder.bias.fill_(0.2)
    return module


@pytest.fixture(scope="module")
def adata():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 4.0, len(GENES))
    rate[:3] = 1e-3  # genes that next to no cell expresses
    labels = rng.integers(3, size=N_CELLS)
    counts = rng.poisson(rate * np.exp(rng.normal(0, 0.5, (3, len(GENES))))[labels])
    adata = anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    adata.var_names, adata.obs_names = GENES, [f"cell {i}" for i in range(N_CELLS)]
    adata.obs["cell_type"] = np.array(LABELS)[labels]
    adata.obs["site"] = np.array(SITES)[rng.integers(2, size=N_CELLS)]
    adata.obs["subtype"] = np.array(FINE)[rng.integers(4, size=N_CELLS)]
    return adata


@pytest.fixture(scope="module")
def both(tmp_path_factory, adata):
    """Open the same weights by both sides: from changes to the model to (ours, theirs)."""
    scvi = pytest.importorskip("scvi", "1.4.2")
    opened = {}

    def open_both(**changes):
        key = str(changes)
        if key not in opened:
            folder = tmp_path_factory.mktemp("models")
            registry = {"genes": GENES, "labels": LABELS, "labels_key": "cell_type"}
            registry |= {"batches": SITES, "batch_key": "site"}
            if "n_fine_labels" in changes:
                registry |= {"fine_labels": FINE, "fine_labels_key": "subtype"}
            model = ImportedModel(_module(**changes), registry, {"layer": None})
            save_model(folder / "ours", model.module, registry, {})
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)  # where scvi-tools leaves its logs
                export_condscvi(model, folder / "theirs", keep_prior=True)
                theirs = scvi.model.CondSCVI.load(folder / "theirs", adata=adata.copy())
            opened[key] = rayvaec.load_model(folder / "ours"), theirs
        return opened[key]

    return open_both


def _agree(ours, theirs):
    """Compare the means of two sets of repetitions, array[REPETITIONS, ...] each."""
    ours, theirs = (np.asarray(side, np.float64).reshape(len(side), -1) for side in (ours, theirs))
    n = len(ours)
    error = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / n)
    z = (ours.mean(0) - theirs.mean(0))[error > 0] / error[error > 0]
    assert len(z)
    expected = (n - 1) / (n - 2)
    # Of so many values of t, the mean square has about this deviation (its kurtosis is below 7).
    assert (z**2).mean() < expected * (1 + 5 * np.sqrt(6 / len(z)) + 0.15)
    assert np.abs(z).max() < student.isf(1e-5 / len(z), 2 * n - 2)
    np.testing.assert_allclose(ours[:, error == 0].mean(0), theirs[:, error == 0].mean(0), 1e-4)


def _repeated(compute):
    """Call scvi-tools with one seed after the other of the generators that it draws from."""
    results = []
    for seed in range(REPETITIONS):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        results.append(compute())
    return results


def _seeds(compute):
    """Call ours with one seed after the other."""
    return [compute(seed) for seed in range(REPETITIONS)]


def _tensors(theirs):
    return next(iter(theirs._make_data_loader(theirs.adata, batch_size=N_CELLS)))


def test_latent_representation(both, adata):
    model, theirs = both()
    for ours, expected in zip(
        model.get_latent_representation(adata, return_dist=True),
        theirs.get_latent_representation(return_dist=True),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    some = [4, 80, 7]
    np.testing.assert_allclose(
        model.get_latent_representation(adata, indices=some),
        theirs.get_latent_representation(indices=some),
        rtol=1e-4,
        atol=1e-5,
    )
    drawn = _seeds(lambda seed: model.get_latent_representation(adata, give_mean=False, seed=seed))
    there = _repeated(lambda: theirs.get_latent_representation(give_mean=False))
    _agree(drawn, there)
    _agree(np.square(drawn), np.square(there))


@pytest.mark.parametrize("prior", ["normal", "mog"])
def test_elbo_and_reconstruction_error(both, adata, prior):
    model, theirs = both(prior=prior)
    _agree(
        _seeds(lambda seed: model.get_elbo(adata, return_mean=False, seed=seed)),
        _repeated(lambda: theirs.get_elbo(return_mean=False)),
    )
    _agree(
        _seeds(
            lambda seed: model.get_reconstruction_error(adata, seed=seed)["reconstruction_loss"]
        ),
        _repeated(lambda: theirs.get_reconstruction_error()["reconstruction_loss"]),
    )
    each = model.get_elbo(adata, return_mean=False)
    assert model.get_elbo(adata) == each.mean()
    np.testing.assert_array_equal(model.elbo(adata), each)


def test_marginal_ll(both, adata):
    """VAEC has no `marginal_ll` there: theirs is the integral over z, of one dimension here."""
    model, theirs = both(n_latent=1, wide=True)
    with pytest.raises(NotImplementedError):
        theirs.get_marginal_ll()
    tensors, module = _tensors(theirs), theirs.module
    grid = torch.linspace(-8, 8, 801)
    with torch.no_grad():
        generated = module.generative(
            grid[:, None, None].expand(-1, N_CELLS, 1),
            tensors["X"].sum(1, keepdim=True).expand(len(grid), -1, -1),
            tensors["labels"],
            tensors["batch"],
        )
        log_joint = generated["px"].log_prob(tensors["X"]).sum(-1).double()
    log_joint += torch.distributions.Normal(0, 1).log_prob(grid.double())[:, None]
    integral = torch.logsumexp(log_joint, 0).numpy() + np.log(16 / 800)
    ours = np.array(
        _seeds(
            lambda seed: model.get_marginal_ll(
                adata, n_mc_samples=100, return_mean=False, seed=seed
            )
        )
    )
    z = (ours.mean(0) - integral) / (ours.std(0, ddof=1) / np.sqrt(REPETITIONS))
    assert (z**2).mean() < 3  # t with 7 degrees of freedom: 1.4, with a deviation of 0.35
    assert abs(ours.mean() - integral.mean()) < 0.02
    assert integral.std() > 5
    # With few samples it is a bound, as the ELBO is with one.
    few = model.get_marginal_ll(adata, n_mc_samples=2, seed=1)
    assert model.get_elbo(adata) < few < integral.mean()


@pytest.mark.parametrize("library_size", [1.0, 1e4, "latent"])
def test_normalized_expression(both, adata, library_size):
    model, theirs = both()
    _agree(
        _seeds(
            lambda seed: model.get_normalized_expression(
                adata, library_size=library_size, n_samples=3, seed=seed
            )
        ),
        _repeated(lambda: theirs.get_normalized_expression(library_size=library_size, n_samples=3)),
    )
    tensors = _tensors(theirs)
    with torch.no_grad():
        inferred = theirs.module.inference(**theirs.module._get_inference_input(tensors))
        inferred["z"] = inferred["qz"].loc
        generated = theirs.module.generative(
            **theirs.module._get_generative_input(tensors, inferred)
        )
    px = generated["px"]
    expected = px.mu if library_size == "latent" else px.scale * library_size
    found = model.get_normalized_expression(
        adata, library_size=library_size, use_posterior_mean=True
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)
    if library_size == 1:
        np.testing.assert_allclose(model.expression(adata), found, rtol=1e-6)


def test_normalized_expression_has_the_shape_that_is_asked_for(both, adata):
    model, theirs = both()
    options = {"gene_list": GENES[5:9], "indices": [3, 1, 2]}
    ours = model.get_normalized_expression(adata, **options)
    expected = theirs.get_normalized_expression(**options)
    assert list(ours.index) == list(expected.index) == ["cell 3", "cell 1", "cell 2"]
    assert list(ours.columns) == list(expected.columns) == GENES[5:9]
    every = model.get_normalized_expression(adata, n_samples=4, return_mean=False)
    assert every.shape == (4, N_CELLS, len(GENES))
    np.testing.assert_allclose(
        every.mean(0), model.get_normalized_expression(adata, n_samples=4), rtol=1e-5, atol=1e-7
    )


def test_transform_batch_changes_the_batch(both, adata):
    """Theirs looks the batch's embedding up before it changes the batch: nothing changes there."""
    model, theirs = both()
    options = {"use_posterior_mean": True}
    own = model.get_normalized_expression(adata, **options)
    north = model.get_normalized_expression(adata, transform_batch="north", **options)
    there = (adata.obs["site"] == "north").to_numpy()
    np.testing.assert_array_equal(own[there], north[there])
    assert (np.abs(own[~there] - north[~there]).max(1) > 1e-4).all()
    moved = adata.copy()  # what a cell of the other site would be decoded to, had it z
    moved.obs["site"] = "north"
    east = model.get_normalized_expression(adata, transform_batch="east", **options)
    both_sites = model.get_normalized_expression(adata, transform_batch=SITES, **options)
    np.testing.assert_allclose((north + east) / 2, both_sites, rtol=1e-5, atol=1e-7)
    torch.manual_seed(0)
    unmoved = theirs.get_normalized_expression()
    torch.manual_seed(0)
    np.testing.assert_array_equal(
        unmoved, theirs.get_normalized_expression(transform_batch="north")
    )


def _by_gene(frame):
    return frame.loc[GENES]


def test_differential_expression_agrees(both, adata):
    model, theirs = both()
    options = {"groupby": "cell_type", "group1": "T cells", "group2": "B cells", "mode": "change"}
    options |= {"n_samples_overall": 600}
    ours = _seeds(lambda seed: _by_gene(model.differential_expression(adata, seed=seed, **options)))
    expected = _repeated(lambda: _by_gene(theirs.differential_expression(silent=True, **options)))
    assert list(ours[0].columns) == list(expected[0].columns)
    assert (ours[0]["comparison"] == "T cells vs B cells").all()
    for column in ("proba_de", "lfc_mean", "lfc_median", "lfc_std", "scale1", "scale2"):
        _agree([frame[column] for frame in ours], [frame[column] for frame in expected])
    for column in ours[0].columns[ours[0].columns.str.match("raw|non_zeros")]:
        np.testing.assert_allclose(ours[0][column], expected[0][column], rtol=1e-4)
    # The largest draw of unexpressed genes sets it: the same to some share on either side.
    pseudocounts = [[frame["pseudocounts"].iloc[0] for frame in side] for side in (ours, expected)]
    assert np.mean(pseudocounts[0]) == pytest.approx(np.mean(pseudocounts[1]), rel=0.5)
    called = [np.mean([f["is_de_fdr_0.05"] for f in side], 0) for side in (ours, expected)]
    assert np.abs(called[0] - called[1]).mean() < 0.1
    assert 0 < called[0].mean() < 1


def test_calls_and_order_are_scvi_tools_own():
    de_core = pytest.importorskip("scvi.model.base._de_core")
    import pandas as pd

    from rayvaec.inference.analyses.differential import discoveries

    rng = np.random.default_rng(0)
    for fdr in (0.01, 0.05, 0.3):
        probability = np.sort(rng.beta(0.5, 0.4, 300))[::-1]
        expected = de_core._fdr_de_prediction(pd.Series(probability), fdr=fdr)
        np.testing.assert_array_equal(discoveries(probability, fdr), expected)


def test_one_group_against_the_rest_and_vanilla(both, adata):
    model, theirs = both()
    options = {"groupby": "cell_type", "mode": "vanilla", "n_samples_overall": 400}
    ours = _seeds(lambda seed: model.differential_expression(adata, seed=seed, **options))
    expected = _repeated(lambda: theirs.differential_expression(silent=True, **options))
    assert list(ours[0].columns) == list(expected[0].columns)
    assert set(ours[0]["comparison"]) == set(expected[0]["comparison"])
    for name in LABELS:
        picked = [
            [_by_gene(frame[frame["group1"] == name])["proba_m1"] for frame in side]
            for side in (ours, expected)
        ]
        _agree(*picked)


def test_positions_instead_of_groups(both, adata):
    model, theirs = both()
    one, two = np.arange(0, 40), np.arange(N_CELLS) >= 40
    options = {"idx1": one, "idx2": two, "mode": "change", "n_samples_overall": 400}
    ours = _seeds(lambda seed: _by_gene(model.differential_expression(adata, seed=seed, **options)))
    expected = _repeated(lambda: _by_gene(theirs.differential_expression(silent=True, **options)))
    assert list(ours[0].columns) == list(expected[0].columns)
    _agree([frame["lfc_mean"] for frame in ours], [frame["lfc_mean"] for frame in expected])
    for column in ("raw_mean1", "raw_mean2", "non_zeros_proportion2"):
        np.testing.assert_allclose(ours[0][column], expected[0][column], rtol=1e-4)


def test_vamp_prior_of_few_cells_is_exact(both, adata):
    model, theirs = both()
    few = adata[:12].copy()
    ours, expected = model.get_vamp_prior(few, p=15), theirs.get_vamp_prior(few, p=15)
    assert set(ours) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-5)


def test_vamp_prior_finds_the_same_clusters(both, adata):
    model, theirs = both()
    np.random.seed(0)  # noqa: NPY002
    ours, expected = model.get_vamp_prior(adata, p=2), theirs.get_vamp_prior(adata, p=2)
    for label in range(len(LABELS)):
        order = [np.argsort(side["mean_vprior"][label, :, 0]) for side in (ours, expected)]
        for name in expected:
            np.testing.assert_allclose(
                *(side[name][label][o] for side, o in zip((ours, expected), order, strict=True)),
                rtol=1e-4,
                atol=1e-5,
            )


def test_a_learned_prior_is_handed_over(both, adata):
    """To 1e-4 of a deviation: theirs leaves out the floor that its own density has."""
    model, theirs = both(prior="mog")
    ours, expected = model.get_vamp_prior(adata), theirs.get_vamp_prior()
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values.detach(), rtol=2e-3, atol=1e-6)
    prior = model.module.prior_log_prob(torch.zeros(1, 3), torch.zeros(1, 1))
    scale = torch.from_numpy(ours["var_vprior"][0]).sqrt()
    mean, weight = (torch.from_numpy(ours[f"{n}_vprior"][0]) for n in ("mean", "weights"))
    each = torch.distributions.Normal(mean, scale).log_prob(torch.zeros(3)).sum(-1)
    assert torch.logsumexp(each + weight.log(), 0) == pytest.approx(prior.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_feature_correlation_matrix(both, adata, kind):
    model, theirs = both()
    options = {"n_samples": 4, "rna_size_factor": 500, "correlation_type": kind}
    ours = _seeds(lambda seed: model.get_feature_correlation_matrix(adata, seed=seed, **options))
    expected = _repeated(lambda: theirs.get_feature_correlation_matrix(**options))
    assert list(ours[0].index) == list(expected[0].columns) == GENES
    _agree(ours, expected)
    assert np.abs(np.mean(ours, 0)[~np.eye(len(GENES), dtype=bool)]).max() > 0.2


def test_fine_labels(both, adata):
    model, theirs = both(n_fine_labels=4)
    ours, expected = model.predict(adata, soft=True), theirs.predict(soft=True)
    assert list(ours.columns) == list(expected.columns) == FINE
    assert list(ours.index) == list(adata.obs_names)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.predict(adata), theirs.predict())
    _agree(
        _seeds(lambda seed: model.predict(adata, soft=True, use_posterior_mean=False, seed=seed)),
        _repeated(lambda: theirs.predict(soft=True, use_posterior_mean=False)),
    )
