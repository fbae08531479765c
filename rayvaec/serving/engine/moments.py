"""Moments and quantiles over draws that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from rayvaec.inference.moments import DrawMoments, column_names
from rayvaec.kernels.nb_sample import Draws
from rayvaec.protocol import dense_schema, encode_dense
from rayvaec.serving.encoding.h5ad import Annotation
from rayvaec.serving.engine.jobs import Job, windows
from rayvaec.serving.engine.plans import (
    ArrowAnswer,
    Block,
    Matrices,
    SamplingSpec,
    joined,
    select_genes,
)


@dataclass(frozen=True)
class MomentsPlan(ArrowAnswer):
    """Moments and quantiles of each cell's draws, in place of the draws.

    Parameters
    ----------
    drawing : SamplingSpec
        Which draws.
    moments : tuple of str
        ``mean``, ``var`` (divided by n_samples, as in `numpy.var`), ``zero_fraction``.
    quantiles : tuple of float
        From 0 to 1; between two draws as `numpy.quantile` has it.
    facts : mapping
        What the answer says beside its rows.
    """

    drawing: SamplingSpec
    moments: tuple[str, ...]
    quantiles: tuple[float, ...]
    facts: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the answer."""
        return column_names(self.moments, self.quantiles)

    @property
    def n_values(self) -> int:
        """Numbers in the answer."""
        return len(self.drawing.cells) * self.drawing.n_out * len(self.names)

    @cached_property
    def _running(self) -> list[_Tally]:
        """The tally that jobs are being added to, if there is one."""
        return []

    @property
    def tally_bytes(self) -> int:
        """Bytes of what is known of the draws so far."""
        return sum(tally.n_bytes for tally in self._running)

    def jobs(self, then: Callable[[Block | None], Any]) -> Iterator[Job]:
        """Yield the jobs; the last of some cells gives their `Block`, the others None."""
        ask = self.drawing
        tally: _Tally | None = None
        for start, stop, first, last in windows(len(ask.cells), ask.n_samples, ask.n_genes):
            if tally is None or tally.start != start:
                tally = _Tally(start, stop, self)

            def finish(draws: Draws, tally: _Tally = tally, n: int = last - first) -> Any:
                self._running[:] = [tally]
                return then(tally.add(draws, n))

            yield ask.job(start, stop, first, last, finish)

    def _schema(self) -> pa.Schema:
        widths = dict.fromkeys(self.names, self.drawing.n_out)
        return dense_schema(widths, {**self.facts, "rows": len(self.drawing.cells)})

    def encode(self, result: Block | None) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        if result is None:
            return []
        return encode_dense(self.schema, result.first_cell, result.columns)

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
    """What is known of the draws of some cells."""

    def __init__(self, start: int, stop: int, task: MomentsPlan) -> None:
        self.start, self._drawing = start, task.drawing
        n_cells, n_out = stop - start, task.drawing.n_out
        self._found = DrawMoments(n_cells, n_out, task.moments, task.quantiles)

    @property
    def n_bytes(self) -> int:
        """Bytes of sums and histogram."""
        return self._found.n_bytes

    def add(self, draws: Draws, n_samples: int) -> Block | None:
        """Take in `n_samples` more draws of each cell; return the block after the last."""
        if self._drawing.columns is not None:
            draws = select_genes(draws, self._drawing.columns, self._drawing.n_genes)
        self._found.add(draws, n_samples)
        if self._found.n_samples < self._drawing.n_samples:
            return None
        rows = {name: found.astype(np.float32) for name, found in self._found.columns().items()}
        return Block(self.start, rows)
