"""Read rows of an on-disk CSC matrix in bounded memory.

A first sweep over the stored values counts those of each row, a second deals them to scratch files,
a set per range of rows; each set is then sorted by row in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.align import check_offsets, check_positions
from rayvaec.util.atomic import remove
from rayvaec.util.progress import Progress

DEALT = "rows.npy"


def csc_rows(
    matrix: Any,
    shape: tuple[int, int],
    elements: int,
    scratch: Path,
    where: str,
    start: int = 0,
) -> Iterator[tuple[int, sparse.csr_array]]:
    """Read a CSC matrix, some rows at a time.

    Parameters
    ----------
    matrix : group of h5py or zarr
        With ``data``, ``indices`` and ``indptr``.
    shape : (int, int)
        Cells and genes.
    elements : int
        About how many stored values are in memory at a time; at least a row's.
    scratch : Path
        Folder for the scratch files: made by the first call, read again by later ones.
    where : str
        What to call the matrix in messages.
    start : int
        First row to read.

    Yields
    ------
    tuple of int and csr_array[n_rows, n_genes]
        Number of the first row, and the values as they are stored.

    Raises
    ------
    CountsError
        If the matrix contradicts itself.
    """
    borders = _borders(matrix, shape, elements, scratch, where)
    for number, (first, last) in enumerate(pairwise(borders.tolist())):
        if last > start:
            x = _gather(scratch, number, (last - first, shape[1]), _types(matrix))
            skipped = max(start - first, 0)
            yield first + skipped, x[skipped:] if skipped else x


def _borders(
    matrix: Any, shape: tuple[int, int], elements: int, scratch: Path, where: str
) -> NDArray[np.int64]:
    """Return the borders of the ranges of rows, whose values are dealt where they are not yet."""
    done = scratch / DEALT
    if done.exists():
        borders = np.load(done)
        if _fit(borders, elements, scratch):
            return borders
    remove(scratch)  # what a process that was killed may have left
    scratch.mkdir(parents=True)
    indptr = matrix["indptr"][:].astype(np.int64)
    stored = int(matrix["data"].shape[0])
    check_offsets(indptr, shape[1], stored, where)
    lengths = _row_lengths(matrix, shape[0], stored, elements, where)
    borders = _equal_parts(lengths, elements)
    _deal(matrix, indptr, stored, elements, borders, scratch)
    unfinished = scratch / f"new-{DEALT}"
    np.save(unfinished, borders)
    unfinished.rename(done)
    return borders


def _fit(borders: NDArray[np.int64], elements: int, scratch: Path) -> bool:
    """Return whether ranges that were made for more memory fit into this one."""
    for number, rows in enumerate(np.diff(borders).tolist()):
        path = scratch / f"{number}.row"
        if rows > 1 and path.exists() and path.stat().st_size > 4 * elements:
            return False
    return True


def _row_lengths(
    matrix: Any, n_rows: int, stored: int, elements: int, where: str
) -> NDArray[np.int64]:
    lengths = np.zeros(n_rows, np.int64)
    with Progress(stored, "values", "counting the values of each row") as progress:
        for start in range(0, stored, elements):
            rows = matrix["indices"][start : start + elements]
            check_positions(rows, n_rows, where)
            np.add.at(lengths, rows, 1)
            progress.advance(len(rows))
    return lengths


def _equal_parts(lengths: NDArray[np.int64], elements: int) -> NDArray[np.int64]:
    """Return borders between which rows have `elements` values at most, or are a single one."""
    ends = np.cumsum(lengths)
    borders = [0]
    while borders[-1] < len(lengths):
        before = int(ends[borders[-1] - 1]) if borders[-1] else 0
        border = int(np.searchsorted(ends, before + elements, side="right"))
        borders.append(max(border, borders[-1] + 1))
    return np.array(borders, np.int64)


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
    matrix: Any,
    indptr: NDArray[np.int64],
    stored: int,
    elements: int,
    borders: NDArray[np.int64],
    scratch: Path,
) -> None:
    """Write every stored value to the files of its rows."""
    types = _types(matrix)
    with Progress(stored, "values", "transposing") as progress:
        for start in range(0, stored, elements):
            stop = min(start + elements, stored)
            cells = matrix["indices"][start:stop]
            # Small types: the stable sort of 16-bit numbers is a radix sort, and takes less room.
            file = np.searchsorted(borders, cells, side="right") - 1
            file = file.astype(np.min_scalar_type(len(borders)))
            order = np.argsort(file, kind="stable")
            ends = np.cumsum(np.bincount(file, minlength=len(borders) - 1))
            for part, dtype in types.items():
                if part == "row":
                    values = cells - borders[file]
                elif part == "column":
                    values = _columns(indptr, start, stop)
                else:
                    values = matrix["data"][start:stop]
                values = values.astype(dtype, copy=False)[order]
                for number, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
                    if begin < end:
                        with (scratch / f"{number}.{part}").open("ab") as out:
                            out.write(values[begin:end].data)
            progress.advance(stop - start)


def _columns(indptr: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int32]:
    """Return the column of each stored value from `start` to `stop`."""
    bounds = np.clip(indptr, start, stop)
    return np.repeat(np.arange(len(indptr) - 1, dtype=np.int32), np.diff(bounds))


def _gather(
    scratch: Path, number: int, shape: tuple[int, int], types: dict[str, np.dtype[Any]]
) -> sparse.csr_array:
    """Sort a file's values by row; within a row they are in order of their columns already."""

    def read(part: str) -> NDArray[Any]:
        path = scratch / f"{number}.{part}"
        return np.fromfile(path, types[part]) if path.exists() else np.empty(0, types[part])

    rows = read("row")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    # A stable sort of 16-bit numbers is a radix sort.
    order = np.argsort(rows.astype(np.min_scalar_type(shape[0])), kind="stable")
    return sparse.csr_array((read("value")[order], read("column")[order], offsets), shape=shape)
