from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch

import rayvaec
from rayvaec.errors import ModelError, StoreError
from rayvaec.model.saved import save_model
from rayvaec.model.scvi.importer import ImportedModel, export_condscvi, import_condscvi
from rayvaec.model.scvi.unpickle import read_torch_archive
from rayvaec.model.vaec import VAEC

GENES = [f"gene {i}" for i in range(30)]
LABELS = ["T cells", "B cells", "NK cells"]
SITES = ["north", "east"]
SOFTMAX = {"generative": "softmax", "n_batch": 1}

FORMS = {
    "softplus": {},
    "softplus, shapes": {"n_layers": 1, "n_latent": 3, "n_hidden": 9, "dropout_rate": 0.2},
    "softplus, no log": {"log_variational": False},
    "softplus, batches": {"n_batch": 2},
    "softplus, encoded batches": {"n_batch": 2, "encode_covariates": True},
    "softmax": SOFTMAX,
    "softmax, batches": {**SOFTMAX, "n_batch": 2, "encode_covariates": True},
    "softmax, mixture": {**SOFTMAX, "prior": "mog", "num_classes_mog": 4},
    "softmax, fine labels": {**SOFTMAX, "n_fine_labels": 4},
    "softmax, weights": {**SOFTMAX, "ct_weight": [0.5, 1.0, 4.0]},
}


def model_of(changes):
    torch.manual_seed(0)
    module = VAEC(**{"n_input": 30, "n_labels": 3, "n_hidden": 16, **changes}).eval()
    module.init_from_counts(torch.full((30,), 1 / 30))
    batches = SITES if changes.get("n_batch", 0) > 1 else []
    registry = {
        "genes": GENES,
        "labels": LABELS,
        "labels_key": "cell_type",
        "batches": batches,
        "batch_key": "site" if batches else None,
    }
    if "n_fine_labels" in changes:
        names = ["CD4", "CD8", "other", "unlabeled"]
        registry |= {"fine_labels": names, "fine_labels_key": "subtype"}
    return ImportedModel(module, registry, {"layer": None})


@pytest.fixture
def cells():
    """Random counts whose labels and sites stand in another order than the model's."""
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(rng.poisson(3.0, (120, 30)).astype(np.float32))
    adata.var_names, adata.obs_names = GENES, [f"cell {i}" for i in range(120)]
    adata.obs["cell_type"] = np.array(sorted(LABELS))[rng.integers(3, size=120)]
    adata.obs["site"] = np.array(sorted(SITES))[rng.integers(2, size=120)]
    adata.obs["subtype"] = np.array(["CD4", "CD8", "other", "unlabeled"])[rng.integers(4, size=120)]
    return adata


@pytest.mark.parametrize("keep_prior", [False, True])
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_an_exported_model_comes_back_bit_by_bit(tmp_path, changes, keep_prior):
    model = model_of(changes)
    export_condscvi(model, tmp_path / "scvi", keep_prior=keep_prior)
    again = import_condscvi(tmp_path / "scvi")
    assert again.module.config == model.module.config
    assert again.registry == model.registry
    assert again.module.state_dict().keys() == model.module.state_dict().keys()
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def test_a_saved_and_an_opened_model_are_exported(tmp_path):
    model = model_of({})
    save_model(tmp_path / "model", model.module, model.registry, {})
    export_condscvi(tmp_path / "model", tmp_path / "one")
    export_condscvi(rayvaec.load_model(tmp_path / "model"), tmp_path / "two")
    assert import_condscvi(tmp_path / "one").registry == model.registry
    assert import_condscvi(tmp_path / "two").registry == model.registry


def test_the_layer_goes_along(tmp_path):
    model = model_of({})
    export_condscvi(model, tmp_path / "one", layer="counts")
    again = import_condscvi(tmp_path / "one")
    assert again.provenance["layer"] == "counts"
    export_condscvi(again, tmp_path / "two")
    assert import_condscvi(tmp_path / "two").provenance["layer"] == "counts"


def test_the_message_says_who_opens_it(tmp_path):
    assert export_condscvi(model_of({}), tmp_path / "a").startswith("scvi-tools 1.3.0 to 1.4.0")
    softmax = model_of(SOFTMAX)
    assert "written as a mixture" in export_condscvi(softmax, tmp_path / "b")
    assert export_condscvi(softmax, tmp_path / "c", keep_prior=True) == (
        "scvi-tools 1.4.1 and later opens it"
    )


def test_what_scvi_tools_cannot_compute_is_refused(tmp_path):
    with pytest.raises(ModelError, match="takes the logarithm of the library"):
        export_condscvi(model_of({"library": "log"}), tmp_path / "scvi")
    assert not (tmp_path / "scvi").exists()


@pytest.mark.parametrize("name", ["genes", "labels", "batches"])
def test_names_that_do_not_fit_are_refused(tmp_path, name):
    model = model_of({"n_batch": 2})
    model.registry[name] = model.registry[name][:-1]
    with pytest.raises(ModelError, match=f"the registry names .* {name} and the weights are for"):
        export_condscvi(model, tmp_path / "scvi")


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path):
    model = model_of({})
    export_condscvi(model, tmp_path / "scvi")
    with pytest.raises(StoreError, match="exists already"):
        export_condscvi(model_of(SOFTMAX), tmp_path / "scvi")
    assert "per_ct_bias" not in read_torch_archive(tmp_path / "scvi/model.pt")["model_state_dict"]
    export_condscvi(model_of(SOFTMAX), tmp_path / "scvi", overwrite=True)
    assert "per_ct_bias" in read_torch_archive(tmp_path / "scvi/model.pt")["model_state_dict"]


@pytest.fixture
def scvi(monkeypatch, tmp_path):
    """scvi-tools, where it is installed, in a folder for the logs that it writes."""
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("scvi")


def needs(scvi, changes):
    """Skip where the installed scvi-tools does not have the form."""
    has_softmax = tuple(map(int, scvi.__version__.split(".")[:3])) >= (1, 4, 1)
    if has_softmax != (changes.get("generative") == "softmax"):
        pytest.skip(f"scvi-tools {scvi.__version__} does not have this form")


def outputs_there(model, seed):
    """Return each cell's reconstruction loss at z's mean, and its divergence, by scvi-tools."""
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=model.adata.n_obs)))
    module = model.module.eval()
    with torch.no_grad():
        inferred = module.inference(**module._get_inference_input(tensors))
        inferred["z"] = inferred["qz"].loc
        generated = module.generative(**module._get_generative_input(tensors, inferred))
        torch.manual_seed(seed)
        output = module.loss(tensors, inferred, generated)
    return next(iter(output.reconstruction_loss.values())), next(iter(output.kl_local.values()))


def outputs_here(model, adata, seed):
    """Return the same by rayvaec."""
    labels, batches = model.registry["labels"], model.registry["batches"]
    tensors = {
        "X": torch.from_numpy(adata.X),
        "labels": torch.tensor([[labels.index(name)] for name in adata.obs["cell_type"]]),
        "fine_labels": torch.zeros(adata.n_obs, 1),
    }
    batch = None
    if batches:
        batch = torch.tensor([[batches.index(name)] for name in adata.obs["site"]])
    module, y = model.module, tensors["labels"]
    with torch.no_grad():
        inferred = module.inference(tensors["X"], y, batch_index=batch)
        z, library = inferred["qz"].loc, inferred["library"]
        generated = module.generative(z, library, y, batch_index=batch)
        torch.manual_seed(seed)
        output = module.loss(tensors, inferred, generated)
    return output.reconstruction_loss, output.kl_local


# Importing and running scvi-tools warns of many things that are its own.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_scvi_tools_computes_the_same(scvi, tmp_path, cells, changes):
    needs(scvi, changes)
    model = model_of(changes)
    export_condscvi(model, tmp_path / "scvi", keep_prior=True)
    there = scvi.model.CondSCVI.load(tmp_path / "scvi", adata=cells.copy())
    reconstruction, kl = outputs_there(there, seed=1)
    expected_reconstruction, expected_kl = outputs_here(model, cells, seed=1)
    torch.testing.assert_close(reconstruction, expected_reconstruction, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_prior_as_a_mixture_gives_the_same_elbo(scvi, tmp_path, cells):
    needs(scvi, SOFTMAX)
    model = model_of(SOFTMAX)
    export_condscvi(model, tmp_path / "scvi")
    there = scvi.model.CondSCVI.load(tmp_path / "scvi", adata=cells.copy())
    pairs = [outputs_there(there, seed) for seed in range(50)]
    elbo = torch.stack([-(reconstruction + kl).mean() for reconstruction, kl in pairs]).mean()
    reconstruction, kl = outputs_here(model, cells, seed=0)
    torch.testing.assert_close(elbo, -(reconstruction + kl).mean(), rtol=1e-4, atol=0)


def train_destvi(scvi, model, adata):
    """Deconvolve for one epoch and return the proportions, cells x labels."""
    spots = adata.copy()
    if scvi.__version__ < "1.4.1":
        scvi.model.DestVI.setup_anndata(spots)
    spatial = scvi.model.DestVI.from_rna_model(spots, model, vamp_prior_p=5)
    spatial.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    return spatial.get_proportions()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["softplus", "softmax", "softmax, batches", "softmax, mixture"])
def test_destvi_takes_the_model(scvi, tmp_path, cells, form):
    needs(scvi, FORMS[form])
    export_condscvi(model_of(FORMS[form]), tmp_path / "scvi")
    model = scvi.model.CondSCVI.load(tmp_path / "scvi", adata=cells.copy())
    proportions = train_destvi(scvi, model, cells)
    assert list(proportions.columns) == LABELS
    np.testing.assert_allclose(proportions.sum(1), 1, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_destvi_takes_an_empirical_prior(scvi, tmp_path, cells):
    """The recipe of docs/scvi.md."""
    needs(scvi, SOFTMAX)
    export_condscvi(model_of(SOFTMAX), tmp_path / "scvi", keep_prior=True)
    model = scvi.model.CondSCVI.load(tmp_path / "scvi", adata=cells.copy())
    empirical = model.get_vamp_prior(model.adata, p=5)
    model.get_vamp_prior = lambda adata, p: {
        name: torch.tensor(value, dtype=torch.float32) for name, value in empirical.items()
    }
    np.testing.assert_allclose(train_destvi(scvi, model, cells).sum(1), 1, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_trained_there_is_the_same_here(scvi, tmp_path, cells):
    """scvi-tools' own file, with all that it keeps beside the weights."""
    adata = cells.copy()
    scvi.model.CondSCVI.setup_anndata(adata, labels_key="cell_type", batch_key="site")
    model = scvi.model.CondSCVI(adata, n_hidden=16, weight_obs=True, encode_covariates=True)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    model.save(tmp_path / "scvi")
    imported = import_condscvi(tmp_path / "scvi")
    assert imported.registry["labels"] == sorted(LABELS)
    assert imported.registry["batches"] == sorted(SITES)
    assert imported.module.config.ct_weight is not None
    reconstruction, kl = outputs_there(model, seed=1)
    expected_reconstruction, expected_kl = outputs_here(imported, cells, seed=1)
    torch.testing.assert_close(reconstruction, expected_reconstruction, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-4, atol=1e-4)
