"""Validation ELBO, independent of the number of workers up to rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from rayvaec.data.store.open import Rows, Store
from rayvaec.data.store.row_sample import RowSample, sample_rows
from rayvaec.model.vaec import VAEC
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.noise import latent_noise
from rayvaec.training.objective import as_tensors
from rayvaec.training.schedule import noise_seed

BLOCK_ROWS = {"cpu": 512, "cuda": 8192}
"""Cells that are worked on together, by device: a GPU takes no longer for more of them."""


@torch.no_grad()
def validation_elbo(
    module: VAEC, store: Store, ranks: Ranks, seed: int, max_cells: int | None = None
) -> float | None:
    """Return the mean evidence lower bound of the store's validation cells.

    Blocks of cells are dealt to the workers. A cell's noise depends on the seed and its place in
    the store alone, so that epochs and runs are compared under the same noise.

    Parameters
    ----------
    module : VAEC
        The model; its mode is restored.
    store : Store
        Whose validation split is used.
    ranks : Ranks
        This worker and the others; every worker must call.
    seed : int
        Seed of the noise.
    max_cells : int, optional
        Use no more of them than this; `rayvaec.data.store.row_sample.sample_rows` chooses.

    Returns
    -------
    float or None
        Nats a cell, higher is better, the same bits on every worker; None without such cells.
    """
    sample = sample_rows(store, "validation", max_cells)
    if not len(sample):
        return None
    total = 0.0
    was_training = module.training
    module.eval()
    blocks = sample.parts(BLOCK_ROWS[ranks.device.type])
    for cells, block in _read_ahead(store, blocks[ranks.rank :: ranks.world_size]):
        x, y, batch_index = as_tensors(block, module)
        noise = latent_noise(module, noise_seed(seed, "validation"), cells, 0)
        output = module.minibatch_loss(x, y, batch_index, noise=noise)
        total -= float((output.reconstruction_loss + output.kl_local).double().sum())
    module.train(was_training)
    return ranks.sums(total)[0] / len(sample)


def _read_ahead(
    store: Store, blocks: Iterable[RowSample]
) -> Iterator[tuple[NDArray[np.int64], Rows]]:
    """Yield row numbers and rows of some blocks, reading the next one in the background."""

    def read(block: RowSample) -> tuple[NDArray[np.int64], Rows]:
        return block.rows, store.read_runs(block.runs)

    ahead: Future[tuple[NDArray[np.int64], Rows]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="rayvaec-validation") as reader:
        for block in blocks:
            ready, ahead = ahead, reader.submit(read, block)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()
