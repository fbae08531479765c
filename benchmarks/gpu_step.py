"""Cells per second of a training step on a GPU: replayed as CUDA graphs, and launched one by one.

A step is: minibatch from CSR in memory, packed, sent, forward, backward, Adam. Products are in
float32 or, as in training, with TF32's ten bits of mantissa. `--profile` prints what the time on
the device goes to.

    python benchmarks/gpu_step.py [--genes 2886 20000] [--batch-sizes 128 1024 8192]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from train_step import DENSITY, N_LABELS, Cells, simulate

from rayvaec.data.loading.loader import prefetched
from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.model.vaec import VAEC
from rayvaec.training.backends import cuda
from rayvaec.training.backends.cuda import DeviceSteps
from rayvaec.training.backends.host_to_device import Block, StepNumbers
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks

WARM_STEPS = 12


def minibatches(cells: Cells, batch_size: int, n_steps: int) -> Iterator[Minibatch]:
    """Slice minibatches of what is shuffled already, over and over."""
    starts = itertools.cycle(range(0, len(cells.labels) - batch_size + 1, batch_size))
    for step, start in zip(range(n_steps), starts, strict=False):
        first, last = cells.indptr[start], cells.indptr[start + batch_size]
        yield Minibatch(
            indptr=cells.indptr[start : start + batch_size + 1] - first,
            indices=cells.indices[first:last],
            counts=cells.counts[first:last],
            labels=cells.labels[start : start + batch_size].astype(np.int32),
            batches=None,
            cells=np.arange(start, start + batch_size),
            n_genes=cells.n_genes,
            n_global=batch_size,
            step=step,
        )


def steps_of(cells: Cells, device: torch.device) -> DeviceSteps:
    """Return what takes steps on a model with start values."""
    torch.manual_seed(0)
    module = VAEC(cells.n_genes, N_LABELS)
    totals = np.bincount(cells.indices, cells.counts, cells.n_genes) + 0.5
    module.init_from_counts(torch.from_numpy(totals / totals.sum()))
    module = module.to(device)
    groups = [{"params": list(module.parameters()), "relative_lr": 1.0}]
    adam = torch.optim.Adam(groups, eps=1e-4, fused=True, capturable=device.type == "cuda")
    config = TrainConfig.from_json({})
    return DeviceSteps(
        module, adam, config, lambda s: StepNumbers(s, 1e-3, 1.0), Ranks(device=device)
    )


def seconds_a_step(steps: DeviceSteps, cells: Cells, batch_size: int, n_steps: int) -> float:
    """Return the time of one of many steps, the device's work included."""
    began = 0.0
    coming = minibatches(cells, batch_size, WARM_STEPS + n_steps)

    def prepare(step: int) -> tuple[Minibatch, Block]:
        minibatch = next(coming)
        return minibatch, steps.prepare(minibatch, step)

    ahead = prefetched(prepare, range(WARM_STEPS + n_steps), 2)
    for step, (minibatch, prepared) in enumerate(ahead):
        if step == WARM_STEPS:
            steps.check()
            began = time.perf_counter()
        steps.take(minibatch, prepared)
    steps.check()
    return (time.perf_counter() - began) / n_steps


def measure(
    cells: Cells, batch_size: int, n_steps: int, rounds: int
) -> Iterator[dict[str, object]]:
    """Yield the figures of one size, from steps of either kind in turn."""
    device = torch.device("cuda", 0)
    eager_steps = cuda.EAGER_STEPS
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        times: dict[str, list[float]] = {"graph": [], "one by one": []}
        for _, kind in itertools.product(range(rounds), times):
            cuda.EAGER_STEPS = eager_steps if kind == "graph" else 2**62
            times[kind].append(seconds_a_step(steps_of(cells, device), cells, batch_size, n_steps))
        cuda.EAGER_STEPS = eager_steps
        rate = {kind: batch_size / statistics.median(found) for kind, found in times.items()}
        yield {
            "name": f"gpu_step_{cells.n_genes}_genes_minibatch_{batch_size}",
            "ours": round(rate["graph"]),
            "peer": round(rate["one by one"]),
            "ratio": round(rate["graph"] / rate["one by one"], 2),
            "unit": "cells/s",
            "setup": {
                "float32_matmul_precision": precision,
                "microseconds": round(1e6 * batch_size / rate["graph"]),
                "device": torch.cuda.get_device_name(),
                "peer": "the same operations, launched one by one",
            },
        }


def profile(cells: Cells, batch_size: int) -> None:
    """Print what the device does in a replayed step."""
    torch.set_float32_matmul_precision("high")
    steps = steps_of(cells, torch.device("cuda", 0))
    seconds_a_step(steps, cells, batch_size, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        seconds_a_step(steps, cells, batch_size, 20)
    print(
        found.key_averages().table(
            sort_by="cuda_time_total", row_limit=45, max_name_column_width=90
        )
    )


def main() -> None:
    """Print JSON lines, one a figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--genes", type=int, nargs="+", default=[2886, 20000])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    for n_genes in options.genes:
        cells = simulate(2 * max(options.batch_sizes), n_genes, DENSITY.get(n_genes, 0.07))
        for batch_size in options.batch_sizes:
            if options.profile:
                profile(cells, batch_size)
                continue
            for figure in measure(cells, batch_size, options.steps, options.rounds):
                print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
