"""Response plans: how each route splits a request into jobs and assembles the response.

A task knows neither HTTP nor threads. Its jobs end in numpy (for JSON, joined at the end) or go
through `encode` to pieces of an Arrow stream, which can be sent before the next job is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.inference.cells import Cells
from rayvaec.kernels.nb_sample import Draws
from rayvaec.protocol import (
    DrawnRows,
    dense_schema,
    draws_schema,
    encode_dense,
    encode_draws,
    stream_start,
)
from rayvaec.serving.encoding.h5ad import Annotation
from rayvaec.serving.engine.jobs import Job, windows


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


@dataclass(frozen=True)
class Matrices:
    """Matrices of an h5ad answer, one row per cell.

    Parameters
    ----------
    layers : mapping
        Cells x genes, sparse or dense, by name.
    obsm : mapping
        Cells x latent dimensions, by name.
    """

    layers: Mapping[str, Any]
    obsm: Mapping[str, Any]


class ResponsePlan(Protocol):
    """Checked work of one request."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the answer says beside its rows."""
        ...

    @property
    def n_values(self) -> int:
        """Numbers in a dense answer; 0 for draws, which are bounded by their cost."""
        ...

    @property
    def tally_bytes(self) -> int:
        """Bytes of what is kept from one job to the next."""
        ...

    def jobs(self, then: Callable[[Any], Any]) -> Iterator[Job]:
        """Yield the jobs, each job's result handed to `then`."""
        ...

    @property
    def start(self) -> bytes:
        """First bytes of the Arrow answer: its schema."""
        ...

    def encode(self, result: Any) -> list[bytes]:
        """Write a job's result as pieces of the Arrow answer."""
        ...

    def as_json(self, results: Sequence[Any]) -> dict[str, Any]:
        """Return what a JSON answer holds beside the facts; arrays stand for lists."""
        ...

    @property
    def about(self) -> Annotation:
        """What the rows and columns of an answer are."""
        ...

    def as_matrices(self, results: Sequence[Any]) -> Matrices:
        """Return what an h5ad answer holds."""
        ...


class ArrowAnswer(ABC):
    """Schema of an Arrow answer, made once a request: it may name a million genes."""

    @abstractmethod
    def _schema(self) -> pa.Schema:
        """Return the schema of the Arrow answer."""

    @cached_property
    def schema(self) -> pa.Schema:
        """Schema of the Arrow answer; its metadata has the facts."""
        return self._schema()

    @cached_property
    def start(self) -> bytes:
        """First bytes of the Arrow answer."""
        return stream_start(self.schema)


@dataclass(frozen=True)
class SamplingSpec:
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
        As in `rayvaec.inference.posterior.draw`.
    n_genes : int
        The model's number of genes.
    columns : array[n_out] of int64, optional
        Genes that the answer holds, in its order; all by default.
    names : sequence of str, optional
        Of the cells.
    """

    kind: Literal["draw", "generate"]
    cells: Cells
    library: NDArray[np.float32] | None
    n_samples: int
    seed: int
    n_genes: int
    columns: NDArray[np.int64] | None
    names: Sequence[str | None] | None

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
class DrawPlan(ArrowAnswer):
    """Draws, as they are.

    Parameters
    ----------
    drawing : SamplingSpec
        Which.
    facts : mapping
        What the answer says beside its rows.
    """

    drawing: SamplingSpec
    facts: Mapping[str, Any]
    n_values: int = 0
    tally_bytes: int = 0

    def jobs(self, then: Callable[[DrawnRows], Any]) -> Iterator[Job]:
        """Yield the jobs; their results are `DrawnRows`."""
        ask = self.drawing
        for start, stop, first, last in windows(len(ask.cells), ask.n_samples, ask.n_genes):

            def finish(draws: Draws, at: tuple[int, int, int, int] = (start, stop, first, last)):  # type: ignore[no-untyped-def]
                return then(self._rows(draws, *at))

            yield ask.job(start, stop, first, last, finish)

    def _schema(self) -> pa.Schema:
        rows = len(self.drawing.cells) * self.drawing.n_samples
        return draws_schema({**self.facts, "rows": rows})

    def encode(self, result: DrawnRows) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        return encode_draws(self.schema, result)

    def as_json(self, results: Sequence[DrawnRows]) -> dict[str, Any]:
        """Return all rows as one CSR matrix."""
        lengths = [np.diff(rows.indptr) for rows in results]
        return {
            "draws": {
                "indptr": np.cumsum(np.concatenate([[0], *lengths])),
                "indices": np.concatenate([rows.indices for rows in results]),
                "counts": np.concatenate([rows.counts for rows in results]),
            }
        }

    @property
    def about(self) -> Annotation:
        """What the rows and columns of an answer are."""
        ask = self.drawing
        return Annotation(ask.cells, ask.names, ask.columns, self.facts)

    def as_matrices(self, results: Sequence[DrawnRows]) -> Matrices:
        """Return a sparse layer for each draw."""
        from scipy import sparse

        ask = self.drawing
        lengths = np.concatenate([np.diff(rows.indptr) for rows in results])
        every = sparse.csr_matrix(
            (
                np.concatenate([rows.counts for rows in results]),
                np.concatenate([rows.indices for rows in results]),
                np.concatenate([[0], np.cumsum(lengths)]),
            ),
            shape=(len(ask.cells) * ask.n_samples, ask.n_out),
        )
        layers = {f"sample_{i}": every[i :: ask.n_samples] for i in range(ask.n_samples)}
        return Matrices(layers, {})

    def _rows(self, draws: Draws, start: int, stop: int, first: int, last: int) -> DrawnRows:
        cells = np.repeat(np.arange(start, stop, dtype=np.int32), last - first)
        samples = np.tile(np.arange(first, last, dtype=np.int32), stop - start)
        if self.drawing.columns is not None:
            draws = select_genes(draws, self.drawing.columns, self.drawing.n_genes)
        return DrawnRows(cells, samples, draws.indptr, draws.indices, draws.counts)


@dataclass(frozen=True)
class DensePlan(ArrowAnswer):
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
    names : sequence of str, optional
        Of the cells.
    facts : mapping
        What the answer says beside its rows.
    """

    kind: Literal["latent", "expression"]
    cells: Cells
    n_genes: int
    widths: Mapping[str, int]
    columns: NDArray[np.int64] | None
    names: Sequence[str | None] | None
    facts: Mapping[str, Any]
    tally_bytes: int = 0

    @property
    def n_values(self) -> int:
        """Numbers in a JSON answer."""
        return len(self.cells) * sum(self.widths.values())

    def jobs(self, then: Callable[[Block], Any]) -> Iterator[Job]:
        """Yield the jobs; their results are `Block`."""
        for start, stop, _, _ in windows(len(self.cells), 1, self.n_genes):

            def finish(values: tuple[NDArray[np.float32], ...], start: int = start) -> Any:
                chosen = [v if self.columns is None else v[:, self.columns] for v in values]
                return then(Block(start, dict(zip(self.widths, chosen, strict=True))))

            yield Job(self.kind, self.cells.part(start, stop), finish)

    def _schema(self) -> pa.Schema:
        return dense_schema(self.widths, {**self.facts, "rows": len(self.cells)})

    def encode(self, result: Block) -> list[bytes]:
        """Write rows as pieces of the Arrow answer."""
        return encode_dense(self.schema, result.first_cell, result.columns)

    def as_json(self, results: Sequence[Block]) -> dict[str, Any]:
        """Return a matrix for each column."""
        matrices = joined(tuple(self.widths), results)
        return {name: np.ascontiguousarray(matrix) for name, matrix in matrices.items()}

    @property
    def about(self) -> Annotation:
        """What the rows and columns of an answer are."""
        return Annotation(self.cells, self.names, self.columns, self.facts)

    def as_matrices(self, results: Sequence[Block]) -> Matrices:
        """Return the matrices as `rayvaec embed` and `rayvaec expression` name them."""
        matrices = joined(tuple(self.widths), results)
        if self.kind == "expression":
            return Matrices(matrices, {})
        return Matrices({}, {"X_rayvaec": matrices["mean"], "X_rayvaec_var": matrices["variance"]})


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


def joined(names: Sequence[str], results: Sequence[Block | None]) -> dict[str, NDArray[np.float32]]:
    """Return the matrix of each name, from the blocks of all rows in order."""
    blocks = [result for result in results if result is not None]
    return {name: np.concatenate([block.columns[name] for block in blocks]) for name in names}
