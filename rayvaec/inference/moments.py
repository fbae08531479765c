"""Moments and quantiles over posterior predictive draws, computed without keeping them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import ConfigError
from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.kernels.nb_sample import Draws
from rayvaec.model.vaec import VAEC
from rayvaec.util.numba_cache import compiled

MOMENTS = ("mean", "var", "zero_fraction")
QUANTILES = "quantiles"

_ROWS_PER_CALL = 8192
_SAMPLES_PER_CALL = 128


def check_reductions(reduce: Sequence[str], quantiles: Sequence[float]) -> None:
    """Refuse names of reductions, and quantiles, that do not exist.

    Parameters
    ----------
    reduce : sequence of str
        Some of `MOMENTS` and ``quantiles``.
    quantiles : sequence of float
        Which quantiles, if `reduce` asks for them.

    Raises
    ------
    ConfigError
        If a name is unknown or given twice, a quantile is not from 0 to 1 or given twice, or only
        one of ``quantiles`` in `reduce` and `quantiles` is given.
    """
    for name in reduce:
        if name not in (*MOMENTS, QUANTILES):
            raise ConfigError(
                f"there is no reduction {name!r}", f"choose from {', '.join((*MOMENTS, QUANTILES))}"
            )
        if list(reduce).count(name) > 1:
            raise ConfigError(f"the reduction {name} is given twice", "name it once")
    for quantile in quantiles:
        if not 0 <= quantile <= 1:
            raise ConfigError(f"there is no quantile {quantile!r}", "give numbers from 0 to 1")
        if list(quantiles).count(quantile) > 1:
            raise ConfigError(f"the quantile {quantile!r} is given twice", "name it once")
    if QUANTILES in reduce and not quantiles:
        raise ConfigError("nothing says which quantiles", "add some, such as 0.05, 0.5 and 0.95")
    if quantiles and QUANTILES not in reduce:
        raise ConfigError("quantiles are given and not reduced to", f"add {QUANTILES} to reduce")


def column_names(moments: Sequence[str], quantiles: Sequence[float]) -> tuple[str, ...]:
    """Return what moments and quantiles are called: ``mean``, ..., ``quantile_0.5``, ..."""
    return (*moments, *(f"quantile_{quantile!r}" for quantile in quantiles))


class DrawMoments:
    """Moments and quantiles of the draws of some cells; exact, so their order does not matter.

    Parameters
    ----------
    n_cells, n_genes : int
        Cells, and genes of a draw.
    moments : sequence of str
        ``mean``, ``var`` (divided by n_samples, as in `numpy.var`), ``zero_fraction``.
    quantiles : sequence of float
        From 0 to 1; between two draws as `numpy.quantile` has it.
    """

    def __init__(
        self, n_cells: int, n_genes: int, moments: Sequence[str], quantiles: Sequence[float]
    ) -> None:
        self.n_samples = 0
        self._shape = (n_cells, n_genes)
        self._moments, self._quantiles = tuple(moments), tuple(quantiles)
        self._sums = [np.zeros(self._shape) for _ in range(3)] if moments else None
        self._histogram = Histogram(n_cells * n_genes) if quantiles else None

    def add(self, draws: Draws, n_samples: int) -> None:
        """Take in `n_samples` more draws of every cell, cell-major."""
        self.n_samples += n_samples
        if self._sums is not None:
            _add(*draws, n_samples, *self._sums)
        if self._histogram is not None:
            cell = np.repeat(np.arange(len(draws.indptr) - 1) // n_samples, np.diff(draws.indptr))
            self._histogram.add(cell * self._shape[1] + draws.indices, draws.counts)

    @property
    def n_bytes(self) -> int:
        """Bytes of the sums and of the counts that are kept for quantiles."""
        sums = sum(each.nbytes for each in self._sums or ())
        return sums + (0 if self._histogram is None else self._histogram.n_bytes)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Return an array [n_cells, n_genes] of each moment and quantile, by `column_names`."""
        found: list[NDArray[np.float64]] = []
        if self._sums is not None:
            total, square, positive = self._sums
            mean = total / self.n_samples
            moments = {
                "mean": mean,
                "var": np.maximum(square / self.n_samples - mean**2, 0.0),
                "zero_fraction": 1.0 - positive / self.n_samples,
            }
            found += [moments[name] for name in self._moments]
        if self._histogram is not None:
            quantiles = self._histogram.quantiles(self._quantiles, self.n_samples)
            found += [values.reshape(self._shape) for values in quantiles]
        return dict(zip(column_names(self._moments, self._quantiles), found, strict=True))


class Window(NamedTuple):
    """Draws ``first .. last - 1`` of cells ``start .. stop - 1``; rows cell-major."""

    start: int
    stop: int
    first: int
    last: int
    drawn: Draws

    @property
    def n_samples(self) -> int:
        """Draws of each cell."""
        return self.last - self.first

    @property
    def rows(self) -> tuple[slice, slice]:
        """Where the window stands in an array [n_samples, n_cells]."""
        return slice(self.first, self.last), slice(self.start, self.stop)


def drawn_windows(module: VAEC, cells: Cells, n_samples: int, seed: int) -> Iterator[Window]:
    """Draw a bounded number of rows at a time."""
    width = min(n_samples, _SAMPLES_PER_CALL)
    step = _ROWS_PER_CALL // width
    for start in range(0, len(cells), step):
        stop = min(start + step, len(cells))
        part = cells.part(start, stop)
        for first in range(0, n_samples, width):
            last = min(first + width, n_samples)
            drawn = posterior.draw(module, part, last - first, seed, first_sample=first)
            yield Window(start, stop, first, last, drawn)


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

    @property
    def n_bytes(self) -> int:
        """Bytes of the counts that are kept."""
        return self._keys.nbytes + self._times.nbytes

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
