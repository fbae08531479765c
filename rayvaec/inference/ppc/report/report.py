"""Contents of ``report.json``: all results as one JSON-serialisable dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import rayvaec
from rayvaec.data.store.open import Store
from rayvaec.inference.bulk.job import Inputs
from rayvaec.inference.ppc.accumulator import Panel
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.interpretation import judge, summarise
from rayvaec.inference.ppc.metrics import FIGURES, Estimates
from rayvaec.inference.ppc.report.sections import (
    Points,
    calibration_of,
    correlations_of,
    genes_of,
    labels_of,
    latent_of,
    libraries_of,
    trend_of,
)
from rayvaec.inference.trained_model import TrainedModel

FORMAT_VERSION = 1
DIGITS = 5


def build_report(
    inputs: Inputs,
    config: CheckConfig,
    n_cells: int,
    panels: Sequence[Panel],
    estimates: Sequence[Estimates],
    points: Sequence[Points],
) -> dict[str, Any]:
    """Put a report together.

    Parameters
    ----------
    inputs : Inputs
        The model and the one it is compared with, and the store.
    config : CheckConfig
        What was asked for.
    n_cells : int
        Cells that were checked.
    panels : sequence of Panel
        Genes of each model that were looked at closely.
    estimates : sequence of Estimates
        Of each model.
    points : sequence of Points
        Of each model.

    Returns
    -------
    dict
        JSON-able; numbers have `DIGITS` digits, and what could not be computed is None.
    """
    store = inputs.store
    described = [
        _described(str(path.absolute()), model, panel, store, found, some)
        for path, model, panel, found, some in zip(
            inputs.paths, inputs.models, panels, estimates, points, strict=True
        )
    ]
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "rayvaec_version": rayvaec.__version__,
        "store": {"path": str(store.path), "hash": store.hash, "n_cells": store.n_cells},
        "cells": {
            "split": config.split,
            "n_cells": n_cells,
            "n_split_cells": len(store.rows(config.split)),
            "n_samples": config.n_samples,
            "seed": config.seed,
        },
        "models": described,
        "thresholds": _thresholds(config, estimates[0]),
    }
    if len(estimates) > 1:
        report["comparison"] = _comparison(estimates[0], estimates[1], store)
    return rounded(report)


def _described(
    path: str,
    model: TrainedModel,
    panel: Panel,
    store: Store,
    estimates: Estimates,
    points: Points,
) -> dict[str, Any]:
    total, genes, labels = estimates.total, model.registry.genes, store.registry.labels
    figures = _figures(estimates)
    found = {
        "genes": genes_of(total, genes),
        "labels": labels_of(estimates, labels, genes, panel),
        "calibration": calibration_of(total, labels),
    }
    return {
        "path": path,
        "hash": model.hash,
        "verdict": summarise(figures, found),
        "figures": figures,
        **found,
        "libraries": libraries_of(total, labels),
        "trend": trend_of(total),
        "correlations": correlations_of(total, labels, genes, panel),
        "latent": {"prior": model.module.config.prior, **latent_of(total, labels, points)},
    }


def _figures(estimates: Estimates) -> dict[str, Any]:
    shortfalls, shortfall_errors = estimates.shortfalls
    columns = (
        *(estimates.values, estimates.errors, estimates.references),
        *(shortfalls, shortfall_errors),
    )
    result = {}
    for (name, figure), *row in zip(FIGURES.items(), *columns, strict=True):
        value, error, reference, shortfall, shortfall_error = map(float, row)
        result[name] = {
            "about": figure.about,
            "value": value,
            "error": error,
            "reference": reference,
            "shortfall": shortfall,
            "shortfall_error": shortfall_error,
            "judged": judge(figure, value, shortfall, shortfall_error),
        }
    return result


def _thresholds(config: CheckConfig, estimates: Estimates) -> dict[str, Any]:
    values = dict(zip(FIGURES, estimates.values.tolist(), strict=True))
    return {
        name: {"least": least, "value": values[name], "met": bool(values[name] >= least)}
        for name, least in config.fail_under.items()
    }


def _comparison(first: Estimates, second: Estimates, store: Store) -> dict[str, Any]:
    differences, errors = first.better_than(second)
    figures = {
        name: {"difference": difference, "error": error}
        for name, difference, error in zip(FIGURES, differences, errors, strict=True)
    }
    bounds, bound_errors = first.label_bounds_over(second)
    return {
        "figures": figures,
        "elbo_per_label": {
            label: {"difference": difference, "error": error}
            for label, difference, error in zip(
                store.registry.labels, bounds, bound_errors, strict=True
            )
        },
    }


def rounded(value: Any) -> Any:
    """Return JSON-able data with numbers to `DIGITS` digits, None for what is not finite."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value
