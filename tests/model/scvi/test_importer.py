from __future__ import annotations

import contextlib
import pickle
import shutil

import anndata
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayvaec
from rayvaec.errors import ModelError, StoreError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.rng import position_keys
from rayvaec.model.draws import KeyedRows, draw_rows
from rayvaec.model.scvi.importer import (
    ImportedModel,
    export_condscvi,
    import_condscvi,
    import_model,
)
from rayvaec.model.scvi.unpickle import read_pickle
from rayvaec.model.vaec import VAEC

GENES = [f"g{i}" for i in range(11)]
REGISTRY = {
    "genes": GENES,
    "labels": ["T", "B", "NK"],
    "labels_key": "cell_type",
    "batches": [],
    "batch_key": None,
}


def named(module, registry=REGISTRY):
    return ImportedModel(module, registry, {})


def arrays(value):
    return np.array(value, dtype=object)


@pytest.fixture
def content(tmp_path):
    """What model.pt of a small softplus model holds, to be changed."""
    torch.manual_seed(0)
    export_condscvi(named(VAEC(11, 3, n_hidden=8)), tmp_path / "written")
    return torch.load(tmp_path / "written/model.pt", weights_only=False)


@pytest.fixture
def folder(tmp_path):
    """A function that saves content as a folder of scvi-tools."""

    def save(content):
        (tmp_path / "saved").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "saved/model.pt")
        return tmp_path / "saved"

    return save


@pytest.fixture
def legacy(tmp_path):
    """A function that saves a folder of 2021, with changes."""

    def save(module, **changes):
        path = tmp_path / "legacy"
        path.mkdir(exist_ok=True)
        torch.save(module.state_dict(), path / "model_params.pt")
        attributes = {
            "init_params_": {
                "kwargs": {"module_kwargs": {"ct_prop": np.ones(3)}},
                "non_kwargs": {"n_hidden": 8, "dropout_rate": 0.1, "use_gpu": True},
            },
            "scvi_setup_dict_": {
                "scvi_version": "0.0.0",
                "categorical_mappings": {
                    "_scvi_batch": {"original_key": "site", "mapping": arrays(["a", "b"])},
                    "_scvi_labels": {
                        "original_key": "cell_type",
                        "mapping": arrays(["T", "B", "NK"]),
                    },
                },
                "data_registry": {"X": {"attr_name": "layers", "attr_key": "counts"}},
            },
        }
        (path / "attr.pkl").write_bytes(pickle.dumps({**attributes, **changes}))
        (path / "var_names.csv").write_text("\n".join(GENES) + "\n")
        return path

    return save


@pytest.mark.parametrize(
    ("name", "generative", "library", "n_labels", "n_genes"),
    [
        ("condscvi_scvi_1_2_2", "softplus", "sum", 3, 100),
        ("condscvi_scvi_1_4_0", "softmax", "sum", 5, 100),
        ("condscvi_lymph_node", "softplus", "log", 12, 1888),
    ],
)
def test_real_models_are_imported(shared, tmp_path, name, generative, library, n_labels, n_genes):
    import_model(shared / "data" / name, tmp_path / "model")
    model = rayvaec.load_model(tmp_path / "model")
    config = model.module.config
    assert (config.generative, config.library) == (generative, library)
    assert (config.n_input, config.n_labels) == (n_genes, n_labels)
    assert (config.n_hidden, config.n_latent, config.n_layers) == (128, 5, 2)
    assert (model.registry.n_genes, model.registry.n_labels) == (n_genes, n_labels)
    x = CsrCounts.from_numpy(np.array([0, 2, 3]), np.array([0, 4, 9]), np.array([3, 1, 2]), n_genes)
    output = model.module.minibatch_loss(x, torch.tensor([[0], [n_labels - 1]]))
    assert torch.isfinite(output.reconstruction_loss).all()
    assert torch.isfinite(output.kl_local).all()


def test_a_model_with_its_data_works_on_them(shared, tmp_path):
    folder = shared / "data/condscvi_scvi_1_2_2"
    import_model(folder, tmp_path / "model")
    model = rayvaec.load_model(tmp_path / "model")
    adata = anndata.read_h5ad(folder / "adata.h5ad")
    mean, variance = model.latent(adata, return_dist=True)
    assert mean.shape == variance.shape == (400, 5)
    assert np.isfinite(mean).all()
    assert np.isfinite(model.elbo(adata)).all()
    assert model.sample(adata, 2).shape == (400, 100, 2)
    assert model.registry.labels == ("label_0", "label_1", "label_2")
    assert model.provenance["scvi_tools"] == "1.2.2"


def test_the_batch_of_a_model_is_kept(shared):
    model = import_condscvi(shared / "data/condscvi_scvi_1_4_0")
    assert (model.registry["batch_key"], model.registry["batches"]) == ("batch", ["batch_0"])
    assert model.module.config.encode_covariates


def test_the_published_model_knows_its_own_cells(shared):
    """Cells drawn from it are as likely as those it was trained on, and z is found again."""
    path = shared / "data/condscvi_lymph_node"
    model = import_condscvi(path)
    assert model.registry["labels_key"] == "broad_cell_types"
    assert model.registry["labels"][:2] == ["B cells", "CD4 T cells"]
    assert model.registry["genes"][0] == "1300017J02Rik"
    assert model.registry["batches"] == []
    assert model.provenance["layer"] == "counts"
    module, n_cells = model.module, 500
    torch.manual_seed(0)
    y, z = torch.randint(12, (n_cells, 1)), torch.randn(n_cells, 5)
    library = module.library_of(torch.full((n_cells, 1), 1800.0))
    keys, samples = position_keys(0, n_cells), np.zeros(n_cells, np.uint64)
    rows = KeyedRows(library, y, None, 0, keys, samples)
    counts = draw_rows(module, z, torch.zeros_like(z), rows)
    x = CsrCounts.from_numpy(counts.indptr, counts.indices, counts.counts, 1888)
    with torch.no_grad():
        found = module.encode(x, y).loc
        output = module.minibatch_loss(x, y)
    correlation = [np.corrcoef(z[:, i], found[:, i])[0, 1] for i in range(5)]
    assert min(correlation) > 0.8
    history = read_pickle(path / "attr.pkl")["history_"]
    trained = history["reconstruction_loss_train"][-1]
    assert trained / 1.5 < float(output.reconstruction_loss.mean()) < trained * 1.5
    assert float(output.kl_local.mean()) == pytest.approx(history["kl_local_train"][-1], rel=0.5)


def test_a_model_of_2021_takes_the_logarithm(legacy):
    module = VAEC(11, 3, n_hidden=8, library="log", dropout_rate=0.1)
    model = import_condscvi(legacy(module))
    assert model.module.config == module.config
    assert model.registry == REGISTRY
    assert model.provenance["layer"] == "counts"


@pytest.mark.parametrize(
    ("scvi_version", "library", "log_variational"),
    [
        ("0.15.5", "log", True),
        ("0.16.0", "sum", True),
        ("1.1.6", "sum", True),
        ("1.2.0", "sum", False),
        ("1.2.2.post2", "sum", False),
        ("1.3.0", "sum", True),
        ("1.4.0", "sum", True),
        ("unknown", "sum", True),
    ],
)
def test_what_releases_computed_is_computed(
    content, folder, scvi_version, library, log_variational
):
    """Before 0.16 the library was logarithmic; in 1.2 the encoder read counts, not logarithms."""
    content["attr_dict"]["registry_"]["scvi_version"] = scvi_version
    config = import_condscvi(folder(content)).module.config
    assert (config.library, config.log_variational) == (library, log_variational)


def test_arguments_that_weights_do_not_tell_are_read(content, folder):
    init_params = content["attr_dict"]["init_params_"]
    init_params["non_kwargs"]["dropout_rate"] = 0.25
    init_params["kwargs"]["module_kwargs"]["log_variational"] = False
    config = import_condscvi(folder(content)).module.config
    assert (config.dropout_rate, config.log_variational) == (0.25, False)


def test_labels_that_are_numbers_become_text(content, folder):
    content["attr_dict"]["registry_"]["field_registries"]["labels"]["state_registry"][
        "categorical_mapping"
    ] = np.array([10, 20, 30])
    assert import_condscvi(folder(content)).registry["labels"] == ["10", "20", "30"]


def change(*path):
    """Return a function that sets a value deep in nested dicts; `del` removes it."""
    *way, last, value = path

    def apply(content):
        for name in way:
            content = content[name]
        if value is del_:
            del content[last]
        else:
            content[last] = value

    return apply


del_ = object()
REGISTRY_AT = ("attr_dict", "registry_")
LABELS_AT = (*REGISTRY_AT, "field_registries", "labels", "state_registry")
INIT_AT = ("attr_dict", "init_params_", "non_kwargs")
KWARGS_AT = ("attr_dict", "init_params_", "kwargs", "module_kwargs")
BATCH = {"state_registry": {"original_key": "site", "categorical_mapping": arrays(["a", "b"])}}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (change("attr_dict", del_), "it has no attr_dict; save the model anew"),
        (change(*REGISTRY_AT, del_), "it has no attr_dict.registry_"),
        (change(*LABELS_AT, "categorical_mapping", del_), "it has no categorical_mapping"),
        (change(*LABELS_AT, "categorical_mapping", 3), "its labels are no list of names"),
        (change("model_state_dict", 3), "its state dict is no dict"),
        (change("model_state_dict", "px_r", "x"), "its weight 'px_r' is no tensor"),
        (change("model_state_dict", "new", torch.ones(1)), "1 are unknown, such as 'new'"),
        (change("model_state_dict", "px_r", del_), "the weights look like no VAEC"),
        (change("var_names", arrays(GENES[:-1])), "it names 10 genes and its weights are for 11"),
        (change("var_names", {"rna": arrays(GENES)}), "its genes are no list of names"),
        (change("var_names", arrays([*GENES[:-1], "g0"])), "it names 'g0' more than once"),
        (change(*LABELS_AT, "categorical_mapping", arrays(["T"])), "it names 1 labels and its"),
        (change(*REGISTRY_AT, "field_registries", "batch", BATCH), "2 batches and its weights"),
        (change(*REGISTRY_AT, "model_name", "SCANVI"), "it holds a model 'SCANVI'; only CondSCVI"),
        (change(*INIT_AT, "n_hidden", 16), "it says n_hidden=16 and its weights show 8"),
        (change(*INIT_AT, "dropout_rate", "high"), "its dropout_rate is no number"),
        (change(*INIT_AT, "dropout_rate", 2.0), "dropout_rate=2.0 is out of range"),
        (change(*KWARGS_AT, "prior", "mog"), "it says prior=mog and its weights show normal"),
        (change(*KWARGS_AT, "log_variational", None), "its log_variational is neither"),
        (change(*KWARGS_AT, "gene_likelihood", "zinb"), "gene_likelihood=zinb, which VAEC"),
        (change(*KWARGS_AT, "colour", 1), "the argument 'colour', whose meaning is not known"),
        (change(*KWARGS_AT, "extra_encoder_kwargs", {"bias": False}), "with extra_encoder_kwargs="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_does_not_fit_is_refused(content, folder, tmp_path, changed, found):
    changed(content)
    path = folder(content)
    with pytest.raises(ModelError) as error:
        import_model(path, tmp_path / "model")
    assert str(error.value).startswith(f"{path}: ")
    assert found in str(error.value)
    assert not (tmp_path / "model").exists()


def test_several_batches_without_names_are_refused(folder, tmp_path):
    registry = {**REGISTRY, "batches": ["a", "b"], "batch_key": "site"}
    export_condscvi(named(VAEC(11, 3, n_hidden=8, n_batch=2), registry), tmp_path / "written")
    content = torch.load(tmp_path / "written/model.pt", weights_only=False)
    del content["attr_dict"]["registry_"]["field_registries"]["batch"]
    with pytest.raises(ModelError, match="weights are for 2 batches and it names none"):
        import_condscvi(folder(content))


def test_folders_that_lack_parts_are_refused(legacy, content, folder, tmp_path):
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere"):
        import_condscvi(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither model.pt nor model_params.pt, attr.pkl"):
        import_condscvi(tmp_path / "empty")
    path = legacy(VAEC(11, 3, n_hidden=8))
    (path / "attr.pkl").unlink()
    with pytest.raises(ModelError, match=r"legacy has no attr.pkl; copy the whole folder"):
        import_condscvi(path)
    import_model(folder(content), tmp_path / "model")
    with pytest.raises(ModelError, match="is a model of rayvaec already"):
        import_condscvi(tmp_path / "model")


def test_gene_names_that_are_no_text_are_refused(legacy):
    path = legacy(VAEC(11, 3, n_hidden=8))
    (path / "var_names.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ModelError, match=r"legacy: var_names.csv is no text"):
        import_condscvi(path)


def test_a_truncated_file_is_refused(content, folder):
    path = folder(content)
    whole = (path / "model.pt").read_bytes()
    (path / "model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"saved/model.pt is no file of torch.save, or damaged"):
        import_condscvi(path)


class Touch:
    """Pickled as a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def test_a_model_that_would_run_code_is_refused(content, folder, legacy, tmp_path):
    touch = Touch(tmp_path / "touched")
    content["attr_dict"]["history_"] = touch
    with pytest.raises(ModelError, match=r"saved/model.pt is refused: it names posix.system"):
        import_model(folder(content), tmp_path / "model")
    path = legacy(VAEC(11, 3, n_hidden=8), train_indices_=touch)
    with pytest.raises(ModelError, match=r"legacy/attr.pkl is refused: it names posix.system"):
        import_model(path, tmp_path / "model")
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "model").exists()


def test_an_existing_model_is_kept_unless_overwritten(content, folder, tmp_path):
    path, out = folder(content), tmp_path / "model"
    import_model(path, out)
    shutil.rmtree(path)
    with pytest.raises(StoreError, match="exists already"):
        import_model(path, out)
    assert import_model(folder(content), out, overwrite=True).registry["labels"] == ["T", "B", "NK"]


def test_mutated_attributes_raise_model_errors_alone(legacy):
    path = legacy(VAEC(11, 3, n_hidden=8))
    whole = (path / "attr.pkl").read_bytes()
    places = st.floats(0, 1, exclude_max=True)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3))
    def check(edits):
        data = bytearray(whole)
        for place, value in edits:
            data[int(place * len(data))] = value
        (path / "attr.pkl").write_bytes(data)
        with contextlib.suppress(ModelError):
            import_condscvi(path)

    check()
