"""Write parts of an AnnData to Zarr v3 with explicit chunks and codecs.

anndata writes every array with one chunking and warns about sharding; here each array gets the
layout that its readers want, under the attributes of anndata's on-disk format
(https://anndata.readthedocs.io/en/stable/fileformat-prose.html), so that `anndata.read_zarr`
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from rayvaec.data.arrays.delta import delta_filter, without_delta_warning
from rayvaec.errors import ConfigError

SHARD_BYTES = 128 * 2**20
ROW_CHUNK = 1024
STRING_CHUNK = 16384
CODECS = {"lz4": "lz4hc", "zstd": "zstd"}


def check_codec(codec: str) -> None:
    """Refuse the name of a codec that does not exist.

    Raises
    ------
    ConfigError
        If `codec` is not one of ``lz4`` and ``zstd``.
    """
    if codec not in CODECS:
        raise ConfigError(f"there is no codec {codec!r}", f"choose one of {', '.join(CODECS)}")


def shard_elements(n: int, dtype: Any, chunk: int) -> int:
    """Return how many of `n` elements share a file: a multiple of `chunk`, about 128 MiB."""
    chunks = max(SHARD_BYTES // (np.dtype(dtype).itemsize * chunk), 1)
    # A small array gets a small shard: zarr works on whole shards in memory.
    return chunk * min(chunks, max(-(-n // chunk), 1))


def create_vector(
    group: zarr.Group,
    key: str,
    n: int,
    dtype: Any,
    *,
    chunk: int,
    codec: str = "lz4",
    rising: bool = False,
) -> zarr.Array[Any]:
    """Create a sharded, compressed, checksummed 1-d array that anndata reads.

    Every chunk carries a CRC-32C, so that damage is found by whoever reads it.

    Parameters
    ----------
    group : zarr.Group
        Where to create it.
    key : str
        Its name in `group`.
    n : int
        Number of elements.
    dtype : dtype
        Type of an element.
    chunk : int
        Elements of a chunk, at least 1.
    codec : {"lz4", "zstd"}
        Blosc with lz4hc or with zstd, level 5, byte shuffle.
    rising : bool, optional
        Whether most elements are a little larger than the one before; with ``"zstd"``, the
        differences are stored then.

    Returns
    -------
    zarr.Array
        The array, all fill value.

    Raises
    ------
    ConfigError
        If there is no such codec.
    """
    check_codec(codec)
    itemsize = np.dtype(dtype).itemsize
    blosc = BloscCodec(cname=CODECS[codec], clevel=5, shuffle="shuffle", typesize=itemsize)  # type: ignore[arg-type]
    with without_delta_warning():
        return group.create_array(
            key,
            shape=(n,),
            dtype=dtype,
            chunks=(chunk,),
            shards=(shard_elements(n, dtype, chunk),),
            filters=[delta_filter(dtype)] if rising and codec == "zstd" else None,
            compressors=[blosc, Crc32cCodec()],
            fill_value=0,
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
        )


def write_vector(
    group: zarr.Group,
    key: str,
    values: NDArray[Any],
    *,
    chunk: int,
    codec: str = "lz4",
    rising: bool = False,
) -> None:
    """Write a 1-d array as `create_vector` makes it, one shard at a time to bound memory."""
    n, dtype = len(values), values.dtype
    array = create_vector(group, key, n, dtype, chunk=chunk, codec=codec, rising=rising)
    step = shard_elements(len(values), values.dtype, chunk)
    for start in range(0, len(values), step):
        array[start : start + step] = values[start : start + step]


def write_strings(group: zarr.Group, key: str, values: Sequence[str]) -> None:
    """Write names as anndata's ``string-array``."""
    n_chunks = max(-(-len(values) // STRING_CHUNK), 1)
    array = group.create_array(
        key,
        shape=(len(values),),
        dtype=str,
        chunks=(STRING_CHUNK,),
        shards=(STRING_CHUNK * n_chunks,),
        compressors=[ZstdCodec(level=5), Crc32cCodec()],
        attributes={"encoding-type": "string-array", "encoding-version": "0.2.0"},
    )
    array[:] = np.array(values, dtype=object)


def write_frame(
    parent: zarr.Group,
    key: str,
    index: Sequence[str],
    columns: Mapping[str, tuple[NDArray[Any], Sequence[str]]],
) -> None:
    """Write a data frame of categorical columns.

    Parameters
    ----------
    parent : zarr.Group
        Group of the AnnData.
    key : str
        ``"obs"`` or ``"var"``.
    index : sequence of str
        Row names.
    columns : mapping of str to (array[n_rows] of int, sequence of str)
        For each column the codes and the categories that they point into.
    """
    frame = parent.create_group(
        key,
        attributes={
            "encoding-type": "dataframe",
            "encoding-version": "0.2.0",
            "_index": "_index",
            "column-order": list(columns),
        },
    )
    write_strings(frame, "_index", index)
    for name, (codes, categories) in columns.items():
        column = frame.create_group(
            name,
            attributes={
                "encoding-type": "categorical",
                "encoding-version": "0.2.0",
                "ordered": False,
            },
        )
        signed = np.min_scalar_type(-len(categories))
        write_vector(column, "codes", np.asarray(codes).astype(signed), chunk=ROW_CHUNK)
        write_strings(column, "categories", categories)


def write_csr(
    parent: zarr.Group,
    key: str,
    csr: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    n_genes: int,
    *,
    chunk: int,
    codec: str = "lz4",
) -> None:
    """Write a CSR matrix.

    Parameters
    ----------
    parent : zarr.Group
        Group of the AnnData or of its layers.
    key : str
        ``"X"`` or a layer's name.
    csr : (array[n_cells + 1], array[nnz], array[nnz])
        indptr, indices and values, in the types that they shall be stored in.
    n_genes : int
        Number of columns.
    chunk : int
        Values of a chunk.
    codec : {"lz4", "zstd"}
        As in `create_vector`.
    """
    indptr, indices, values = csr
    matrix = parent.create_group(
        key,
        attributes={
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [len(indptr) - 1, n_genes],
        },
    )
    write_vector(matrix, "data", values, chunk=chunk, codec=codec)
    write_vector(matrix, "indices", indices, chunk=chunk, codec=codec, rising=True)
    write_vector(matrix, "indptr", indptr, chunk=ROW_CHUNK)


def create_anndata(folder: str) -> zarr.Group:
    """Create the group of an AnnData with empty obsm, varm, obsp, varp, layers and uns."""
    root = zarr.open_group(
        folder,
        mode="w-",
        zarr_format=3,
        attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"},
    )
    for key in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        root.create_group(key, attributes={"encoding-type": "dict", "encoding-version": "0.1.0"})
    return root
