"""Per-gene lookup tables of the sampler.

    softplus form:  size_g = rate_g            odds_g = exp(px_r_g)
    softmax form:   size_g = exp(px_r_g)       odds_g = rate_g / size_g

The work of a draw is bounded: means above `MAX_MEAN` and log odds above `MAX_LOG_ODDS` are refused.
Up to there the probability of a draw that an int32 does not hold is below 1e-30.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import ConfigError, CountsError

MAX_MEAN = 1e8
MAX_LOG_ODDS = 17.0


class GeneTables(NamedTuple):
    """What the sweep reads per gene.

    Parameters
    ----------
    softmax : bool
        The form.
    odds_or_size : ndarray[n_genes]
        exp(px_r): odds in the softplus form, sizes in the softmax form.
    limit : ndarray[n_genes]
        Largest rate.
    cluster : ndarray[n_genes]
        log1p(odds), what a size is multiplied with to give lambda, in the softplus form; sizes in
        the softmax form.
    """

    softmax: bool
    odds_or_size: NDArray[np.float64]
    limit: NDArray[np.float32]
    cluster: NDArray[np.float32]

    def of(self, genes: slice) -> GeneTables:
        """Return the tables of some genes."""
        return GeneTables(
            self.softmax, self.odds_or_size[genes], self.limit[genes], self.cluster[genes]
        )


def gene_tables(px_r: NDArray[np.float64], generative: str) -> GeneTables:
    """Compute what the sweep reads per gene.

    Parameters
    ----------
    px_r : ndarray[n_genes]
        Logits (softplus form) or log theta (softmax form).
    generative : {"softplus", "softmax"}
        The form.

    Returns
    -------
    GeneTables

    Raises
    ------
    ConfigError
        If there is no such form.
    CountsError
        If a value is not finite.
    """
    if generative not in ("softplus", "softmax"):
        raise ConfigError(f"generative is {generative!r}", "choose softplus or softmax")
    if not np.isfinite(px_r).all():
        gene = int(np.flatnonzero(~np.isfinite(px_r))[0])
        raise CountsError(f"px_r of gene {gene} is {px_r[gene]}", "use a model with finite weights")
    # Beyond these every odds is 0 or refused, and float32 would over- or underflow.
    terms = np.exp(np.clip(px_r, -80.0, 80.0))
    if generative == "softmax":
        limit, cluster = np.minimum(MAX_MEAN, terms * math.exp(MAX_LOG_ODDS)), terms
    else:
        limit = np.where(px_r > MAX_LOG_ODDS, 0.0, np.minimum(MAX_MEAN / terms, 1e30))
        cluster = np.log1p(terms)
    return GeneTables(
        generative == "softmax", terms, limit.astype(np.float32), cluster.astype(np.float32)
    )


def refusal(
    rate: NDArray[np.float32], tables: GeneTables, first_row: int, first_gene: int
) -> CountsError:
    """Name the first value that is out of bounds.

    Parameters
    ----------
    rate : ndarray[n_rows, n_genes]
        Rows, in one of which there is such a value.
    tables : GeneTables
        Holds these genes' bounds.
    first_row, first_gene : int
        Numbers of the first row and gene, for the message.

    Returns
    -------
    CountsError
        To be raised.
    """
    row, gene = np.argwhere(~((rate >= 0) & (rate <= tables.limit)))[0]
    value = rate[row, gene]
    where = f"rate of row {first_row + row}, gene {first_gene + gene} is {value:g}"
    if not np.isfinite(value) or value < 0:
        return CountsError(where, "rates are finite and not negative: check the model's weights")
    return CountsError(
        f"{where}, at px_r for which draws are bounded by a rate of {tables.limit[gene]:.4g}",
        f"means go up to {MAX_MEAN:.0e} and log odds up to {MAX_LOG_ODDS:g}: draws must fit int32",
    )
