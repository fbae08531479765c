"""Per-cell outputs of bulk inference: draws, moments, latent variables, expression, ELBO."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayvaec.inference import posterior
from rayvaec.inference.analyses.marginal_likelihood import marginal_ll
from rayvaec.inference.bulk.actors import Crew
from rayvaec.inference.bulk.job import Job
from rayvaec.inference.bulk.worker import RegionWorker, Task
from rayvaec.inference.bulk.zarr_output import Width, create_output, write_obs
from rayvaec.inference.cells import Cells
from rayvaec.inference.moments import DrawMoments, column_names, drawn_windows
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.model.vaec import VAEC

_CELLS_OF_SUMS = 256


class Quantity(Task):
    """A result with one entry of fixed width a cell."""

    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad")

    keyed: ClassVar[bool] = False
    """Whether it depends on the keys of the cells' noise."""

    @abstractmethod
    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return the arrays to fill, by their path in the AnnData, such as ``obsm/X_rayvaec``."""

    @abstractmethod
    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the cells' rows of every array."""

    def bytes_per_cell(self, model: TrainedModel, nnz: float) -> float:
        """Return what a cell's entries take."""
        return sum(width.nbytes for width in self.widths(model.module).values())

    def begin(self, job: Job) -> None:
        """Create an AnnData with empty arrays."""
        create_output(job, self.widths(job.inputs.model.module))

    def region(self, worker: RegionWorker, number: int) -> dict[str, Any]:
        """Compute a region and write its rows; return an empty record."""
        region = worker.region(number)
        model, store_cells = worker.models[0]
        rows, names, cells = store_cells.read(region.start, region.stop, keyed=self.keyed)
        write_obs(worker.root, worker.store.registry, region.start, names, rows)
        for path, values in self.values(model.module, cells).items():
            worker.root[path][region.start : region.stop] = values  # type: ignore[index]
        return {}

    def finish(self, job: Job, crew: Crew, records: dict[int, Any]) -> None:
        """Do nothing: all is written."""


@dataclass(frozen=True)
class Latent(Quantity):
    """Mean and variance of q(z | x, y)."""

    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad", ".csv", ".parquet")

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obsm/X_rayvaec`` and ``obsm/X_rayvaec_var``, [n_cells, n_latent]."""
        width = Width((module.config.n_latent,), "float32")
        return {"obsm/X_rayvaec": width, "obsm/X_rayvaec_var": width}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return mean and variance."""
        mean, variance = posterior.latent(module, cells)
        return {"obsm/X_rayvaec": mean, "obsm/X_rayvaec_var": variance}


@dataclass(frozen=True)
class Expression(Quantity):
    """Denoised expression: each gene's share of the expected counts."""

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``layers/expression``, [n_cells, n_genes]."""
        return {"layers/expression": Width((module.config.n_input,), "float32")}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the shares; every row sums to 1."""
        return {"layers/expression": posterior.expression(module, cells)}


@dataclass(frozen=True)
class Elbo(Quantity):
    """Evidence lower bound and reconstruction error of every cell, from the same draw of z.

    Parameters
    ----------
    seed : int
        Seed of z's noise.
    """

    seed: int = 0
    keyed: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad", ".csv", ".parquet")

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obs/elbo`` and ``obs/reconstruction_error``, [n_cells]."""
        return dict.fromkeys(("obs/elbo", "obs/reconstruction_error"), Width((), "float64"))

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the bounds and errors, in nats."""
        error, divergence = posterior.bound_terms(module, cells, self.seed)
        return {"obs/elbo": -(error + divergence), "obs/reconstruction_error": error}


@dataclass(frozen=True)
class MarginalLL(Quantity):
    """Marginal log-likelihood of every cell.

    Parameters
    ----------
    n_samples, seed : int
        Draws of z a cell, and the seed of all of them.
    """

    n_samples: int
    seed: int = 0
    keyed: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = (".zarr", ".h5ad", ".csv", ".parquet")

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return ``obs/marginal_ll``, [n_cells]."""
        return {"obs/marginal_ll": Width((), "float64")}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the estimates, in nats."""
        return {"obs/marginal_ll": marginal_ll(module, cells, self.n_samples, self.seed)}


@dataclass(frozen=True)
class Moments(Quantity):
    """Moments and quantiles over posterior-predictive draws that are not kept.

    Parameters
    ----------
    n_samples, seed : int
        Draws a cell, and the seed of all of them.
    reduce : tuple of str
        Which moments to keep; ``var`` divides by n_samples, as `numpy.var` does.
    quantiles : tuple of float
        Which quantiles to keep, from 0 to 1, as `numpy.quantile` has them.
    """

    n_samples: int
    seed: int
    reduce: tuple[str, ...]
    quantiles: tuple[float, ...] = ()
    keyed: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the task from others, JSON-able."""
        identity = super().identity()
        if not self.quantiles:
            del identity["quantiles"]
        return identity

    def widths(self, module: VAEC) -> dict[str, Width]:
        """Return one layer a moment and quantile, [n_cells, n_genes]."""
        width = Width((module.config.n_input,), "float32")
        names = column_names(self.reduce, self.quantiles)
        return {f"layers/{name}": width for name in names}

    def values(self, module: VAEC, cells: Cells) -> dict[str, NDArray[Any]]:
        """Return the moments and quantiles of each cell's draws."""
        shape = (len(cells), module.config.n_input)
        rows = {path: np.empty(shape, width.dtype) for path, width in self.widths(module).items()}
        # Sums of a region at once would take gigabytes.
        for start in range(0, len(cells), _CELLS_OF_SUMS):
            part = cells.part(start, min(start + _CELLS_OF_SUMS, len(cells)))
            found: DrawMoments | None = None
            for window in drawn_windows(module, part, self.n_samples, self.seed):
                if found is None or window.first == 0:
                    n_cells = window.stop - window.start
                    found = DrawMoments(n_cells, shape[1], self.reduce, self.quantiles)
                found.add(window.drawn, window.n_samples)
                if found.n_samples == self.n_samples:
                    here = slice(start + window.start, start + window.stop)
                    for name, values in found.columns().items():
                        rows[f"layers/{name}"][here] = values
        return rows
