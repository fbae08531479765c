"""What bulk work computes for a region of cells, and which columns and layers that fills.

A quantity of fixed width fills arrays whose row is a cell. Draws have no fixed width: they become
sparse layers, whose offsets are known only when all are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rayvaec.compiled import compiled
from rayvaec.errors import ConfigError
from rayvaec.infer import posterior
from rayvaec.infer.cells import Cells
from rayvaec.infer.likelihood import marginal_ll
from rayvaec.kernels.nb_sample import Draws as DrawnRows
from rayvaec.model.vaec import VAEC

REDUCTIONS = ("mean", "var", "zero_fraction")

_ROWS_PER_CALL = 8192
_SAMPLES_PER_CALL = 128
_CELLS_OF_SUMS = 256


class Width(NamedTuple):
    """Shape and type of one cell's entry in an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of a cell's entry."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Quantity(Protocol):
    """A result with one entry of fixed width a cell."""

    keyed: ClassVar[bool]
    """Whether it depends on the keys of the cells' noise."""

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return the arrays to fill, by their path in the AnnData, such as ``obsm/X_rayvaec``."""
        ...

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the cells' rows of every array."""
        ...


@dataclass(frozen=True)
class Latent:
    """Mean and variance of q(z | x, y)."""

    keyed: ClassVar[bool] = False

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obsm/X_rayvaec`` and ``obsm/X_rayvaec_var``, [n_cells, n_latent]."""
        width = Width((module.config.n_latent,), "float32")
        return {"obsm/X_rayvaec": width, "obsm/X_rayvaec_var": width}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return mean and variance."""
        mean, variance = posterior.latent(module, cells)
        return {"obsm/X_rayvaec": mean, "obsm/X_rayvaec_var": variance}


@dataclass(frozen=True)
class Expression:
    """Denoised expression: each gene's share of the expected counts."""

    keyed: ClassVar[bool] = False

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``layers/expression``, [n_cells, n_genes]."""
        return {"layers/expression": Width((module.config.n_input,), "float32")}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the shares; every row sums to 1."""
        return {"layers/expression": posterior.expression(module, cells)}


@dataclass(frozen=True)
class Elbo:
    """Evidence lower bound and reconstruction error of every cell, from the same draw of z.

    Parameters
    ----------
    seed : int
        Seed of z's noise.
    """

    seed: int = 0
    keyed: ClassVar[bool] = True

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obs/elbo`` and ``obs/reconstruction_error``, [n_cells]."""
        return dict.fromkeys(("obs/elbo", "obs/reconstruction_error"), Width((), "float64"))

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the bounds and errors, in nats."""
        error, divergence = posterior.bound_terms(module, cells, self.seed)
        return {"obs/elbo": -(error + divergence), "obs/reconstruction_error": error}


@dataclass(frozen=True)
class MarginalLL:
    """Marginal log-likelihood of every cell.

    Parameters
    ----------
    n_samples, seed : int
        Draws of z a cell, and the seed of all of them.
    """

    n_samples: int
    seed: int = 0
    keyed: ClassVar[bool] = True

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obs/marginal_ll``, [n_cells]."""
        return {"obs/marginal_ll": Width((), "float64")}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the estimates, in nats."""
        return {"obs/marginal_ll": marginal_ll(module, cells, self.n_samples, self.seed)}


@dataclass(frozen=True)
class Moments:
    """Moments over posterior-predictive draws that are not kept.

    Parameters
    ----------
    n_samples, seed : int
        Draws a cell, and the seed of all of them.
    reduce : tuple of str
        Which of `REDUCTIONS` to keep; ``var`` divides by n_samples, as `numpy.var` does.
    """

    n_samples: int
    seed: int
    reduce: tuple[str, ...]
    keyed: ClassVar[bool] = True

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return one layer a reduction, [n_cells, n_genes]."""
        width = Width((module.config.n_input,), "float32")
        return {f"layers/{name}": width for name in self.reduce}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the moments of each cell's draws."""
        shape = (len(cells), module.config.n_input)
        rows = {path: np.empty(shape, width.dtype) for path, width in self.widths(module).items()}
        for start in range(0, len(cells), _CELLS_OF_SUMS):
            part = cells.part(start, min(start + _CELLS_OF_SUMS, len(cells)))
            for name, moment in self._moments(module, part).items():
                rows[f"layers/{name}"][start : start + len(part)] = moment
        return rows

    def _moments(self, module: VAEC, cells: Cells) -> dict[str, NDArray[np.float64]]:
        shape = (len(cells), module.config.n_input)
        sums, squares, nonzero = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for window in _drawn_windows(module, cells, self.n_samples, self.seed):
            block = slice(window.start, window.stop)
            _add(*window.drawn, window.n_samples, sums[block], squares[block], nonzero[block])
        mean = sums / self.n_samples
        moments = {
            "mean": mean,
            "var": np.maximum(squares / self.n_samples - mean**2, 0),
            "zero_fraction": 1 - nonzero / self.n_samples,
        }
        return {name: moments[name] for name in self.reduce}


@dataclass(frozen=True)
class Draws:
    """Posterior-predictive draws, each a sparse layer ``sample_<i>``.

    Parameters
    ----------
    n_samples, seed : int
        Draws a cell, and the seed of all of them.
    """

    n_samples: int
    seed: int
    keyed: ClassVar[bool] = True


def check_reductions(reduce: tuple[str, ...]) -> None:
    """Refuse names that are no reductions.

    Parameters
    ----------
    reduce : tuple of str
        What was asked for.

    Raises
    ------
    ConfigError
        If a name is unknown or given twice.
    """
    for name in reduce:
        if name not in REDUCTIONS:
            raise ConfigError(
                f"there is no reduction {name!r}", f"choose from {', '.join(REDUCTIONS)}"
            )
        if reduce.count(name) > 1:
            raise ConfigError(f"the reduction {name} is given twice", "name it once")


class SampleMajor(NamedTuple):
    """Draws of a region, all cells of the first sample, then all of the second, and so on.

    Parameters
    ----------
    lengths : array[n_samples, n_cells] of int32
        Non-zeros of each row.
    indices : array[nnz] of uint16 or uint32
        Genes, ascending within a row.
    counts : array[nnz] of uint8, uint16 or uint32
        Counts, in the smallest type that holds all of them.
    """

    lengths: NDArray[np.int32]
    indices: NDArray[Any]
    counts: NDArray[Any]


def draw_sample_major(module: VAEC, cells: Cells, n_samples: int, seed: int) -> SampleMajor:
    """Draw counts for a region of cells.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
        The region's cells.
    n_samples, seed : int
        As in `rayvaec.infer.posterior.draw`.

    Returns
    -------
    SampleMajor
    """
    windows = list(_drawn_windows(module, cells, n_samples, seed))
    lengths = np.empty((n_samples, len(cells)), np.int32)
    for window in windows:
        lengths[window.rows] = np.diff(window.drawn.indptr).reshape(-1, window.n_samples).T
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths.ravel()).reshape(lengths.shape)
    largest = max((int(window.drawn.counts.max(initial=0)) for window in windows), default=0)
    nnz = int(lengths.sum(dtype=np.int64))
    indices = np.empty(nnz, np.min_scalar_type(module.config.n_input - 1))
    counts = np.empty(nnz, np.min_scalar_type(largest))
    for window in windows:
        _scatter(*window.drawn, starts[window.rows], indices, counts)
    return SampleMajor(lengths, indices, counts)


class _Window(NamedTuple):
    """Draws ``first .. last - 1`` of cells ``start .. stop - 1``; rows cell-major."""

    start: int
    stop: int
    first: int
    last: int
    drawn: DrawnRows

    @property
    def n_samples(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> tuple[slice, slice]:
        """Where the window stands in an array [n_samples, n_cells]."""
        return slice(self.first, self.last), slice(self.start, self.stop)


def _drawn_windows(module: VAEC, cells: Cells, n_samples: int, seed: int) -> Iterator[_Window]:
    """Draw a bounded number of rows at a time."""
    width = min(n_samples, _SAMPLES_PER_CALL)
    step = _ROWS_PER_CALL // width
    for start in range(0, len(cells), step):
        stop = min(start + step, len(cells))
        part = cells.part(start, stop)
        for first in range(0, n_samples, width):
            last = min(first + width, n_samples)
            drawn = posterior.draw(module, part, last - first, seed, first_sample=first)
            yield _Window(start, stop, first, last, drawn)


@compiled
def _scatter(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    starts: NDArray[Any],
    out_indices: NDArray[Any],
    out_counts: NDArray[Any],
) -> None:
    """Copy cell-major rows to where their sample and cell begin in the output."""
    n_samples, n_cells = starts.shape
    for cell in range(n_cells):
        for sample in range(n_samples):
            row = cell * n_samples + sample
            to = starts[sample, cell]
            for entry in range(indptr[row], indptr[row + 1]):
                out_indices[to] = indices[entry]
                out_counts[to] = counts[entry]
                to += 1


@compiled
def _add(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    n_samples: int,
    sums: NDArray[Any],
    squares: NDArray[Any],
    nonzero: NDArray[Any],
) -> None:
    """Add cell-major rows of draws to their cell's sums."""
    for row in range(len(indptr) - 1):
        cell = row // n_samples
        for entry in range(indptr[row], indptr[row + 1]):
            gene = indices[entry]
            count = np.float64(counts[entry])
            sums[cell, gene] += count
            squares[cell, gene] += count * count
            nonzero[cell, gene] += 1.0
