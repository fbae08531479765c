"""Sections of the report: genes, labels, calibration, library sizes, correlations, latent space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.inference.ppc.accumulator import (
    DRAWN,
    FOURTH,
    LEVELS,
    LIBRARY_BINS,
    LIBRARY_STEP,
    MEAN,
    NONZERO,
    OBSERVED,
    REPLICATE,
    VARIANCE,
    ZERO,
    ZERO_VARIANCE,
    Array,
    Panel,
    Tally,
)
from rayvaec.inference.ppc.metrics import (
    EXPRESSED,
    INTERVALS,
    Estimates,
    coverage,
    gene_moments,
    label_agreement,
    label_correlation_errors,
    label_correlations,
    prior_divergence,
    residual_ratio,
)

CAUTION = 3.0
"""Standard errors that count for nothing where genes are ranked by how far off they are."""

WORST_GENES, WORST_OF_LABEL = 15, 3
TREND_BINS = 20
ACTIVE = 0.01
"""Variance over cells of a latent dimension's mean, from which on it is in use (Burda et al. 2016,
Importance weighted autoencoders)."""


@dataclass(frozen=True)
class Points:
    """Some of the cells, for the latent map.

    Parameters
    ----------
    labels : NDArray[n] of int
        The store's label codes.
    means : NDArray[n, n_latent]
        Means of q(z | x, y).
    """

    labels: NDArray[Any]
    means: NDArray[np.float32]


def _ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerator / denominator


def _cautious(deviation: Array, z: Array) -> Array:
    """Return how large a deviation of so many standard errors is at least."""
    share = 1 - CAUTION / np.maximum(np.nan_to_num(np.abs(z)), CAUTION)
    return np.abs(deviation) * share


def genes_of(tally: Tally, genes: Sequence[str]) -> dict[str, Any]:
    """Return every gene's moments, observed and drawn, and the worst genes by name.

    ``z_*`` are deviations in standard errors, given z: standard normal if the model is right. A
    gene's ``noise_ratio`` is the variance that is observed around each cell's mean, over the one
    that the model gives it.
    """
    observed, drawn = gene_moments(tally, OBSERVED), gene_moments(tally, DRAWN)
    n = tally.cells.sum()
    expected, residual = tally.expected, tally.residual[OBSERVED]
    counts = observed["mean"] * n
    zeros = n - tally.genes[OBSERVED, NONZERO]
    noise_ratio = residual_ratio(tally, OBSERVED)
    z_mean = _ratio(counts - expected[MEAN], np.sqrt(expected[VARIANCE]))
    z_noise = _ratio(residual - expected[VARIANCE], np.sqrt(expected[FOURTH]))
    z_zeros = _ratio(zeros - expected[ZERO], np.sqrt(expected[ZERO_VARIANCE]))
    worst = {
        "mean": _cautious(np.log((counts + 0.5) / (expected[MEAN] + 0.5)), z_mean),
        "noise": _cautious(np.log(np.maximum(noise_ratio, 1e-9)), z_noise),
        "zeros": _cautious((zeros - expected[ZERO]) / n, z_zeros),
    }
    return {
        "names": list(genes),
        "observed_mean": observed["mean"],
        "drawn_mean": drawn["mean"],
        "observed_variance": observed["variance"],
        "drawn_variance": drawn["variance"],
        "observed_zero_fraction": 1 - observed["nonzero"],
        "drawn_zero_fraction": 1 - drawn["nonzero"],
        "z_mean": z_mean,
        "noise_ratio": noise_ratio,
        "z_noise": z_noise,
        "z_zero_fraction": z_zeros,
        "worst": {
            name: [genes[gene] for gene in _largest(score, WORST_GENES)]
            for name, score in worst.items()
        },
    }


def _largest(score: Array, n: int) -> list[int]:
    order = np.argsort(-score, kind="stable")[:n]
    return [int(at) for at in order if score[at] > 0]


def labels_of(
    estimates: Estimates, labels: Sequence[str], genes: Sequence[str], panel: Panel
) -> list[dict[str, Any]]:
    """Return what is known of every label: bound, agreement, coverage, worst genes."""
    tally = estimates.total
    bounds, errors = estimates.label_bounds()
    correlation = {data: label_correlation_errors(tally, data) for data in (OBSERVED, REPLICATE)}
    covered = coverage(tally.pit[OBSERVED, :, EXPRESSED:].sum(1))
    library = np.exp(_ratio(tally.log_library, np.stack([tally.n_rows(d) for d in range(3)])))
    divergence = prior_divergence(tally)
    result = []
    for code, label in enumerate(labels):
        result.append(
            {
                "label": label,
                "n_cells": int(tally.cells[code]),
                "elbo": bounds[code],
                "elbo_error": errors[code],
                "agreement": label_agreement(tally, OBSERVED, [code]),
                "agreement_reference": label_agreement(tally, REPLICATE, [code]),
                "correlation_error": np.sqrt(correlation[OBSERVED][code]),
                "correlation_error_reference": np.sqrt(correlation[REPLICATE][code]),
                "coverage": dict(zip(map(str, INTERVALS), covered[code], strict=True)),
                "observed_library": library[OBSERVED, code],
                "drawn_library": library[DRAWN, code],
                "prior_divergence": divergence[code],
                "worst_genes": _worst_of_label(tally, code, genes, panel),
            }
        )
    return result


def _worst_of_label(
    tally: Tally, code: int, genes: Sequence[str], panel: Panel
) -> list[dict[str, Any]]:
    counts = tally.label_genes[OBSERVED, code]
    expected, variance = tally.label_expected[:, code]
    fold = np.log((counts + 0.5) / (expected + 0.5))
    score = _cautious(fold, _ratio(counts - expected, np.sqrt(variance)))
    n = max(tally.cells[code], 1)
    return [
        {
            "gene": genes[panel.label_genes[at]],
            "observed_mean": counts[at] / n,
            "expected_mean": expected[at] / n,
        }
        for at in _largest(score, WORST_OF_LABEL)
    ]


def calibration_of(tally: Tally, labels: Sequence[str]) -> dict[str, Any]:
    """Return histograms of the probability transform and the coverage of intervals."""
    histogram = tally.pit[OBSERVED]
    by_level, by_label = histogram.sum(0), histogram[:, EXPRESSED:].sum(1)
    names = [f"{low:g} to {high:g}" for low, high in pairwise(LEVELS)]
    names.append(f"{LEVELS[-1]:g} and more")
    return {
        "intervals": INTERVALS,
        "levels": [
            {
                "expected_count": name,
                "n_counts": counts.sum(),
                "coverage": covered,
                "pit": _shares(counts),
            }
            for name, counts, covered in zip(names, by_level, coverage(by_level), strict=True)
        ],
        "labels": dict(zip(labels, coverage(by_label), strict=True)),
        "coverage": coverage(by_label.sum(0)),
        "pit": _shares(by_label.sum(0)),
    }


def _shares(histogram: Array) -> Array:
    return histogram / max(histogram.sum(), 1)


def libraries_of(tally: Tally, labels: Sequence[str]) -> dict[str, Any]:
    """Return histograms and medians of the library sizes, observed and drawn."""
    edges = 10 ** (LIBRARY_STEP * np.arange(LIBRARY_BINS + 1))
    histograms = tally.library.sum(1)
    used = np.flatnonzero(histograms.sum(0))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, 1)

    def median(histogram: Array) -> float:
        at = np.searchsorted(np.cumsum(histogram), histogram.sum() / 2)
        return float(np.sqrt(edges[at] * edges[at + 1])) if histogram.sum() else float("nan")

    return {
        "edges": edges[first : last + 1],
        "observed": _shares(histograms[OBSERVED, first:last]),
        "drawn": _shares(histograms[DRAWN, first:last]),
        "median": {
            label: {
                "observed": median(tally.library[OBSERVED, code]),
                "drawn": median(tally.library[DRAWN, code]),
            }
            for code, label in enumerate(labels)
        },
    }


def trend_of(tally: Tally) -> dict[str, Any]:
    """Return the genes' median variance at every mean, observed and drawn."""
    moments = {"observed": gene_moments(tally, OBSERVED), "drawn": gene_moments(tally, DRAWN)}
    means = np.concatenate([moment["mean"] for moment in moments.values()])
    if not (means > 0).any():
        return {"edges": [], "observed": [], "drawn": []}
    edges = np.geomspace(means[means > 0].min(), means.max() * (1 + 1e-9), TREND_BINS + 1)
    trend: dict[str, Any] = {"edges": edges}
    for name, moment in moments.items():
        at = np.digitize(moment["mean"], edges) - 1
        trend[name] = [
            float(np.median(moment["variance"][at == number])) if (at == number).sum() > 2 else None
            for number in range(TREND_BINS)
        ]
    return trend


def correlations_of(
    tally: Tally, labels: Sequence[str], genes: Sequence[str], panel: Panel
) -> dict[str, Any]:
    """Return the gene-gene correlations of every label: pairs above the diagonal, row by row."""
    observed, drawn = label_correlations(tally, OBSERVED), label_correlations(tally, DRAWN)
    return {
        "genes": [genes[gene] for gene in panel.pair_genes],
        "labels": {
            label: {"observed": observed[code], "drawn": drawn[code]}
            for code, label in enumerate(labels)
            if np.isfinite(observed[code]).any()
        },
    }


def latent_of(tally: Tally, labels: Sequence[str], points: Points) -> dict[str, Any]:
    """Return the map of some cells on the two principal axes of all cells' latent means.

    Principal components, since latent space has few dimensions: distances on the map are distances
    there, and the axes say how much of the variance they show.
    """
    n = max(tally.cells.sum(), 1)
    mean = tally.latent_mean.sum(0) / n
    covariance = tally.latent_products.sum(0) / n - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    variance = np.maximum(values[::-1], 0)
    within = tally.latent_products.sum(0) - sum(
        np.outer(m, m) / k for m, k in zip(tally.latent_mean, tally.cells, strict=True) if k
    )
    return {
        "variance_of_mean": np.diag(covariance),
        "active_dimensions": int((np.diag(covariance) > ACTIVE).sum()),
        "n_dimensions": len(mean),
        "share_of_variance": _shares(variance)[:2],
        "share_between_labels": 1 - _ratio(np.trace(within) / n, np.trace(covariance)),
        "points": {
            "label": [labels[code] for code in points.labels],
            "position": _projected(points.means - mean, axes),
        },
    }


def _projected(means: NDArray[Any], axes: Array) -> Array:
    projected = means @ axes
    return np.pad(projected, ((0, 0), (0, 2 - projected.shape[1])))
