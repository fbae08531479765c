"""The commands as a user meets them: exit codes, one line a mistake, nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import time

import anndata
import numpy as np
import pytest
import torch

from rayvaec.cli import build_parser, main, verbs_of
from rayvaec.inference.trained_model import load_model


@pytest.fixture
def run(capsys):
    """Run a command; return exit code, standard output and standard error."""

    def run_command(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_command


@pytest.fixture(scope="module")
def adata(atlas_h5ad):
    return anndata.read_h5ad(atlas_h5ad)


def mistake(result, *words):
    """Assert exit code 2 and a single line with all the words."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("rayvaec")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("simulate", "prepare", "inspect", "train", "sample", "embed", "serve", "demo"):
        assert verb in out


def test_every_command_has_help(run):
    verbs = verbs_of(build_parser())
    assert len(verbs) >= 10
    for verb in verbs:
        code, out, _ = run(verb, "--help")
        assert code == 0
        assert "--debug" in out


def test_train_help_lists_the_settings(run):
    assert "dropout_rate" in run("train", "--help")[1]


def test_a_wrong_word_takes_one_line(run):
    mistake(run("trian"), "trian", "see rayvaec --help")
    mistake(run("train"), "STORE", "see rayvaec train --help")


REQUIRED = {
    "simulate": "--out OUT",
    "prepare": "IN --out OUT --labels-key KEY",
    "inspect": "RUN",
    "train": "STORE --out OUT",
    "check": "MODEL STORE --out OUT",
    "serve": "MODEL",
    "import": "DIR --out OUT",
    "export": "MODEL --out OUT",
    "demo": "--out OUT",
    "sample": "MODEL STORE --out OUT --n-samples 3",
}


@pytest.mark.parametrize("verb", verbs_of(build_parser()))
def test_a_mistyped_option_points_to_its_verb(run, verb):
    words = REQUIRED.get(verb, "MODEL STORE --out OUT").split()
    where = f"see rayvaec {verb} --help"
    mistake(run(verb, *words, "--debgu", "3"), "--debgu", "did you mean --debug?", where)


def test_simulate_prepare_inspect(run, tmp_path):
    atlas, store = tmp_path / "atlas.h5ad", tmp_path / "store"
    code, out, _ = run(
        "simulate", "--out", atlas, "--n-cells", 300, "--n-genes", 50, "--n-labels", 3
    )
    assert code == 0
    assert f"rayvaec prepare {atlas}" in out
    adata = anndata.read_h5ad(atlas)
    assert adata.shape == (300, 50)
    assert adata.obs["cell_type"].nunique() == 3
    assert "batch" in adata.obs
    code, out, _ = run("prepare", atlas, "--out", store, "--labels-key", "cell_type")
    assert code == 0
    assert f"rayvaec train {store}" in out
    code, out, _ = run("inspect", store, "--verify")
    assert code == 0
    assert "300" in out
    assert "every checksum is right" in out


def test_inspect_describes_a_model(run, model_path):
    code, out, _ = run("inspect", model_path)
    assert code == 0
    assert "softplus form" in out


def test_a_model_goes_to_scvi_tools_and_back(run, model_path, tmp_path):
    code, out, _ = run("export", model_path, "--out", tmp_path / "condscvi")
    assert code == 0
    assert "1.3" in out
    code, out, _ = run("import", tmp_path / "condscvi", "--out", tmp_path / "model")
    assert code == 0
    assert f"rayvaec serve {tmp_path / 'model'}" in out
    before, after = (load_model(path) for path in (model_path, tmp_path / "model"))
    assert after.registry == before.registry
    for name, value in before.module.state_dict().items():
        assert torch.equal(value, after.module.state_dict()[name])
    mistake(run("import", model_path, "--out", tmp_path / "other"), str(model_path))


def test_inspect_says_what_it_cannot_read(run, tmp_path):
    mistake(run("inspect", tmp_path), str(tmp_path), "no store, model or run")
    mistake(run("inspect", tmp_path / "nowhere"), "does not exist")


def logged(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.astype(np.float32).log1p()


def negative(adata):
    adata.X = adata.X.astype(np.float32)
    adata.X.data[5] = -1


def not_a_number(adata):
    adata.X = adata.X.astype(np.float32)
    adata.X.data[5] = np.nan


def infinite(adata):
    adata.X = adata.X.astype(np.float32)
    adata.X.data[5] = np.inf


def without_a_label(adata):
    labels = adata.obs["cell_type"].astype(object)
    labels.iloc[3] = None
    adata.obs["cell_type"] = labels.astype("category")


def duplicate_genes(adata):
    adata.var_names = [adata.var_names[1], *adata.var_names[1:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (logged, ["0.693", "cell_", "gene_", "--layer='counts'"]),
        (negative, ["-1", "cell_", "gene_"]),
        (not_a_number, ["nan", "cell_", "gene_"]),
        (infinite, ["inf", "cell_", "gene_"]),
        (without_a_label, ["cell_type", "1 "]),
        (duplicate_genes, ["gene_", "more than once"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_prepare_refuses_bad_data_and_leaves_nothing(run, adata, tmp_path, change, words):
    bad = adata.copy()
    change(bad)
    bad.write_h5ad(tmp_path / "bad.h5ad")
    result = run(
        "prepare",
        tmp_path / "bad.h5ad",
        "--out",
        tmp_path / "store",
        "--labels-key",
        "cell_type",
    )
    mistake(result, "bad.h5ad", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.h5ad"]


def test_prepare_lists_the_columns_there_are(run, atlas_h5ad, tmp_path):
    result = run("prepare", atlas_h5ad, "--out", tmp_path / "store", "--labels-key", "celltype")
    mistake(result, "'celltype'", "cell_type")
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_no_cells(run, adata, tmp_path):
    adata[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    result = run(
        "prepare",
        tmp_path / "empty.h5ad",
        "--out",
        tmp_path / "store",
        "--labels-key",
        "cell_type",
    )
    mistake(result, "no cells")


def test_an_existing_output_is_refused(run, atlas_h5ad, store_path, model_path, tmp_path):
    for words in (
        ("simulate", "--out", tmp_path),
        ("prepare", atlas_h5ad, "--out", tmp_path, "--labels-key", "cell_type"),
        ("train", store_path, "--out", tmp_path),
        ("sample", model_path, store_path, "--out", tmp_path, "--n-samples", 1),
        ("marginal-ll", model_path, store_path, "--out", tmp_path),
        ("de", model_path, store_path, "--out", tmp_path, "--group1", "a", "--fdr", 0.1),
        ("vamp-prior", model_path, store_path, "--out", tmp_path, "--p", 3),
        ("expression", model_path, store_path, "--out", tmp_path, "--by-label"),
    ):
        (tmp_path / "kept").write_text("")
        mistake(run(*words), str(tmp_path), "exist")
        assert (tmp_path / "kept").exists()


def test_a_store_without_its_manifest_is_another_program_s(run, store_path, tmp_path):
    import shutil

    import zarr

    copy = tmp_path / "store"
    shutil.copytree(store_path, copy)
    group = zarr.open_group(copy)
    del group.attrs["rayvaec"]
    mistake(run("train", copy, "--out", tmp_path / "run"), str(copy), "rayvaec prepare")
    assert not (tmp_path / "run").exists()
    code, out, _ = run("inspect", copy)
    assert code == 0
    assert out.startswith(f"AnnData that rayvaec did not write: {copy}")


def test_a_folder_that_is_no_model_is_refused(run, store_path, tmp_path):
    (tmp_path / "model").mkdir()
    for words in (
        (
            "sample",
            tmp_path / "model",
            store_path,
            "--out",
            tmp_path / "out.zarr",
            "--n-samples",
            1,
        ),
        ("serve", tmp_path / "model"),
    ):
        mistake(run(*words), str(tmp_path / "model"), "not a model folder")
    mistake(run("serve", tmp_path / "nowhere"), "no model folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.ray
def test_more_workers_than_lanes_or_cpus_are_refused_at_once(ray_local, run, store_path, tmp_path):
    out = tmp_path / "run"
    mistake(run("train", store_path, "--out", out, "--num-workers", 17), "17", "16")
    mistake(run("train", store_path, "--out", out, "--num-workers", 3), "3", "CPU")
    assert not out.exists()


def test_settings_are_refused_with_the_nearest_names_all_at_once(run, store_path, tmp_path):
    result = run(
        "train",
        store_path,
        "--out",
        tmp_path / "run",
        "--set",
        "batchsize=128",
        "--set",
        "lr=-1",
        "--num-workers",
        "0",
    )
    mistake(result, "'batchsize'", "'batch_size'", "lr=-1", "num_workers=0")
    result = run("train", store_path, "--out", tmp_path / "run", "--batch-size", "100")
    mistake(result, "batch_size=100", "lanes=16", "96")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(run, tmp_path):
    code, _, err = run("inspect", tmp_path / "nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_an_unexpected_failure_has_exit_code_1(run, tmp_path, monkeypatch):
    from rayvaec import datasets

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "write_atlas", fail)
    code, _, err = run("simulate", "--out", tmp_path / "atlas.h5ad")
    assert code == 1
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1


def test_a_command_leaves_the_logging_of_its_process_as_it_was(run, model_path):
    loggers = logging.getLogger(), logging.getLogger("httpx")
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    assert run("inspect", model_path)[0] == 0
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before


def test_a_termination_cleans_up(run, tmp_path, monkeypatch):
    from rayvaec import datasets
    from rayvaec.util.atomic import whole_output

    def terminated(out, **_):
        with whole_output(out) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(datasets, "write_atlas", terminated)
    code, _, err = run("simulate", "--out", tmp_path / "atlas.h5ad")
    assert code == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
