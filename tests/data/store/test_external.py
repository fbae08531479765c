from __future__ import annotations

import json
import logging
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from numcodecs import LZ4
from scipy import sparse
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from rayvaec.cli import main
from rayvaec.data import Loader, open_store
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.store.external import split
from rayvaec.data.store.external_scan import label_distance
from rayvaec.data.store.open import share
from rayvaec.errors import ConfigError, CountsError, StoreError
from rayvaec.training.driver.trainer import _open

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

KEYS = ObsKeys("cell_type")
N_CELLS, N_GENES = 400, 30


def make_counts(n_cells: int = N_CELLS, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 300, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < 0.3)
    x[np.arange(n_cells), rng.integers(N_GENES, size=n_cells)] += 1
    return x


def make_anndata(x, labels=None, form=sparse.csr_matrix, first=0, dtype="float32", **obs):
    labels = [f"type {row % 3}" for row in range(len(x))] if labels is None else labels
    cells = [f"cell {first + row}" for row in range(len(x))]
    return anndata.AnnData(
        form(x.astype(dtype)),
        pd.DataFrame({"cell_type": labels, **obs}, index=cells),
        pd.DataFrame(index=[f"gene {column}" for column in range(x.shape[1])]),
    )


def write(path: Path, adata, version: int = 3, **options) -> Path:
    with anndata.settings.override(auto_shard_zarr_v3=False):
        group = zarr.open_group(path, mode="w", zarr_format=version)
        write_elem(group, "/", adata, dataset_kwargs=options)
    return path


def write_collection(path: Path, parts) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    with anndata.settings.override(auto_shard_zarr_v3=True):
        for number, part in enumerate(parts):
            write_elem(group, f"dataset_{number}", part)
    return path


def dense(rows) -> np.ndarray:
    shape = (len(rows), N_GENES)
    return sparse.csr_matrix((rows.counts, rows.indices, rows.indptr), shape).toarray()


def assert_holds(store, x, labels=None) -> None:
    """Check every row against what was written, whatever the order."""
    rows, names = store.read(0, store.n_cells), store.obs_names(0, store.n_cells)
    at = [int(name.removeprefix("cell ")) for name in names]
    assert sorted(at) == list(range(len(x)))
    np.testing.assert_array_equal(dense(rows), x[at])
    found = [store.registry.labels[code] for code in rows.labels]
    assert found == [f"type {row % 3}" if labels is None else labels[row] for row in at]
    assert rows.counts.dtype == np.uint16
    assert rows.indices.dtype == np.uint16
    assert store.manifest.gene_totals == tuple(x.sum(axis=0).tolist())
    assert store.manifest.total_counts == x.sum()
    assert store.manifest.nnz == (x > 0).sum()


CODECS = {
    "v3 default": (3, {}),
    "v3 uncompressed": (3, {"compressors": None}),
    "v3 gzip": (3, {"compressors": [GzipCodec()]}),
    "v3 blosc": (3, {"compressors": [BloscCodec(typesize=4)], "chunks": (1000,)}),
    "v3 zstd shards": (3, {"compressors": [ZstdCodec()], "shards": (2000,), "chunks": (500,)}),
    "v2 default": (2, {}),
    "v2 lz4": (2, {"compressor": LZ4()}),
}


def write_with_codec(path: Path, adata, name: str) -> Path:
    """Write an AnnData, and its counts once more with a codec."""
    version, options = CODECS[name]
    write(path, adata, version)
    matrix = zarr.open_group(path, mode="r+")["X"]
    for part in ("data", "indices") if options else ():
        values = matrix[part][:]
        matrix.create_array(part, data=values, overwrite=True, **options)
    return path


@pytest.mark.parametrize("name", CODECS)
def test_every_format_is_read(tmp_path, name):
    x = make_counts()
    path = write_with_codec(tmp_path / "atlas.zarr", make_anndata(x), name)
    store = open_store(path, KEYS)
    assert_holds(store, x)
    assert (store.n_cells, store.n_genes, store.n_train) == (400, 30, 360)
    assert store.registry.labels == ("type 0", "type 1", "type 2")
    assert store.manifest.cells_per_label == (134, 133, 133)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
def test_every_type_of_counts_is_read(tmp_path, dtype):
    x = make_counts() % 200
    x[:, 0] = 1
    path = write(tmp_path / "atlas.zarr", make_anndata(x, dtype=dtype))
    rows = open_store(path, KEYS).as_stored().read(0, N_CELLS)
    np.testing.assert_array_equal(dense(rows), x)
    assert rows.counts.dtype == np.uint8


def test_the_loader_gives_every_training_cell_once(tmp_path):
    x = make_counts()
    store = open_store(write(tmp_path / "atlas.zarr", make_anndata(x)), KEYS)
    loader = Loader(store, batch_size=64, lanes=4, block_rows=16, buffer_rows=128)
    cells = [cell for minibatch in loader.epoch(0) for cell in minibatch.cells]
    assert sorted(cells) == list(range(store.n_train))
    trained = {name for cell in cells for name in store.obs_names(cell, cell + 1)}
    held_out = set(store.obs_names(store.n_train, store.n_cells))
    assert len(trained) == 360
    assert len(held_out) == 40
    assert not trained & held_out


def test_a_collection(tmp_path):
    x = make_counts(500)
    bounds = [0, 200, 201, 500]
    parts = [
        make_anndata(x[start:stop], [f"type {row % 3}" for row in range(start, stop)], first=start)
        for start, stop in pairwise(bounds)
    ]
    # Another member, other categories in another order: codes differ, names count.
    parts[0].obs["cell_type"] = pd.Categorical(
        parts[0].obs["cell_type"], ["unused", "type 2", "type 0", "type 1"]
    )
    parts[2].obs["cell_type"] = parts[2].obs["cell_type"].astype(str)
    store = open_store(write_collection(tmp_path / "collection", parts), KEYS)
    assert_holds(store, x)
    assert len(store.partitions) == 3
    assert store.registry.labels == ("type 0", "type 1", "type 2")
    again = pickle.loads(pickle.dumps(store))
    assert again.hash == store.hash
    assert again.obs_names(0, 500) == store.obs_names(0, 500)
    stored = pickle.loads(pickle.dumps(store.as_stored()))
    assert stored.obs_names(0, 500) == [f"cell {row}" for row in range(500)]
    assert_holds(stored, x)


def test_batches_are_read(tmp_path):
    x = make_counts()
    donors = [f"donor {row // 100}" for row in range(N_CELLS)]
    adata = make_anndata(x, donor=donors, number=np.arange(N_CELLS) % 7)
    path = write(tmp_path / "atlas.zarr", adata)
    store = open_store(path, ObsKeys("number", "donor")).as_stored()
    assert store.registry.labels == tuple("0123456")
    assert store.registry.batches == ("donor 0", "donor 1", "donor 2", "donor 3")
    rows = store.read(0, N_CELLS)
    np.testing.assert_array_equal(rows.labels, np.arange(N_CELLS) % 7)
    np.testing.assert_array_equal(rows.batches, np.arange(N_CELLS) // 100)


@pytest.mark.parametrize("name", ["v3 default", "v2 default", "v3 blosc"])
def test_a_foreign_store_on_a_web_server(tmp_path, serve_files, name):
    x = make_counts()
    path = write_with_codec(tmp_path / "atlas.zarr", make_anndata(x), name)
    server = serve_files(tmp_path)
    server.faults += ["", "503", "cut"]
    store = open_store(f"{server.url}/atlas.zarr", KEYS)
    assert store.hash == open_store(path, KEYS).hash
    assert_holds(store.as_stored(), x)


def test_another_process_opens_it_by_its_description(tmp_path):
    x = make_counts()
    path = write(tmp_path / "atlas.zarr", make_anndata(x))
    before = sorted(file.name for file in path.rglob("*"))
    store = open_store(path, KEYS)
    shared = share(store, tmp_path)
    assert sorted(file.name for file in path.rglob("*")) == before  # nothing is written into it
    again = open_store(shared)
    assert (again.path, again.hash, again.n_train) == (path, store.hash, store.n_train)
    assert_holds(again, x)
    assert open_store(store.path, KEYS).hash == store.hash
    shutil.rmtree(path)
    write(path, make_anndata(make_counts(300)))
    with pytest.raises(StoreError, match=r"atlas.zarr is not what it was when it was surveyed"):
        open_store(shared)
    Path(shared).write_text("{}")
    with pytest.raises(StoreError, match=r"store.json is no description of a store"):
        open_store(shared)


def test_other_contents_have_another_hash(tmp_path):
    x = make_counts()
    hashes = set()
    for number, (row, column) in enumerate([(0, 0), (3, 4), (399, 29)]):
        y = x.copy()
        y[row, column] += 1
        hashes.add(open_store(write(tmp_path / str(number), make_anndata(y)), KEYS).hash)
    write(tmp_path / "v2", make_anndata(y, dtype="int64"), version=2)
    assert open_store(tmp_path / "v2", KEYS).hash in hashes
    assert len(hashes) == 3


def test_validation_cells_come_from_all_over():
    for cells in ([400], [100_000], [7, 60_000, 5], [2]):
        train, validation = split(cells)
        rows = [
            (segment.partition, row)
            for segment in train + validation
            for row in range(segment.start, segment.stop)
        ]
        assert sorted(rows) == [(k, row) for k, n in enumerate(cells) for row in range(n)]
        n_validation = sum(segment.stop - segment.start for segment in validation)
        assert abs(n_validation - sum(cells) / 10) <= max(256, 1)
        assert n_validation > 0
    _, validation = split([100_000])
    tenths = np.bincount([segment.start // 10_000 for segment in validation], minlength=10)
    assert tenths.min() > 5
    assert split([1]) == (((0, 0, 1),), ())


def test_how_well_labels_mix():
    labels = np.arange(100_000) % 10
    found, ideal = label_distance(labels.astype(np.int32))
    assert found == pytest.approx(ideal, rel=0.15)
    found, ideal = label_distance(np.sort(labels).astype(np.int32))
    assert found > 3 * ideal


def test_a_sorted_store_is_warned_of(tmp_path, caplog):
    x = make_counts(20_000)
    labels = [f"type {row // 2000}" for row in range(20_000)]
    with caplog.at_level(logging.INFO, "rayvaec"):
        open_store(write(tmp_path / "sorted", make_anndata(x, labels)), KEYS)
    assert "are not shuffled" in caplog.text
    assert "`rayvaec prepare` makes a store that is" in caplog.text.replace("\n", "")
    caplog.clear()
    with caplog.at_level(logging.INFO, "rayvaec"):
        open_store(write(tmp_path / "mixed", make_anndata(x)), KEYS)
    assert "is read as it lies" in caplog.text
    assert "are not shuffled" not in caplog.text


def bad_value(value):
    def change(x):
        adata = make_anndata(x)
        adata.X[7, :] = 0
        adata.X[7, 5] = value
        return adata

    return change


def lacking_label(x):
    adata = make_anndata(x)
    adata.obs["cell_type"] = pd.Categorical(adata.obs["cell_type"], ["type 0", "type 2"])
    return adata


def with_rows(indptr, indices):
    """Replace the first cells by rows of CSR that scipy would not write."""

    def change(x):
        adata = make_anndata(x[: len(indptr) - 1])
        adata.X = sparse.csr_matrix(
            (np.ones(len(indices), "float32"), indices, indptr), adata.shape
        )
        return adata

    return change


REFUSED = [
    (
        bad_value(0.5),
        r"atlas.zarr, X: 0.5 at cell cell 7, gene gene 5 is not a whole number; pass raw",
    ),
    (bad_value(-1), r"-1.0 at cell cell 7, gene gene 5 is negative"),
    (bad_value(np.nan), r"nan at cell cell 7, gene gene 5 is not finite"),
    (bad_value(0), r"cell cell 7 of .* has no counts; .*prepare INPUT --drop-empty"),
    (lacking_label, r"column 'cell_type' has no value for 133 of 400 cells, the first cell 1;"),
    (with_rows([0, 2, 4], [0, 1, 5, 2]), r"cell cell 1 of .* has its genes out of order; make a"),
    (with_rows([0, 2, 5], [0, 1, 2, 2, 3]), r"cell cell 1 of .* holds gene gene 2 more than once"),
    (
        lambda x: make_anndata(x, form=sparse.csc_matrix),
        r"stored as csc and is read by rows",
    ),
    (
        lambda x: make_anndata(x, form=np.asarray),
        r"stored as dense and is read by rows, from csr; ",
    ),
]


@pytest.mark.filterwarnings("ignore:Changing the sparsity structure")
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_trained_on_is_refused(tmp_path, change, message):
    path = write(tmp_path / "atlas.zarr", change(make_counts()))
    with pytest.raises(CountsError, match=message):
        open_store(path, KEYS)


def test_a_layer_of_counts_is_named(tmp_path):
    adata = make_anndata(make_counts())
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    path = write(tmp_path / "atlas.zarr", adata)
    with pytest.raises(CountsError, match=r"counts, such as `layer='counts'` \(layers: counts\)"):
        open_store(path, KEYS)


def test_columns_are_listed(tmp_path):
    path = write(tmp_path / "atlas.zarr", make_anndata(make_counts(), donor="a"))
    with pytest.raises(CountsError, match="no obs column 'celltype'; the columns are cell_type, d"):
        open_store(path, ObsKeys("celltype"))
    with pytest.raises(StoreError, match="name its obs column of cell types with `labels_key`"):
        open_store(path)
    with pytest.raises(ConfigError, match="labels and batches are both read from obs column 'a'"):
        ObsKeys("a", "a")


def test_members_with_other_genes_are_refused(tmp_path):
    parts = [make_anndata(make_counts()) for _ in range(2)]
    parts[1].var_names = [*parts[0].var_names[1:], "odd"]
    path = write_collection(tmp_path / "collection", parts)
    with pytest.raises(CountsError, match=r"dataset_1 has other genes: it lacks gene 0, and .* od"):
        open_store(path, KEYS)
    parts[1].var_names = parts[0].var_names[::-1]
    path = write_collection(tmp_path / "other", parts)
    with pytest.raises(CountsError, match=r"dataset_1 has its genes in another order than"):
        open_store(path, KEYS)


def test_a_matrix_that_contradicts_itself_is_refused(tmp_path):
    path = write(tmp_path / "atlas.zarr", make_anndata(make_counts()))
    matrix = zarr.open_group(path, mode="r+")["X"]
    indptr = matrix["indptr"][:]
    for change, message in (
        (indptr[::-1], "row offsets do not follow"),
        (np.append(indptr[:-1], indptr[-1] - 1), "it has .* values, not"),
        (indptr[:-1], "has 399 row offsets for 400"),
    ):
        matrix.create_array("indptr", data=np.ascontiguousarray(change), overwrite=True)
        with pytest.raises(CountsError, match=message):
            open_store(path, KEYS)
    matrix.create_array("indptr", data=indptr, overwrite=True)
    matrix["indices"][3] = N_GENES
    with pytest.raises(CountsError, match="values of genes beyond its 30"):
        open_store(path, KEYS)


def test_inspect_says_how_to_train_on_it(tmp_path, capsys):
    path = write(tmp_path / "atlas.zarr", make_anndata(make_counts(), donor="a"), version=2)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"AnnData that rayvaec did not write: {path}\n")
    assert "  columns  cell_type, donor\n" in shown
    assert f"rayvaec train {path} --out RUN --labels-key KEY" in shown
    share(open_store(path, KEYS), tmp_path)
    assert main(["inspect", str(tmp_path / "store.json")]) == 0
    shown = capsys.readouterr().out
    assert "400: 360 for training, 40 for validation, drawn with seed 0" in shown
    assert main(["inspect", "--verify", str(tmp_path / "store.json")]) == 2
    assert "has no checksums: rayvaec did not write it" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_run_on_a_foreign_store(tmp_path):
    x = make_counts()
    path = write(tmp_path / "atlas.zarr", with_raw(x))
    run = tmp_path / "run"
    train = ["train", str(path), "--out", str(run), "--batch-size", "64", "--set", "n_hidden=16"]
    keys = ["--labels-key", "cell_type", "--layer", "raw"]
    assert main([*train, "--max-epochs", "1", *keys]) == 0
    assert json.loads((run / "run.json").read_text())["store"] == str(path)
    # A resumed run needs neither the options nor another survey.
    store = open_store(f"{path}::raw", KEYS)
    assert _open(path, run, None, None).hash == store.hash
    embed = ["embed", str(run / "model"), str(path), "--out", str(tmp_path / "z.zarr")]
    assert main(embed) == 2  # X is normalised
    assert main([*embed, "--layer", "raw"]) == 0
    embedded = anndata.read_zarr(tmp_path / "z.zarr")
    assert embedded.obs_names.tolist() == [f"cell {row}" for row in range(N_CELLS)]
    assert np.isfinite(embedded.obsm["X_rayvaec"]).all()


def test_columns_that_are_not_there_or_not_the_stores(tmp_path, random_store, capsys):
    path = write(tmp_path / "atlas.zarr", make_anndata(make_counts()))
    out = tmp_path / "run"
    assert main(["train", str(path), "--out", str(out), "--labels-key", "celltype"]) == 2
    assert "the columns are cell_type" in capsys.readouterr().err
    own = ["train", str(random_store.path), "--out", str(out)]
    assert main([*own, "--labels-key", "celltype"]) == 2
    assert "--labels-key is celltype and the store" in capsys.readouterr().err
    assert main([*own, "--batch-key", "donor"]) == 2
    assert "was made with batch; leave out --batch-key" in capsys.readouterr().err
    assert not out.exists()


def with_raw(x):
    adata = make_anndata(x)
    adata.raw = adata.copy()
    adata.X = sparse.csr_matrix(np.log1p(x))
    return adata


@pytest.mark.parametrize("version", [2, 3])
def test_a_layer_of_a_foreign_store_is_read(tmp_path, version):
    x = make_counts()
    path = write(tmp_path / "atlas.zarr", with_raw(x), version)
    with pytest.raises(
        CountsError, match=r"raw counts, such as `layer='raw'` \(layers: raw; raw is adata.raw.X"
    ):
        open_store(path, KEYS)
    store = open_store(path, ObsKeys("cell_type", layer="raw"))
    assert_holds(store, x)
    assert [source["layer"] for source in store.manifest.sources] == ["raw"]
    for again in (
        pickle.loads(pickle.dumps(store)),
        open_store(share(store, tmp_path)),
        open_store(f"{path}::raw", KEYS),
    ):
        assert again.hash == store.hash
        assert_holds(again, x)
    assert open_store(f"{write(tmp_path / 'plain', make_anndata(x))}::X", KEYS).hash == store.hash


def test_a_layer_on_a_web_server(tmp_path, serve_files):
    x = make_counts()
    write(tmp_path / "atlas.zarr", with_raw(x))
    server = serve_files(tmp_path)
    with pytest.raises(
        CountsError, match=r"such as `layer='raw'` \(layers: raw; raw is adata.raw.X"
    ):
        open_store(f"{server.url}/atlas.zarr", KEYS)
    assert_holds(open_store(f"{server.url}/atlas.zarr::raw", KEYS), x)


def test_a_store_of_prepare_has_no_layers(random_store):
    with pytest.raises(StoreError, match=r"has no layer 'raw'.*; leave out ::raw"):
        open_store(f"{random_store.path}::raw", KEYS)
    with pytest.raises(ConfigError, match="`layer` is raw and the store .* was made with none"):
        _open(random_store.path, None, None, None, "raw")
