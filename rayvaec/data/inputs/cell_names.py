"""Unique cell names over all inputs, held as 8-byte hashes.

A name's first cell keeps it, and the k-th repetition counts as ``name-k``. So `prepare` names
cells, and so random numbers are keyed in process, by the client, and over stores that rayvaec did
not write.

Names are compared by 64-bit hashes, eight bytes a cell, so that those of a whole atlas need not be
in memory. Should two different names ever share a hash, one of them gets a suffix that it did not
need.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

logger = logging.getLogger("rayvaec")

_NAMES_BLOCK = 2**18


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
        numbers = self.suffixes(names, start).tolist()
        return [_suffixed(name, number) for name, number in zip(names, numbers, strict=True)]

    def suffixes(self, names: Sequence[str], start: int) -> NDArray[np.int64]:
        """Return the numbers that `rename` adds, 0 for none; parameters as there."""
        numbers = self._repetition[start : start + len(names)].copy()
        pending = np.flatnonzero(numbers)
        while len(pending):
            renamed = [_suffixed(names[row], numbers[row]) for row in pending.tolist()]
            pending = pending[self._are_known(name_hashes(renamed))]
            numbers[pending] += self._period
        return numbers

    def _are_known(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        places = np.searchsorted(self._known, hashes)
        return self._known[np.minimum(places, len(self._known) - 1)] == hashes


def _suffixed(name: str, number: int) -> str:
    return f"{name}-{number}" if number else name


def tell_apart(names: list[str], where: str | None = None) -> list[str]:
    """Return names that occur once each: those of `UniqueNames`.

    Parameters
    ----------
    names : list of str
        Of all cells, in order.
    where : str, optional
        Where they come from, for a warning where some are repeated; without it there is none.

    Returns
    -------
    list of str
    """
    if len(set(names)) == len(names):
        return names
    unique = UniqueNames(name_hashes(names))
    renamed = unique.rename(names, 0)
    if where is not None:
        first = next(row for row, name in enumerate(names) if renamed[row] != name)
        warn_of_repeated(where, unique.n_renamed(), len(names), renamed[first])
    return renamed


def warn_of_repeated(where: str, n_repeated: int, n_cells: int, example: str) -> None:
    """Log how many cells have a name that an earlier one has, and how they are told apart."""
    logger.warning(
        "%s: %s of %s cells have the name of an earlier one; their random numbers are those of "
        "cells named by occurrence, such as %r",
        where,
        f"{n_repeated:,}",
        f"{n_cells:,}",
        example,
    )


class Repetitions(NamedTuple):
    """Which cells of a store have the name of an earlier one.

    Parameters
    ----------
    rows : array[n_repeated] of int64
        Their positions in the store, ascending.
    suffixes : array[n_repeated] of int64
        The number that tells each of them apart.
    """

    rows: NDArray[np.int64]
    suffixes: NDArray[np.int64]

    def rename(self, names: list[str], start: int) -> list[str]:
        """Return names that occur once in the store; parameters as in `UniqueNames.rename`."""
        first, last = np.searchsorted(self.rows, [start, start + len(names)])
        if first == last:
            return names
        renamed = list(names)
        for row, suffix in zip(
            self.rows[first:last].tolist(), self.suffixes[first:last].tolist(), strict=True
        ):
            renamed[row - start] = _suffixed(names[row - start], suffix)
        return renamed


def find_repetitions(read: Callable[[int, int], list[str]], n_cells: int) -> Repetitions:
    """Find repeated names among those of many cells, which need not fit into memory.

    Parameters
    ----------
    read : callable
        Returns the names of the cells from a first to before a last position.
    n_cells : int
        Number of cells.

    Returns
    -------
    Repetitions
    """
    unique = UniqueNames(hashes_of(read, n_cells))
    rows, suffixes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, stop in _blocks(n_cells) if unique.n_renamed() else ():
        found = unique.suffixes(read(start, stop), start)
        repeated = np.flatnonzero(found)
        rows.append(repeated + start)
        suffixes.append(found[repeated])
    return Repetitions(np.concatenate(rows), np.concatenate(suffixes))


def hashes_of(read: Callable[[int, int], list[str]], n_cells: int) -> NDArray[np.uint64]:
    """Return the hashes of the names of many cells; parameters as in `find_repetitions`."""
    parts = [name_hashes(read(start, stop)) for start, stop in _blocks(n_cells)]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _blocks(n_cells: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_cells, _NAMES_BLOCK):
        yield start, min(start + _NAMES_BLOCK, n_cells)
