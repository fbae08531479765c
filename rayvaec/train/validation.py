"""The validation ELBO: the same number for any number of workers, but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from rayvaec.data.store import Rows, Store
from rayvaec.model.vaec import VAEC
from rayvaec.train.noise import latent_noise
from rayvaec.train.ranks import Ranks
from rayvaec.train.replica import as_tensors
from rayvaec.train.schedule import noise_seed

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
        Use the first cells of the split only; the store's order is random.

    Returns
    -------
    float or None
        Nats a cell, higher is better, the same bits on every worker; None without such cells.
    """
    rows = store.rows("validation")
    stop = rows.stop if max_cells is None else min(rows.stop, rows.start + max_cells)
    if rows.start >= stop:
        return None
    total = 0.0
    was_training = module.training
    module.eval()
    blocks = range(rows.start, stop, BLOCK_ROWS[ranks.device.type])
    for start, block in _read_ahead(
        store, blocks[ranks.rank :: ranks.world_size], stop, blocks.step
    ):
        x, y, batch_index = as_tensors(block, module)
        cells = np.arange(start, start + len(block))
        noise = latent_noise(module, noise_seed(seed, "validation"), cells, 0)
        output = module.minibatch_loss(x, y, batch_index, noise=noise)
        total -= float((output.reconstruction_loss + output.kl_local).double().sum())
    module.train(was_training)
    return ranks.sums(total)[0] / (stop - rows.start)


def _read_ahead(store: Store, starts: range, stop: int, n_rows: int) -> Iterator[tuple[int, Rows]]:
    """Yield blocks of rows, reading the next one in the background."""

    def read(start: int) -> tuple[int, Rows]:
        return start, store.read(start, min(start + n_rows, stop))

    ahead: Future[tuple[int, Rows]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="rayvaec-validation") as reader:
        for start in starts:
            ready, ahead = ahead, reader.submit(read, start)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()
