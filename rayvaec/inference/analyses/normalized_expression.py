"""Normalised expression: the decoder's mean at a common library size.

scvi-tools' softmax form gives each gene's share of the expected counts directly; in the softplus
form it is the expected count over the cell's sum of expected counts. So rows sum to 1 in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.inference.cells import Cells
from rayvaec.inference.posterior import Block, blocks, shares
from rayvaec.kernels import transfer
from rayvaec.kernels.rng import normal_noise
from rayvaec.model.draws import padded
from rayvaec.model.vaec import VAEC


@dataclass(frozen=True)
class Wanted:
    """What to compute of the decoded genes.

    Parameters
    ----------
    n_samples : int
        Draws of z a cell; 0 stands for the mean of z.
    seed : int
        Seed of z's noise; draw i has the z of draw i of `rayvaec.inference.posterior.draw`.
    library_size : float or "latent"
        Total that a cell's expression sums to; ``"latent"`` gives the expected counts.
    batches : sequence of (int or None)
        Batch codes to decode as if from, averaged over; None stands for a cell's own.
    genes : array of int64 or None
        Columns to keep; all by default.
    average : bool
        Whether to return the mean over the draws instead of all.
    """

    n_samples: int = 0
    seed: int = 0
    library_size: float | Literal["latent"] = 1.0
    batches: Sequence[int | None] = (None,)
    genes: NDArray[np.int64] | None = None
    average: bool = True


@torch.no_grad()
def normalized_expression(module: VAEC, cells: Cells, wanted: Wanted) -> NDArray[np.float32]:
    """Return normalised expression.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    wanted : Wanted
        What to compute.

    Returns
    -------
    NDArray[n_cells, n_genes], or [n_samples, n_cells, n_genes] of several draws not averaged
    """
    n_genes = module.config.n_input if wanted.genes is None else len(wanted.genes)
    n_draws = max(wanted.n_samples, 1)
    shape = (1 if wanted.average else n_draws, len(cells), n_genes)
    result = np.zeros(shape, np.float32)
    for block in blocks(module, cells):
        for draw, z in enumerate(positions(module, block, cells.keys[block.rows], wanted)):
            decoded = _averaged(module, block, z, wanted)
            result[0 if wanted.average else draw, block.rows] += decoded[: block.n]
    if wanted.average:
        result /= n_draws
    return result if len(result) > 1 else result[0]


def positions(
    module: VAEC, block: Block, keys: NDArray[np.uint64], wanted: Wanted
) -> Iterator[Tensor]:
    """Yield the mean of z, or draw after draw of it.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    block : Block
    keys : array[n_cells] of uint64
        Keys of the block's cells.
    wanted : Wanted
        Number and seed of the draws.

    Yields
    ------
    Tensor[BLOCK_ROWS, n_latent]
    """
    qz = block.qz
    if not wanted.n_samples:
        yield qz.loc
    for sample in range(wanted.n_samples):
        samples = np.full(len(keys), sample, np.uint64)
        noise = normal_noise(wanted.seed, keys, samples, module.config.n_latent)
        yield qz.loc + qz.scale * padded(transfer.to_device(noise, qz.loc.device))


def _averaged(module: VAEC, block: Block, z: Tensor, wanted: Wanted) -> NDArray[np.float32]:
    """Decode a block as if from each of the batches; return the mean over them."""
    total: Any = 0
    for code in wanted.batches:
        batch_index = block.batch_index if code is None else torch.full_like(block.y, code)
        if wanted.library_size == "latent":
            library = module.library_of(block.x.library())
            decoded = module.mean_of_rate(module.decode(z, library, block.y, batch_index))
        else:
            decoded = shares(module, z, block.y, batch_index) * wanted.library_size
        total = total + decoded
    if wanted.genes is not None:
        total = total[:, transfer.to_device(wanted.genes, total.device)]
    return transfer.to_host(total / len(wanted.batches))
