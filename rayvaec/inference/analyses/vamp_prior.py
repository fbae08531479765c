"""Empirical ("VampPrior") prior over z for each label, as used by DestVI.

k-means of the cells' posterior means within each label; a cluster becomes a Gaussian with the
moments of the mixture of its cells' posteriors. Only posteriors are kept of the cells, and where a
label has more than `MOST_POINTS` of them, neighbours are merged into points that carry the moments
of all their cells: memory does not grow with the data, and moments stay exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import ConfigError
from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.kernels import transfer
from rayvaec.model.losses import MIXTURE_FLOOR
from rayvaec.model.precision import in_working_precision
from rayvaec.model.vaec import VAEC

MOST_POINTS = 2**16
"""Points of a label that are kept; beyond, they are merged to `FEWEST_POINTS`."""

FEWEST_POINTS = 2**12

RESTARTS = 10
"""Starts of k-means, of which the best is kept."""


class Points(NamedTuple):
    """Cells' posteriors, or moments of several merged.

    Parameters
    ----------
    label : array[n_points] of int64
        Label codes.
    weight : array[n_points] of float64
        Cells behind each point.
    mean, variance : array[n_points, n_latent] of float64
        Moments of the mixture of their posteriors.
    """

    label: NDArray[np.int64]
    weight: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def chosen(self, which: NDArray[Any]) -> Points:
        """Return the points that an index or a mask chooses."""
        return Points(*(values[which] for values in self))


def points_of(module: VAEC, cells: Cells) -> Points:
    """Return every cell as a point."""
    mean, variance = posterior.latent(module, cells)
    return Points(
        cells.labels, np.ones(len(cells)), mean.astype(np.float64), variance.astype(np.float64)
    )


def gathered(parts: Iterable[Points]) -> Points:
    """Join points, merging neighbours of a label once it has more than `MOST_POINTS`.

    Parameters
    ----------
    parts : iterable of Points
        At least one; the order may matter in the digits where something is merged.

    Returns
    -------
    Points
        Sorted by label.
    """
    kept: dict[int, list[Points]] = {}
    for part in parts:
        for label in np.unique(part.label).tolist():
            own = kept.setdefault(label, [])
            own.append(part.chosen(part.label == label))
            if sum(len(points.label) for points in own) > MOST_POINTS:
                kept[label] = [_merged(_joined(own))]
    return _joined([_joined(kept[label]) for label in sorted(kept)])


def prior_of(points: Points, n_labels: int, p: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return the empirical prior.

    Parameters
    ----------
    points : Points
        From `gathered`.
    n_labels, p : int
        Labels, and clusters of each. A label with no more cells than that gets one cluster a cell;
        clusters beyond have weight 0, mean 0 and variance 1.
    seed : int
        Seed of k-means' starts.

    Returns
    -------
    dict
        ``mean_vprior``, ``var_vprior`` (array[n_labels, p, n_latent]) and ``weights_vprior``
        (array[n_labels, p], rows sum to 1, or to 0 of a label without cells).
    """
    n_latent = points.mean.shape[1]
    mean, variance = np.zeros((n_labels, p, n_latent)), np.ones((n_labels, p, n_latent))
    weights = np.zeros((n_labels, p))
    for label in np.unique(points.label).tolist():
        clusters = _clusters(points.chosen(points.label == label), p, seed)
        first = slice(len(clusters.label))
        mean[label, first], variance[label, first] = clusters.mean, clusters.variance
        weights[label, first] = clusters.weight / clusters.weight.sum()
    return {"mean_vprior": mean, "var_vprior": variance, "weights_vprior": weights}


def learned_prior(module: VAEC) -> dict[str, NDArray[np.float64]]:
    """Return the mixture prior of a model that has one, in the same form."""
    module = in_working_precision(module)
    deviation = module.prior_log_std.exp() + MIXTURE_FLOOR
    prior = {
        "mean_vprior": module.prior_means,
        "var_vprior": deviation**2,
        "weights_vprior": module.prior_logits.softmax(-1),
    }
    return {name: transfer.to_host(value.double()) for name, value in prior.items()}


def check_clusters(p: int, seed: int) -> None:
    """Refuse a number of clusters below 1 and a seed that k-means does not take."""
    if p < 1:
        raise ConfigError(f"p={p} clusters are no prior", "give a whole number >= 1")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is out of range", "give a whole number from 0 to 2**32 - 1")


def _clusters(points: Points, p: int, seed: int) -> Points:
    if len(points.label) <= p:
        return points
    from sklearn.cluster import KMeans

    kmeans = KMeans(n_clusters=p, n_init=RESTARTS, random_state=seed)
    return _moments(points, kmeans.fit_predict(points.mean, sample_weight=points.weight))


def _merged(points: Points) -> Points:
    """Merge neighbours of one label: halve the points across their widest side, again and again."""
    cells = [np.arange(len(points.label))]
    while 2 * len(cells) <= FEWEST_POINTS:
        halves = []
        for cell in cells:
            side = int(np.ptp(points.mean[cell], axis=0).argmax())
            order = np.argpartition(points.mean[cell, side], len(cell) // 2)
            halves += np.split(cell[order], [len(cell) // 2])
        cells = halves
    assignment = np.empty(len(points.label), np.int64)
    for number, cell in enumerate(cells):
        assignment[cell] = number
    return _moments(points, assignment)


def _moments(points: Points, assignment: NDArray[np.integer[Any]]) -> Points:
    """Return one point for each cluster, with the moments of the mixture of its points."""
    weight = np.bincount(assignment, points.weight).astype(np.float64)

    def average(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = [np.bincount(assignment, points.weight * column) for column in values.T]
        return np.stack(sums, 1) / weight[:, None]

    mean = average(points.mean)
    variance = average(points.variance + (points.mean - mean[assignment]) ** 2)
    return Points(np.full(len(weight), points.label[0]), weight, mean, variance)


def _joined(parts: list[Points]) -> Points:
    return Points(*(np.concatenate(values) for values in zip(*parts, strict=True)))
