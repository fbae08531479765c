"""Keyed posterior predictive draws: decode z and sample counts, row by row.

A row is one draw of one cell. Its noise is keyed by (seed, cell key, sample), and products run in
blocks of a fixed number of rows, since the rounding of a matrix product may depend on that number:
what a row becomes does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.kernels import transfer
from rayvaec.kernels.cpu.decoded_draws import draw_decoded
from rayvaec.kernels.nb_sample import Draws, draw_counts, join_rows
from rayvaec.kernels.rng import normal_noise, position_keys
from rayvaec.kernels.threads import run_all, thread_count
from rayvaec.model.precision import in_working_precision

if TYPE_CHECKING:
    from rayvaec.model.sparse import SparseVAEC

BLOCK_ROWS = 64
"""Rows of every matrix product; a shorter block is padded."""

GROUP_BLOCKS = 32
"""Most blocks whose hidden layers are computed together, in the thread that draws them."""

RATE_BYTES = 64 * 2**20
"""Most bytes of rates decoded before they are drawn from."""


@dataclass(frozen=True)
class KeyedRows:
    """Rows to be drawn: what they are decoded with beside z, and what names their random streams.

    Parameters
    ----------
    library : Tensor[n_rows, 1], from `VAEC.library_of`
    y, batch_index : Tensor[n_rows, 1]
        Label and batch codes; batches None in models without.
    seed : int
        Seed of all draws.
    keys, samples : NDArray[n_rows] of uint64
        Key of each row's cell, and which of the cell's draws the row is.
    """

    library: Tensor
    y: Tensor
    batch_index: Tensor | None
    seed: int
    keys: NDArray[np.uint64]
    samples: NDArray[np.uint64]

    def of(self, rows: slice) -> KeyedRows:
        """Return some of the rows."""
        batch_index = None if self.batch_index is None else self.batch_index[rows]
        tensors = self.library[rows], self.y[rows], batch_index
        return KeyedRows(*tensors, self.seed, self.keys[rows], self.samples[rows])


@torch.no_grad()
def draw_rows(module: SparseVAEC, loc: Tensor, scale: Tensor, rows: KeyedRows) -> Draws:
    """Draw z from N(loc, scale) and counts given z.

    Parameters
    ----------
    module : SparseVAEC
        The model, in evaluation mode.
    loc, scale : Tensor[n_rows, n_latent]
        Mean and standard deviation of z.
    rows : KeyedRows

    Returns
    -------
    Draws
        Counts of n_rows x n_input.
    """
    keyed = normal_noise(rows.seed, rows.keys, rows.samples, loc.shape[1])
    z = loc + scale * transfer.to_device(keyed, loc.device)
    module = in_working_precision(module)
    draw = draw_fused if z.device.type == "cpu" else draw_decoded_blocks
    return draw(module, z, rows)


def draw_posterior(
    module: SparseVAEC, tensors: Mapping[str, Tensor], inferred: Mapping[str, Any], n_samples: int
) -> Draws:
    """Draw from cells' posterior predictive distribution; torch's global generator gives the seed.

    Parameters
    ----------
    module : SparseVAEC
        The model, in evaluation mode.
    tensors : Mapping
        As in `VAEC.forward`.
    inferred : Mapping
        What `VAEC.inference` returned for them.
    n_samples : int
        Draws a cell, each with its own z.

    Returns
    -------
    Draws
        Counts of (n_cells * n_samples) x n_input, a cell's draws one after another.
    """
    y, batch_index = tensors["labels"], tensors.get("batch")
    n_cells, qz = len(y), inferred["qz"]
    cell = torch.arange(n_cells).repeat_interleave(n_samples)
    rows = KeyedRows(
        inferred["library"][cell],
        y[cell],
        None if batch_index is None else batch_index[cell],
        seed=int(torch.randint(2**62, ())),
        keys=position_keys(0, n_cells)[cell.numpy()],
        samples=np.tile(np.arange(n_samples, dtype=np.uint64), n_cells),
    )
    return draw_rows(module, qz.loc[cell], qz.scale[cell], rows)


def draw_fused(module: SparseVAEC, z: Tensor, rows: KeyedRows) -> Draws:
    """Draw counts given z on the CPU, with the decoder's last product inside the kernel.

    Parameters and result as in `draw_rows`, with z, Tensor[n_rows, n_latent], drawn.
    """
    biases = module.row_biases

    @torch.no_grad()  # a setting per thread
    def group(start: int, stop: int) -> list[Draws]:
        own = rows.of(slice(start, stop))
        return draw_decoded(
            module.decoder_hidden(z[start:stop], own.y, own.batch_index, BLOCK_ROWS),
            module.output.weight,
            module.output.bias,
            module.px_r,
            own.library,
            own.seed,
            own.keys,
            own.samples,
            generative=module.config.generative,
            row_bias=None if biases is None else (biases, own.y.reshape(-1).long()),
        )

    n_blocks = -(-len(z) // BLOCK_ROWS)
    height = max(1, min(GROUP_BLOCKS, n_blocks // thread_count())) * BLOCK_ROWS
    starts = range(0, len(z), height)
    groups = [partial(group, start, min(start + height, len(z))) for start in starts]
    return join_rows(list(chain.from_iterable(run_all(groups))))


@torch.no_grad()
def draw_decoded_blocks(module: SparseVAEC, z: Tensor, rows: KeyedRows) -> Draws:
    """Draw counts given z: decode on the device of the model, draw on the CPU.

    Parameters and result as in `draw_fused`; counts may differ where a rate is rounded otherwise.
    """
    n_rows, n_genes = len(z), module.config.n_input
    px_r = transfer.to_host(module.px_r.float())
    group = max(RATE_BYTES // (4 * n_genes * BLOCK_ROWS), 1) * BLOCK_ROWS
    rate = np.empty((min(group, n_rows), n_genes), np.float32)
    parts = []
    for start in range(0, n_rows, group):
        stop = min(start + group, n_rows)
        for first in range(start, stop, BLOCK_ROWS):
            block = slice(first, min(first + BLOCK_ROWS, stop))
            own = rows.of(block)
            decoded = decode_block(module, z[block], own.library, own.y, own.batch_index)
            rate[first - start : block.stop - start] = transfer.to_host(decoded)
        words = rows.seed, rows.keys[start:stop], rows.samples[start:stop]
        form = module.config.generative
        parts.append(draw_counts(rate[: stop - start], px_r, *words, generative=form))
    return join_rows(parts)


@torch.no_grad()
def decode_block(
    module: SparseVAEC, z: Tensor, library: Tensor, y: Tensor, batch_index: Tensor | None
) -> Tensor:
    """Decode at most BLOCK_ROWS rows to px_rate, in a product of exactly BLOCK_ROWS rows.

    Parameters
    ----------
    module : SparseVAEC
    z : Tensor[n_rows, n_latent]
    library, y, batch_index : Tensor[n_rows, 1]

    Returns
    -------
    Tensor[n_rows, n_input]
    """
    batches = None if batch_index is None else padded(batch_index)
    return module.decode(padded(z), padded(library), padded(y), batches)[: len(z)]


def padded(x: Tensor) -> Tensor:
    """Fill `x` with zeros to BLOCK_ROWS rows."""
    if len(x) == BLOCK_ROWS:
        return x
    return torch.cat((x, x.new_zeros((BLOCK_ROWS - len(x), *x.shape[1:]))))
