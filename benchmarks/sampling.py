"""Posterior-predictive draws per second, decoder included, against torch's Gamma and Poisson.

A draw is one count: cells x genes x samples. Both sides start from z's distribution and end with
counts: ours sparse and keyed per cell, the peer's dense from torch's global generator. They run in
turn, and their median time is taken. OMP_WAIT_POLICY is best left alone: PASSIVE slows the peer.

    python benchmarks/sampling.py [--genes 2886 20000]
        [--cells 1024] [--rounds 5] [--cpu-time]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from rayvaec.kernels.rng import position_keys
from rayvaec.model.draws import KeyedRows, draw_rows
from rayvaec.model.vaec import VAEC

CLOCK = time.perf_counter
N_LABELS = 8
DENSITY = {2886: 0.06, 20000: 0.0765}


def build(n_genes: int, density: float) -> tuple[VAEC, float]:
    """Build a model whose draws have about this share of non-zeros; return it and a library."""
    torch.manual_seed(0)
    module = VAEC(n_genes, N_LABELS).eval()
    fraction = np.exp(np.random.default_rng(0).normal(0, 1.7, n_genes))
    fraction /= fraction.sum()
    module.init_from_counts(torch.from_numpy(fraction))
    with torch.no_grad():
        module.px_r.normal_(0.0, 1.0)
    log_q = np.logaddexp(0, module.px_r.detach().numpy())
    low, high = 1.0, 1e7
    for _ in range(60):
        library = np.sqrt(low * high)
        share = 1 - np.exp(-library * fraction * log_q).mean()
        low, high = (library, high) if share < density else (low, library)
    return module, float(low)


def sides(
    module: VAEC, library: float, n_rows: int
) -> tuple[Callable[[], float], Callable[[], None]]:
    """Return our draw (giving the share of non-zeros) and the peer's."""
    loc, scale = torch.zeros(n_rows, 5), torch.ones(n_rows, 5)
    libraries = torch.full((n_rows, 1), library)
    y = torch.randint(N_LABELS, (n_rows, 1))
    keys, samples = position_keys(0, n_rows), np.zeros(n_rows, np.uint64)
    keyed = KeyedRows(libraries, y, None, 0, keys, samples)

    def ours() -> float:
        draws = draw_rows(module, loc, scale, keyed)
        return len(draws.indices) / (n_rows * module.config.n_input)

    @torch.no_grad()
    def peer() -> None:
        for start in range(0, n_rows, 64):
            rows = slice(start, start + 64)
            z = loc[rows] + scale[rows] * torch.randn(loc[rows].shape)
            rate = module.decode(z, libraries[rows], y[rows]).clamp_min(1e-12)
            gamma = torch.distributions.Gamma(rate, torch.exp(-module.px_r), validate_args=False)
            torch.poisson(gamma.sample())

    return ours, peer


def measure(n_genes: int, n_cells: int, rounds: int) -> dict[str, object]:
    """Time both sides in turn and return the line to print."""
    module, library = build(n_genes, DENSITY.get(n_genes, 0.07))
    ours, peer = sides(module, library, n_cells)
    density = ours()
    peer()
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, draw in (("ours", ours), ("peer", peer)):
            began = CLOCK()
            draw()
            times[side].append(CLOCK() - began)
    rate = {side: n_cells * n_genes / statistics.median(t) / 1e6 for side, t in times.items()}
    return {
        "name": f"sampling_{n_genes}_genes",
        "ours": round(rate["ours"], 1),
        "peer": round(rate["peer"], 2),
        "ratio": round(rate["ours"] / rate["peer"], 1),
        "unit": "million draws/s"
        if CLOCK is time.perf_counter
        else "million draws per CPU second, one thread",
        "setup": {
            "n_genes": n_genes,
            "cells": n_cells,
            "density": round(density, 4),
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            "load": round(os.getloadavg()[0], 1),
            "rounds": rounds,
            "peer": "torch Gamma + Poisson",
        },
    }


def main() -> None:
    """Print one JSON line per number of genes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--genes", type=int, nargs="+", default=[2886, 20000])
    parser.add_argument("--cells", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, CPU time: for machines that are busy"
    )
    options = parser.parse_args()
    if options.cpu_time:
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    for n_genes in options.genes:
        print(json.dumps(measure(n_genes, options.cells, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
