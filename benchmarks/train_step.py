"""Cells per second of a full training step, against scvi-tools' CondSCVI.train.

A step is: minibatch from CSR in memory, forward, backward, Adam. Both sides train on the same
counts, in turn, and their median step is taken. Without scvi-tools (extra `bench`) only ours runs.
OMP_WAIT_POLICY is best left alone: PASSIVE halves the peer's speed at small minibatches.

    python benchmarks/train_step.py [--genes 2886 20000]
        [--batch-sizes 1024 128] [--rounds 3] [--cpu-time]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.nb_sample import draw_counts
from rayvaec.kernels.rng import position_keys
from rayvaec.kernels.threads import single_threaded_torch
from rayvaec.model.vaec import VAEC
from rayvaec.training.noise import CellNoise

CLOCK = time.perf_counter
N_LABELS = 8
DENSITY = {2886: 0.06, 20000: 0.0765}


@dataclass(frozen=True)
class Cells:
    """Counts of n_cells in memory, and their labels."""

    indptr: np.ndarray
    indices: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    n_genes: int

    def minibatch(self, start: int, stop: int) -> tuple[CsrCounts, torch.Tensor]:
        """Slice rows of what is shuffled already, as the loader's buffers are."""
        first, last = self.indptr[start], self.indptr[stop]
        x = CsrCounts.from_numpy(
            self.indptr[start : stop + 1] - first,
            self.indices[first:last],
            self.counts[first:last],
            self.n_genes,
        )
        return x, torch.from_numpy(self.labels[start:stop, None])


def simulate(n_cells: int, n_genes: int, density: float) -> Cells:
    """Draw counts whose gene means are log-normal, scaled to the wanted share of non-zeros."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_LABELS, n_cells)
    profiles = rng.normal(0, 1.5, n_genes) + rng.normal(0, 0.5, (N_LABELS, n_genes))
    px_r = np.full(n_genes, 0.5, np.float32)
    low, high = -12.0, 3.0
    for _ in range(30):
        middle = (low + high) / 2
        zeros = np.exp(-np.exp(profiles + middle) * np.logaddexp(0, px_r))
        low, high = (middle, high) if 1 - zeros.mean() < density else (low, middle)
    library = rng.lognormal(0, 0.3, (n_cells, 1))
    keys, samples = position_keys(0, n_cells), np.zeros(n_cells, np.uint64)
    parts = []
    for start in range(0, n_cells, 512):
        rows = slice(start, min(start + 512, n_cells))
        rate = np.exp(profiles[labels[rows]] + low) * library[rows]
        parts.append(draw_counts(rate, px_r, 0, keys[rows], samples[rows]))
    lengths = np.concatenate([np.diff(part.indptr) for part in parts])
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.indices for part in parts]).astype(np.uint16),
        np.concatenate([part.counts for part in parts]).astype(np.uint16),
        labels.astype(np.int64),
        n_genes,
    )


def our_steps(cells: Cells, batch_size: int) -> Callable[[], list[float]]:
    """Return a function that trains one pass over the cells and returns seconds per step."""
    torch.manual_seed(0)
    module = VAEC(cells.n_genes, N_LABELS)
    totals = np.bincount(cells.indices, cells.counts, cells.n_genes) + 0.5
    module.init_from_counts(torch.from_numpy(totals / totals.sum()))
    noise = CellNoise(0, module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=1e-4, fused=True)

    def one_pass() -> list[float]:
        times = []
        for start in range(0, len(cells.labels) - batch_size + 1, batch_size):
            began = CLOCK()
            x, y = cells.minibatch(start, start + batch_size)
            with single_threaded_torch():
                optimizer.zero_grad(set_to_none=True)
                keyed = noise.at(len(times), np.arange(start, start + batch_size))
                module.minibatch_loss(x, y, noise=keyed).loss.backward()
                optimizer.step()
            times.append(CLOCK() - began)
        return times

    return one_pass


def peer_steps(cells: Cells, batch_size: int) -> Callable[[], list[float]] | None:
    """Return the same for scvi-tools, or None where it is not installed."""
    if importlib.util.find_spec("scvi") is None:
        return None
    warnings.filterwarnings("ignore")
    import logging

    import anndata
    import lightning
    import pandas as pd
    import scvi
    from scipy import sparse

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    matrix = sparse.csr_matrix(
        (cells.counts.astype(np.float32), cells.indices.astype(np.int32), cells.indptr),
        (len(cells.labels), cells.n_genes),
    )
    obs = pd.DataFrame(
        {"label": pd.Categorical(cells.labels.astype(str))},
        index=[str(i) for i in range(len(cells.labels))],
    )
    adata = anndata.AnnData(matrix, obs)
    scvi.model.CondSCVI.setup_anndata(adata, labels_key="label")
    model = scvi.model.CondSCVI(adata)

    class Clock(lightning.pytorch.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: object) -> None:
            self.ends.append(CLOCK())

    def one_pass() -> list[float]:
        clock = Clock()
        model.train(
            max_epochs=1,
            accelerator="cpu",
            batch_size=batch_size,
            datasplitter_kwargs={"drop_last": True},
            callbacks=[clock],
            enable_progress_bar=False,
            logger=False,
        )
        # From one step's end to the next: the loading of the minibatch is in it.
        return np.diff(clock.ends).tolist()

    return one_pass


def measure(n_genes: int, batch_size: int, rounds: int) -> dict[str, object]:
    """Time both sides in turn and return the line to print."""
    density = DENSITY.get(n_genes, 0.07)
    n_cells = batch_size * (8 if batch_size >= 512 else 24)
    cells = simulate(n_cells, n_genes, density)
    sides = {"ours": our_steps(cells, batch_size), "peer": peer_steps(cells, batch_size)}
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for number, (side, one_pass) in _turns(sides, rounds):
        found = one_pass()
        if number:  # the first pass compiles and warms up
            times[side] += found
    rate = {side: batch_size / statistics.median(t) for side, t in times.items() if t}
    peer = rate.get("peer")
    return {
        "name": f"train_step_{n_genes}_genes_minibatch_{batch_size}",
        "ours": round(rate["ours"]),
        "peer": None if peer is None else round(peer),
        "ratio": None if peer is None else round(rate["ours"] / peer, 2),
        "unit": "cells/s" if CLOCK is time.perf_counter else "cells per CPU second, one thread",
        "setup": {
            "n_genes": n_genes,
            "density": round(len(cells.indices) / n_cells / n_genes, 4),
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            "load": round(os.getloadavg()[0], 1),
            "steps": len(times["ours"]),
            "peer": "scvi-tools CondSCVI.train",
        },
    }


def _turns(
    sides: dict[str, Callable[[], list[float]] | None], rounds: int
) -> Iterator[tuple[int, tuple[str, Callable[[], list[float]]]]]:
    for number in range(rounds + 1):
        for side, one_pass in sides.items():
            if one_pass is not None:
                yield number, (side, one_pass)


def main() -> None:
    """Print one JSON line per number of genes and minibatch size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--genes", type=int, nargs="+", default=[2886, 20000])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, CPU time: for machines that are busy"
    )
    options = parser.parse_args()
    if options.cpu_time:
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    for n_genes in options.genes:
        for batch_size in options.batch_sizes:
            print(json.dumps(measure(n_genes, batch_size, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
