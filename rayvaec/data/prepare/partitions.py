"""Write the partitions of a store, and its manifest last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.writer import check_codec, create_anndata, write_csr, write_frame
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest, PartitionInfo
from rayvaec.errors import ConfigError, StoreError
from rayvaec.util.atomic import write_json
from rayvaec.util.checksums import folder_checksums, joint_checksum

STORE_ATTRIBUTES = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}


@dataclass(frozen=True)
class CountsDtypes:
    """Types that the counts and the gene positions of a whole store are stored in.

    Parameters
    ----------
    counts, indices : dtype
        Unsigned integers.
    """

    counts: np.dtype[Any]
    indices: np.dtype[Any]

    @classmethod
    def smallest(cls, max_count: int, n_genes: int) -> Self:
        """Choose the smallest types that hold every count and every gene's position.

        Parameters
        ----------
        max_count : int
            The largest count of the whole store.
        n_genes : int
            Number of genes.

        Returns
        -------
        CountsDtypes
            Counts in uint8, uint16 or uint32, indices in uint16 or uint32.
        """
        counts = np.min_scalar_type(max(max_count, 0))
        indices = np.uint16 if n_genes <= 2**16 else np.uint32
        return cls(counts=np.dtype(counts), indices=np.dtype(indices))


@dataclass(frozen=True)
class PartitionCells:
    """The cells of one partition, in the order that they are written in.

    Parameters
    ----------
    indptr : array[n_cells + 1] of int
        CSR row offsets, starting at 0.
    indices, counts : array[nnz] of int
        Gene positions, sorted within a row, and counts above zero.
    names : sequence of str
        Names of the cells.
    labels : array[n_cells] of int
        Label codes.
    batches : array[n_cells] of int, optional
        Batch codes, where the registry has batches.
    """

    indptr: NDArray[Any]
    indices: NDArray[Any]
    counts: NDArray[Any]
    names: Sequence[str]
    labels: NDArray[Any]
    batches: NDArray[Any] | None = None


def chunk_elements(nnz: int, n_cells: int, rows_per_chunk: int | None) -> int:
    """Choose how many stored values go into a chunk.

    A block of rows begins and ends inside chunks, which are decoded whole: large chunks waste
    that work, small ones cost more calls. About 24 rows were fastest, at 1,500 values a row and
    at 180.

    Parameters
    ----------
    nnz, n_cells : int
        Stored values and rows of the partition.
    rows_per_chunk : int, optional
        About how many rows a chunk shall hold.

    Returns
    -------
    int
        A power of two: by default the nearest to 24 rows, between 2**13 and 2**16; for a given
        `rows_per_chunk` between 2**10 and 2**20.

    Raises
    ------
    ConfigError
        If `rows_per_chunk` is below 1.
    """
    if rows_per_chunk is not None and rows_per_chunk < 1:
        raise ConfigError(f"rows_per_chunk is {rows_per_chunk}", "give a number above 0")
    wanted = (rows_per_chunk or 24) * nnz / max(n_cells, 1)
    least, most = (13, 16) if rows_per_chunk is None else (10, 20)
    return 2 ** int(np.clip(np.round(np.log2(max(wanted, 1))), least, most))


def write_partition(
    folder: Path,
    name: str,
    cells: PartitionCells,
    registry: Registry,
    dtypes: CountsDtypes,
    *,
    codec: str = "lz4",
    rows_per_chunk: int | None = None,
) -> PartitionInfo:
    """Write one partition of a store as a complete AnnData.

    Partitions are independent of one another: several processes may write them at once.

    Parameters
    ----------
    folder : Path
        Folder of the store; created where it does not exist.
    name : str
        ``dataset_<k>``; nothing of that name may exist in `folder`.
    cells : PartitionCells
        What to write.
    registry : Registry
        Genes, labels and batches of the store.
    dtypes : CountsDtypes
        Types to store counts and gene positions in, the same for all partitions.
    codec : {"lz4", "zstd"}
        lz4 reads fastest; zstd takes less room.
    rows_per_chunk : int, optional
        As in `chunk_elements`.

    Returns
    -------
    PartitionInfo
        What the manifest says about the partition.

    Raises
    ------
    ConfigError
        If there is no such codec, or `rows_per_chunk` is below 1.
    StoreError
        If the disk is full or cannot be written to, or something stands in the partition's place.
    """
    n_cells, nnz = len(cells.labels), len(cells.counts)
    chunk = chunk_elements(nnz, n_cells, rows_per_chunk)
    check_codec(codec)
    csr = (
        cells.indptr.astype(np.int64, copy=False),
        cells.indices.astype(dtypes.indices, copy=False),
        cells.counts.astype(dtypes.counts, copy=False),
    )
    columns = {registry.labels_key: (cells.labels, registry.labels)}
    if registry.batch_key is not None and cells.batches is not None:
        columns[registry.batch_key] = (cells.batches, registry.batches)
    with _writing(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        root = create_anndata(str(folder / name))
        write_csr(root, "X", csr, registry.n_genes, chunk=chunk, codec=codec)
        write_frame(root, "obs", cells.names, columns)
        write_frame(root, "var", registry.genes, {})
        files = folder_checksums(folder / name)
    return PartitionInfo(
        name=name, n_cells=n_cells, nnz=nnz, files=files, checksum=joint_checksum(files)
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a disk that is full, gone or read-only into an error that names the place."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error})",
            "make room on that disk, or choose another --out",
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a store: from now on it opens.

    Parameters
    ----------
    folder : Path
        Folder of the store, with every partition that `manifest` names.
    manifest : Manifest
        What the store holds.

    Raises
    ------
    StoreError
        If the disk is full or cannot be written to.
    """
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {**STORE_ATTRIBUTES, "rayvaec": manifest.sealed()},
    }
    with _writing(folder / "zarr.json"):
        write_json(folder / "zarr.json", group)
