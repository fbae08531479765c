"""Sample of rows that represents a split, whatever the order of the store.

The rows of a store that `prepare` shuffled are in random order, and the first ones are a random
sample. Those of an external store may be sorted by cell type, and a store that was appended to is
shuffled in portions: there, short runs of rows are drawn from all over the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.loading.sampler import permutation
from rayvaec.data.store.store import Store

RUNS, MOST_RUN_ROWS = 256, 64
"""Runs have as many rows as gives this many of them, and no more than a chunk of a store."""
SAMPLE_SEED = 1


@dataclass(frozen=True)
class RowSample:
    """Rows of a store, in runs.

    Parameters
    ----------
    runs : tuple of range
        Consecutive rows each.
    """

    runs: tuple[range, ...]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.runs)])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the rows in the store, [n_rows]."""
        return np.concatenate([np.zeros(0, np.int64), *map(np.asarray, self.runs)])

    def part(self, start: int, stop: int) -> RowSample:
        """Return the rows from one position in the sample to another."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pairs = zip(self.runs[first:], self._starts[first:].tolist(), strict=False)
        cut = []
        for run, begin in pairs:
            if begin >= stop:
                break
            cut.append(run[max(start - begin, 0) : stop - begin])
        return RowSample(tuple(cut))

    def parts(self, size: int) -> list[RowSample]:
        """Cut the sample into parts of `size` rows; the last one may have fewer."""
        return [self.part(start, start + size) for start in range(0, len(self), size)]

    def mixed(self) -> RowSample:
        """Return the same rows in short runs in a random order: its parts are then alike."""
        size = _run_rows(len(self))
        runs = [run[at : at + size] for run in self.runs for at in range(0, len(run), size)]
        return RowSample(tuple(runs[number] for number in permutation(len(runs), SAMPLE_SEED)))


def sample_rows(store: Store, split: str, most: int | None = None) -> RowSample:
    """Choose rows that stand for all rows of a split; always the same ones of a store.

    Parameters
    ----------
    store : Store
        Any.
    split : {"train", "validation", "all"}
        Which of its rows.
    most : int, optional
        How many to choose, at most; all by default. Where the store's order is not random it may
        be fewer, by less than one in `RUNS`.

    Returns
    -------
    RowSample
        In the order of the store.

    Raises
    ------
    StoreError
        If there is no such split.
    """
    rows = store.rows(split)
    if most is None or most >= len(rows):
        return RowSample((rows,))
    if store.is_shuffled:
        return RowSample((rows[:most],))
    size = _run_rows(most)
    # One run somewhere in each of equal parts: at even distances, rows that lie in turns would all
    # be of one kind.
    borders = np.arange(most // size + 1) * len(rows) // max(most // size, 1)
    words = np.random.Philox(key=SAMPLE_SEED).random_raw(len(borders) - 1)
    starts = borders[:-1] + (words % (np.diff(borders) - size + 1).astype(np.uint64)).astype(int)
    return RowSample(tuple(rows[start : start + size] for start in starts.tolist()))


def _run_rows(n_rows: int) -> int:
    return min(max(n_rows // RUNS, 1), MOST_RUN_ROWS)
