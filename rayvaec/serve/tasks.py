"""What each route computes: a request cut into jobs, and their results put into an answer.

A task knows neither HTTP nor threads. Its jobs end in numpy (for JSON, joined at the end) or go
through `encode` to pieces of an Arrow stream, which can be sent before the next job is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.infer.posterior import Cells
from rayvaec.kernels.nb_sample import Draws
from rayvaec.serve.wire import (
    DrawnRows,
    dense_schema,
    draws_schema,
    encode_dense,
    encode_draws,
)
from rayvaec.serve.work import Job, windows


@dataclass(frozen=True)
class Block:
    """Rows of a dense answer.

    Parameters
    ----------
    first_cell : int
        Position in the request of the first row's cell.
    columns : mapping of arrays[n_rows, width]
        By name.
    """

    first_cell: int
    columns: Mapping[str, NDArray[Any]]


class Task(Protocol):
    """Checked work of one request."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the answer says beside its rows."""
        ...

    @property
    def n_json_values(self) -> int:
        """Numbers in a dense JSON answer; 0 for draws, which are bounded by their cost."""
        ...

    def jobs(self, then: Callable[[Any], Any]) -> Iterator[Job]:
        """Yield the jobs, each job's result handed to `then`."""
        ...

    def schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""
        ...

    def encode(self, result: Any) -> list[bytes]:
        """Write a job's result as pieces of the Arrow answer."""
        ...

    def as_json(self, results: Sequence[Any]) -> dict[str, Any]:
        """Return what a JSON answer holds beside the facts."""
        ...


@dataclass(frozen=True)
class Drawing:
    """Which draws a request asks for.

    Parameters
    ----------
    kind : str
        Whether z comes from the cells' posterior or from the prior.
    cells : Cells
        Given cells, or new ones without counts.
    library : array[n_cells] of float32, optional
        Expected total counts of new cells.
    n_samples, seed : int
        As in `rayvaec.infer.posterior.draw`.
    n_genes : int
        The model's number of genes.
    columns : array[n_out] of int64, optional
        Genes that the answer holds, in its order; all by default.
    """

    kind: Literal["draw", "generate"]
    cells: Cells
    library: NDArray[np.float32] | None
    n_samples: int
    seed: int
    n_genes: int
    columns: NDArray[np.int64] | None

    @property
    def n_out(self) -> int:
        """Genes of the answer."""
        return self.n_genes if self.columns is None else len(self.columns)

    def job(self, start: int, stop: int, first: int, last: int, finish: Callable) -> Job:
        """Return the job of draws `first` to before `last` of cells `start` to before `stop`."""
        return Job(
            kind=self.kind,
            cells=self.cells.part(start, stop),
            finish=finish,
            n_samples=last - first,
            first_sample=first,
            seed=self.seed,
            library=None if self.library is None else self.library[start:stop],
        )


@dataclass(frozen=True)
class DrawTask:
    """Draws, as they are.

    Parameters
    ----------
    drawing : Drawing
        Which.
    facts : mapping
        What the answer says beside its rows.
    """

    drawing: Drawing
    facts: Mapping[str, Any]
    n_json_values: int = 0

    def jobs(self, then: Callable[[DrawnRows], Any]) -> Iterator[Job]:
        """Yield the jobs; their results are `DrawnRows`."""
        ask = self.drawing
        for start, stop, first, last in windows(len(ask.cells), ask.n_samples, ask.n_genes):

            def finish(draws: Draws, at: tuple[int, int, int, int] = (start, stop, first, last)):  # type: ignore[no-untyped-def]
                return then(self._rows(draws, *at))

            yield ask.job(start, stop, first, last, finish)

    def schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""
        rows = len(self.drawing.cells) * self.drawing.n_samples
        return draws_schema({**self.facts, "rows": rows})

    def encode(self, result: DrawnRows) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        return encode_draws(self.schema(), result)

    def as_json(self, results: Sequence[DrawnRows]) -> dict[str, Any]:
        """Return all rows as one CSR matrix."""
        lengths = [np.diff(rows.indptr) for rows in results]
        return {
            "draws": {
                "indptr": [0, *np.cumsum(np.concatenate(lengths)).tolist()],
                "indices": np.concatenate([rows.indices for rows in results]).tolist(),
                "counts": np.concatenate([rows.counts for rows in results]).tolist(),
            }
        }

    def _rows(self, draws: Draws, start: int, stop: int, first: int, last: int) -> DrawnRows:
        cells = np.repeat(np.arange(start, stop, dtype=np.int32), last - first)
        samples = np.tile(np.arange(first, last, dtype=np.int32), stop - start)
        if self.drawing.columns is not None:
            draws = select_genes(draws, self.drawing.columns, self.drawing.n_genes)
        return DrawnRows(cells, samples, draws.indptr, draws.indices, draws.counts)


@dataclass(frozen=True)
class MomentsTask:
    """Moments over draws that are not kept.

    Parameters
    ----------
    drawing : Drawing
        Which draws.
    reduce : tuple of str
        ``mean``, ``var`` (divided by n_samples, as in `numpy.var`), ``zero_fraction``.
    facts : mapping
        What the answer says beside its rows.
    """

    drawing: Drawing
    reduce: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def n_json_values(self) -> int:
        """Numbers in a JSON answer."""
        return len(self.drawing.cells) * self.drawing.n_out * len(self.reduce)

    def jobs(self, then: Callable[[Block | None], Any]) -> Iterator[Job]:
        """Yield the jobs; the last of some cells gives their `Block`, the others None."""
        ask = self.drawing
        sums: _Sums | None = None
        for start, stop, first, last in windows(len(ask.cells), ask.n_samples, ask.n_genes):
            if sums is None or sums.start != start:
                sums = _Sums(start, stop, ask)

            def finish(draws: Draws, sums: _Sums = sums, n: int = last - first) -> Any:
                return then(sums.add(draws, n, self.reduce))

            yield ask.job(start, stop, first, last, finish)

    def schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""
        widths = dict.fromkeys(self.reduce, self.drawing.n_out)
        return dense_schema(widths, {**self.facts, "rows": len(self.drawing.cells)})

    def encode(self, result: Block | None) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        if result is None:
            return []
        return encode_dense(self.schema(), result.first_cell, result.columns)

    def as_json(self, results: Sequence[Block | None]) -> dict[str, Any]:
        """Return a matrix for each moment."""
        return {"moments": _joined(self.reduce, results)}


class _Sums:
    """Running sums over the draws of some cells; exact, so their order does not matter."""

    def __init__(self, start: int, stop: int, drawing: Drawing) -> None:
        self.start = start
        self._drawing, self._n_cells, self._seen = drawing, stop - start, 0
        shape = (self._n_cells, drawing.n_genes)
        self._total, self._square, self._positive = (np.zeros(shape) for _ in range(3))

    def add(self, draws: Draws, n_samples: int, reduce: Sequence[str]) -> Block | None:
        """Take in `n_samples` more draws of each cell; return the moments after the last."""
        cell = np.repeat(np.arange(len(draws.indptr) - 1) // n_samples, np.diff(draws.indptr))
        place = cell * self._total.shape[1] + draws.indices
        counts, size = draws.counts.astype(np.float64), self._total.size
        self._total.ravel()[:] += np.bincount(place, counts, size)
        self._square.ravel()[:] += np.bincount(place, counts**2, size)
        self._positive.ravel()[:] += np.bincount(place, minlength=size)
        self._seen += n_samples
        if self._seen < self._drawing.n_samples:
            return None
        mean = self._total / self._seen
        moments = {
            "mean": mean,
            "var": np.maximum(self._square / self._seen - mean**2, 0.0),
            "zero_fraction": 1.0 - self._positive / self._seen,
        }
        columns = slice(None) if self._drawing.columns is None else self._drawing.columns
        chosen = {name: moments[name][:, columns].astype(np.float32) for name in reduce}
        return Block(self.start, chosen)


@dataclass(frozen=True)
class DenseTask:
    """Latent space or denoised expression of given cells.

    Parameters
    ----------
    kind : str
        Which.
    cells : Cells
        Of what.
    n_genes : int
        The model's number of genes.
    widths : mapping
        Name and width of each column of the answer.
    columns : array[n_out] of int64, optional
        Genes that the answer holds, in its order.
    facts : mapping
        What the answer says beside its rows.
    """

    kind: Literal["latent", "expression"]
    cells: Cells
    n_genes: int
    widths: Mapping[str, int]
    columns: NDArray[np.int64] | None
    facts: Mapping[str, Any]

    @property
    def n_json_values(self) -> int:
        """Numbers in a JSON answer."""
        return len(self.cells) * sum(self.widths.values())

    def jobs(self, then: Callable[[Block], Any]) -> Iterator[Job]:
        """Yield the jobs; their results are `Block`."""
        for start, stop, _, _ in windows(len(self.cells), 1, self.n_genes):

            def finish(values: tuple[NDArray[np.float32], ...], start: int = start) -> Any:
                chosen = [v if self.columns is None else v[:, self.columns] for v in values]
                return then(Block(start, dict(zip(self.widths, chosen, strict=True))))

            yield Job(self.kind, self.cells.part(start, stop), finish)

    def schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""
        return dense_schema(self.widths, {**self.facts, "rows": len(self.cells)})

    def encode(self, result: Block) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        return encode_dense(self.schema(), result.first_cell, result.columns)

    def as_json(self, results: Sequence[Block]) -> dict[str, Any]:
        """Return a matrix for each column."""
        return _joined(tuple(self.widths), results)


def select_genes(draws: Draws, columns: NDArray[np.int64], n_genes: int) -> Draws:
    """Keep some genes of draws.

    Parameters
    ----------
    draws : Draws
        Rows of all genes.
    columns : array[n_out] of int64
        The genes to keep; their positions here are the new indices.
    n_genes : int
        Number of genes before.

    Returns
    -------
    Draws
        The same rows, indices ascending.
    """
    target = np.full(n_genes, -1, np.int32)
    target[columns] = np.arange(len(columns), dtype=np.int32)
    rows = np.repeat(np.arange(len(draws.indptr) - 1), np.diff(draws.indptr))
    moved = target[draws.indices]
    kept = np.flatnonzero(moved >= 0)
    order = kept[np.lexsort((moved[kept], rows[kept]))]
    ends = np.searchsorted(rows[kept], np.arange(len(draws.indptr)))
    return Draws(ends.astype(np.int64), moved[order], draws.counts[order])


def _joined(names: Sequence[str], results: Sequence[Block | None]) -> dict[str, Any]:
    blocks = [result for result in results if result is not None]
    return {
        name: np.concatenate([block.columns[name] for block in blocks]).tolist() for name in names
    }
