"""Moments and quantiles over draws that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.kernels.nb_sample import Draws
from rayvaec.serve.h5ad.writing import Annotation
from rayvaec.serve.tasks import Block, Drawing, Matrices, joined, select_genes
from rayvaec.serve.wire import dense_schema, encode_dense
from rayvaec.serve.work import Job, windows


@dataclass(frozen=True)
class MomentsTask:
    """Moments and quantiles of each cell's draws, in place of the draws.

    Parameters
    ----------
    drawing : Drawing
        Which draws.
    moments : tuple of str
        ``mean``, ``var`` (divided by n_samples, as in `numpy.var`), ``zero_fraction``.
    quantiles : tuple of float
        From 0 to 1; between two draws as `numpy.quantile` has it.
    facts : mapping
        What the answer says beside its rows.
    """

    drawing: Drawing
    moments: tuple[str, ...]
    quantiles: tuple[float, ...]
    facts: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the answer."""
        return (*self.moments, *(f"quantile_{q!r}" for q in self.quantiles))

    @property
    def n_values(self) -> int:
        """Numbers in the answer."""
        return len(self.drawing.cells) * self.drawing.n_out * len(self.names)

    def jobs(self, then: Callable[[Block | None], Any]) -> Iterator[Job]:
        """Yield the jobs; the last of some cells gives their `Block`, the others None."""
        ask = self.drawing
        tally: _Tally | None = None
        for start, stop, first, last in windows(len(ask.cells), ask.n_samples, ask.n_genes):
            if tally is None or tally.start != start:
                tally = _Tally(start, stop, self)

            def finish(draws: Draws, tally: _Tally = tally, n: int = last - first) -> Any:
                return then(tally.add(draws, n))

            yield ask.job(start, stop, first, last, finish)

    def schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""
        widths = dict.fromkeys(self.names, self.drawing.n_out)
        return dense_schema(widths, {**self.facts, "rows": len(self.drawing.cells)})

    def encode(self, result: Block | None) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        if result is None:
            return []
        return encode_dense(self.schema(), result.first_cell, result.columns)

    def as_json(self, results: Sequence[Block | None]) -> dict[str, Any]:
        """Return a matrix for each moment and quantile."""
        matrices = joined(self.names, results)
        return {"moments": {name: matrix.tolist() for name, matrix in matrices.items()}}

    @property
    def about(self) -> Annotation:
        """What the rows and columns of an answer are."""
        ask = self.drawing
        return Annotation(ask.cells, ask.names, ask.columns, self.facts)

    def as_matrices(self, results: Sequence[Block | None]) -> Matrices:
        """Return a dense layer for each moment and quantile."""
        return Matrices(joined(self.names, results), {})


class _Tally:
    """What is known of the draws of some cells; exact, so their order does not matter."""

    def __init__(self, start: int, stop: int, task: MomentsTask) -> None:
        self.start = start
        self._task, self._seen = task, 0
        n_cells, n_out = stop - start, task.drawing.n_out
        self._sums = _Sums(n_cells, n_out) if task.moments else None
        self._histogram = Histogram(n_cells * n_out) if task.quantiles else None
        self._shape = (n_cells, n_out)

    def add(self, draws: Draws, n_samples: int) -> Block | None:
        """Take in `n_samples` more draws of each cell; return the block after the last."""
        drawing = self._task.drawing
        if drawing.columns is not None:
            draws = select_genes(draws, drawing.columns, drawing.n_genes)
        cell = np.repeat(np.arange(len(draws.indptr) - 1) // n_samples, np.diff(draws.indptr))
        place = cell * drawing.n_out + draws.indices
        self._seen += n_samples
        if self._sums is not None:
            self._sums.add(place, draws.counts)
        if self._histogram is not None:
            self._histogram.add(place, draws.counts)
        return self._block() if self._seen == drawing.n_samples else None

    def _block(self) -> Block:
        columns: list[NDArray[np.float64]] = []
        if self._sums is not None:
            moments = self._sums.moments(self._seen)
            columns += [moments[name] for name in self._task.moments]
        if self._histogram is not None:
            columns += self._histogram.quantiles(self._task.quantiles, self._seen)
        rows = [values.reshape(self._shape).astype(np.float32) for values in columns]
        return Block(self.start, dict(zip(self._task.names, rows, strict=True)))


class _Sums:
    """Running sums of each cell's draws of each gene."""

    def __init__(self, n_cells: int, n_genes: int) -> None:
        self._total, self._square, self._positive = (np.zeros(n_cells * n_genes) for _ in range(3))

    def add(self, place: NDArray[np.int64], counts: NDArray[np.int32]) -> None:
        """Take in more draws: `place` is ``cell * n_genes + gene`` of each count."""
        values, size = counts.astype(np.float64), len(self._total)
        self._total += np.bincount(place, values, size)
        self._square += np.bincount(place, values**2, size)
        self._positive += np.bincount(place, minlength=size)

    def moments(self, seen: int) -> dict[str, NDArray[np.float64]]:
        """Return every moment of `seen` draws, flat."""
        mean = self._total / seen
        return {
            "mean": mean,
            "var": np.maximum(self._square / seen - mean**2, 0.0),
            "zero_fraction": 1.0 - self._positive / seen,
        }


class Histogram:
    """How often each count was drawn at each place (a gene of a cell); zeros go without saying.

    Counts of draws repeat, so this is far smaller than the draws; at worst, where none repeats,
    it is as large as their non-zeros.

    Parameters
    ----------
    n_places : int
        Cells * genes.
    """

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._keys, self._times = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, place: NDArray[np.int64], counts: NDArray[np.int32]) -> None:
        """Take in counts above 0, each at its place."""
        keys, times = np.unique(place << 31 | counts.astype(np.int64), return_counts=True)
        if len(self._keys):
            every = np.concatenate([self._keys, keys])
            keys, inverse = np.unique(every, return_inverse=True)
            weights = np.concatenate([self._times, times]).astype(np.float64)
            times = np.bincount(inverse, weights).astype(np.int64)
        self._keys, self._times = keys, times

    def quantiles(self, quantiles: Sequence[float], seen: int) -> list[NDArray[np.float64]]:
        """Return quantiles of `seen` draws at each place.

        Parameters
        ----------
        quantiles : sequence of float
            From 0 to 1.
        seen : int
            Draws of each place.

        Returns
        -------
        list of arrays[n_places]
        """
        ends = np.searchsorted(self._keys, np.arange(1, self._n_places + 1) << 31)
        # Draws at or below each key, zeros not counted; `before` is where a place's own begin.
        below = np.cumsum(self._times)
        at_ends = np.concatenate([[0], below])[ends]
        before = np.concatenate([[0], at_ends[:-1]])
        zeros = seen - (at_ends - before)
        found = []
        for q in quantiles:
            rank = q * (seen - 1)
            low = self._ranked(int(rank), below, before, zeros)
            high = self._ranked(min(int(rank) + 1, seen - 1), below, before, zeros)
            found.append(low + (high - low) * (rank - int(rank)))
        return found

    def _ranked(
        self,
        rank: int,
        below: NDArray[np.int64],
        before: NDArray[np.int64],
        zeros: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Return the draw with `rank` smaller ones (from 0, in order) at each place."""
        values = np.zeros(self._n_places)
        positive = np.flatnonzero(zeros <= rank)
        wanted = before[positive] + (rank - zeros[positive])
        entry = np.searchsorted(below, wanted, side="right")
        values[positive] = self._keys[entry] & (2**31 - 1)
        return values
