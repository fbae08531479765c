"""CSR counts of a minibatch."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.errors import CountsError
from rayvaec.kernels.threads import run_all, spans
from rayvaec.util.numba_cache import compiled


class CsrCounts(NamedTuple):
    """Counts in compressed sparse rows, in whatever integer dtypes they are stored in.

    Parameters
    ----------
    indptr : Tensor[n_cells + 1], int64
        Where each cell's entries start and end.
    indices : Tensor[nnz], any integer dtype
        Gene of every entry; a gene occurs at most once in a cell.
    counts : Tensor[nnz], any integer dtype
        Raw counts, non-negative.
    n_genes : int
        Number of columns.
    """

    indptr: Tensor
    indices: Tensor
    counts: Tensor
    n_genes: int

    @classmethod
    def from_numpy(
        cls,
        indptr: NDArray[np.integer[Any]],
        indices: NDArray[np.integer[Any]],
        counts: NDArray[np.integer[Any]],
        n_genes: int,
    ) -> CsrCounts:
        """Wrap the three arrays of a CSR matrix without copying entries.

        Parameters
        ----------
        indptr : ndarray[n_cells + 1], integer
            Row boundaries, from 0 to nnz.
        indices, counts : ndarray[nnz], integer
            Genes and raw counts.
        n_genes : int
            Number of columns.

        Returns
        -------
        CsrCounts
            On the CPU, sharing the memory of `indices` and `counts`.

        Raises
        ------
        CountsError
            If the arrays' lengths contradict each other or their dtypes are not integer.
        """
        for name, array in (("indptr", indptr), ("indices", indices), ("counts", counts)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise CountsError(
                    f"{name} is {array.dtype} with {array.ndim} dimensions",
                    "pass one-dimensional integer arrays",
                )
        if not len(indptr) or indptr[0] != 0 or indptr[-1] != len(indices):
            raise CountsError(
                f"indptr does not run from 0 to the number of indices, {len(indices)}",
                "pass the three arrays of one CSR matrix",
            )
        if len(indices) != len(counts):
            raise CountsError(
                f"{len(indices)} indices but {len(counts)} counts",
                "pass the three arrays of one CSR matrix",
            )
        return cls(
            torch.from_numpy(indptr.astype(np.int64, copy=False)),
            torch.from_numpy(indices),
            torch.from_numpy(counts),
            n_genes,
        )

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def device(self) -> torch.device:
        """Where the counts lie."""
        return self.counts.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row boundaries, genes and counts."""
        return self.indptr, self.indices, self.counts

    def cells(self) -> Tensor:
        """Return the row of every entry, int64[nnz]."""
        return torch.repeat_interleave(
            torch.arange(self.n_cells, device=self.device),
            self.indptr.diff(),
            output_size=len(self.indices),
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the counts as a dense matrix.

        Parameters
        ----------
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor[n_cells, n_genes]
            Raw counts.
        """
        dense = torch.zeros(self.n_cells, self.n_genes, dtype=dtype, device=self.device)
        # Unsigned dtypes can be neither index nor source of a scatter.
        dense[self.cells(), self.indices.to(torch.int64)] = self.counts.to(dtype)
        return dense

    def library(self) -> Tensor:
        """Return each cell's total count, float32[n_cells, 1]."""
        if self.device.type == "cpu":
            totals = np.empty((self.n_cells, 1), np.float32)
            _row_sums(self.indptr.numpy(), self.counts.numpy(), totals)
            return torch.from_numpy(totals)
        # Differences of sums are exact in int64, and a cell without entries needs no special case.
        ends = torch.zeros(len(self.counts) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(self.counts.to(torch.int64), 0, out=ends[1:])
        return ends[self.indptr].diff().to(torch.float32)[:, None]

    def to(self, device: torch.device | str) -> CsrCounts:
        """Return the same counts on another device.

        Parameters
        ----------
        device : torch.device or str
            Where the arrays shall lie.

        Returns
        -------
        CsrCounts
            Of the same dtypes.
        """
        return CsrCounts(
            self.indptr.to(device), self.indices.to(device), self.counts.to(device), self.n_genes
        )


@compiled
def _row_sums(indptr: NDArray[Any], counts: NDArray[Any], totals: NDArray[Any]) -> None:
    for row in range(len(totals)):
        total = np.int64(0)
        for i in range(indptr[row], indptr[row + 1]):
            total += np.int64(counts[i])
        totals[row, 0] = total


def is_ascending(indptr: NDArray[np.int64], indices: NDArray[np.integer[Any]]) -> bool:
    """Return whether indices rise strictly within every row.

    Parameters
    ----------
    indptr : ndarray[n_cells + 1]
        Row boundaries.
    indices : ndarray[nnz], integer
        Column of every entry.

    Returns
    -------
    bool
    """
    starts = indptr[1:-1][np.diff(indptr[1:]) > 0]
    starts = starts[starts > 0]
    # Only from one row to the next may they fall.
    falls = np.count_nonzero(indices[1:] <= indices[:-1])
    return falls == np.count_nonzero(indices[starts] <= indices[starts - 1])


def checked_arrays(
    x: CsrCounts,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Return the arrays of counts on the CPU as compiled kernels read them.

    Parameters
    ----------
    x : CsrCounts
        On the CPU.

    Returns
    -------
    indptr, indices, counts : ndarray
        Of int64, int32 and int32, with ascending genes in every cell; not copied where they are
        so already.

    Raises
    ------
    CountsError
        If a count is negative or too large, an index is not that of a gene (a compiled kernel
        would read and write out of bounds), or a gene occurs twice in a cell.
    """
    indices, counts = x.indices.numpy(), x.counts.numpy()
    for name, values, limit in (("index", indices, x.n_genes), ("count", counts, 2**31)):
        if len(values) and (values.min() < 0 or values.max() >= limit):
            place = int(np.flatnonzero((values < 0) | (values >= limit))[0])
            raise CountsError(
                f"{name} {values[place]} at entry {place} is outside 0 to {limit - 1}",
                f"counts are non-negative and of the model's {x.n_genes} genes",
            )
    indptr = x.indptr.numpy().astype(np.int64, copy=False)
    genes = np.ascontiguousarray(indices, dtype=np.int32)
    values = np.ascontiguousarray(counts, dtype=np.int32)
    if not is_ascending(indptr, genes):
        cells = x.cells().numpy()
        order = np.lexsort((genes, cells))
        genes, values = genes[order], values[order]
        if not is_ascending(indptr, genes):
            twice = int(np.flatnonzero((np.diff(genes) == 0) & (np.diff(cells) == 0))[0])
            raise CountsError(
                f"gene {genes[twice]} occurs twice in cell {cells[twice]}",
                "sum duplicate entries before (scipy: sum_duplicates)",
            )
    return indptr, genes, values


@compiled
def _fill_places(
    indptr: NDArray[Any], indices: NDArray[Any], width: int, places: NDArray[Any]
) -> None:
    for row in range(len(places)):
        place, stop = indptr[row], indptr[row + 1]
        places[row, 0] = place
        for tile in range(1, places.shape[1]):
            while place < stop and indices[place] < tile * width:
                place += 1
            places[row, tile] = place


def tile_places(
    indptr: NDArray[np.int64], indices: NDArray[np.int32], width: int, n_genes: int
) -> NDArray[np.int64]:
    """Find where every row's entries of every tile of genes begin.

    Parameters
    ----------
    indptr : ndarray[n_rows + 1]
        Row boundaries; need not begin at 0.
    indices : ndarray
        Genes, ascending in every row.
    width : int
        Genes of a tile; the last may be narrower.
    n_genes : int
        Number of columns.

    Returns
    -------
    ndarray[n_rows, n_tiles + 1], int64
        Row c's entries of tile t are [places[c, t], places[c, t + 1]).
    """
    places = np.empty((len(indptr) - 1, -(-n_genes // width) + 1), np.int64)
    run_all(
        [
            partial(_fill_places, indptr[a : b + 1], indices, width, places[a:b])
            for a, b in spans(len(places), 4 if len(indices) > 100_000 else 1)
        ]
    )
    return places
