"""Stores, runs, models and outputs of format version 1, kept as its first release wrote them.

``fixtures/format_1.tar.gz`` holds what these commands made of a simulated ``atlas.h5ad``::

    rayvaec simulate --out atlas.h5ad --n-cells 300 --n-genes 40 --n-labels 3
    rayvaec prepare atlas.h5ad --out store --labels-key cell_type --batch-key batch
    rayvaec train store --out run --max-epochs 2 --batch-size 64 --set n_hidden=16
    rayvaec train store --out run_softmax --max-epochs 2 --batch-size 64 --set n_hidden=16 \\
        --set generative=softmax
    rayvaec sample run/model store --out drawn.zarr --n-samples 2
    rayvaec embed run/model store --out embedded.zarr

and in ``expected.npz``, by model, `sample(n_samples=2, seed=3)`, `latent`, `elbo` and the first 50
cells of `expression`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import anndata
import numpy as np
import pytest

import rayvaec
from rayvaec.cli import main
from rayvaec.data import Loader, open_store
from rayvaec.model.saved import read_model
from rayvaec.training.records import read_epochs

RUNS = ("run", "run_softmax")
FORMAT = Path(__file__).parent / "fixtures" / "format_1.tar.gz"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the release wrote."""
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(FORMAT) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(old: Path) -> dict[str, np.ndarray]:
    with np.load(old / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def atlas(old: Path) -> anndata.AnnData:
    return anndata.read_h5ad(old / "atlas.h5ad")


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_prepare_still_writes_these_bytes(old, tmp_path):
    new = tmp_path / "store"
    arguments = ["prepare", old / "atlas.h5ad", "--out", new, "--labels-key", "cell_type"]
    assert main([*map(str, arguments), "--batch-key", "batch"]) == 0
    before, after = files_below(old / "store"), files_below(new)
    assert {name for name in before if before[name] != after.get(name)} <= {"zarr.json"}
    assert set(after) == set(before)
    one, other = (open_store(folder).manifest for folder in (old / "store", new))
    assert one.partitions == other.partitions
    assert (one.registry, one.gene_totals) == (other.registry, other.gene_totals)


def test_the_store_gives_every_training_cell_once(old):
    store = open_store(old / "store")
    cells = [minibatch.cells for minibatch in Loader(store, batch_size=64).epoch(0)]
    assert np.array_equal(np.sort(np.concatenate(cells)), np.arange(store.n_train))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", ["latent", "elbo", "expression"])
def test_models_compute_as_before(run, method, old, atlas, expected):
    model = rayvaec.load_model(old / run / "model")
    cells = atlas[:50] if method == "expression" else atlas
    # What is left is another processor's rounding.
    assert np.allclose(
        getattr(model, method)(cells), expected[f"{run}/{method}"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("run", RUNS)
def test_models_draw_the_same_counts(run, old, atlas, expected):
    drawn = rayvaec.load_model(old / run / "model").sample(atlas, n_samples=2, seed=3)
    # A draw changes only where another processor's rounding moves it over a bound.
    assert np.mean(drawn != expected[f"{run}/sample"]) < 1e-3


def test_outputs_are_computed_as_before(old, atlas):
    model = rayvaec.load_model(old / "run" / "model")
    drawn, embedded = (anndata.read_zarr(old / f"{name}.zarr") for name in ("drawn", "embedded"))
    cells = atlas[drawn.obs_names]
    ours = model.sample(cells, n_samples=2, seed=0)
    theirs = np.stack([drawn.layers[f"sample_{n}"].toarray() for n in range(2)], axis=2)
    assert np.mean(ours != theirs) < 1e-3
    latent = model.latent(atlas[embedded.obs_names])
    assert np.allclose(latent, embedded.obsm["X_rayvaec"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["store", "run", "run/model", "run_softmax/last"])
def test_inspect_reads_them(name, old, capsys):
    assert main(["inspect", str(old / name)]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_a_run_goes_on(ray_local, old):
    run = old / "run"
    arguments = ["train", old / "store", "--out", run, "--resume", "--max-epochs", "3"]
    assert main([*map(str, arguments), "--num-workers", "1"]) == 0
    assert [record["epoch"] for record in read_epochs(run)] == [1, 2, 3]
    assert np.isfinite(read_epochs(run)[2]["val_elbo"])
    assert read_model(run / "last").provenance["metrics"]["epoch"] == 3
