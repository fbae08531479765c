"""A request's cells, and how many of them fit into one request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import CountsError
from rayvaec.serve.wire import RawCells, encode_cells, encode_new_cells

_BYTES_PER_VALUE = 8  # gene and count
_BYTES_PER_CELL = 64  # offsets, and more than their padding
_BYTES_PER_STREAM = 4096


class Portions(Protocol):
    """Cells that can be sent in parts."""

    @property
    def named(self) -> bool:
        """Whether their draws are the same in any request, their names being their keys."""
        ...

    def __len__(self) -> int: ...

    def ends(self) -> NDArray[np.int64]:
        """Return at most how many bytes the first 1, 2, ... cells take in a request."""
        ...

    def body(self, start: int, stop: int, parameters: Mapping[str, Any]) -> bytes:
        """Write a request for the cells from `start` to before `stop`."""
        ...


@dataclass(frozen=True)
class GivenCells:
    """Cells with counts; always named.

    Parameters
    ----------
    cells : RawCells
        With `cell_ids`.

    Raises
    ------
    CountsError
        If a name occurs twice: a server would see that only within one request.
    """

    cells: RawCells
    named: bool = True

    def __post_init__(self) -> None:
        names = self.cells.cell_ids or []
        if len(set(names)) != len(names):
            seen: set[str | None] = set()
            twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise CountsError(
                f"adata.obs_names has {twice!r} more than once; both cells would get the same "
                "random numbers",
                "make the names unique, such as with adata.obs_names_make_unique()",
            )

    def __len__(self) -> int:
        return len(self.cells.labels)

    def ends(self) -> NDArray[np.int64]:
        """Return at most how many bytes the first 1, 2, ... cells take in a request."""
        values = self.cells.indptr[1:] * _BYTES_PER_VALUE
        return values + _text_ends(self.cells.labels, self.cells.batches, self.cells.cell_ids)

    def body(self, start: int, stop: int, parameters: Mapping[str, Any]) -> bytes:
        """Write a request for the cells from `start` to before `stop`."""
        cells = self.cells
        first, last = cells.indptr[start], cells.indptr[stop]
        part = replace(
            cells,
            labels=cells.labels[start:stop],
            indptr=cells.indptr[start : stop + 1] - first,
            indices=cells.indices[first:last],
            counts=cells.counts[first:last],
            batches=None if cells.batches is None else cells.batches[start:stop],
            cell_ids=None if cells.cell_ids is None else cells.cell_ids[start:stop],
        )
        return encode_cells(part, parameters)


@dataclass(frozen=True)
class NewCells:
    """Cells to be drawn from the prior; without names they are keyed by position in the request.

    Parameters
    ----------
    labels : sequence of str
        One per cell.
    library : array[n_cells] of float64
        Expected total counts.
    batches, cell_ids : sequence of str, optional
        One per cell.
    """

    labels: Sequence[str]
    library: NDArray[np.float64]
    batches: Sequence[str] | None
    cell_ids: Sequence[str] | None

    @property
    def named(self) -> bool:
        """Whether their draws are the same in any request."""
        return self.cell_ids is not None

    def __len__(self) -> int:
        return len(self.labels)

    def ends(self) -> NDArray[np.int64]:
        """Return at most how many bytes the first 1, 2, ... cells take in a request."""
        return _text_ends(self.labels, self.batches, self.cell_ids)

    def body(self, start: int, stop: int, parameters: Mapping[str, Any]) -> bytes:
        """Write a request for the cells from `start` to before `stop`."""
        return encode_new_cells(
            self.labels[start:stop],
            self.library[start:stop],
            None if self.batches is None else self.batches[start:stop],
            None if self.cell_ids is None else self.cell_ids[start:stop],
            parameters,
        )


def portions(
    cells: Portions, model: Mapping[str, Any], parameters: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Cut cells into requests that keep the server's limits.

    Parameters
    ----------
    cells : Portions
        All cells.
    model : mapping
        What /v1/model says.
    parameters : mapping
        The request's other fields.

    Returns
    -------
    list of (start, stop)
        One at least. What cannot be cut (a single cell, cells without names) may be over a limit:
        the server then says so.
    """
    n, limits = len(cells), model.get("limits", {})
    if n == 0 or not cells.named:
        return [(0, n)]
    cost = len(model["genes"]) * parameters.get("n_samples", 1)
    most = max(int(min(limits.get("max_cells", n), limits.get("max_cost", n * cost) // cost)), 1)
    room = limits.get("max_body_bytes", np.inf) - len(json.dumps(dict(parameters)))
    ends, cuts, start = cells.ends(), [], 0
    while start < n:
        before = ends[start - 1] if start else 0
        fitting = int(np.searchsorted(ends, before + room - _BYTES_PER_STREAM, side="right"))
        stop = min(start + most, max(fitting, start + 1), n)
        cuts.append((start, stop))
        start = stop
    return cuts


def _text_ends(*columns: Sequence[str | None] | None) -> NDArray[np.int64]:
    texts = [column for column in columns if column is not None]
    sizes = [sum(len((text or "").encode()) for text in row) for row in zip(*texts, strict=False)]
    return np.cumsum(np.asarray(sizes, np.int64) + _BYTES_PER_CELL)
