"""Cell names that are unique over all inputs, at eight bytes a cell.

Names are compared by 64-bit hashes, so that those of a whole atlas need not be in memory. Should
two different names ever share a hash, one of them gets a suffix that it did not need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def name_hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of every name."""
    return pd.util.hash_array(np.array(names, dtype=object), categorize=False)


class UniqueNames:
    """Gives every cell after the first of its name a suffix.

    The k-th repetition of ``name`` becomes ``name-k``, or where a cell is called that already
    ``name-(k + t * period)`` with the smallest t that is free. As k is below the period, no two
    repetitions of a name can meet, whatever their t; so each name follows from its own cell alone.

    Parameters
    ----------
    hashes : array[n_cells] of uint64
        Hashes of the names of all cells, in order.
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        order = np.argsort(hashes, kind="stable")
        self._known = hashes[order]
        new = np.concatenate([[True], self._known[1:] != self._known[:-1]])[: len(hashes)]
        first = np.maximum.accumulate(np.where(new, np.arange(len(hashes)), 0))
        self._repetition = np.empty(len(hashes), np.int64)
        self._repetition[order] = np.arange(len(hashes)) - first
        self._period = int(self._repetition.max(initial=0)) + 1

    def n_renamed(self, start: int = 0) -> int:
        """Return how many cells from `start` on get another name."""
        return int(np.count_nonzero(self._repetition[start:]))

    def rename(self, names: Sequence[str], start: int) -> list[str]:
        """Return unique names for consecutive cells.

        Parameters
        ----------
        names : sequence of str
            Their own names.
        start : int
            Position of the first of them among all cells.

        Returns
        -------
        list of str
        """
        renamed = list(names)
        numbers = self._repetition[start : start + len(renamed)].copy()
        pending = np.flatnonzero(numbers)
        while len(pending):
            for row in pending.tolist():
                renamed[row] = f"{names[row]}-{numbers[row]}"
            taken = self._are_known(name_hashes([renamed[row] for row in pending.tolist()]))
            pending = pending[taken]
            numbers[pending] += self._period
        return renamed

    def _are_known(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        places = np.searchsorted(self._known, hashes)
        return self._known[np.minimum(places, len(self._known) - 1)] == hashes
