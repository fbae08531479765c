"""Cells in a model's gene order and codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cells:
    """Cells in the model's gene order and codes.

    Parameters
    ----------
    indptr : NDArray[n_cells + 1] of int64
        CSR row pointers.
    indices, counts : NDArray[nnz] of an integer type
        Gene and raw count of each non-zero.
    labels : NDArray[n_cells] of int64
        Label codes.
    batches : NDArray[n_cells] of int64, optional
        Batch codes, in models with batches.
    keys : NDArray[n_cells] of uint64
        Key of each cell's noise, from `rayvaec.kernels.rng`.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.integer]
    counts: NDArray[np.integer]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    keys: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Cells:
        """Return the cells from `start` to before `stop`."""
        first, last = self.indptr[start], self.indptr[stop]
        return Cells(
            self.indptr[start : stop + 1] - first,
            self.indices[first:last],
            self.counts[first:last],
            self.labels[start:stop],
            None if self.batches is None else self.batches[start:stop],
            self.keys[start:stop],
        )

    def take(self, positions: NDArray[np.int64]) -> Cells:
        """Return the cells at some positions, in that order."""
        lengths = np.diff(self.indptr)[positions]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        entries = np.repeat(self.indptr[positions] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return Cells(
            indptr,
            self.indices[entries],
            self.counts[entries],
            self.labels[positions],
            None if self.batches is None else self.batches[positions],
            self.keys[positions],
        )
