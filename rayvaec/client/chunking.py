"""Split the cells of a call into requests that stay within the server's limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayvaec.errors import ConfigError
from rayvaec.protocol import RawCells, encode_cells, encode_new_cells
from rayvaec.util.messages import Names, as_names, is_one_name

_BYTES_PER_VALUE = 8  # gene and count
_BYTES_PER_CELL = 64  # offsets, and more than their padding
_BYTES_PER_STREAM = 4096


class RequestChunks(Protocol):
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
        With `cell_ids`, each of them once.
    """

    cells: RawCells
    named: bool = True

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


def new_cells(
    labels: Names,
    library: ArrayLike,
    n_cells: int | None = None,
    *,
    batches: Names | None = None,
    cell_ids: Names | None = None,
) -> NewCells:
    """Describe new cells; parameters as in `rayvaec.client.Client.generate`.

    Parameters
    ----------
    labels, batches : str, number or sequence of them
        One for all cells, or one per cell.
    library : float or sequence of float
        One for all cells, or one per cell.
    n_cells : int, optional
        Number of cells; that of `labels` by default.
    cell_ids : sequence of str, optional
        One per cell; repeated ones are told apart by their occurrence.

    Returns
    -------
    NewCells

    Raises
    ------
    ConfigError
        If there are not as many of one as of another.
    """
    from rayvaec.data.inputs.cell_names import tell_apart  # brings pandas

    if n_cells is None:
        n_cells = 1 if is_one_name(labels) else len(as_names(labels))
    elif not isinstance(n_cells, Integral) or n_cells < 1:
        raise ConfigError(f"n_cells={n_cells}", "give a whole number >= 1")
    libraries = np.asarray(library, np.float64)
    if libraries.shape not in ((), (1,), (n_cells,)):
        raise _not_one_per_cell("library", libraries.shape, n_cells)
    return NewCells(
        labels=_one_per_cell("labels", labels, n_cells),
        library=np.broadcast_to(libraries, n_cells),
        batches=None if batches is None else _one_per_cell("batches", batches, n_cells),
        cell_ids=None
        if cell_ids is None
        else tell_apart(_one_per_cell("cell_ids", cell_ids, n_cells), "cell_ids"),
    )


def _one_per_cell(name: str, given: Names, n_cells: int) -> list[str]:
    """Return names of all cells, of which one scalar may stand for all but cells' own names."""
    names = as_names(given)
    if is_one_name(given) and name != "cell_ids":
        names = names * n_cells
    if len(names) != n_cells:
        raise _not_one_per_cell(name, (len(names),), n_cells)
    return names


def _not_one_per_cell(name: str, shape: tuple[int, ...], n_cells: int) -> ConfigError:
    found = " x ".join(map(str, shape))
    return ConfigError(f"{name} has {found} values for {n_cells} cells", "give one per cell")


def chunk_requests(
    cells: RequestChunks, model: Mapping[str, Any], parameters: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Cut cells into requests that keep the server's limits.

    Parameters
    ----------
    cells : RequestChunks
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
