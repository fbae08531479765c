"""Metrics of a posterior predictive check, each with its standard error.

A figure compares further draws with the observed cells. The same figure with the first draw of each
cell in the place of the observed one is its *reference*: what the model would reach if it were
right, with as many cells and draws. What is judged is the shortfall from it, so that noise in a
small store is not held against a model.

Errors are delete-a-group jackknife errors (Kott 2001, Journal of Official Statistics 17:521) over
groups of cells. They hold what another choice of cells and other draws would change, also for
differences of two models on the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayvaec.inference.ppc.accumulator import (
    COUNT,
    DRAWN,
    LEVELS,
    NONZERO,
    OBSERVED,
    PIT_BINS,
    REPLICATE,
    SQUARE,
    VARIANCE,
    Array,
    Tally,
)

ENOUGH_CELLS = 20
"""A gene is compared where this many cells have it, of the observed and the replicated on average;
a label's correlations, where it has more cells than this."""

FEWEST_GENES = 10
INTERVALS = (0.5, 0.8, 0.95)
EXPRESSED = LEVELS.index(1.0)
"""First of the levels that the coverage of intervals is taken over."""

Measure = Callable[[Tally, int], float]


@dataclass(frozen=True)
class Figure:
    """One of the figures.

    Parameters
    ----------
    measure : callable
        From a tally and the data set in the place of the data (`OBSERVED` or `REPLICATE`) to the
        figure; NaN where there are too few cells or genes.
    about : str
        What it is, for a person.
    good, fair : float, optional
        Shortfall from the reference up to which it is called so. None where there is no reference.
    """

    measure: Measure
    about: str
    good: float | None = None
    fair: float | None = None


def agreement(data: Array, draws: Array, enough: NDArray[np.bool_]) -> float:
    """Return 1 over the typical fold error: exp(-median |ln(draws / data)|).

    Parameters
    ----------
    data, draws : Array[n]
        What is compared, >= 0.
    enough : Array[n] of bool
        What takes part, if it is not zero in both.

    Returns
    -------
    float
        In [0, 1]; 1 if all are equal; NaN if fewer than `FEWEST_GENES` take part.
    """
    enough = enough & ((data > 0) | (draws > 0))
    if enough.sum() < FEWEST_GENES:
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(np.exp(-np.median(np.abs(np.log(draws[enough]) - np.log(data[enough])))))


def enough_cells(tally: Tally) -> NDArray[np.bool_]:
    """Return which genes are compared; observed and replicated cells count alike."""
    nonzero = tally.genes[[OBSERVED, REPLICATE], NONZERO].mean(0)
    return nonzero >= ENOUGH_CELLS


def gene_moments(tally: Tally, dataset: int) -> dict[str, Array]:
    """Return mean, variance and share of non-zero cells of every gene, Array[n_genes] each."""
    n = max(tally.n_rows(dataset).sum(), 1)
    mean, square, nonzero = tally.genes[dataset, [COUNT, SQUARE, NONZERO]] / n
    return {"mean": mean, "variance": np.maximum(square - mean**2, 0), "nonzero": nonzero}


def _of_genes(name: str) -> Measure:
    def measure(tally: Tally, data: int) -> float:
        of_data, of_draws = (gene_moments(tally, which)[name] for which in (data, DRAWN))
        return agreement(of_data, of_draws, enough_cells(tally))

    return measure


def residual_ratio(tally: Tally, data: int) -> Array:
    """Return each gene's squared distance from its mean given z, over what the model expects."""
    expected = tally.expected[VARIANCE]
    return np.divide(tally.residual[data], expected, where=expected > 0, out=np.ones_like(expected))


def _dispersion(tally: Tally, data: int) -> float:
    ratio = residual_ratio(tally, data)
    return agreement(ratio, np.ones_like(ratio), enough_cells(tally))


def _library(tally: Tally, data: int) -> float:
    means = [
        tally.log_library[which].sum() / max(tally.n_rows(which).sum(), 1)
        for which in (data, DRAWN)
    ]
    return float(np.exp(-abs(means[1] - means[0])))


def label_agreement(tally: Tally, data: int, labels: Sequence[int] | slice = slice(None)) -> float:
    """Return the agreement of the genes' means within some labels."""
    means = [
        tally.label_genes[which][labels] / np.maximum(tally.n_rows(which)[labels], 1)[:, None]
        for which in (data, DRAWN)
    ]
    counts = tally.label_genes[[OBSERVED, REPLICATE]].mean(0)[labels]
    return agreement(means[0].ravel(), means[1].ravel(), (counts >= ENOUGH_CELLS).ravel())


def label_correlations(tally: Tally, dataset: int) -> Array:
    """Return the genes' correlations within each label, Array[n_labels, n_pairs].

    The pairs are those above the diagonal; NaN where a gene does not vary, or cells are too few.
    """
    n = tally.n_rows(dataset)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = tally.pair_sums[dataset] / n
        product = tally.pair_products[dataset] / n[:, :, None]
        covariance = product - mean[:, :, None] * mean[:, None, :]
        variance = np.einsum("lgg->lg", covariance)
        variance = np.where(variance > 1e-9, variance, np.nan)
        correlation = covariance / np.sqrt(variance[:, :, None] * variance[:, None, :])
    correlation[tally.cells <= ENOUGH_CELLS] = np.nan
    return correlation[(slice(None), *np.triu_indices(correlation.shape[-1], 1))]


def label_correlation_errors(tally: Tally, data: int) -> Array:
    """Return the mean squared difference of correlations in each label, NaN where unknown."""
    found = label_correlations(tally, DRAWN) - label_correlations(tally, data)
    known = np.isfinite(found)
    total = np.where(known, found, 0)
    n = known.sum(1)
    return np.divide((total**2).sum(1), n, where=n > 0, out=np.full(len(n), np.nan))


def _correlation(tally: Tally, data: int) -> float:
    errors = label_correlation_errors(tally, data)
    known = np.isfinite(errors)
    if not known.any():
        return float("nan")
    return float(1 - np.sqrt(np.average(errors[known], weights=tally.cells[known])))


def coverage(histogram: Array) -> Array:
    """Return the share inside the central intervals `INTERVALS`; NaN where there is nothing.

    Parameters
    ----------
    histogram : Array[..., PIT_BINS]

    Returns
    -------
    Array[..., n_intervals]
    """
    total = histogram.sum(-1)
    shares = []
    for interval in INTERVALS:
        cut = round((1 - interval) / 2 * PIT_BINS)
        inside = histogram[..., cut : PIT_BINS - cut].sum(-1)
        shares.append(np.divide(inside, total, where=total > 0, out=np.full_like(total, np.nan)))
    return np.stack(shares, axis=-1)


def _calibration(number: int) -> Measure:
    def measure(tally: Tally, data: int) -> float:
        covered = coverage(tally.pit[data, :, EXPRESSED:].sum((0, 1)))[number]
        return float(1 - abs(covered - INTERVALS[number]))

    return measure


def prior_divergence(tally: Tally) -> Array:
    """Return how far each label's cells are from the prior in latent space, nats a dimension.

    That is KL(N(m, S) || N(m', S')) / n_latent with mean and covariance m, S of all of the label's
    q(z | x, y) taken together and m', S' of the prior; NaN where the label has too few cells. It
    matters since new cells are generated from the prior, whether or not real ones are there
    (Hoffman & Johnson 2016, ELBO surgery).
    """
    n_labels, n_latent = tally.latent_mean.shape
    result = np.full(n_labels, np.nan)
    for label in np.flatnonzero(tally.cells > ENOUGH_CELLS):
        n = tally.cells[label]
        m = tally.latent_mean[label] / n
        covariance = tally.latent_products[label] / n - np.outer(m, m)
        covariance += np.diag(tally.latent_variance[label] / n)
        prior_m = tally.prior_mean[label] / n
        prior = tally.prior_products[label] / n - np.outer(prior_m, prior_m)
        relative = np.linalg.solve(prior, covariance)
        _, log_determinant = np.linalg.slogdet(relative)
        distance = (m - prior_m) @ np.linalg.solve(prior, m - prior_m)
        divergence = np.trace(relative) + distance - n_latent - log_determinant
        result[label] = divergence / 2 / n_latent
    return result


def _prior_fit(tally: Tally, data: int) -> float:
    known = tally.cells > ENOUGH_CELLS
    if not known.any():
        return float("nan")
    n_latent = tally.latent_mean.shape[1]
    # Of n draws from the prior itself, the divergence has this expectation.
    divergence = (1 + (n_latent + 1) / 2) / (2 * np.maximum(tally.cells, 1))
    if data == OBSERVED:
        divergence = prior_divergence(tally)
    return float(np.exp(-np.average(divergence[known], weights=tally.cells[known])))


def _of_bound(row: int) -> Measure:
    def measure(tally: Tally, data: int) -> float:
        known = data == OBSERVED
        return float(tally.bound[row].sum() / tally.cells.sum()) if known else float("nan")

    return measure


FIGURES: dict[str, Figure] = {
    "elbo": Figure(_of_bound(0), "evidence lower bound, nats a cell"),
    "reconstruction": Figure(
        _of_bound(2), "log-likelihood of the counts given z, nats a cell: minus scvi-tools' error"
    ),
    "gene_mean": Figure(_of_genes("mean"), "agreement of the genes' means", 0.05, 0.15),
    "gene_variance": Figure(_of_genes("variance"), "agreement of the genes' variances", 0.05, 0.15),
    "gene_nonzero": Figure(
        _of_genes("nonzero"), "agreement of the share of cells that have a gene", 0.05, 0.15
    ),
    "dispersion": Figure(_dispersion, "agreement of the noise around a cell's mean", 0.05, 0.15),
    "library": Figure(_library, "agreement of the library sizes", 0.02, 0.10),
    "label_means": Figure(
        label_agreement, "agreement of the genes' means within labels", 0.05, 0.15
    ),
    "correlation": Figure(
        _correlation, "1 - difference of gene-gene correlations within labels", 0.03, 0.08
    ),
    **{
        f"calibration_{interval * 100:g}": Figure(
            _calibration(number),
            about=f"1 - |coverage of the {interval:.0%} interval - {interval:g}|",
            good=0.02,
            fair=0.05,
        )
        for number, interval in enumerate(INTERVALS)
    },
    "prior_fit": Figure(_prior_fit, "agreement of latent space with the prior", 0.05, 0.20),
}
"""All figures, by name."""


class Estimates:
    """The figures of one model, and how they vary from group to group of cells.

    Parameters
    ----------
    groups : sequence of Tally
        One tally a group of cells, each with at least one.
    """

    def __init__(self, groups: Sequence[Tally]) -> None:
        self.groups = groups
        self.total = Tally.total(groups)
        self._whole = self._measured(self.total)
        without = [self.total - group for group in groups] if len(groups) > 1 else []
        shape = (len(without), *self._whole.shape)
        self._without = np.array([self._measured(rest) for rest in without]).reshape(shape)

    def _measured(self, tally: Tally) -> Array:
        datasets = (OBSERVED, REPLICATE)
        return np.array(
            [[figure.measure(tally, data) for data in datasets] for figure in FIGURES.values()]
        )

    @property
    def values(self) -> Array:
        """The figures, Array[n_figures]."""
        return self._whole[:, 0]

    @property
    def references(self) -> Array:
        """What they would be if the model were right."""
        return self._whole[:, 1]

    @property
    def errors(self) -> Array:
        """Standard errors of the figures."""
        return jackknife_error(self._without[:, :, 0])

    @property
    def shortfalls(self) -> tuple[Array, Array]:
        """Reference minus figure, and its standard error."""
        return self.references - self.values, jackknife_error(
            self._without[:, :, 1] - self._without[:, :, 0]
        )

    def better_than(self, other: Estimates) -> tuple[Array, Array]:
        """Return these figures minus another model's on the same cells, and their errors."""
        return self.values - other.values, jackknife_error(
            self._without[:, :, 0] - other._without[:, :, 0]
        )

    def label_bounds(self) -> tuple[Array, Array]:
        """Return the mean evidence lower bound of each label, and its standard error over cells."""
        total = self.total
        n = np.where(total.cells > 0, total.cells, np.nan)
        mean = total.bound[0] / n
        return mean, np.sqrt(np.maximum(total.bound[1] / n - mean**2, 0) / n)

    def label_bounds_over(self, other: Estimates) -> tuple[Array, Array]:
        """Return each label's mean bound minus another model's on the same cells, and errors."""

        def difference(first: Tally, second: Tally) -> Array:
            n = np.where(first.cells > 0, first.cells, np.nan)
            return (first.bound[0] - second.bound[0]) / n

        without = [
            difference(self.total - mine, other.total - its)
            for mine, its in zip(self.groups, other.groups, strict=True)
        ]
        return difference(self.total, other.total), jackknife_error(np.array(without))


def jackknife_error(without: Array) -> Array:
    """Return the standard error of an estimate from its values without each of the groups.

    Parameters
    ----------
    without : Array[n_groups, ...]

    Returns
    -------
    Array[...], NaN where there are fewer than two groups
    """
    n = len(without)
    if n < 2:
        return np.full(without.shape[1:], np.nan)
    return np.sqrt((n - 1) / n * ((without - without.mean(0)) ** 2).sum(0))
