"""Rows of a CSC matrix on disk, in bounded memory.

One sweep over the stored values deals them to one scratch file per range of rows; each file is
then sorted by row in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.align import check_offsets, check_positions


def csc_rows(
    matrix: Any, shape: tuple[int, int], elements: int, scratch: Path, where: str
) -> Iterator[tuple[int, sparse.csr_array]]:
    """Read a CSC matrix, some rows at a time.

    Parameters
    ----------
    matrix : group of h5py or zarr
        With ``data``, ``indices`` and ``indptr``.
    shape : (int, int)
        Cells and genes.
    elements : int
        About how many stored values are in memory at a time.
    scratch : Path
        Folder for the scratch files: made by the first call, read again by later ones.
    where : str
        What to call the matrix in messages.

    Yields
    ------
    tuple of int and csr_array[n_rows, n_genes]
        Number of the first row, and the values as they are stored.

    Raises
    ------
    CountsError
        If the matrix contradicts itself.
    """
    stored = int(matrix["data"].shape[0])
    n_files = max(-(-stored // elements), 1)
    rows = max(-(-shape[0] // n_files), 1)
    if not scratch.exists():
        scratch.mkdir(parents=True)
        _deal(matrix, shape, elements, rows, scratch, where)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield start, _gather(scratch / str(start // rows), stop - start, shape[1], _record(matrix))


def _record(matrix: Any) -> np.dtype[Any]:
    """Return the type of a stored value with its row within the file and its column."""
    return np.dtype([("row", "<i4"), ("column", "<i4"), ("value", matrix["data"].dtype)])


def _deal(
    matrix: Any, shape: tuple[int, int], elements: int, rows: int, scratch: Path, where: str
) -> None:
    """Write every stored value to the file of its rows."""
    indptr = matrix["indptr"][:].astype(np.int64)
    stored = int(matrix["data"].shape[0])
    check_offsets(indptr, shape[1], stored, where)
    for start in range(0, stored, elements):
        stop = min(start + elements, stored)
        cells = matrix["indices"][start:stop].astype(np.int64)
        check_positions(cells, shape[0], where)
        records = np.empty(stop - start, _record(matrix))
        records["row"] = cells % rows
        records["column"] = _columns(indptr, start, stop)
        records["value"] = matrix["data"][start:stop]
        file = cells // rows
        records = records[np.argsort(file, kind="stable")]
        ends = np.cumsum(np.bincount(file))
        for number in np.unique(file):
            begin = ends[number - 1] if number else 0
            with (scratch / str(number)).open("ab") as out:
                records[begin : ends[number]].tofile(out)


def _columns(indptr: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Return the column of each stored value from `start` to `stop`."""
    bounds = np.clip(indptr, start, stop)
    return np.repeat(np.arange(len(indptr) - 1), np.diff(bounds))


def _gather(path: Path, n_rows: int, n_genes: int, record: np.dtype[Any]) -> sparse.csr_array:
    """Sort a file's values by row; within a row they are in order of their columns already."""
    records = np.fromfile(path, record) if path.exists() else np.empty(0, record)
    records = records[np.argsort(records["row"], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(records["row"], minlength=n_rows))])
    data = np.ascontiguousarray(records["value"])
    columns = np.ascontiguousarray(records["column"])
    return sparse.csr_array((data, columns, offsets), shape=(n_rows, n_genes))
