"""Assemble response rows: cut at cell boundaries and concatenated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rayvaec.protocol import AnswerStream, DrawnRows

Rows: TypeAlias = DrawnRows | dict[str, NDArray[np.float32]]

PART_BYTES = 16 * 2**20
"""Size from which whole cells of a running answer are handed on."""


@dataclass(frozen=True)
class Part:
    """All rows of some consecutive cells.

    Parameters
    ----------
    first : int
        Position of the first cell.
    n_cells : int
        How many.
    rows : Rows
        Their rows, cells counted from `first`.
    facts : mapping
        What the answer says beside its rows.
    """

    first: int
    n_cells: int
    rows: Rows
    facts: Mapping[str, Any]

    def beyond(self, done: int) -> Part | None:
        """Return what of it stands at cell `done` or after, None where nothing does."""
        skip = max(done - self.first, 0)
        if skip >= self.n_cells:
            return None
        if skip == 0:
            return self
        per_cell = n_rows(self.rows) // self.n_cells
        rest = cut(self.rows, skip * per_cell, n_rows(self.rows), skip)
        return Part(self.first + skip, self.n_cells - skip, rest, self.facts)


class RowAssembler:
    """Takes rows out of a running answer, cell by cell.

    Parameters
    ----------
    stream : AnswerStream
        The answer.
    first : int
        Position of its first cell.
    per_cell : int
        Rows of each cell.
    dense : bool
        Whether its rows are dense.
    """

    def __init__(self, stream: AnswerStream, first: int, per_cell: int, dense: bool) -> None:
        self._stream, self._first, self._per_cell, self._dense = stream, first, per_cell, dense
        self._done = 0
        self._left: list[Rows] = []

    def take(self) -> Part | None:
        """Return the cells that have come whole since the last call, None where there are none."""
        self._left.append(self._stream.dense() if self._dense else self._stream.draws())
        n_cells = sum(map(n_rows, self._left)) // self._per_cell
        if n_cells == 0:
            return None
        rows = join(self._left)
        whole = n_cells * self._per_cell
        part = cut(rows, 0, whole, self._done)
        self._left = [cut(rows, whole, n_rows(rows))] if whole < n_rows(rows) else []
        first, self._done = self._first + self._done, self._done + n_cells
        return Part(first, n_cells, part, self._stream.parameters)


def n_rows(rows: Rows) -> int:
    """Return the number of rows."""
    return len(rows.cells) if isinstance(rows, DrawnRows) else len(next(iter(rows.values()), ()))


def cut(rows: Rows, start: int, stop: int, less: int = 0) -> Rows:
    """Return the rows from `start` to before `stop`, their cells' numbers smaller by `less`."""
    if not isinstance(rows, DrawnRows):
        return {name: values[start:stop] for name, values in rows.items()}
    ends = rows.indptr[start : stop + 1]
    values = slice(ends[0], ends[-1])
    return DrawnRows(
        rows.cells[start:stop] - np.int32(less),
        rows.samples[start:stop],
        ends - ends[0],
        rows.indices[values],
        rows.counts[values],
    )


def join(parts: Sequence[Rows]) -> Rows:
    """Put rows below each other; `parts` are of one kind."""
    if len(parts) == 1:
        return parts[0]
    drawn = [part for part in parts if isinstance(part, DrawnRows)]
    if drawn:
        lengths = np.concatenate([np.diff(part.indptr) for part in drawn])
        return DrawnRows(
            np.concatenate([part.cells for part in drawn]),
            np.concatenate([part.samples for part in drawn]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            np.concatenate([part.indices for part in drawn]),
            np.concatenate([part.counts for part in drawn]),
        )
    dense = [part for part in parts if not isinstance(part, DrawnRows)]
    return {name: np.concatenate([part[name] for part in dense]) for name in dense[0]}


def whole(parts: Sequence[Part]) -> Part:
    """Return all parts of a request as one."""
    rows = []
    for part in parts:
        shift = parts[0].first - part.first
        rows.append(cut(part.rows, 0, n_rows(part.rows), shift))
    return Part(parts[0].first, sum(part.n_cells for part in parts), join(rows), parts[0].facts)
