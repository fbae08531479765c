from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec
from zarr.codecs.numcodecs import Delta

from rayvaec.data.arrays.delta import undo_delta, without_delta_warning
from rayvaec.data.arrays.sharded import ShardedArray1D, ZarrArray1D, open_array_1d
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.inputs.reader import Input
from rayvaec.data.inputs.writer import create_vector
from rayvaec.data.io.byte_reader import LocalByteReader
from rayvaec.data.loading.loader import Loader
from rayvaec.data.store.open import open_store
from rayvaec.errors import StoreError

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)]
INNER = {
    "none": [],
    "crc": [Crc32cCodec()],
    "zstd": [BloscCodec(cname="zstd", shuffle="shuffle"), Crc32cCodec()],
    "lz4": [BloscCodec(cname="lz4", shuffle="bitshuffle")],
}


@pytest.fixture
def quiet():
    with without_delta_warning():
        yield


@pytest.fixture(params=["one call", "two calls", "numcodecs"])
def decoder(request, monkeypatch):
    """Chunks read and decoded in one call, in two, and one by one."""
    from rayvaec.data.arrays import decode

    if request.param != "one call":
        monkeypatch.setattr(decode, "PREAD", 0)
    if request.param == "numcodecs":
        monkeypatch.setattr(decode, "DECOMPRESS", 0)


def write(
    folder: Path,
    values: np.ndarray,
    chunk: int = 8,
    per_shard: int = 3,
    inner: str = "zstd",
    **more: object,
) -> zarr.Array:
    """Write with zarr's own codec, and nothing of rayvaec."""
    array = zarr.open_group(folder, mode="w", zarr_format=3).create_array(
        "x",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk,),
        shards=(chunk * per_shard,),
        filters=[Delta(**{"dtype": values.dtype.str} | more.pop("types", {}))],
        compressors=(INNER | {"gzip": [GzipCodec()]})[inner],
        **more,
    )
    array[:] = values
    return array


def opened(folder: Path):
    return open_array_1d(LocalByteReader(folder), "x")


whole = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, st.integers(1, 60), elements=None)
)


@settings(max_examples=150, deadline=None)
@given(values=whole)
def test_undoes_what_numcodecs_does(values):
    encoded = numcodecs.Delta(dtype=values.dtype).encode(values)
    undo_delta(encoded, len(values))
    np.testing.assert_array_equal(encoded, values)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.usefixtures("decoder", "quiet")
def test_reads_what_zarr_reads(tmp_path, data):
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    n, chunk = data.draw(st.integers(0, 100)), data.draw(st.integers(1, 20))
    fill_value = data.draw(st.sampled_from([0, 1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    limits = np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, n, dtype, endpoint=True)
    empty = data.draw(st.tuples(st.integers(0, 100), st.integers(0, 100)))
    values[slice(*empty)] = fill_value  # whole chunks and shards of it are not written
    per_shard, inner = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(sorted(INNER)))
    array = write(
        tmp_path,
        values,
        chunk,
        per_shard,
        inner,
        fill_value=fill_value,
        config={"write_empty_chunks": data.draw(st.booleans())},
    )
    vector = opened(tmp_path)
    assert isinstance(vector, ShardedArray1D)
    np.testing.assert_array_equal(array[:], values)
    borders = range(0, n + 1, chunk)
    for _ in range(5):
        places = st.one_of(st.integers(0, n), st.sampled_from(borders))
        start, stop = sorted([data.draw(places), data.draw(places)])
        np.testing.assert_array_equal(vector.read(start, stop), values[start:stop])
        room = np.full(vector.span(start, stop) + 1, 77, dtype)
        at = vector.read_into(start, stop, room[:-1])
        np.testing.assert_array_equal(room[at : at + stop - start], values[start:stop])
        assert room[-1] == 77


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (np.arange(50, dtype="u2"), {"types": {"astype": "<u4"}}),
        (np.arange(50, dtype="u2"), {"inner": "gzip"}),
        (np.arange(50, dtype="f4"), {}),
    ],
    ids=["other type inside", "gzip", "floating point"],
)
def test_other_differences_are_read_by_zarr(tmp_path, values, options):
    with without_delta_warning():
        write(tmp_path, values, **options)
    vector = opened(tmp_path)  # and no warning
    assert isinstance(vector, ZarrArray1D)
    np.testing.assert_array_equal(vector.read(3, 33), values[3:33])


@pytest.mark.usefixtures("quiet")
def test_a_flipped_bit_is_found(tmp_path):
    write(tmp_path, np.arange(1, 31, dtype="u2"))
    file = tmp_path / "x/c/0"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"x/c/0 is damaged"):
        opened(tmp_path).read(0, 30)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_only_rising_values_under_zstd_are_stored_as_differences(tmp_path, codec):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    for rising in (False, True):
        name = f"x{rising}"
        create_vector(group, name, 20, "u2", chunk=8, codec=codec, rising=rising)
        metadata = json.loads((tmp_path / name / "zarr.json").read_text())
        first = metadata["codecs"][0]["configuration"]["codecs"][0]["name"]
        assert first == ("numcodecs.delta" if rising and codec == "zstd" else "bytes")


def test_a_zstd_store_is_read_by_anndata_and_by_the_loader(make_store):
    store = make_store(codec="zstd", rows_per_chunk=1)
    with without_delta_warning():
        parts = [anndata.read_zarr(store.path / f"dataset_{k}") for k in range(2)]
    np.testing.assert_array_equal(np.vstack([p.X.toarray() for p in parts]), store.matrix)
    got = np.zeros_like(store.matrix)
    for minibatch in Loader(open_store(store.path), batch_size=64, lanes=2).epoch(0):
        for row, cell in enumerate(minibatch.cells):
            at = slice(*minibatch.indptr[row : row + 2])
            got[cell, minibatch.indices[at]] = minibatch.counts[at]
    np.testing.assert_array_equal(got, store.matrix)


def test_zarr_says_no_more_than_that_the_codec_is_not_in_the_specification(make_store):
    store = make_store(codec="zstd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anndata.read_zarr(store.path / "dataset_0")
    assert caught
    assert {str(warning.message).split(" and may")[0] for warning in caught} == {
        "Numcodecs codecs are not in the Zarr version 3 specification"
    }


def test_a_zstd_store_is_smaller_for_its_differences(make_store):
    def size(codec):
        path = make_store(codec, codec=codec, n_genes=2000, density=0.1).path
        return sum(f.stat().st_size for f in path.glob("dataset_*/X/indices/c/*"))

    assert size("zstd") < 0.75 * size("lz4")


def test_partitions_of_a_zstd_store_are_surveyed_and_prepared_from(make_store, tmp_path):
    made = make_store(codec="zstd", n_partitions=1)
    member = made.path / "dataset_0"
    store = open_store(member, ObsKeys("cell_type"))
    rows = store.read(0, store.n_cells)
    got = sparse.csr_array((rows.counts, rows.indices, rows.indptr), made.matrix.shape).toarray()
    at = [made.names.index(name) for name in store.obs_names(0, store.n_cells)]
    np.testing.assert_array_equal(got, made.matrix[at])
    with Input(member) as source:
        blocks = [block.toarray() for _, block in source.blocks(1000, tmp_path)]
    np.testing.assert_array_equal(np.vstack(blocks), made.matrix)
