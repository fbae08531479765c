"""AnnData Zarr output that is filled region by region.

Rows of an array are cells. Regions are runs of rows that fill whole files of every array, so that
several processes may write at once. A sparse layer's files hold runs of stored values instead: it
is created and filled when the number of values of every region is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from rayvaec.data.inputs.writer import create_anndata, write_frame, write_strings
from rayvaec.data.registry import Registry
from rayvaec.data.store.open import Rows
from rayvaec.inference.bulk.job import Job

VALUES_PER_CHUNK = 2**17
CHUNKS_PER_SHARD = 64
ROW_CHUNK_BYTES = 4 * 2**20
REGIONS_PER_POINTER_SHARD = 64

_VECTOR: dict[str, Any] = {"encoding-type": "array", "encoding-version": "0.2.0"}
_STRING: dict[str, Any] = {"encoding-type": "string", "encoding-version": "0.2.0"}
_CATEGORICAL: dict[str, Any] = {
    "encoding-type": "categorical",
    "encoding-version": "0.2.0",
    "ordered": False,
}


class Width(NamedTuple):
    """Shape and type of one cell's entry in an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of a cell's entry."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def create_output(job: Job, widths: Mapping[str, Width]) -> None:
    """Create an AnnData with names of genes and categories, and empty rows for the cells.

    What it is computed from is kept as JSON in ``uns["rayvaec"]``.

    Parameters
    ----------
    job : Job
        Whose output to create; must not exist.
    widths : mapping of str to Width
        Arrays to create, by path.
    """
    store, size = job.inputs.store, job.regions.size
    registry, n_cells = store.registry, store.n_cells
    root = create_anndata(str(job.state.output))
    columns = {registry.labels_key: registry.labels}
    if registry.batch_key is not None:
        columns[registry.batch_key] = registry.batches
    order = [*columns, *(path.removeprefix("obs/") for path in widths if path.startswith("obs/"))]
    obs = root.create_group(
        "obs",
        attributes={
            "encoding-type": "dataframe",
            "encoding-version": "0.2.0",
            "_index": "_index",
            "column-order": order,
        },
    )
    obs.create_array(
        "_index",
        shape=(n_cells,),
        dtype=str,
        chunks=(min(size, n_cells),),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        attributes={"encoding-type": "string-array", "encoding-version": "0.2.0"},
    )
    for name, categories in columns.items():
        column = obs.create_group(name, attributes=_CATEGORICAL)
        write_strings(column, "categories", categories)
        codes = Width((), np.min_scalar_type(-len(categories)).name)
        _create_rows(column, "codes", n_cells, size, codes)
    write_frame(root, "var", job.inputs.model.registry.genes, {})
    for path, width in widths.items():
        _create_rows(root, path, n_cells, size, width)
    text = root.create_array("uns/rayvaec", shape=(), dtype=str, attributes=_STRING)
    text[()] = json.dumps(job.plan)


def _create_rows(
    group: zarr.Group, path: str, n_cells: int, region: int, width: Width
) -> zarr.Array[Any]:
    """Create an array [n_cells, ...] of which a region fills whole files."""
    shard = min(region, n_cells)
    chunk = shard
    # Regions are powers of two, so halves of one divide it; the last region may be of any size.
    while chunk * width.nbytes > ROW_CHUNK_BYTES and chunk % 2 == 0:
        chunk //= 2
    return group.create_array(
        path,
        shape=(n_cells, *width.shape),
        dtype=width.dtype,
        chunks=(chunk, *width.shape),
        shards=(shard, *width.shape) if chunk < shard else None,
        compressors=_compressors(width.dtype),
        fill_value=0,
        attributes=_VECTOR,
    )


def _compressors(dtype: str) -> list[Any]:
    # lz4hc, as stores use it, is a third as fast and 15 % smaller: stores are written once and
    # read often, outputs are not.
    size = np.dtype(dtype).itemsize
    return [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=size), Crc32cCodec()]


def array_at(root: zarr.Group, path: str) -> zarr.Array[Any]:
    """Return the array at `path`; the type checker cannot know that it is one."""
    return cast("zarr.Array[Any]", root[path])


def write_obs(
    root: zarr.Group,
    registry: Registry,
    start: int,
    names: Sequence[str],
    rows: Rows,
) -> None:
    """Write names, labels and batches of a region.

    Parameters
    ----------
    root : zarr.Group
        The output.
    registry : Registry
        As in `create_output`.
    start : int
        First row of the region.
    names : sequence of str
        Names of the cells.
    rows : Rows
        What the store holds of them.
    """
    here = slice(start, start + len(names))
    array_at(root, "obs/_index")[here] = np.array(names, dtype=object)
    array_at(root, f"obs/{registry.labels_key}/codes")[here] = rows.labels
    if rows.batches is not None:
        array_at(root, f"obs/{registry.batch_key}/codes")[here] = rows.batches


def write_means(
    folder: Path,
    rows: Sequence[str],
    genes: Sequence[str],
    n_cells: NDArray[np.int64],
    mean: NDArray[np.float32],
) -> None:
    """Write an AnnData of averages.

    Parameters
    ----------
    folder : Path
        Where to create it; must not exist.
    rows, genes : sequence of str
        What the averages are of.
    n_cells : array[n_rows] of int64
        Cells behind each row, kept in obs.
    mean : array[n_rows, n_genes] of float32
        X.
    """
    root = create_anndata(str(folder))
    root.create_array("X", data=mean, attributes=_VECTOR)
    write_frame(root, "obs", rows, {})
    obs = cast(zarr.Group, root["obs"])
    obs.create_array("n_cells", data=n_cells, attributes=_VECTOR)
    obs.attrs["column-order"] = ["n_cells"]
    write_frame(root, "var", genes, {})


def create_layer(
    root: zarr.Group, name: str, n_cells: int, n_genes: int, nnz: int, region: int
) -> None:
    """Create an empty sparse layer of int32 counts, over one whose creation was cut off.

    Parameters
    ----------
    root : zarr.Group
        The output.
    name : str
        Name of the layer.
    n_cells, n_genes, nnz : int
        Its shape and number of stored values.
    region : int
        Rows of a region.
    """
    layer = root.create_group(
        f"layers/{name}",
        attributes={
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [n_cells, n_genes],
        },
        overwrite=True,
    )
    chunk = min(VALUES_PER_CHUNK, max(nnz, 1))
    for key in ("data", "indices"):
        _create_vector(layer, key, nnz, "int32", chunk, CHUNKS_PER_SHARD)
    chunk = min(region, n_cells + 1)
    _create_vector(layer, "indptr", n_cells + 1, "int64", chunk, REGIONS_PER_POINTER_SHARD)


def _create_vector(
    group: zarr.Group, key: str, n: int, dtype: str, chunk: int, chunks_per_shard: int
) -> None:
    group.create_array(
        key,
        shape=(n,),
        dtype=dtype,
        chunks=(chunk,),
        shards=(chunk * min(chunks_per_shard, max(-(-n // chunk), 1)),),
        compressors=_compressors(dtype),
        fill_value=0,
        attributes=_VECTOR,
    )


def shards_of(array: zarr.Array[Any]) -> list[tuple[int, int]]:
    """Return first and one-past-last element of every file of a 1-d array."""
    step = (array.shards or array.chunks)[0]
    return [(start, min(start + step, array.size)) for start in range(0, array.size, step)]


def write_values(
    root: zarr.Group,
    name: str,
    span: tuple[int, int],
    ends: NDArray[np.int64],
    read: Callable[[int, int, int], tuple[NDArray[Any], NDArray[Any]]],
) -> None:
    """Write one file each of a layer's genes and counts.

    Parameters
    ----------
    root : zarr.Group
        The output.
    name : str
        Name of the layer.
    span : (int, int)
        First and one-past-last stored value, from `shards_of`.
    ends : array[n_regions] of int64
        One past the last stored value of each region, in the layer.
    read : callable
        From (region, first, last) to genes and counts of the region's own stored values
        ``first .. last - 1`` in the layer.
    """
    start, stop = span
    indices, counts = np.empty(stop - start, np.int32), np.empty(stop - start, np.int32)
    region, at = int(np.searchsorted(ends, start, side="right")), start
    while at < stop:
        begin = int(ends[region - 1]) if region else 0
        last = min(int(ends[region]), stop)
        here = slice(at - start, last - start)
        indices[here], counts[here] = read(region, at - begin, last - begin)
        region, at = region + 1, last
    array_at(root, f"layers/{name}/indices")[start:stop] = indices
    array_at(root, f"layers/{name}/data")[start:stop] = counts


def write_pointers(
    root: zarr.Group, name: str, span: tuple[int, int], first: int, lengths: NDArray[np.int32]
) -> None:
    """Write one file of a layer's row pointers.

    Parameters
    ----------
    root : zarr.Group
        The output.
    name : str
        Name of the layer.
    span : (int, int)
        First and one-past-last pointer, from `shards_of`.
    first : int
        Value of the first of them.
    lengths : array[stop - start - 1] of int32
        Stored values of the rows between these pointers.
    """
    pointers = np.empty(span[1] - span[0], np.int64)
    pointers[0] = first
    pointers[1:] = first + np.cumsum(lengths, dtype=np.int64)
    array_at(root, f"layers/{name}/indptr")[span[0] : span[1]] = pointers
