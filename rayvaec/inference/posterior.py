"""Posterior quantities of one minibatch: latent variables, expression, ELBO, draws.

Every function is a pure function of (model, cell, seed): products run in blocks of a fixed number
of rows and noise is keyed by the cell, so neither the other cells of a call nor their order change
a cell's result. Where cells come from, and where results go, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Normal

from rayvaec.errors import ConfigError
from rayvaec.inference.cells import Cells
from rayvaec.kernels import transfer
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.nb_sample import Draws
from rayvaec.kernels.rng import normal_noise
from rayvaec.kernels.threads import run_all, thread_count
from rayvaec.model.draws import BLOCK_ROWS, GROUP_BLOCKS, KeyedRows, draw_rows, padded
from rayvaec.model.inputs import CellTensors, code_column
from rayvaec.model.precision import working_dtype
from rayvaec.model.vaec import VAEC

ELBO_SAMPLE = 2**63
"""Sample index of the noise behind `elbo`, apart from every index that draws use."""


@dataclass(frozen=True)
class Block:
    """BLOCK_ROWS rows as tensors: the cells of `rows`, then empty padding.

    Parameters
    ----------
    rows : slice
        Which cells these are.
    x : CsrCounts
        Raw counts of BLOCK_ROWS x n_input.
    y, batch_index : Tensor[BLOCK_ROWS, 1]
        Label and batch codes; batches None in models without.
    qz : Normal
        q(z | x, y), Tensor[BLOCK_ROWS, n_latent]; 0 and 0 in the padding.
    """

    rows: slice
    x: CsrCounts
    y: Tensor
    batch_index: Tensor | None
    qz: Normal

    @property
    def n(self) -> int:
        """Number of cells."""
        return self.rows.stop - self.rows.start


def _device(module: VAEC) -> torch.device:
    return module.px_r.device


def blocks(module: VAEC, cells: Cells) -> Iterator[Block]:
    """Encode cells and cut them into blocks of BLOCK_ROWS rows on the model's device."""
    loc, scale = encoded(module, cells)
    device = _device(module)
    for start in range(0, len(cells), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(cells))
        rows = slice(start, stop)
        tensors = CellTensors.of(
            cells.part(start, stop), module.config.n_input, device, n_rows=BLOCK_ROWS
        )
        qz = Normal(padded(loc[rows]), padded(scale[rows]), validate_args=False)
        yield Block(rows, tensors.x, tensors.y, tensors.batch_index, qz)


@torch.no_grad()
def encoded(module: VAEC, cells: Cells) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(z | x, y).

    Many blocks are encoded at once, a thread each, in products of BLOCK_ROWS rows.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells

    Returns
    -------
    tuple of Tensor[n_cells, n_latent]
        On the model's device.
    """
    device, n_cells = _device(module), len(cells)
    shape = (n_cells, module.config.n_latent)
    loc = torch.empty(shape, dtype=working_dtype(module), device=device)
    scale = torch.empty_like(loc)

    @torch.no_grad()  # a setting per thread
    def encode(start: int, stop: int) -> None:
        part = CellTensors.of(cells.part(start, stop), module.config.n_input, device)
        qz = module.encode(part.x, part.y, part.batch_index, rows_per_product=BLOCK_ROWS)
        loc[start:stop], scale[start:stop] = qz.loc, qz.scale

    n_blocks = -(-n_cells // BLOCK_ROWS)
    height = max(1, min(GROUP_BLOCKS, n_blocks // thread_count())) * BLOCK_ROWS
    starts = range(0, n_cells, height)
    run_all([partial(encode, start, min(start + height, n_cells)) for start in starts])
    return loc, scale


@torch.no_grad()
def latent(module: VAEC, cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and variance of q(z | x, y).

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells

    Returns
    -------
    tuple of NDArray[n_cells, n_latent]
    """
    loc, scale = encoded(module, cells)
    return transfer.to_host(loc.float()), transfer.to_host((scale**2).float())


@torch.no_grad()
def expression(module: VAEC, cells: Cells) -> NDArray[np.float32]:
    """Return denoised expression: each gene's share of the expected counts at the mean of z.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells

    Returns
    -------
    NDArray[n_cells, n_genes], rows sum to 1
    """
    result = np.empty((len(cells), module.config.n_input), np.float32)
    for block in blocks(module, cells):
        decoded = shares(module, block.qz.loc, block.y, block.batch_index)
        result[block.rows] = transfer.to_host(decoded[: block.n])
    return result


@torch.no_grad()
def shares(module: VAEC, z: Tensor, y: Tensor, batch_index: Tensor | None) -> Tensor:
    """Return each gene's share of the expected counts, given z.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    z : Tensor[n_rows, n_latent]
    y, batch_index : Tensor[n_rows, 1]
        Label and batch codes.

    Returns
    -------
    Tensor[n_rows, n_genes], rows sum to 1
    """
    mean = module.mean_of_rate(module.decode(z, torch.ones_like(z[:, :1]), y, batch_index))
    return mean / mean.sum(1, keepdim=True)


def elbo(module: VAEC, cells: Cells, seed: int = 0) -> NDArray[np.float64]:
    """Return each cell's evidence lower bound, from one keyed draw of z.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    seed : int
        Seed of z's noise.

    Returns
    -------
    NDArray[n_cells], in nats, higher is better
    """
    reconstruction, divergence = bound_terms(module, cells, seed)
    return -(reconstruction + divergence)


@torch.no_grad()
def bound_terms(
    module: VAEC, cells: Cells, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the two terms of each cell's negative evidence lower bound.

    Parameters
    ----------
    module, cells, seed
        As in `elbo`.

    Returns
    -------
    reconstruction : NDArray[n_cells]
        -log p(x | z, y) at one keyed draw of z, in nats.
    divergence : NDArray[n_cells]
        KL(q(z | x, y) || p(z | y)), in nats; of a mixture prior estimated from keyed draws.
    """
    device = _device(module)
    reconstructions, divergences = np.empty((2, len(cells)))
    samples = np.full(len(cells), ELBO_SAMPLE, np.uint64)
    keyed = normal_noise(seed, cells.keys, samples, module.n_noise * module.config.n_latent)
    every_noise = keyed.reshape(len(cells), module.n_noise, -1)
    for block in blocks(module, cells):
        qz = block.qz
        noise = padded(transfer.to_device(every_noise[block.rows], device)).transpose(0, 1)
        z = qz.loc + qz.scale * noise[0]
        factor = torch.ones_like(qz.loc[:, 0])
        _, reconstruction = module.reconstruction(z, block.x, block.y, block.batch_index, factor)
        reconstructions[block.rows] = transfer.to_host(reconstruction[: block.n])
        divergence = module.kl(qz, block.y, noise[1:])
        divergences[block.rows] = transfer.to_host(divergence[: block.n])
    return reconstructions, divergences


@torch.no_grad()
def draw(module: VAEC, cells: Cells, n_samples: int, seed: int, *, first_sample: int = 0) -> Draws:
    """Draw counts from the posterior predictive distribution.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
    n_samples : int
        Draws a cell, each with its own z.
    seed : int
        Seed of all draws.
    first_sample : int
        Index of the first draw: draws 0 to 9 are draws 0 to 4 followed by draws 5 to 9.

    Returns
    -------
    Draws
        Row ``cell * n_samples + i`` is draw ``first_sample + i`` of the cell.
    """
    mean, variance = latent(module, cells)
    library = np.zeros(len(cells), np.float32)
    filled = np.diff(cells.indptr) > 0
    sums = np.add.reduceat(cells.counts, cells.indptr[:-1][filled], dtype=np.float64)
    library[filled] = sums
    return _draw_rows(
        module,
        loc=torch.from_numpy(mean).repeat_interleave(n_samples, 0),
        scale=torch.from_numpy(variance).sqrt().repeat_interleave(n_samples, 0),
        library=library,
        cells=cells,
        n_samples=n_samples,
        seed=seed,
        first_sample=first_sample,
    )


@torch.no_grad()
def generate(
    module: VAEC,
    labels: NDArray[np.int64],
    library: NDArray[np.float32],
    keys: NDArray[np.uint64],
    n_samples: int,
    seed: int,
    *,
    first_sample: int = 0,
    batches: NDArray[np.int64] | None = None,
) -> Draws:
    """Draw new cells: z from the prior, then counts given z, label and library size.

    The prior is N(0, I) or, in models with a mixture, the label's own.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    labels : NDArray[n_cells] of int64
        Label codes.
    library : NDArray[n_cells] of float32
        Total counts a cell is expected to have.
    keys : NDArray[n_cells] of uint64
        Key of each cell's noise.
    n_samples, seed, first_sample : int
        As in `draw`.
    batches : NDArray[n_cells] of int64, optional
        Batch codes, in models with batches.

    Returns
    -------
    Draws
        Rows as in `draw`.
    """
    empty = np.zeros(0, np.int32)
    indptr = np.zeros(len(labels) + 1, np.int64)
    cells = Cells(indptr, empty, empty, labels, batches, keys)
    rows, samples = _keyed_rows(cells, n_samples, first_sample)
    # The number after z's own picks the component.
    n_latent = module.config.n_latent
    noise = normal_noise(seed, keys[rows], samples, n_latent + 1)[:, n_latent]
    choice = torch.special.ndtr(torch.from_numpy(noise).double()).to(_device(module))
    loc, scale = module.prior_of(code_column(labels[rows], _device(module)), choice)
    return _draw_rows(module, loc, scale, library, cells, n_samples, seed, first_sample)


def _draw_rows(
    module: VAEC,
    loc: Tensor,
    scale: Tensor,
    library: NDArray[np.float32],
    cells: Cells,
    n_samples: int,
    seed: int,
    first_sample: int,
) -> Draws:
    """Draw counts; `loc` and `scale` have a row a draw, `library` one a cell."""
    device = _device(module)
    row, samples = _keyed_rows(cells, n_samples, first_sample)
    rows = KeyedRows(
        module.library_of(transfer.to_device(library[row], device)[:, None]),
        code_column(cells.labels[row], device),
        None if cells.batches is None else code_column(cells.batches[row], device),
        seed=seed,
        keys=cells.keys[row],
        samples=samples,
    )
    return draw_rows(module, loc.to(device), scale.to(device), rows)


def _keyed_rows(
    cells: Cells, n_samples: int, first_sample: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return each row's cell, and which of its draws the row is."""
    samples = np.arange(first_sample, first_sample + n_samples, dtype=np.uint64)
    return np.repeat(np.arange(len(cells)), n_samples), np.tile(samples, len(cells))


def check_draws(n_samples: int, seed: int) -> None:
    """Refuse a number of draws below 1 and a negative seed, with a `ConfigError`."""
    if n_samples < 1:
        raise ConfigError(f"n_samples={n_samples} draws nothing", "give a whole number >= 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} is out of range", "give a whole number from 0 to 2**63 - 1")
