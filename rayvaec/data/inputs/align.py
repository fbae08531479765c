"""Reorder the columns of a count matrix to a list of genes, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.counts import LARGEST_COUNT
from rayvaec.errors import CountsError
from rayvaec.util.messages import join_names


def check_offsets(indptr: NDArray[np.int64], n: int, stored: int, where: str) -> None:
    """Refuse a sparse matrix whose indptr does not fit its values.

    Parameters
    ----------
    indptr : array of int64
        Offsets of rows or columns.
    n : int
        How many rows or columns there are.
    stored : int
        How many values there are.
    where : str
        What to call the matrix in messages.

    Raises
    ------
    CountsError
        If it has another length, decreases, or leads outside the values.
    """
    fits = len(indptr) == n + 1 and indptr[0] == 0 and indptr[-1] == stored
    if not fits or np.any(np.diff(indptr) < 0):
        raise CountsError(
            f"{where} is damaged: its indptr does not fit its {stored} values",
            "write the file again",
        )


def check_positions(indices: NDArray[Any], n: int, where: str) -> None:
    """Refuse indices of a sparse matrix outside ``[0, n)``; `where` names it in the message."""
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise CountsError(
            f"{where} is damaged: it has an index of {indices.max()} and the limit is {n - 1}",
            "write the file again",
        )


def align_columns(x: sparse.csr_array, target: NDArray[np.int64], n_genes: int) -> sparse.csr_array:
    """Move columns to their place and drop those that have none.

    Parameters
    ----------
    x : csr_array[n_cells, n_names] of int32
        Counts; rows may be unsorted, hold zeros, or hold a column more than once (then summed).
    target : array[n_names] of int64
        New column of each column, -1 to drop it.
    n_genes : int
        Number of columns afterwards.

    Returns
    -------
    csr_array[n_cells, n_genes] of int32
        Sorted, without duplicates or zeros; nothing of `x` is changed.

    Raises
    ------
    CountsError
        If duplicates add up to more than a count may be.
    """
    if n_genes != x.shape[1] or not np.array_equal(target, np.arange(n_genes)):
        moved = target[x.indices]
        kept = moved >= 0
        ends = np.concatenate([[0], np.cumsum(kept)])
        x = sparse.csr_array(
            (x.data[kept], moved[kept].astype(np.int32), ends[x.indptr].astype(x.indptr.dtype)),
            shape=(x.shape[0], n_genes),
        )
    return canonical(x)


def canonical(x: sparse.csr_array) -> sparse.csr_array:
    """Sort the entries of every row, sum those of the same column, and drop zeros.

    Parameters
    ----------
    x : csr_array[n_cells, n_genes] of int32
        Counts; its arrays may be another's, and are not written to.

    Returns
    -------
    csr_array[n_cells, n_genes] of int32
        `x` itself where there is nothing to do.

    Raises
    ------
    CountsError
        If duplicates add up to more than a count may be.
    """
    if not x.has_canonical_format:
        x = x.astype(np.int64)  # a copy: scipy sorts and sums in place, in the type of the data
        x.sum_duplicates()
        if x.nnz and x.data.max() > LARGEST_COUNT:
            place = int(x.data.argmax())
            row = int(np.searchsorted(x.indptr, place, side="right")) - 1
            raise CountsError(
                f"duplicate entries at row {row}, column {x.indices[place]} add up to "
                f"{x.data[place]}, above the largest count, {LARGEST_COUNT}",
                "correct the matrix",
            )
        x = x.astype(np.int32)
    if not x.data.all():
        x = x.copy()
        x.eliminate_zeros()
    return x


def place_in_csr(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    cells: Callable[[int], str],
    genes: Sequence[str],
) -> Callable[[int], tuple[str, str]]:
    """Return a function that names cell and gene of a stored value, for `as_counts`.

    Parameters
    ----------
    indptr, indices : arrays
        Of the CSR matrix, [n_cells, n_genes].
    cells : callable
        Name of a cell by its row.
    genes : sequence of str
        Names of the columns.

    Returns
    -------
    callable
        From the position of a stored value to (cell name, gene name).
    """

    def locate(position: int) -> tuple[str, str]:
        row = int(np.searchsorted(indptr, position, side="right")) - 1
        return cells(row), genes[int(indices[position])]

    return locate


def refuse_missing(
    genes: Sequence[str],
    missing: Sequence[str],
    given: Sequence[str],
    allow_missing: bool,
    where: str,
) -> None:
    """Refuse data that lacks genes.

    Parameters
    ----------
    genes, missing, given : sequence of str
        The genes that are needed, those of them that are missing, and those of the data.
    allow_missing : bool
        Whether some may be missing; never all.
    where : str
        What to call the data in messages.

    Raises
    ------
    CountsError
        Naming the first missing genes.
    """
    if len(missing) == len(genes):
        raise CountsError(
            f"{where} has none of the {len(genes)} genes that are needed (they start with "
            f"{join_names(genes, 3)}; its own with {join_names(given, 3)})",
            "use the same kind of gene names",
        )
    if missing and not allow_missing:
        raise CountsError(
            f"{where} lacks {len(missing)} of {len(genes)} genes: {join_names(missing)}",
            "add them, or pass allow_missing=True to count them as zero",
        )
