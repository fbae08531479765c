from __future__ import annotations

import json
import resource
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr

from rayvaec.data.prepare.partitions import CountsDtypes, chunk_elements
from rayvaec.errors import ConfigError, StoreError
from rayvaec.util.checksums import file_checksum, folder_checksums, joint_checksum


@pytest.mark.parametrize("n_batches", [0, 3])
def test_every_partition_is_an_anndata(make_store, n_batches):
    store = make_store(n_batches=n_batches)
    parts = [anndata.read_zarr(store.path / f"dataset_{k}") for k in range(2)]
    assert len(parts[0]) != len(parts[1])
    matrix = np.vstack([part.X.toarray() for part in parts])
    np.testing.assert_array_equal(matrix, store.matrix)
    for part in parts:
        assert list(part.var_names) == list(store.registry.genes)
        assert list(part.obs["cell_type"].cat.categories) == ["T", "B", "NK"]
        assert list(part.obs.columns) == ["cell_type", "batch"][: 1 + (n_batches > 0)]
        assert not [*part.obsm, *part.layers, *part.uns]
        assert part.X.has_sorted_indices
    names = [name for part in parts for name in part.obs_names]
    assert names == store.names
    codes = np.concatenate([part.obs["cell_type"].cat.codes for part in parts])
    np.testing.assert_array_equal(codes, store.labels)
    if n_batches:
        codes = np.concatenate([part.obs["batch"].cat.codes for part in parts])
        np.testing.assert_array_equal(codes, store.batches)


def test_the_store_is_an_annbatch_collection(make_store):
    group = zarr.open_group(make_store().path, mode="r")
    assert group.attrs["encoding-type"] == "annbatch-preshuffled"
    assert group.attrs["encoding-version"] == "0.1.0"
    assert sorted(group.group_keys()) == ["dataset_0", "dataset_1"]


@pytest.mark.parametrize(("codec", "cname"), [("lz4", "lz4hc"), ("zstd", "zstd")])
def test_codecs_types_and_checksums_on_disk(make_store, codec, cname):
    store = make_store(codec=codec, rows_per_chunk=1)
    for name, dtype in [("data", "uint16"), ("indices", "uint16"), ("indptr", "int64")]:
        metadata = json.loads((store.path / f"dataset_0/X/{name}/zarr.json").read_text())
        assert metadata["data_type"] == dtype
        (sharding,) = metadata["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == [1024]
        names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        delta = ["numcodecs.delta"] if (codec, name) == ("zstd", "indices") else []
        assert names == [*delta, "bytes", "blosc", "crc32c"]
        blosc = sharding["configuration"]["codecs"][-2]["configuration"]
        assert blosc["cname"] == (cname if name != "indptr" else "lz4hc")
        assert (blosc["clevel"], blosc["shuffle"]) == (5, "shuffle")
        assert blosc["typesize"] == np.dtype(dtype).itemsize


def test_large_arrays_are_cut_into_shards(make_store, monkeypatch):
    monkeypatch.setattr("rayvaec.data.inputs.writer.SHARD_BYTES", 4096)
    store = make_store(rows_per_chunk=1)
    assert len(list((store.path / "dataset_1/X/data/c").iterdir())) > 1
    part = anndata.read_zarr(store.path / "dataset_1")
    np.testing.assert_array_equal(part.X.toarray(), store.matrix[-len(part) :])


def test_a_partition_without_counts_can_be_written(make_store):
    store = make_store(n_cells=4, n_partitions=1, density=0)
    assert anndata.read_zarr(store.path / "dataset_0").X.nnz == 0


@pytest.mark.parametrize(
    ("largest", "n_genes", "counts", "indices"),
    [
        *((0, 1, "uint8", "uint16"), (255, 65536, "uint8", "uint16")),
        *((256, 65537, "uint16", "uint32"), (65535, 2, "uint16", "uint16")),
        (65536, 2, "uint32", "uint16"),
        (2**31 - 1, 2, "uint32", "uint16"),
    ],
)
def test_smallest_types(largest, n_genes, counts, indices):
    types = CountsDtypes.smallest(largest, n_genes)
    assert types == CountsDtypes(np.dtype(counts), np.dtype(indices))


def test_chunks_hold_about_the_rows_asked_for():
    assert chunk_elements(1_500_000, 1000, 64) == 2**17
    assert chunk_elements(1_500_000, 1000, 1) == 2**11
    assert chunk_elements(0, 0, 64) == 2**10
    assert chunk_elements(1_500_000, 1000, None) == 2**15
    assert chunk_elements(180_000, 1000, None) == 2**13
    assert chunk_elements(10**9, 1000, None) == 2**16
    assert chunk_elements(10**9, 10, 64) == 2**20
    with pytest.raises(ConfigError, match="rows_per_chunk is 0"):
        chunk_elements(1, 1, 0)


def test_an_unknown_codec_is_refused(make_store):
    with pytest.raises(ConfigError, match="there is no codec 'snappy'; choose one of lz4, zstd"):
        make_store(codec="snappy")


def test_checksums_are_those_of_sha256sum(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    files = folder_checksums(tmp_path)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files == {"a": f"sha256:{empty}", "b/x": f"sha256:{abc}"}
    (tmp_path / "listing").write_text(f"{empty}  a\n{abc}  b/x\n")
    assert joint_checksum(files) == file_checksum(tmp_path / "listing")
    assert joint_checksum(dict(reversed(files.items()))) == joint_checksum(files)


def test_a_full_disk_is_an_error_that_names_the_place(make_store, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StoreError) as error:
            make_store("full", n_partitions=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{tmp_path}/full/dataset_0 cannot be written (File too large); "
        "make room on that disk, or choose another `out`"
    )


def test_a_partition_is_not_written_over_another(make_store):
    make_store("twice")
    with pytest.raises(StoreError, match="twice/dataset_0 cannot be written"):
        make_store("twice")
