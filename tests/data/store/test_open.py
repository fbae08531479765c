from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rayvaec.data import Loader, open_store
from rayvaec.errors import StoreError
from rayvaec.util.checksums import folder_checksums


def dense(rows, n_genes: int) -> np.ndarray:
    shape = (len(rows), n_genes)
    return sparse.csr_matrix((rows.counts, rows.indices, rows.indptr), shape).toarray()


def test_what_a_store_says_of_itself(random_store):
    store = open_store(str(random_store.path))
    assert (store.n_cells, store.n_genes, store.n_train) == (2345, 40, 2100)
    assert store.registry == random_store.registry
    assert store.path == random_store.path
    assert store.hash == store.manifest.hash()
    assert store.rows("train") == range(2100)
    assert store.rows("validation") == range(2100, 2345)
    assert store.rows("all") == range(2345)
    with pytest.raises(StoreError, match="no split 'test'; choose one of train, validation, all"):
        store.rows("test")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows_are_read(random_store, data):
    store = open_store(random_store.path)
    start = data.draw(st.integers(0, store.n_cells))
    stop = data.draw(st.integers(start, store.n_cells))
    rows = store.read(start, stop)
    assert len(rows) == stop - start
    np.testing.assert_array_equal(dense(rows, 40), random_store.matrix[start:stop])
    np.testing.assert_array_equal(rows.labels, random_store.labels[start:stop])
    np.testing.assert_array_equal(rows.batches, random_store.batches[start:stop])
    assert (rows.indptr.dtype, rows.labels.dtype, rows.batches.dtype) == ("i8", "i4", "i4")
    assert (rows.counts.dtype, rows.indices.dtype) == ("u2", "u2")
    assert store.obs_names(start, stop) == random_store.names[start:stop]


def test_rows_outside_are_refused(random_store):
    store = open_store(random_store.path)
    for start, stop in [(-1, 3), (3, 2), (2000, 2346)]:
        with pytest.raises(StoreError, match=f"rows {start} to {stop} are not in"):
            store.read(start, stop)
        with pytest.raises(StoreError, match="it has 2345 rows"):
            store.obs_names(start, stop)


def test_a_store_without_batches(make_store):
    made = make_store(largest=255)
    rows = open_store(made.path).read(0, 300)
    assert rows.batches is None
    assert rows.counts.dtype == np.uint8
    np.testing.assert_array_equal(dense(rows, 40), made.matrix)


def list_files(path: Path, files: dict[str, str]) -> None:
    """Have the manifest list other files for every partition."""
    group = json.loads((path / "zarr.json").read_text())
    manifest = group["attributes"]["rayvaec"]
    del manifest["checksum"]
    for partition in manifest["partitions"]:
        partition["files"] = files
    (path / "zarr.json").write_text(json.dumps(group))


def test_another_process_can_open_it(random_store):
    store = pickle.loads(pickle.dumps(open_store(random_store.path)))
    assert len(store.read(0, 5)) == 5


def test_arrays_of_another_layout_are_read_through_zarr(make_store):
    # What another program may have made of a partition: zarr's default codec, no shards.
    made = make_store(n_partitions=1)
    part = anndata.read_zarr(made.path / "dataset_0")
    shutil.rmtree(made.path / "dataset_0")
    with anndata.settings.override(auto_shard_zarr_v3=False):
        write_elem(zarr.open_group(made.path, mode="a"), "dataset_0", part)
    list_files(made.path, folder_checksums(made.path / "dataset_0"))
    rows = open_store(made.path).read(7, 250)
    np.testing.assert_array_equal(dense(rows, 40), made.matrix[7:250])


def test_nothing_there(tmp_path):
    with pytest.raises(StoreError, match=rf"there is no store at {tmp_path}/x; correct the path"):
        open_store(tmp_path / "x")


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "a.h5ad").touch()
    with pytest.raises(StoreError, match=r"a.h5ad is a file and not a store; make a store of it"):
        open_store(tmp_path / "a.h5ad")


def test_another_folder_is_no_store(tmp_path):
    with pytest.raises(
        StoreError,
        match="is no store, no AnnData Zarr and no annbatch collection; write a store with",
    ):
        open_store(tmp_path)


def test_an_anndata_is_no_store(random_store):
    with pytest.raises(
        StoreError, match="dataset_0 is not a store that rayvaec wrote; name its obs column"
    ):
        open_store(random_store.path / "dataset_0")


def test_an_unfinished_store(make_store):
    path = make_store().path
    (path / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"is unfinished: it has no manifest; .* --overwrite"):
        open_store(path)


def test_a_damaged_group(make_store):
    path = make_store().path
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match=r"the file .*/zarr.json is damaged"):
        open_store(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_of_the_manifest_is_believed(tiny_store, data):
    wanted, file = open_store(tiny_store.path).manifest, tiny_store.path / "zarr.json"
    content = file.read_bytes()
    place = data.draw(st.integers(content.index(b'"rayvaec"'), len(content) - 1))
    flipped = bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))])
    file.write_bytes(content[:place] + flipped + content[place + 1 :])
    try:
        found = open_store(tiny_store.path).manifest
    except StoreError as error:
        assert str(tiny_store.path) in str(error)  # noqa: PT017
    else:
        assert found == wanted
    finally:
        file.write_bytes(content)


def test_a_newer_store(make_store):
    path = make_store().path
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"]["rayvaec"]["format_version"] = 2
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(StoreError, match="format version 2 and this rayvaec reads up to 1"):
        open_store(path)


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("dataset_*/**/*") if file.is_file())


def test_verify_finds_a_flipped_byte_in_any_file(make_store):
    path = make_store(n_cells=20).path
    store = open_store(path)
    store.verify()
    for file in files_of(path):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StoreError, match=rf"the file {file} does not match its checksum"):
            store.verify()
        file.write_bytes(whole)
    store.verify()


def test_verify_finds_a_missing_file(make_store):
    path = make_store(n_cells=20).path
    file = files_of(path)[3]
    file.unlink()
    with pytest.raises(StoreError, match=rf"the file {file} is missing"):
        open_store(path).verify()


def test_verify_finds_an_interrupted_copy_at_once(make_store, monkeypatch):
    path = make_store(n_cells=20).path
    files = files_of(path)
    files[0].write_bytes(b"")
    files[7].unlink()
    files[9].unlink()
    message = rf"the file {files[7]} is missing, and 1 more; copy the store again"
    with pytest.raises(StoreError, match=message):
        open_store(path).verify()
    shutil.copy(files[6], files[7])
    shutil.copy(files[6], files[9])
    with pytest.raises(StoreError, match=rf"the file {files[0]} does not match its checksum"):
        open_store(path).verify()


def test_verify_says_how_far_it_is(make_store, caplog, monkeypatch):
    path = make_store(n_cells=20).path
    size = sum(file.stat().st_size for file in files_of(path))
    with caplog.at_level("INFO", "rayvaec"):
        open_store(path).verify()
    assert f"verifying: {size} of {size} bytes" in caplog.text


def everything(path: Path) -> list[bytes]:
    """Return all that training and bulk work read of a store."""
    store = open_store(path)
    loader = Loader(store, 16, block_rows=4, buffer_rows=64, lanes=16)
    parts = [
        array.tobytes()
        for m in loader.epoch(0)
        for array in (m.indptr, m.indices, m.counts, m.labels, m.batches, m.cells)
    ]
    return [*parts, *(name.encode() for name in store.obs_names(0, store.n_cells))]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_trained_on(tiny_store, data):
    whole = tiny_store.path
    wanted = everything(whole)
    file = data.draw(st.sampled_from(files_of(whole)))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = bytes([content[place] ^ (1 << bit)])
    file.write_bytes(content[:place] + flipped + content[place + 1 :])
    try:
        with pytest.raises(StoreError, match=rf"the file {file} does not match its checksum"):
            open_store(whole).verify()
        try:
            found = everything(whole)
        except StoreError as error:
            # zarr itself reads the names, and its errors name the array.
            array = file.parent.parent if file.parent.name == "c" else file
            assert str(array) in str(error)  # noqa: PT017
        else:
            assert found == wanted
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["X/data", "obs/cell_type/codes", "obs/_index"])
@pytest.mark.parametrize("change", [('"fill_value":0', '"fill_value":1'), ('"/"', '"."')])
def test_metadata_that_was_changed_is_not_followed(make_store, name, change):
    # Either would be read as chunks of zeros or ones.
    path = make_store(n_cells=20, n_partitions=1).path
    file = path / "dataset_0" / name / "zarr.json"
    text = json.dumps(json.loads(file.read_text()), separators=(",", ":"))
    file.write_text(text.replace(*change))
    store = open_store(path)
    with pytest.raises(StoreError, match=rf"the file {file} does not match its checksum"):
        _ = store.read(0, 20), store.obs_names(0, 20)


@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr", "obs/cell_type/codes"])
def test_reading_names_the_file_that_is_cut_short_damaged_or_missing(make_store, name):
    path = make_store().path
    file = path / "dataset_1" / name / "c/0"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", bytes([whole[0] ^ 1]) + whole[1:]):
        file.write_bytes(broken)
        with pytest.raises(StoreError, match=rf"the file {file} is (damaged|cut short)"):
            open_store(path).read(0, 300)
    file.unlink()
    with pytest.raises(StoreError, match=rf"the file {file} is missing"):
        open_store(path).read(0, 300)
    shutil.rmtree(path / "dataset_1")
    with pytest.raises(StoreError, match=r"dataset_1/X/indptr/zarr.json is missing"):
        open_store(path).read(0, 300)


def test_an_array_of_another_length_is_refused(make_store):
    small, large = make_store("small", n_cells=20).path, make_store("large").path
    list_files(large, {})
    shutil.rmtree(large / "dataset_1/X")
    shutil.copytree(small / "dataset_1/X", large / "dataset_1/X")
    with pytest.raises(StoreError, match=r"X/indptr has 14 elements and the manifest speaks of"):
        open_store(large).read(0, 300)
