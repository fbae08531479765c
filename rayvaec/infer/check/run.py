"""Check a model on a store: cut the cells into regions, have them measured, write the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import rayvaec
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.names import listing
from rayvaec.data.store import Store, open_store
from rayvaec.errors import ConfigError, ModelError, RayvaecError, StoreError
from rayvaec.files import bring_back, check_free
from rayvaec.infer.actors import actors, explained, run_stage
from rayvaec.infer.check.config import CheckConfig
from rayvaec.infer.check.figures import Estimates
from rayvaec.infer.check.page import write_report
from rayvaec.infer.check.report import build_report
from rayvaec.infer.check.tally import Tally, panel_of
from rayvaec.infer.check.worker import CheckedModel, CheckWork, CheckWorker, part, read_points
from rayvaec.infer.ledger import Ledger
from rayvaec.infer.store_cells import StoreCells
from rayvaec.infer.trained import TrainedModel, load_model
from rayvaec.location import location
from rayvaec.runtime import check_cpus, check_gpus, check_job_paths, check_seen, ray_session

GROUPS = 20
"""Groups of cells behind the errors of the figures."""

MAX_REGION = 8192
MAP_CELLS = 4000


def check_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    config: CheckConfig | None = None,
    *,
    against: str | Path | None = None,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare a model's draws with the cells that they should look like.

    Parameters
    ----------
    model_path, store_path : str or Path
        A saved model, and a store (path or URL) that has the model's genes and labels.
    out : str or Path
        Folder to write: ``index.html`` and ``report.json``.
    config : CheckConfig, optional
        Which cells, how many draws, thresholds; the defaults by default.
    against : str or Path, optional
        A second model, of the same genes, to be compared on the same cells.
    num_workers : int
        Ray actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.
    overwrite : bool
        Whether an existing report may be replaced.

    Returns
    -------
    dict
        What ``report.json`` holds.

    Raises
    ------
    ConfigError
        If an option is out of range, or Ray has fewer CPUs or GPUs than the workers need.
    StoreError
        If there is no such store, the split has no cells, or `out` exists.
    ModelError
        If there is no such model, it does not fit the store, or the two models differ in genes.
    RayvaecError
        If the work failed; finished regions are kept for a rerun.
    """
    config = config or CheckConfig()
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does nothing", "give a whole number >= 1")
    paths = [Path(model_path)] + ([Path(against)] if against is not None else [])
    where, out = location(store_path), Path(out)
    check_job_paths([*paths, out], [where])
    bring_back(out)
    check_free(out, overwrite)
    models = [load_model(path) for path in paths]
    registry = models[0].registry
    store = open_store(where, ObsKeys(registry.labels_key, registry.batch_key))
    for model in models:
        StoreCells(store, model.registry)
    _check_comparable(models, paths)
    rows = _rows(store, config)
    with ray_session():
        who = f"{num_workers} worker{'s' * (num_workers > 1)}"
        check_cpus(num_workers, who)
        check_gpus(num_workers * use_gpu, who)
        check_seen([*paths, where], [out])
        device = "cuda" if use_gpu else "cpu"
        ledger = Ledger(out.absolute(), _plan(config, models, store, len(rows), device))
        try:
            if not ledger.goes_on:
                ledger.begin()
            work = _work(models, paths, store, rows, config, ledger, device)
            with actors(CheckWorker, work, num_workers, use_gpu) as workers:
                _measure(workers, work, ledger)
            report = _report(work, models, store, config, ledger)
            write_report(report, ledger.output)
        except Exception as error:
            raise explained(error, ledger.folder) from error
    ledger.publish()
    return report


def _check_comparable(models: list[TrainedModel], paths: list[Path]) -> None:
    """Refuse a second model whose figures would speak of other genes."""
    first = set(models[0].registry.genes)
    for model, path in zip(models[1:], paths[1:], strict=True):
        differ = sorted(first ^ set(model.registry.genes))
        if differ:
            raise ModelError(
                f"{paths[0]} and {path} differ in {len(differ)} genes: {listing(differ)}",
                "compare models of the same genes: a bound over other genes is another quantity",
            )


def _rows(store: Store, config: CheckConfig) -> range:
    rows = store.rows(config.split)
    if not rows:
        instead = "train" if config.split == "validation" else "all"
        raise StoreError(
            f"the store {store.path} has no {config.split} cells",
            f"check with --split {instead}"
            + ", which flatters a model that was trained on them, or prepare the store again with "
            "--val-fraction 0.1" * (config.split == "validation"),
        )
    return rows[: config.max_cells]


def _plan(
    config: CheckConfig, models: list[TrainedModel], store: Store, n_cells: int, device: str
) -> dict[str, Any]:
    return {
        "quantity": "check",
        **config.identity(),
        "n_cells": n_cells,
        "models": [model.hash for model in models],
        "store": store.hash,
        "rayvaec_version": rayvaec.__version__,
        "device": device,
    }


def _work(
    models: list[TrainedModel],
    paths: list[Path],
    store: Store,
    rows: range,
    config: CheckConfig,
    ledger: Ledger,
    device: str,
) -> CheckWork:
    manifest = store.manifest
    totals = dict(zip(store.registry.genes, manifest.gene_totals, strict=True))
    typical = manifest.total_counts / manifest.n_cells
    checked = tuple(
        CheckedModel(
            os.path.abspath(path),
            model.hash,
            panel_of(totals, model.registry.genes, len(store.registry.labels), typical),
        )
        for model, path in zip(models, paths, strict=True)
    )
    return CheckWork(
        *(checked, store.share(ledger.folder), store.hash, rows.start, len(rows)),
        region=min(-(-len(rows) // GROUPS), MAX_REGION),
        n_samples=config.n_samples,
        seed=config.seed,
        point_stride=-(-len(rows) // MAP_CELLS),
        parts=str(ledger.parts),
        device=device,
    )


def _n_regions(work: CheckWork) -> int:
    return -(-work.n_cells // work.region)


def _measure(workers: list[Any], work: CheckWork, ledger: Ledger) -> None:
    numbers = range(_n_regions(work))
    calls = {number: ("region", (number,)) for number in numbers}
    sizes = {number: min(work.region, work.n_cells - number * work.region) for number in numbers}
    run_stage(workers, ledger, "regions", calls, sizes, "cells")


def _report(
    work: CheckWork,
    models: list[TrainedModel],
    store: Store,
    config: CheckConfig,
    ledger: Ledger,
) -> dict[str, Any]:
    numbers = range(_n_regions(work))
    estimates, points = [], []
    for which in range(len(models)):
        groups = [
            Tally.total(Tally.load(part(work.parts, number, which, "tally")) for number in some)
            for first in range(min(GROUPS, len(numbers)))
            if (some := numbers[first::GROUPS])
        ]
        estimates.append(Estimates(groups))
        points.append(read_points(ledger.parts, len(numbers), which))
    return build_report(work, models, store, config, estimates, points)


def fail_below(report: dict[str, Any], out: Path) -> None:
    """Raise if a figure is below its threshold.

    Parameters
    ----------
    report : dict
        What `check_store` returned.
    out : Path
        Where the report stands.

    Raises
    ------
    RayvaecError
        That names the figures.
    """
    below = [
        f"{name} is {'unknown' if at['value'] is None else format(at['value'], '.5g')}, "
        f"under {at['least']:g}"
        for name, at in report["thresholds"].items()
        if not at["met"]
    ]
    if below:
        raise RayvaecError(
            f"below --fail-under: {'; '.join(below)}", f"{out}/index.html shows what is wrong"
        )
