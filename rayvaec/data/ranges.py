"""Ranges of several arrays, read with one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.decode import ChunkRun
from rayvaec.data.shards import ShardedVector, Vector, read_runs


def read_together(reads: Sequence[tuple[Vector, int, int, NDArray[Any]]]) -> list[int]:
    """Read ranges of arrays into buffers, with one call without the GIL where that is possible.

    Parameters
    ----------
    reads : sequence of (Vector, int, int, array)
        The arguments of `Vector.read_into`.

    Returns
    -------
    list of int
        What `Vector.read_into` returns for each; errors as there.
    """
    runs: list[ChunkRun] = []
    finish: list[Callable[[int, int, NDArray[Any]], int]] = []
    for vector, start, stop, out in reads:
        found = vector.runs(start, stop, out) if isinstance(vector, ShardedVector) else None
        if isinstance(vector, ShardedVector) and found is not None:
            runs += found
            finish.append(vector.finish)
        else:
            finish.append(vector.read_into)
    if runs and not read_runs(runs):
        # Whatever it is, one by one the files are named.
        finish = [vector.read_into for vector, *_ in reads]
    return [then(*read[1:]) for then, read in zip(finish, reads, strict=True)]


def read_ranges(ranges: Sequence[tuple[Vector, int, int]]) -> list[NDArray[Any]]:
    """Read ranges of arrays as new arrays, as `read_together`; errors as in `Vector.read_into`."""
    reads = [(*of, np.empty(of[0].span(*of[1:]), of[0].dtype)) for of in ranges]
    return [
        out[at : at + stop - start]
        for at, (_, start, stop, out) in zip(read_together(reads), reads, strict=True)
    ]
