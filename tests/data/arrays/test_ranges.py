from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from rayvaec.data.arrays import decode
from rayvaec.data.arrays.sharded import ShardedArray1D, open_array_1d, read_ranges
from rayvaec.data.io.byte_reader import LocalByteReader
from rayvaec.errors import StoreError

WRITTEN = {
    "counts": np.arange(100, 200, dtype=np.uint16),
    "offsets": np.arange(70, dtype=np.int64) ** 2,
    "gaps": np.repeat(np.array([0, 7, 0, 9], np.int8), 12),
    "plain": np.arange(50, dtype=np.int32),
}


@pytest.fixture
def vectors(tmp_path):
    """Two arrays that can be read with one call, one with chunks left out, one for zarr."""
    group = zarr.open_group(tmp_path, mode="w", zarr_format=3)
    for name, values in WRITTEN.items():
        sharded = ShardingCodec(
            chunk_shape=(8,), codecs=[BytesCodec(), BloscCodec(cname="lz4"), Crc32cCodec()]
        )
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(24,),
            serializer=BytesCodec() if name == "plain" else sharded,
            compressors=None,
            fill_value=0,
        )
        array[:] = values
    blobs = LocalByteReader(tmp_path)
    return {name: open_array_1d(blobs, name) for name in WRITTEN}


RANGES = [("counts", 3, 90), ("plain", 5, 45), ("offsets", 60, 70), ("gaps", 2, 47)]
RANGES += [("offsets", 9, 9), ("counts", 20, 29), ("offsets", 0, 50)]


def test_ranges_of_many_arrays_are_read_in_their_order(vectors):
    found = read_ranges([(vectors[name], *span) for name, *span in RANGES])
    for values, (name, start, stop) in zip(found, RANGES, strict=True):
        assert values.dtype == WRITTEN[name].dtype
        np.testing.assert_array_equal(values, WRITTEN[name][start:stop])


def test_one_call_reads_what_it_can(vectors, monkeypatch):
    if not (decode.DECOMPRESS and decode.CRC32C and decode.PREAD):
        pytest.skip("the C functions are not to be had")
    monkeypatch.setattr(ShardedArray1D, "read_into", None)
    spans = [(vectors["counts"], 3, 90), (vectors["offsets"], 60, 70)]
    for values, wanted in zip(
        read_ranges(spans), (WRITTEN["counts"][3:90], WRITTEN["offsets"][60:]), strict=True
    ):
        np.testing.assert_array_equal(values, wanted)


def test_a_damaged_file_among_many_is_named(vectors, tmp_path):
    file = Path(tmp_path) / "offsets" / "c" / "1"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="offsets/c/1 is damaged"):
        read_ranges([(vectors["counts"], 0, 90), (vectors["offsets"], 0, 70)])
    read_ranges([(vectors["counts"], 0, 90), (vectors["offsets"], 0, 24)])
