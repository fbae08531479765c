"""Metadata of sharded one-dimensional Zarr v3 arrays.

https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rayvaec.data.arrays.delta import is_delta

_TYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
}
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True)
class ArrayMetadata:
    """What the direct reader needs to know of an array.

    Parameters
    ----------
    n : int
        Number of elements.
    dtype : dtype
        Type of an element, in native byte order.
    chunk, shard : int
        Elements of a chunk and of a shard.
    fill_value : bool, int or float
        Value of elements that were not written.
    index_at_end : bool
        Whether a shard's index stands at its end, not at its start.
    delta : bool
        Whether chunks hold differences of neighbours; see `rayvaec.data.arrays.delta`.
    blosc, crc : bool
        Whether chunks are compressed by blosc, and then followed by a CRC-32C.
    separator : str
        What stands between ``c`` and the shard's number in its key.
    """

    n: int
    dtype: np.dtype[Any]
    chunk: int
    shard: int
    fill_value: bool | int | float
    index_at_end: bool
    delta: bool
    blosc: bool
    crc: bool
    separator: str

    @classmethod
    def parse(cls, metadata: Any) -> ArrayMetadata | None:
        """Read an array's ``zarr.json``.

        Parameters
        ----------
        metadata : dict
            Decoded JSON.

        Returns
        -------
        ArrayMetadata or None
            None where the array has anything that the direct reader does not know.
        """
        try:
            return cls._parse(metadata)
        except (KeyError, TypeError, ValueError, IndexError):
            return None

    @classmethod
    def _parse(cls, metadata: Any) -> ArrayMetadata | None:
        (n,) = metadata["shape"]
        (shard,) = _configured(metadata["chunk_grid"], "regular")["chunk_shape"]
        keys = _configured(metadata["chunk_key_encoding"], "default")
        (codec,) = metadata["codecs"]
        sharding = _configured(codec, "sharding_indexed")
        (chunk,) = sharding["chunk_shape"]
        fill_value = metadata["fill_value"]
        dtype, codecs = np.dtype(metadata["data_type"]), sharding["codecs"]
        delta = is_delta(codecs[0], dtype)
        array_to_bytes, *others = codecs[1:] if delta else codecs
        names = [other["name"] for other in others]
        endian = _configured(array_to_bytes, "bytes").get("endian", "little")
        known = (
            metadata["zarr_format"] == 3
            and metadata["data_type"] in _TYPES
            and not metadata.get("storage_transformers")
            and isinstance(fill_value, bool | int | float)
            and endian == "little"
            and names in ([], ["blosc"], ["crc32c"], ["blosc", "crc32c"])
            and [_bare(item) for item in sharding["index_codecs"]] == _INDEX_CODECS
            and chunk > 0
            and shard % chunk == 0
        )
        if not known:
            return None
        return cls(
            n=n,
            dtype=dtype,
            chunk=chunk,
            shard=shard,
            fill_value=fill_value,
            index_at_end=sharding.get("index_location", "end") == "end",
            delta=delta,
            blosc="blosc" in names,
            crc="crc32c" in names,
            separator=keys.get("separator", "/"),
        )


def _configured(item: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration of a named metadata item; ValueError where it has another name."""
    if item["name"] != name:
        raise ValueError(name)
    return item.get("configuration") or {}


def _bare(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value}
