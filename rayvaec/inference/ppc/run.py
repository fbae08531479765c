"""Run a posterior predictive check over a store and write its report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayvaec.data.store.open import Store
from rayvaec.data.store.row_sample import RowSample, sample_rows
from rayvaec.errors import ModelError, RayvaecError, StoreError
from rayvaec.inference.bulk.job import Inputs
from rayvaec.inference.bulk.runner import open_inputs, run
from rayvaec.inference.ppc.accumulator import Panel, panel_of
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.worker import PosteriorCheck
from rayvaec.util.messages import join_names


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
    paths = [Path(path) for path in (model_path, against) if path is not None]
    with open_inputs(
        PosteriorCheck,
        paths,
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        _check_comparable(inputs)
        rows = _rows(inputs.store, config)
        return run(inputs, PosteriorCheck(config, rows, tuple(_panels(inputs))))


def _check_comparable(inputs: Inputs) -> None:
    """Refuse a second model whose figures would speak of other genes."""
    models, paths = inputs.models, inputs.paths
    first = set(models[0].registry.genes)
    for model, path in zip(models[1:], paths[1:], strict=True):
        differ = sorted(first ^ set(model.registry.genes))
        if differ:
            raise ModelError(
                f"{paths[0]} and {path} differ in {len(differ)} genes: {join_names(differ)}",
                "compare models of the same genes: a bound over other genes is another quantity",
            )


def _rows(store: Store, config: CheckConfig) -> RowSample:
    """Choose the cells to check, in an order in which every region stands for all of them."""
    rows = sample_rows(store, config.split, config.max_cells)
    if not len(rows):
        instead = "train" if config.split == "validation" else "all"
        raise StoreError(
            f"the store {store.path} has no {config.split} cells",
            f"check with --split={instead}"
            + ", which flatters a model that was trained on them, or prepare the store again with "
            "--val-fraction 0.1" * (config.split == "validation"),
        )
    return rows if store.is_shuffled else rows.mixed()


def _panels(inputs: Inputs) -> Iterator[Panel]:
    """Choose which genes of each model are looked at closely."""
    store = inputs.store
    manifest, labels = store.manifest, store.registry.labels
    totals = dict(zip(store.registry.genes, manifest.gene_totals, strict=True))
    typical = manifest.total_counts / manifest.n_cells
    for model in inputs.models:
        yield panel_of(totals, model.registry.genes, len(labels), typical)


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
