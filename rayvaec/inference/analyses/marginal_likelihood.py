"""Marginal log-likelihood of cells by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.inference.cells import Cells
from rayvaec.inference.posterior import Block, blocks
from rayvaec.kernels import transfer
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.rng import normal_noise
from rayvaec.model.draws import BLOCK_ROWS
from rayvaec.model.vaec import VAEC

MARGINAL_SAMPLE = 2**62
"""Index of the first sample behind `marginal_ll`, apart from every index that draws use."""

STACKED = 16
"""Samples of z decoded in one product; always as many, since rounding may depend on it."""


@torch.no_grad()
def marginal_ll(
    module: VAEC, cells: Cells, n_samples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Estimate each cell's marginal log-likelihood log p(x | y).

    The importance-weighted bound of Burda, Grosse & Salakhutdinov (2016, eq. 8), with z_s ~ q::

        log 1/S sum_s p(x | z_s, y) p(z_s | y) / q(z_s | x, y)

    It is below log p(x | y) on average, by less the more samples there are. The sum is kept as a
    logarithm: weights may differ by hundreds of orders of magnitude.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    n_samples : int
        Samples S of z a cell.
    seed : int
        Seed of z's noise.

    Returns
    -------
    NDArray[n_cells], in nats, higher is better
    """
    result = np.empty(len(cells))
    for block in blocks(module, cells):
        total = block.qz.loc.new_full((BLOCK_ROWS,), -math.inf, dtype=torch.float64)
        for log_weight in _log_weights(module, block, cells.keys[block.rows], n_samples, seed):
            total = torch.logaddexp(total, torch.logsumexp(log_weight, 0))
        result[block.rows] = transfer.to_host(total[: block.n]) - math.log(n_samples)
    return result


def _log_weights(
    module: VAEC, block: Block, keys: NDArray[np.uint64], n_samples: int, seed: int
) -> Iterator[Tensor]:
    """Yield log p(x | z) p(z) / q(z | x), float64 Tensor[some samples, BLOCK_ROWS] at a time."""
    qz = block.qz
    device, n_latent = qz.loc.device, module.config.n_latent
    keys = np.tile(np.pad(keys, (0, BLOCK_ROWS - len(keys))), STACKED)
    x, y = _stacked(block.x), block.y.repeat(STACKED, 1)
    batch_index = None if block.batch_index is None else block.batch_index.repeat(STACKED, 1)
    factor = qz.loc.new_ones(len(y))
    for first in range(0, n_samples, STACKED):
        samples = np.arange(MARGINAL_SAMPLE + first, MARGINAL_SAMPLE + first + STACKED)
        keyed = normal_noise(seed, keys, np.repeat(samples, BLOCK_ROWS), n_latent)
        noise = transfer.to_device(keyed, device).view(STACKED, BLOCK_ROWS, n_latent)
        z = qz.loc + qz.scale * noise
        _, lost = module.reconstruction(z.flatten(0, 1), x, y, batch_index, factor)
        log_q = -(noise**2 / 2 + qz.scale.log()).sum(-1) - n_latent / 2 * math.log(2 * math.pi)
        log_ratio = module.prior_log_prob(z, block.y) - log_q
        log_weight = log_ratio.double() - lost.double().view(STACKED, BLOCK_ROWS)
        yield log_weight[: n_samples - first]


def _stacked(x: CsrCounts) -> CsrCounts:
    """Return the rows STACKED times over."""
    nnz, copies = len(x.counts), torch.arange(STACKED, device=x.device)
    starts = (x.indptr[:-1] + nnz * copies[:, None]).flatten()
    indptr = torch.cat((starts, starts.new_full((1,), STACKED * nnz)))
    return CsrCounts(indptr, x.indices.repeat(STACKED), x.counts.repeat(STACKED), x.n_genes)
