"""Worker of a posterior predictive check: measures regions of cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.store.row_sample import RowSample
from rayvaec.inference.bulk.actors import Crew
from rayvaec.inference.bulk.job import Inputs, Job, Regions
from rayvaec.inference.bulk.worker import RegionWorker, Task
from rayvaec.inference.ppc.accumulator import Panel, Tally
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.measure import measure
from rayvaec.inference.ppc.metrics import Estimates
from rayvaec.inference.ppc.report.page import write_report
from rayvaec.inference.ppc.report.report import build_report
from rayvaec.inference.ppc.report.sections import Points
from rayvaec.util.atomic import open_whole

GROUPS = 20
"""Groups of cells behind the errors of the figures."""

MAX_REGION = 8192
MAP_CELLS = 4000


@dataclass(frozen=True)
class PosteriorCheck(Task):
    """Draws of held-out cells, compared with the cells.

    Parameters
    ----------
    config : CheckConfig
        Which cells, how many draws, thresholds.
    rows : RowSample
        The cells; in an order in which every region stands for all of them.
    panels : tuple of Panel
        Which genes of each model are looked at closely.
    """

    config: CheckConfig
    rows: RowSample
    panels: tuple[Panel, ...]
    formats: ClassVar[tuple[str, ...]] = ()
    as_stored: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the task from others, JSON-able."""
        return {"quantity": "check", **self.config.identity(), "n_cells": len(self.rows)}

    def regions(self, inputs: Inputs) -> Regions:
        """Cut the cells into at least as many regions as there are groups."""
        return Regions(range(len(self.rows)), min(-(-len(self.rows) // GROUPS), MAX_REGION))

    def region(self, worker: RegionWorker, number: int) -> dict[str, Any]:
        """Measure one region with every model; return an empty record."""
        region, config = worker.region(number), self.config
        runs = self.rows.part(region.start, region.stop).runs
        positions = np.arange(region.start, region.stop)
        on_map = positions % -(-len(self.rows) // MAP_CELLS) == 0
        for which, (model, store_cells) in enumerate(worker.models):
            rows, _, cells = store_cells.read_runs(runs)
            module, panel = model.module, self.panels[which]
            tally = Tally.empty(
                module.config.n_input,
                len(worker.store.registry.labels),
                module.config.n_latent,
                panel,
            )
            mean = measure(module, cells, rows.labels, panel, config.n_samples, config.seed, tally)
            with open_whole(worker.part(_part(number, which, "tally"))) as file:
                np.savez(file, **vars(tally))
            points = {"labels": rows.labels[on_map], "means": mean[on_map]}
            with open_whole(worker.part(_part(number, which, "points"))) as file:
                np.savez(file, **points)
        return {}

    def finish(self, job: Job, crew: Crew, records: dict[int, Any]) -> dict[str, Any]:
        """Write the report and return it."""
        numbers, parts = range(len(job.regions)), job.state.parts
        estimates, points = [], []
        for which in range(len(job.inputs.models)):
            groups = [
                Tally.total(Tally.load(parts / _part(number, which, "tally")) for number in some)
                for first in range(min(GROUPS, len(numbers)))
                if (some := numbers[first::GROUPS])
            ]
            estimates.append(Estimates(groups))
            points.append(_read_points([parts / _part(n, which, "points") for n in numbers]))
        report = build_report(
            job.inputs, self.config, len(self.rows), self.panels, estimates, points
        )
        write_report(report, job.state.result)
        return report


def _part(region: int, model: int, what: str) -> str:
    """Return the name of what a region gave with a model: ``tally`` or ``points``."""
    return f"{region}.{model}.{what}.npz"


def _read_points(paths: list[Path]) -> Points:
    """Return the cells that the regions kept, region by region."""
    found: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
    for path in paths:
        with np.load(path) as arrays:
            found.append((arrays["labels"], arrays["means"]))
    labels, means = zip(*found, strict=True)
    return Points(labels=np.concatenate(labels), means=np.concatenate(means))
