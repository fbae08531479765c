from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_store
from rayvaec.datasets import simulate
from rayvaec.errors import ConfigError, CountsError, ModelError, RayvaecError, StoreError
from rayvaec.inference.analyses.differential import Comparison
from rayvaec.inference.bulk import api, formats, runner, worker
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local", "small_regions")]


def _make_regions_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several regions, and several files a layer, in a store of 1,200 cells."""
    monkeypatch.setattr(worker, "MAX_REGION", 256)
    monkeypatch.setattr("rayvaec.inference.bulk.zarr_output.VALUES_PER_CHUNK", 512)
    monkeypatch.setattr("rayvaec.inference.bulk.zarr_output.CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr("rayvaec.inference.bulk.zarr_output.REGIONS_PER_POINTER_SHARD", 2)


@pytest.fixture
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_regions_small(monkeypatch)


@pytest.fixture
def lasting(lasting_actors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the processes of the tests before."""
    monkeypatch.setattr(runner, "actors", lasting_actors)


@pytest.fixture(scope="module")
def model(model_path: Path) -> TrainedModel:
    return load_model(model_path)


@pytest.fixture(scope="module")
def in_memory(store_path: Path) -> anndata.AnnData:
    """The store's cells in its order, as one AnnData."""
    parts = [anndata.read_zarr(part) for part in sorted(store_path.glob("dataset_*"))]
    adata = anndata.concat(parts)
    adata.X = sp.csr_matrix(adata.X).astype(np.int32)
    return adata


def _same_cells(found: anndata.AnnData, expected: anndata.AnnData) -> None:
    assert found.X is None
    assert list(found.obs_names) == list(expected.obs_names)
    assert list(found.var_names) == list(expected.var_names)
    assert list(found.obs["cell_type"]) == list(expected.obs["cell_type"])


@pytest.fixture(scope="module")
def undisturbed(
    model_path: Path,
    store_path: Path,
    ray_local: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Three draws a cell with seed 5, by workers that nothing happened to."""
    out = tmp_path_factory.mktemp("draws") / "out.zarr"
    with pytest.MonkeyPatch.context() as patch:
        _make_regions_small(patch)
        api.sample_store(model_path, store_path, out, 3, seed=5, num_workers=2)
    return out


def test_draws_are_those_of_the_model_in_memory(
    undisturbed: Path, model: TrainedModel, in_memory: anndata.AnnData
) -> None:
    found = anndata.read_zarr(undisturbed)
    _same_cells(found, in_memory)
    assert set(found.layers) == {"sample_0", "sample_1", "sample_2"}
    expected = model.sample(in_memory, 3, seed=5, sparse=True)
    for sample in range(3):
        layer = found.layers[f"sample_{sample}"]
        assert layer.dtype == np.int32
        layer.check_format(full_check=True)
        assert layer.nnz == expected[sample].nnz > 0
        np.testing.assert_array_equal(layer.toarray(), expected[sample].toarray())
    assert '"seed": 5' in found.uns["rayvaec"]
    assert [path.name for path in undisturbed.parent.iterdir()] == ["out.zarr"]


def test_many_samples_are_drawn_in_windows(
    model_path: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayvaec.inference import moments
    from rayvaec.inference.bulk import draw_layers

    module = load_model(model_path).module
    cells = worker.StoreCells(open_store(store_path), load_model(model_path).registry)
    _, _, some = cells.read(0, 70)
    whole = draw_layers.draw_sample_major(module, some, 7, seed=1)
    monkeypatch.setattr(moments, "_SAMPLES_PER_CALL", 3)
    monkeypatch.setattr(moments, "_ROWS_PER_CALL", 64)
    windows = draw_layers.draw_sample_major(module, some, 7, seed=1)
    for left, right in zip(whole, windows, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.usefixtures("lasting")
def test_reductions_are_moments_of_the_draws(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.zarr"
    reduce = ("mean", "var", "zero_fraction")
    api.sample_store(model_path, store_path, out, 6, seed=2, reduce=reduce, num_workers=2)
    found = anndata.read_zarr(out)
    _same_cells(found, in_memory)
    assert set(found.layers) == set(reduce)
    draws = np.asarray(model.sample(in_memory, 6, seed=2))
    np.testing.assert_allclose(found.layers["mean"], draws.mean(2), rtol=1e-6)
    np.testing.assert_allclose(found.layers["var"], draws.var(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.layers["zero_fraction"], (draws == 0).mean(2), rtol=1e-6)


@pytest.mark.usefixtures("lasting")
def test_quantiles_are_those_of_the_draws(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    out, quantiles = tmp_path / "out.zarr", (0.05, 0.5, 1.0)
    how = {"reduce": ("mean", "quantiles"), "quantiles": quantiles}
    api.sample_store(model_path, store_path, out, 6, seed=2, num_workers=2, **how)
    found = anndata.read_zarr(out)
    assert set(found.layers) == {"mean", "quantile_0.05", "quantile_0.5", "quantile_1.0"}
    draws = np.asarray(model.sample(in_memory, 6, seed=2))
    np.testing.assert_allclose(found.layers["mean"], draws.mean(2), rtol=1e-6)
    for quantile in quantiles:
        expected = np.quantile(draws, quantile, axis=2)
        np.testing.assert_allclose(found.layers[f"quantile_{quantile}"], expected, rtol=1e-6)


def _read(path: Path) -> Any:
    readers = {
        ".zarr": anndata.read_zarr,
        ".h5ad": anndata.read_h5ad,
        ".csv": lambda path: pd.read_csv(path, index_col=0),
        ".parquet": pd.read_parquet,
    }
    return readers[path.suffix](path)


def _same_anndata(found: anndata.AnnData, expected: anndata.AnnData) -> None:
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert found.uns == expected.uns
    for name in ("layers", "obsm"):
        one, other = getattr(found, name), getattr(expected, name)
        assert set(one) == set(other)
        for key in one:
            left, right = one[key], other[key]
            assert (type(left), left.dtype) == (type(right), right.dtype)
            if sp.issparse(left):
                left.check_format(full_check=True)
                left, right = left.toarray(), right.toarray()
            np.testing.assert_array_equal(left, right)
    assert (found.X is None) == (expected.X is None)
    if found.X is not None:
        np.testing.assert_array_equal(found.X, expected.X)


def _same_columns(table: pd.DataFrame, adata: anndata.AnnData) -> None:
    """Assert that a table has the columns of an AnnData, and no others."""
    assert list(table.index.astype(str)) == list(adata.obs_names)
    assert table.index.name == "cell"
    expected = {name: adata.obs[name].to_numpy() for name in adata.obs}
    for name, matrix in sorted(adata.obsm.items()):
        expected |= {f"{name}_{i}": column for i, column in enumerate(matrix.T)}
    if adata.X is not None:
        expected |= dict(zip(adata.var_names, adata.X.T, strict=True))
    assert list(table) == list(expected)
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(table[name], values, rtol=1e-6)
        else:
            assert list(table[name]) == list(values)


VERBS: dict[str, Callable[..., None]] = {
    "sample": lambda *paths: api.sample_store(*paths, 2),
    "moments": lambda *paths: api.sample_store(*paths, 2, reduce=("mean",)),
    "embed": api.embed_store,
    "expression": api.expression_store,
    "means": lambda *paths: api.expression_store(*paths, by_label=True),
    "elbo": api.elbo_store,
}


@pytest.mark.usefixtures("lasting")
@pytest.mark.parametrize(
    ("verb", "suffixes"),
    [
        ("sample", (".h5ad",)),
        ("moments", (".h5ad",)),
        ("embed", (".h5ad", ".csv", ".parquet")),
        ("expression", (".h5ad",)),
        ("means", (".h5ad", ".csv", ".parquet")),
        ("elbo", (".h5ad", ".csv", ".parquet")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_holds_the_same(
    verb: str,
    suffixes: tuple[str, ...],
    model_path: Path,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(formats, "_ROWS", 500)  # several pieces
    monkeypatch.setattr(formats, "_PIECE_BYTES", 2**14)
    VERBS[verb](model_path, store_path, tmp_path / "out.zarr")
    expected = _read(tmp_path / "out.zarr")
    for suffix in suffixes:
        path = tmp_path / f"out{suffix}"
        VERBS[verb](model_path, store_path, path)
        found = _read(path)
        if suffix == ".h5ad":
            _same_anndata(found, expected)
        else:
            _same_columns(found, expected)
    assert {path.suffix for path in tmp_path.iterdir()} == {".zarr", *suffixes}


@pytest.mark.usefixtures("lasting")
def test_latent_expression_and_elbo_are_those_of_the_model_in_memory(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    api.embed_store(model_path, store_path, tmp_path / "latent.zarr")
    found = anndata.read_zarr(tmp_path / "latent.zarr")
    _same_cells(found, in_memory)
    mean, variance = model.latent(in_memory, return_dist=True)
    np.testing.assert_array_equal(found.obsm["X_rayvaec"], mean)
    np.testing.assert_array_equal(found.obsm["X_rayvaec_var"], variance)

    api.expression_store(model_path, store_path, tmp_path / "expression.zarr", num_workers=2)
    found = anndata.read_zarr(tmp_path / "expression.zarr")
    np.testing.assert_array_equal(found.layers["expression"], model.expression(in_memory))

    api.elbo_store(model_path, store_path, tmp_path / "elbo.zarr", seed=3)
    found = anndata.read_zarr(tmp_path / "elbo.zarr")
    assert list(found.obs.columns) == ["cell_type", "elbo", "reconstruction_error"]
    np.testing.assert_array_equal(found.obs["elbo"], model.elbo(in_memory, seed=3))
    error = model.get_reconstruction_error(in_memory, return_mean=False, seed=3)
    np.testing.assert_array_equal(found.obs["reconstruction_error"], error["reconstruction_loss"])


@pytest.mark.usefixtures("lasting")
def test_marginal_likelihoods_are_those_of_the_model_in_memory(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    out = tmp_path / "ll.zarr"
    api.marginal_ll_store(model_path, store_path, out, n_mc_samples=20, seed=3, num_workers=2)
    expected = model.get_marginal_ll(in_memory, n_mc_samples=20, return_mean=False, seed=3)
    np.testing.assert_array_equal(anndata.read_zarr(out).obs["marginal_ll"], expected)


@pytest.mark.usefixtures("lasting")
def test_the_empirical_prior_is_that_of_the_model_in_memory(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    out = tmp_path / "prior.npz"
    api.vamp_prior_store(model_path, store_path, out, p=3, num_workers=2)
    expected = model.get_vamp_prior(in_memory, p=3)
    with np.load(out) as found:
        assert found["labels"].tolist() == list(model.registry.labels)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-10, err_msg=name)


def _same_table(found: Path, expected: pd.DataFrame) -> None:
    table = pd.read_csv(found, index_col="gene")
    assert list(table.index) == list(expected.index)
    pd.testing.assert_frame_equal(table, expected, check_names=False, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("lasting")
def test_comparisons_are_those_of_the_model_in_memory(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
) -> None:
    groups = {"group1": model.registry.labels[2], "group2": model.registry.labels[1]}
    how, out = Comparison(n_samples=300, seed=4), tmp_path / "de.csv"
    api.differential_expression_store(model_path, store_path, out, how=how, **groups)
    parquet = tmp_path / "de.parquet"
    api.differential_expression_store(model_path, store_path, parquet, how=how, **groups)
    table = pd.read_csv(out, index_col="gene")
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), table, check_dtype=False)
    options = {"n_samples_overall": 300, "seed": 4, **groups}
    _same_table(out, model.differential_expression(in_memory, **options))


class _DiesOnce(worker.RegionWorker):
    """Kills its own process in the middle of a region and in the middle of a layer, once each."""

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        if method == "values":
            self._die_once("values", arguments[1][0] > 0)
        record = super().call(method, *arguments)
        self._die_once("region", method == "region" and arguments[0] == 1)
        return record

    def _die_once(self, what: str, now: bool) -> None:
        mark = Path(self.work.parts).parents[2] / f"died in {what}"
        if now and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_workers_leave_no_row_out_and_none_double(
    model_path: Path,
    store_path: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "RegionWorker", _DiesOnce)
    out = tmp_path / "killed.zarr"
    api.sample_store(model_path, store_path, out, 3, seed=5, num_workers=2)
    assert (tmp_path / "died in region").exists()
    assert (tmp_path / "died in values").exists()
    assert _files(out) == _files(undisturbed)


def test_killed_workers_count_no_cell_twice_in_an_average(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "RegionWorker", _DiesOnce)
    out = tmp_path / "means.zarr"
    api.expression_store(model_path, store_path, out, by_label=True, num_workers=2)
    assert (tmp_path / "died in region").exists()
    found = anndata.read_zarr(out)
    assert list(found.obs_names) == list(model.registry.labels)
    assert list(found.var_names) == list(model.registry.genes)
    every = model.expression(in_memory)
    for label, row in zip(found.obs_names, found.X, strict=True):
        own = (in_memory.obs["cell_type"] == label).to_numpy()
        assert found.obs.loc[label, "n_cells"] == own.sum()
        np.testing.assert_allclose(row, every[own].mean(0), rtol=1e-5)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class _FailsAt(worker.RegionWorker):
    """Fails at one region, and counts the regions that it was asked for."""

    error = OSError(28, "No space left on device")

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        folder = Path(self.work.parts).parents[2]
        if method == "region":
            if arguments[0] == 3 and not (folder / "mended").exists():
                raise self.error
            (folder / f"computed {arguments[0]}").touch()
        return super().call(method, *arguments)


@pytest.mark.usefixtures("lasting")
def test_a_rerun_does_what_is_missing(
    model_path: Path,
    store_path: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "RegionWorker", _FailsAt)
    out = tmp_path / "out.zarr"
    with pytest.raises(RayvaecError, match=r"no space .* finished regions are kept in"):
        api.sample_store(model_path, store_path, out, 3, seed=5)
    assert not out.exists()
    computed = set(tmp_path.glob("computed *"))
    finished = {path.name for path in computed}
    # The one after the failed one was on its way.
    assert finished == {"computed 0", "computed 1", "computed 2", "computed 4"}
    for path in computed:
        path.unlink()
    with pytest.raises(StoreError, match=r"out.zarr.partial holds .*: seed was 5 and is 6; give"):
        api.sample_store(model_path, store_path, out, 3, seed=6)
    (tmp_path / "mended").touch()
    api.sample_store(model_path, store_path, out, 3, seed=5, num_workers=2)
    again = {path.name for path in tmp_path.glob("computed *")}
    assert again == {"computed 3"}
    assert _files(out) == _files(undisturbed)
    assert not (tmp_path / "out.zarr.partial").exists()


IS_KILLED = """
import os, signal, sys
import ray
from rayvaec.cluster import require_token
from rayvaec.inference.bulk import api, worker
from rayvaec.inference.bulk.run_state import RunState

worker.MAX_REGION = 256
finish = RunState.finish

def die(self, stage, item, record):
    finish(self, stage, item, record)
    if stage == "regions":
        os.kill(os.getpid(), signal.SIGKILL)

RunState.finish = die
require_token()
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
api.embed_store(*sys.argv[1:])
"""


def test_a_command_that_was_killed_is_gone_on_with(
    model_path: Path, store_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.zarr"
    caplog.set_level("INFO", "rayvaec")
    command = [sys.executable, "-c", IS_KILLED, str(model_path), str(store_path), str(out)]
    with (tmp_path / "said").open("w") as said:  # a pipe would stay open as long as its Ray lives
        killed = subprocess.run(command, timeout=200, stdout=said, stderr=said)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
    (tmp_path / "said").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {".out.zarr.lock", "out.zarr.partial"}
    with pytest.raises(StoreError, match='quantity was "latent" and is "elbo"'):
        api.elbo_store(model_path, store_path, out)
    api.embed_store(model_path, store_path, out, num_workers=2)
    assert "going on: 1 of 5 regions are finished" in caplog.text
    api.embed_store(model_path, store_path, tmp_path / "whole.zarr")
    assert _files(out) == _files(tmp_path / "whole.zarr")
    assert {path.name for path in tmp_path.iterdir()} == {"out.zarr", "whole.zarr"}


class _WritesShort(_FailsAt):
    error = OSError("4096 requested and 1024 written")  # numpy's, of a full disk


@pytest.mark.usefixtures("lasting")
def test_a_rerun_of_a_comparison_does_what_is_missing(
    model_path: Path,
    store_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "RegionWorker", _WritesShort)
    out, how = tmp_path / "out.csv", Comparison(n_samples=50)
    with pytest.raises(RayvaecError, match=r"no space .* finished regions are kept in"):
        api.differential_expression_store(model_path, store_path, out, how=how)
    assert not out.exists()
    for path in tmp_path.glob("computed *"):
        path.unlink()
    (tmp_path / "mended").touch()
    api.differential_expression_store(model_path, store_path, out, how=how)
    again = {path.name for path in tmp_path.glob("computed *")}
    assert again == {"computed 3"}
    _same_table(out, model.differential_expression(in_memory, n_samples_overall=50))
    assert not (tmp_path / "out.csv.partial").exists()


@pytest.mark.usefixtures("lasting")
def test_an_output_is_replaced_only_when_that_is_asked_for(
    model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(StoreError, match="exists already"):
        api.embed_store(model_path, store_path, out)
    assert (out / "precious").exists()
    out.rename(tmp_path / ".out.zarr.7.replaced")  # as a kill while it was replaced leaves it
    with pytest.raises(StoreError, match="exists already"):
        api.embed_store(model_path, store_path, out)
    assert (out / "precious").exists()
    api.embed_store(model_path, store_path, out, overwrite=True)
    assert anndata.read_zarr(out).n_obs == 1200
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def _save(path: Path, genes: list[str], labels: list[str]) -> Path:
    registry = {"genes": genes, "labels": labels, "labels_key": "x"}
    registry |= {"batches": [], "batch_key": None}
    torch.manual_seed(0)
    save_model(path, VAEC(len(genes), len(labels), n_hidden=8), registry, {})
    return path


@pytest.mark.usefixtures("lasting")
def test_genes_are_matched_by_name(
    model_path: Path, store_path: Path, in_memory: anndata.AnnData, tmp_path: Path
) -> None:
    registry = open_store(store_path).registry
    genes = list(registry.genes)[100:40:-1]
    path = _save(tmp_path / "model", genes, list(registry.labels))
    api.sample_store(path, store_path, tmp_path / "out.zarr", 1)
    found = anndata.read_zarr(tmp_path / "out.zarr")
    expected = load_model(path).sample(in_memory, 1, labels_key="cell_type", sparse=True)[0]
    assert list(found.var_names) == genes
    np.testing.assert_array_equal(found.layers["sample_0"].toarray(), expected.toarray())


def test_a_model_that_does_not_fit_is_refused(store_path: Path, tmp_path: Path) -> None:
    registry = open_store(store_path).registry
    genes, labels = list(registry.genes), list(registry.labels)
    other = _save(tmp_path / "genes", [*genes, "NOT_THERE"], labels)
    with pytest.raises(ModelError, match="lacks 1 of the model's 121 genes: NOT_THERE"):
        api.embed_store(other, store_path, tmp_path / "out.zarr")
    other = _save(tmp_path / "labels", genes, labels[1:])
    with pytest.raises(ModelError, match=rf"1 labels that the model does not know: {labels[0]};"):
        api.embed_store(other, store_path, tmp_path / "out.zarr")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("lasting")
def test_batches_go_with_the_cells(tmp_path: Path) -> None:
    simulate(n_cells=300, n_genes=40, n_labels=2, seed=1).write_h5ad(tmp_path / "a.h5ad")
    config = PrepareConfig(labels_key="cell_type", batch_key="batch")
    prepare([tmp_path / "a.h5ad"], tmp_path / "store", config)
    registry = open_store(tmp_path / "store").registry
    torch.manual_seed(0)
    module = VAEC(40, 2, n_hidden=8, n_batch=registry.n_batches)
    save_model(tmp_path / "model", module, registry.to_json(), {})
    api.expression_store(tmp_path / "model", tmp_path / "store", tmp_path / "out.zarr")
    found = anndata.read_zarr(tmp_path / "out.zarr")
    source = anndata.read_h5ad(tmp_path / "a.h5ad")[found.obs_names]
    expected = load_model(tmp_path / "model").expression(source)
    np.testing.assert_array_equal(found.layers["expression"], expected)
    assert list(found.obs["batch"]) == list(source.obs["batch"])
    assert list(found.obs["cell_type"]) == list(source.obs["cell_type"])
    how = Comparison(n_samples=40, batch_correction=True)
    paths = tmp_path / "model", tmp_path / "store", tmp_path / "de.csv"
    api.differential_expression_store(*paths, how=how, groupby="batch")
    options = {"n_samples_overall": 40, "batch_correction": True, "groupby": "batch"}
    _same_table(paths[2], load_model(paths[0]).differential_expression(source, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 1, "seed": -1}, "seed=-1"),
        ({"n_samples": 1, "reduce": ("median",)}, r"'median'; choose from mean, var"),
        ({"n_samples": 1, "reduce": ("mean", "mean")}, "given twice"),
        ({"n_samples": 1, "reduce": ("quantiles",)}, "nothing says which quantiles"),
        ({"n_samples": 1, "quantiles": (0.5,)}, "add quantiles to reduce"),
        ({"n_samples": 1, "reduce": ("quantiles",), "quantiles": (1.5,)}, "no quantile 1.5"),
        ({"n_samples": 1, "num_workers": 0}, "num_workers=0"),
        ({"n_samples": 1, "num_workers": 99}, "99 workers need 99 CPUs and Ray has 2"),
        ({"n_samples": 1, "use_gpu": True}, "1 worker needs 1 GPU"),
    ],
)
def test_options_out_of_range_are_refused_and_leave_nothing(
    model_path: Path, store_path: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        api.sample_store(model_path, store_path, tmp_path / "out.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_or_no_store_is_refused(
    model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        api.embed_store(store_path, store_path, tmp_path / "out.zarr")
    with pytest.raises(StoreError):
        api.embed_store(model_path, model_path, tmp_path / "out.zarr")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("lasting")
def test_a_store_that_changed_meanwhile_is_noticed(
    model_path: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(worker.RegionWorker):
        def call(self, method: str, *arguments: Any) -> dict[str, Any]:
            object.__setattr__(self.work, "store_hash", "0" * 64)
            return super().call(method, *arguments)

    monkeypatch.setattr(runner, "RegionWorker", Other)
    copy = tmp_path / "store"
    shutil.copytree(store_path, copy)
    with pytest.raises(RayvaecError, match="another store at"):
        api.embed_store(model_path, copy, tmp_path / "out.zarr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group1": "T cells"}, "no group 'T cells' in cell_type; choose from "),
        ({"groupby": "site"}, "no column 'site' of groups; choose from cell_type"),
        ({"num_workers": 0}, "num_workers=0"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused_and_leave_nothing(
    model_path: Path, store_path: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        api.differential_expression_store(model_path, store_path, tmp_path / "de.csv", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("lasting")
def test_a_label_of_one_cell_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adata = simulate(n_cells=60, n_genes=20, n_labels=2, seed=1)
    adata.obs["cell_type"] = ["alone", *["a", "b"] * 29, "a"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    prepare([tmp_path / "a.h5ad"], tmp_path / "store", PrepareConfig(labels_key="cell_type"))
    model = _save(tmp_path / "model", list(adata.var_names), ["a", "alone", "b"])
    paths = model, tmp_path / "store", tmp_path / "de.csv"
    with pytest.raises(CountsError, match="group 'alone' has 1 cell, and a comparison needs"):
        api.differential_expression_store(*paths, group1=["a", "alone"])
    assert not list(tmp_path.glob("de.csv*"))
    api.differential_expression_store(*paths)
    assert "fewer than 2 cells are not compared with the others: 'alone' (1)" in caplog.text
    assert set(pd.read_csv(tmp_path / "de.csv")["group1"]) == {"a", "b"}


@pytest.mark.usefixtures("lasting")
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_one_name_are_told_apart_over_the_whole_store(
    model_path: Path,
    model: TrainedModel,
    in_memory: anndata.AnnData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    repeated = in_memory[np.full(600, 3)].copy()  # three regions
    repeated.obs_names = [f"c{cell % 200}" for cell in range(600)]
    anndata.io.write_elem(
        zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2), "/", repeated
    )
    api.sample_store(model_path, tmp_path / "a.zarr", tmp_path / "out.zarr", 1, seed=5)
    assert "400 of 600 cells have the name of an earlier one" in caplog.text
    found = anndata.read_zarr(tmp_path / "out.zarr")
    assert list(found.obs_names) == list(repeated.obs_names)
    drawn = found.layers["sample_0"].toarray()
    np.testing.assert_array_equal(drawn, model.sample(repeated, 1, seed=5)[..., 0])
    assert len(np.unique(drawn, axis=0)) == 600


def test_a_learned_prior_is_not_estimated(store_path: Path, tmp_path: Path) -> None:
    registry = open_store(store_path).registry
    module = VAEC(120, 4, n_hidden=8, generative="softmax", n_batch=1, prior="mog")
    save_model(tmp_path / "model", module, registry.to_json(), {})
    with pytest.raises(ConfigError, match="learned a mixture prior"):
        api.vamp_prior_store(tmp_path / "model", store_path, tmp_path / "prior.npz")
