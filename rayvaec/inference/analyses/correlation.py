"""Gene-gene correlation of denoised draws (`get_feature_correlation_matrix`).

A draw is the negative binomial's own rate before the Poisson, a Gamma with the mean and dispersion
that the model gives a cell of a fixed size. So what counting adds is left out, and what cells of
one state differ by is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.inference.analyses.normalized_expression import Wanted, normalized_expression
from rayvaec.inference.cells import Cells
from rayvaec.kernels import transfer
from rayvaec.kernels.nb_loss import RATE_FLOOR
from rayvaec.kernels.rng import GAMMA, check_seed, stream_keys
from rayvaec.model.draws import BLOCK_ROWS
from rayvaec.model.vaec import VAEC


def denoised_draws(module: VAEC, cells: Cells, wanted: Wanted) -> Iterator[NDArray[np.float32]]:
    """Yield Gamma draws for a few cells at a time.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    wanted : Wanted
        Number and seed of the draws, `library_size` that the mean of a draw sums to, and one batch
        at most to decode as if from.

    Yields
    ------
    array[n_samples, n_some_cells, n_genes] of float32
    """
    px_r = transfer.to_host(module.px_r.double().exp())
    for start in range(0, len(cells), BLOCK_ROWS):
        part = cells.part(start, min(start + BLOCK_ROWS, len(cells)))
        mean = normalized_expression(module, part, wanted).reshape(wanted.n_samples, len(part), -1)
        drawn = np.empty_like(mean)
        for sample in range(wanted.n_samples):
            for row, key in enumerate(part.keys):
                words = stream_keys(GAMMA, check_seed(wanted.seed), key, np.uint64(sample))
                rng = np.random.Generator(np.random.Philox(key=np.array(words, np.uint64)))
                expected = np.maximum(mean[sample, row].astype(np.float64), RATE_FLOOR)
                # Softplus form: px_r is the logit, so each unit of the Gamma is worth exp(px_r).
                shape = expected / px_r if module.is_softplus else px_r
                drawn[sample, row] = rng.standard_gamma(shape) * (expected / shape)
        yield drawn


def pearson(blocks: Iterator[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the correlation matrix of columns that come a few rows at a time.

    Parameters
    ----------
    blocks : iterator of array[..., n_genes]

    Returns
    -------
    array[n_genes, n_genes], NaN for a gene that does not vary
    """
    n, origin = 0, None
    sums: Any = 0.0
    products: Any = 0.0
    for block in blocks:
        rows = block.reshape(-1, block.shape[-1]).astype(np.float64)
        # Products of differences from about the mean: those of large values would lose the digits.
        origin = rows.mean(0) if origin is None else origin
        rows -= origin
        n += len(rows)
        sums = sums + rows.sum(0)
        products = products + rows.T @ rows
    return _normalised(products / n - np.outer(sums / n, sums / n))


def spearman(blocks: Iterator[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the rank correlation matrix; parameters and result as in `pearson`.

    All rows are held in memory, in float32.
    """
    from scipy.stats import rankdata

    rows = np.concatenate([block.reshape(-1, block.shape[-1]) for block in blocks])
    for gene in range(rows.shape[1]):
        ranks = rankdata(rows[:, gene])
        rows[:, gene] = ranks - ranks.mean()
    covariance = np.zeros((rows.shape[1],) * 2)
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024].astype(np.float64)
        covariance += some.T @ some
    return _normalised(covariance)


def _normalised(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = np.sqrt(np.diag(covariance))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = covariance / np.outer(deviation, deviation)
    np.fill_diagonal(correlation, np.where(deviation > 0, 1.0, np.nan))
    return correlation
