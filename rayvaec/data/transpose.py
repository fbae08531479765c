"""Rows of a CSC matrix on disk, in bounded memory.

One sweep over the stored values deals them to scratch files, a set per range of rows; each set is
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
        shape_here = (min(rows, shape[0] - start), shape[1])
        yield start, _gather(scratch, start // rows, shape_here, _types(matrix))


def _types(matrix: Any) -> dict[str, np.dtype[Any]]:
    """Return the parts of a stored value, each of which has a file of its own, and their types.

    The row is counted from the file's first one.
    """
    return {
        "row": np.dtype(np.int32),
        "column": np.dtype(np.int32),
        "value": matrix["data"].dtype,
    }


def _deal(
    matrix: Any, shape: tuple[int, int], elements: int, rows: int, scratch: Path, where: str
) -> None:
    """Write every stored value to the files of its rows."""
    indptr = matrix["indptr"][:].astype(np.int64)
    stored = int(matrix["data"].shape[0])
    check_offsets(indptr, shape[1], stored, where)
    for start in range(0, stored, elements):
        stop = min(start + elements, stored)
        cells = matrix["indices"][start:stop].astype(np.int64)
        check_positions(cells, shape[0], where)
        file, row = np.divmod(cells, rows)
        order = _stable_order(file)
        ends = np.cumsum(np.bincount(file))
        parts = {
            "row": row,
            "column": _columns(indptr, start, stop),
            "value": matrix["data"][start:stop],
        }
        for part, dtype in _types(matrix).items():
            values = parts[part][order].astype(dtype, copy=False)
            for number, piece in enumerate(np.split(values, ends[:-1])):
                if len(piece):
                    with (scratch / f"{number}.{part}").open("ab") as out:
                        piece.tofile(out)


def _stable_order(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return the stable order of small whole numbers; below 2**16 numpy sorts by radix."""
    return np.argsort(keys.astype(np.min_scalar_type(keys.max(initial=0))), kind="stable")


def _columns(indptr: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Return the column of each stored value from `start` to `stop`."""
    bounds = np.clip(indptr, start, stop)
    return np.repeat(np.arange(len(indptr) - 1), np.diff(bounds))


def _gather(
    scratch: Path, number: int, shape: tuple[int, int], types: dict[str, np.dtype[Any]]
) -> sparse.csr_array:
    """Sort a file's values by row; within a row they are in order of their columns already."""
    parts = {}
    for part, dtype in types.items():
        path = scratch / f"{number}.{part}"
        parts[part] = np.fromfile(path, dtype) if path.exists() else np.empty(0, dtype)
    order = _stable_order(parts["row"])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(parts["row"], minlength=shape[0]))])
    return sparse.csr_array((parts["value"][order], parts["column"][order], offsets), shape=shape)
