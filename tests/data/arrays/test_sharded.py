from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from rayvaec.data.arrays.sharded import ShardedArray1D, ZarrArray1D, open_array_1d
from rayvaec.data.io.byte_reader import LocalByteReader
from rayvaec.errors import StoreError

KNOWN = {
    "none": [],
    "crc": [Crc32cCodec()],
    "lz4hc": [BloscCodec(cname="lz4hc", shuffle="shuffle"), Crc32cCodec()],
    "zstd": [BloscCodec(cname="zstd", shuffle="bitshuffle")],
    "blosclz": [BloscCodec(cname="blosclz", shuffle="noshuffle", clevel=0)],
}
UNKNOWN = {
    "zstd alone": [ZstdCodec(level=1)],
    "gzip": [GzipCodec()],
    "crc first": [Crc32cCodec(), BloscCodec(cname="lz4")],
}
DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64"),
]


def write(
    folder: Path,
    values: np.ndarray,
    chunk: int = 8,
    chunks_per_shard: int = 3,
    codecs: str = "lz4hc",
    index_location: str = "end",
    **options: object,
) -> zarr.Array:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    sharding = ShardingCodec(
        chunk_shape=(chunk,),
        codecs=[BytesCodec(), *(KNOWN | UNKNOWN)[codecs]],
        index_location=index_location,
    )
    array = group.create_array(
        "x",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk * chunks_per_shard,),
        serializer=sharding,
        compressors=None,
        **options,
    )
    array[:] = values
    return array


def opened(folder: Path):
    return open_array_1d(LocalByteReader(folder), "x")


def read_through_buffer(vector, start: int, stop: int) -> np.ndarray:
    room = np.empty(vector.span(start, stop) + 1, vector.dtype)
    room[-1] = 1  # must stay as it is
    at = vector.read_into(start, stop, room[:-1])
    assert room[-1] == 1
    return room[at : at + stop - start]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.usefixtures("decoder")
def test_reads_what_zarr_reads(tmp_path, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n, chunk = data.draw(st.integers(0, 100)), data.draw(st.integers(1, 20))
    chunks_per_shard = data.draw(st.integers(1, 5))
    codecs = data.draw(st.sampled_from(sorted(KNOWN | UNKNOWN)))
    fill_value = data.draw(st.sampled_from([0, 1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.integers(0, 100, n).astype(dtype)
    empty = data.draw(st.tuples(st.integers(0, 100), st.integers(0, 100)))
    values[slice(*empty)] = fill_value  # whole chunks and shards of it are not written
    array = write(
        tmp_path,
        values,
        chunk,
        chunks_per_shard,
        codecs,
        index_location=data.draw(st.sampled_from(["start", "end"])),
        fill_value=fill_value,
        config={"write_empty_chunks": data.draw(st.booleans())},
    )
    vector = opened(tmp_path)
    assert isinstance(vector, ShardedArray1D) == (codecs in KNOWN)
    assert len(vector) == n
    assert vector.dtype == array.dtype
    for _ in range(5):
        start = data.draw(st.integers(0, n))
        stop = data.draw(st.integers(start, n))
        wanted = array[start:stop]
        np.testing.assert_array_equal(vector.read(start, stop), wanted)
        np.testing.assert_array_equal(read_through_buffer(vector, start, stop), wanted)


def test_a_missing_shard_is_fill_value(tmp_path):
    array = write(tmp_path, np.arange(1, 101, dtype="uint16"), fill_value=7)
    (tmp_path / "x/c/2").unlink()
    got = opened(tmp_path).read(0, 100)
    np.testing.assert_array_equal(got, array[:])
    assert set(got[48:72]) == {7}


def test_a_missing_shard_that_must_exist_is_an_error(tmp_path):
    write(tmp_path, np.arange(1, 101, dtype="uint16"))
    (tmp_path / "x/c/2").unlink()
    vector = open_array_1d(LocalByteReader(tmp_path), "x", {"x/c/1": "", "x/c/2": ""})
    vector.read(0, 48)
    with pytest.raises(StoreError, match=r"x/c/2 is missing"):
        vector.read(47, 49)


@pytest.mark.parametrize("codecs", ["none", "lz4hc"])
def test_chunks_in_any_order_are_found(tmp_path, codecs):
    # The specification leaves the order of chunks in a shard, and gaps between them, to writers.
    values = np.arange(1, 25, dtype="<u4")
    array = write(tmp_path, values, codecs=codecs)
    shard = tmp_path / "x/c/0"
    whole = np.fromfile(shard, np.uint8)
    places = whole[-52:-4].view("<u8").reshape(3, 2)
    parts = [bytes(whole[begin : begin + n]) for begin, n in places.tolist()]
    reordered, index = b"gap", np.zeros((3, 2), "<u8")
    for k in (2, 0, 1):
        index[k] = len(reordered), len(parts[k])
        reordered += parts[k] + b"x" * k
    import google_crc32c

    index_bytes = index.tobytes()
    crc = google_crc32c.value(index_bytes).to_bytes(4, "little")
    shard.write_bytes(reordered + index_bytes + crc)
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(opened(tmp_path).read(0, 24), values)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [5, 20]},
        {"data_type": "complex64"},
        {"fill_value": "NaN"},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"codecs": []},
        {"chunk_key_encoding": {"name": "v2"}},
        {"chunk_grid": {"name": "rectangular", "configuration": {}}},
        {"storage_transformers": [{"name": "new"}]},
        {"zarr_format": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_are_not_understood_are_left_to_zarr(tmp_path, change):
    from rayvaec.data.arrays.metadata import ArrayMetadata

    write(tmp_path, np.arange(100, dtype="float32"))
    metadata = json.loads((tmp_path / "x/zarr.json").read_text())
    assert ArrayMetadata.parse(metadata) is not None
    assert ArrayMetadata.parse(metadata | change) is None
    assert ArrayMetadata.parse("x") is None


def test_big_endian_and_unsharded_arrays_are_read_by_zarr(tmp_path):
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    values = np.arange(50, dtype="int32")
    group.create_array("plain", data=values, chunks=(7,))
    sharding = ShardingCodec(chunk_shape=(5,), codecs=[BytesCodec(endian="big")])
    group.create_array("big", data=values, chunks=(10,), serializer=sharding, compressors=None)
    blobs = LocalByteReader(tmp_path)
    for name in ("plain", "big"):
        vector = open_array_1d(blobs, name)
        assert isinstance(vector, ZarrArray1D)
        assert vector.dtype == np.dtype("int32")
        np.testing.assert_array_equal(vector.read(3, 33), values[3:33])
        np.testing.assert_array_equal(read_through_buffer(vector, 3, 33), values[3:33])
        with pytest.raises(IndexError):
            vector.read(3, 51)


def test_a_range_outside_is_an_error(tmp_path):
    write(tmp_path, np.arange(20, dtype="uint8"))
    for start, stop in [(-1, 3), (5, 4), (0, 21)]:
        with pytest.raises(IndexError, match="of 20 in x"):
            opened(tmp_path).read(start, stop)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    position=st.integers(0, 10**6), bit=st.integers(0, 7), index=st.sampled_from(["start", "end"])
)
def test_every_flipped_bit_is_found(tmp_path, position, bit, index):
    write(tmp_path, np.arange(1, 31, dtype="uint16"), chunks_per_shard=4, index_location=index)
    file = tmp_path / "x/c/0"
    data = bytearray(file.read_bytes())
    data[position % len(data)] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"x/c/0 is damaged"):
        opened(tmp_path).read(0, 30)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(length=st.integers(0, 10**6), index=st.sampled_from(["start", "end"]))
@pytest.mark.parametrize("codecs", ["none", "lz4hc"])
def test_every_truncation_is_found(tmp_path, codecs, length, index):
    write(tmp_path, np.arange(1, 31, dtype="uint16"), 8, 4, codecs, index)
    file = tmp_path / "x/c/0"
    data = file.read_bytes()
    file.write_bytes(data[: length % len(data)])
    with pytest.raises(StoreError, match=r"x/c/0 is damaged or cut short .*; copy it again"):
        opened(tmp_path).read(0, 30)


@pytest.fixture(params=["one call", "two calls", "numcodecs"])
def decoder(request, monkeypatch):
    """Chunks read and decoded in one call, in two, and one by one: where no C function is found."""
    from rayvaec.data.arrays import decode

    assert decode.DECOMPRESS, "numcodecs does not export blosc_decompress_ctx here"
    assert decode.CRC32C, "google_crc32c does not export crc32c_value here"
    assert decode.PREAD, "the C library does not export pread64 here"
    if request.param != "one call":
        monkeypatch.setattr(decode, "PREAD", 0)
    if request.param == "numcodecs":
        monkeypatch.setattr(decode, "DECOMPRESS", 0)


def test_local_chunks_are_read_in_one_call(tmp_path, monkeypatch):
    write(tmp_path, np.arange(1, 31, dtype="uint16"), 8, 4, "zstd")
    vector = opened(tmp_path)
    vector.read(0, 30)  # the indexes
    monkeypatch.setattr(LocalByteReader, "read", None)
    assert vector.read(3, 29).tolist() == list(range(4, 30))


@pytest.mark.parametrize("codecs", ["none", "zstd"])
@pytest.mark.usefixtures("decoder")
def test_chunks_of_a_wrong_size_are_found_without_checksums(tmp_path, codecs):
    write(tmp_path / "a", np.arange(1, 31, dtype="uint16"), 8, 4, codecs)
    write(tmp_path / "b", np.arange(1, 16, dtype="uint16"), 4, 4, codecs)
    shutil.copy(tmp_path / "b/x/c/0", tmp_path / "a/x/c/0")
    with pytest.raises(StoreError, match="is damaged"):
        opened(tmp_path / "a").read(0, 30)


@pytest.mark.parametrize(("position", "n"), [(0, 1), (2, 1), (12, 1), (20, 3)])
@pytest.mark.usefixtures("decoder")
def test_what_is_not_blosc_is_found_without_checksums(tmp_path, position, n):
    write(tmp_path, np.arange(1, 3000, dtype="uint16"), 3000, 1, "zstd")
    file = tmp_path / "x/c/0"
    data = bytearray(file.read_bytes())
    data[position : position + n] = b"\xff" * n
    file.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        opened(tmp_path).read(0, 30)


def test_a_file_cut_while_it_is_read_is_an_error_and_not_a_crash(tmp_path):
    write(tmp_path, np.random.default_rng(0).integers(0, 9999, 4000), chunk=400)
    vector = opened(tmp_path)
    vector.read(0, 10)  # the index of the first shard is in memory from now on
    (tmp_path / "x/c/0").write_bytes(b"")
    with pytest.raises(StoreError, match=r"x/c/0 is cut short: it ends at byte 0"):
        vector.read(0, 10)


def test_damage_in_an_array_that_zarr_reads_names_the_array(tmp_path):
    write(tmp_path, np.arange(100, dtype="uint32"), codecs="gzip")
    file = tmp_path / "x/c/0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"the array {tmp_path}/x cannot be read"):
        opened(tmp_path).read(0, 10)


def test_metadata_that_is_missing_or_damaged_is_an_error(tmp_path):
    write(tmp_path, np.arange(100, dtype="uint32"))
    file = tmp_path / "x/zarr.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StoreError, match=r"x/zarr.json is damaged"):
        opened(tmp_path)
    file.write_text("[]")
    with pytest.raises(StoreError, match=r"the array .*/x cannot be read"):
        opened(tmp_path)
    file.unlink()
    with pytest.raises(StoreError, match=r"x/zarr.json is missing"):
        opened(tmp_path)


def test_large_ranges_are_read_past_the_scratch_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rayvaec.data.arrays.sharded.SCRATCH_BYTES", 64)
    values = np.random.default_rng(0).integers(0, 2**60, 300)
    write(tmp_path, values, chunk=50, chunks_per_shard=2)
    np.testing.assert_array_equal(opened(tmp_path).read(1, 299), values[1:299])


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("rayvaec.data.io.byte_reader.MAX_OPEN_FILES", 3)
    values = np.arange(1, 101, dtype="uint16")
    write(tmp_path, values, chunk=2, chunks_per_shard=1)
    blobs = LocalByteReader(tmp_path)
    vector = open_array_1d(blobs, "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        np.testing.assert_array_equal(vector.read(0, 100), values)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    del vector, blobs
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_unreadable_files_are_named(tmp_path):
    write(tmp_path, np.arange(1, 101, dtype="uint16"))
    (tmp_path / "x/c/0").unlink()
    (tmp_path / "x/c/0").mkdir()
    with pytest.raises(StoreError, match=r"x/c/0 (cannot be read|is damaged)"):
        opened(tmp_path).read(0, 3)
