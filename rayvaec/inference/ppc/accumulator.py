"""Sufficient statistics of a check; their size is independent of the number of cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OBSERVED, REPLICATE, DRAWN = range(3)
"""The three data sets: the store's cells; the first draw of each, which is what they would look
like if the model were right; and all further draws."""

COUNT, SQUARE, NONZERO = range(3)
MEAN, VARIANCE, FOURTH, ZERO, ZERO_VARIANCE = range(5)

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Lower borders of the expression levels, in expected counts."""

PIT_BINS = 40
"""Borders of 50, 80 and 95 % intervals lie on borders of these bins."""

LIBRARY_STEP, LIBRARY_BINS = 0.02, 350
"""Bins of log10 of the library size, from 1 to 10 million counts."""


@dataclass(frozen=True)
class Panel:
    """Which genes are looked at label by label, and in pairs: bounded numbers of them.

    Parameters
    ----------
    label_column, pair_column : NDArray[n_genes] of int64
        Position of each of the model's genes among those, or -1.
    typical_library : float
        Counts that cells are scaled to before correlations are taken of log(1 + count).
    """

    label_column: NDArray[np.int64]
    pair_column: NDArray[np.int64]
    typical_library: float

    @property
    def label_genes(self) -> NDArray[np.int64]:
        """Genes that are looked at label by label, in the order of their positions."""
        return np.flatnonzero(self.label_column >= 0)[np.argsort(_kept(self.label_column))]

    @property
    def pair_genes(self) -> NDArray[np.int64]:
        """Genes that are looked at in pairs, in the order of their positions."""
        return np.flatnonzero(self.pair_column >= 0)[np.argsort(_kept(self.pair_column))]


def _kept(column: NDArray[np.int64]) -> NDArray[np.int64]:
    return column[column >= 0]


@dataclass
class Tally:
    """Sums over cells; D is 3 (`OBSERVED`, `REPLICATE`, `DRAWN`), labels are the store's.

    Parameters
    ----------
    cells : Array[n_labels]
        Number of cells.
    draws : Array[]
        Further draws a cell, n_samples - 1, times the number of tallies that were added up.
    genes : Array[D, 3, n_genes]
        Sum of counts, of their squares, number of non-zeros.
    expected : Array[5, n_genes]
        Given z, the sum of the counts' means, of their variances, of the variances of squared
        residuals, of the probabilities of zero, and of the variances of "it is zero".
    residual : Array[2, n_genes]
        Sum of squared differences from the mean given z, of `OBSERVED` and `REPLICATE`.
    label_genes : Array[D, n_labels, n_label_genes]
        Sum of counts.
    label_expected : Array[2, n_labels, n_label_genes]
        Sums of means and variances, as in `expected`.
    pit : Array[2, n_labels, n_levels, PIT_BINS]
        Histograms of the probability integral transform, of `OBSERVED` and `REPLICATE`.
    library : Array[D, n_labels, LIBRARY_BINS]
        Histograms of log10 of the library size.
    log_library : Array[D, n_labels]
        Sum of the natural logarithm of the library size.
    pair_sums : Array[D, n_labels, n_pair_genes]
        Sum of the normalised log(1 + count).
    pair_products : Array[D, n_labels, n_pair_genes, n_pair_genes]
        Sum of their products.
    bound : Array[3, n_labels]
        Sum of the evidence lower bound, of its square, and of the log-likelihood given z.
    prior_mean : Array[n_labels, n_latent]
        Sum of the means of z's prior.
    prior_products : Array[n_labels, n_latent, n_latent]
        Sum of the expectations of z z' under the prior.
    latent_mean, latent_variance : Array[n_labels, n_latent]
        Sums of mean and variance of q(z | x, y).
    latent_products : Array[n_labels, n_latent, n_latent]
        Sum of the products of its means.
    """

    cells: Array
    draws: Array
    genes: Array
    expected: Array
    residual: Array
    label_genes: Array
    label_expected: Array
    pit: Array
    library: Array
    log_library: Array
    pair_sums: Array
    pair_products: Array
    bound: Array
    prior_mean: Array
    prior_products: Array
    latent_mean: Array
    latent_variance: Array
    latent_products: Array

    @classmethod
    def empty(cls, n_genes: int, n_labels: int, n_latent: int, panel: Panel) -> Self:
        """Return sums over no cell."""
        n_own, n_pairs = len(panel.label_genes), len(panel.pair_genes)
        shapes: dict[str, tuple[int, ...]] = {
            "cells": (n_labels,),
            "draws": (),
            "genes": (3, 3, n_genes),
            "expected": (5, n_genes),
            "residual": (2, n_genes),
            "label_genes": (3, n_labels, n_own),
            "label_expected": (2, n_labels, n_own),
            "pit": (2, n_labels, len(LEVELS), PIT_BINS),
            "library": (3, n_labels, LIBRARY_BINS),
            "log_library": (3, n_labels),
            "pair_sums": (3, n_labels, n_pairs),
            "pair_products": (3, n_labels, n_pairs, n_pairs),
            "bound": (3, n_labels),
            "prior_mean": (n_labels, n_latent),
            "prior_products": (n_labels, n_latent, n_latent),
            "latent_mean": (n_labels, n_latent),
            "latent_variance": (n_labels, n_latent),
            "latent_products": (n_labels, n_latent, n_latent),
        }
        return cls(**{name: np.zeros(shape) for name, shape in shapes.items()})

    def __iadd__(self, other: Self) -> Self:
        for name, array in vars(self).items():
            array += getattr(other, name)
        return self

    def __sub__(self, other: Self) -> Self:
        return type(self)(
            **{name: array - getattr(other, name) for name, array in vars(self).items()}
        )

    @staticmethod
    def total(tallies: Iterable[Tally]) -> Tally:
        """Return the sum of at least one tally."""
        first, *others = tallies
        result = Tally(**{name: array.copy() for name, array in vars(first).items()})
        for other in others:
            result += other
        return result

    def n_rows(self, dataset: int) -> Array:
        """Return the rows of each label in a data set."""
        return self.cells * (self.draws_a_cell if dataset == DRAWN else 1)

    @property
    def draws_a_cell(self) -> float:
        """Further draws of every cell."""
        return float(self.draws / max(self.cells.sum(), 1))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read sums from an npz file."""
        with np.load(path) as arrays:
            return cls(**arrays)


def panel_of(
    gene_totals: Mapping[str, int], genes: Iterable[str], n_labels: int, typical_library: float
) -> Panel:
    """Choose the genes with the most counts.

    Parameters
    ----------
    gene_totals : mapping of str to int
        Counts of each gene in the store.
    genes : iterable of str
        The model's genes.
    n_labels : int
        Labels of the store.
    typical_library : float
        As in `Panel`.

    Returns
    -------
    Panel
        With at most `LABEL_ELEMENTS` elements over all labels, and `PAIR_ELEMENTS` pairs.
    """
    names = list(genes)
    totals = np.array([gene_totals[name] for name in names])
    order = np.argsort(-totals, kind="stable")
    n_own = max(LABEL_ELEMENTS // max(n_labels, 1), 1)
    n_pairs = min(int(np.sqrt(PAIR_ELEMENTS / max(n_labels, 1))), MOST_PAIR_GENES)
    columns = []
    for n in (n_own, n_pairs):
        column = np.full(len(names), -1, np.int64)
        column[order[:n]] = np.arange(min(n, len(names)))
        columns.append(column)
    return Panel(columns[0], columns[1], typical_library)


LABEL_ELEMENTS = 200_000
PAIR_ELEMENTS = 200_000
MOST_PAIR_GENES = 50
