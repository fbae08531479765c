"""What N nodes would do: 1 and 2 workers measured here, more of them modelled.

Runs `rayvaec train` on a simulated store with one core a worker: one worker at two minibatch
sizes, which gives the cost of a step and of a cell, and two workers, which shows what the model
says of them against what they did. The loader alone, validation and a checkpoint are timed in this
process, one thread. docs/scaling.md has the formulas.

    python benchmarks/scaling.py [--n-cells 40000] [--n-genes 2886] [--batch-sizes 128 1024]
        [--modelled-batch-sizes 128 1024 8192] [--nodes 1 2 4 8 16] [--workers-per-node 1]
        [--gbit 10] [--latency-us 50] [--price-per-hour 0.20] [--lanes 16] [--constants FILE]

`--constants FILE` takes a line of constants that an earlier call printed, and measures nothing.

"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FLOAT_BYTES = 4
RANK = """
import statistics, sys, time
import torch, torch.distributed as dist

sync, n_numbers, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sync}", rank=rank, world_size=2)
numbers, seconds = torch.zeros(n_numbers), []
for _ in range(60):
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(numbers)
    seconds.append(time.perf_counter() - began)
if rank == 0:
    print(statistics.median(seconds[10:]))
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Constants:
    """What was measured, with one core a worker.

    Parameters
    ----------
    n_parameters : int
        Numbers in the gradient.
    step_seconds : float
        What a step costs whatever its cells: launching, Adam, noise.
    cell_seconds : float
        What a cell costs more, loading on the same core included.
    loader_seconds : float
        The part of it that the loader alone takes.
    validation_seconds : float
        What a validation cell costs.
    checkpoint_seconds : float
        For how long a checkpoint holds the training up.
    reduce_seconds : float
        What adding the gradients of two workers on one machine costs a step, in shared memory.
    socket_seconds : float
        What gloo takes to add them over this machine's sockets, as workers of several nodes do.
    """

    n_parameters: int
    step_seconds: float
    cell_seconds: float
    loader_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    reduce_seconds: float
    socket_seconds: float


@dataclass(frozen=True)
class Cluster:
    """What the workers run on.

    Parameters
    ----------
    nodes, workers_per_node : int
        How many; a worker has one core of the kind that was measured.
    gbit : float
        Bandwidth of a node's link that all-reduces reach, 10**9 bits a second.
    latency_us : float
        Microseconds that a message between nodes takes.
    price_per_hour : float
        Of a node.
    """

    nodes: int
    workers_per_node: int
    gbit: float
    latency_us: float
    price_per_hour: float

    @property
    def workers(self) -> int:
        """All workers."""
        return self.nodes * self.workers_per_node


def all_reduce_seconds(constants: Constants, cluster: Cluster) -> float:
    """Return the seconds of one ring all-reduce of the gradient.

    2 (W - 1) messages, one after the other, and 2 (W - 1) / W of the gradient's bytes through
    every worker (Patarasuk and Yuan 2009). Two workers handle the gradient once in
    `reduce_seconds` on one node, and not in less than `socket_seconds` on several; that grows with
    the bytes. Workers of one node share its link, but a ring crosses it once; on one node nothing
    crosses it.
    """
    workers = cluster.workers
    handling = constants.reduce_seconds * 2 * (workers - 1) / workers
    if cluster.nodes == 1:
        return handling
    handling = max(handling, constants.socket_seconds * 2 * (workers - 1) / workers)
    messages = 2 * (workers - 1) * cluster.latency_us * 1e-6
    return handling + messages + sent_bytes(constants, cluster) * 8 / (cluster.gbit * 1e9)


def sent_bytes(constants: Constants, cluster: Cluster) -> float:
    """Return the bytes that a worker sends in one all-reduce."""
    return 2 * (cluster.workers - 1) / cluster.workers * FLOAT_BYTES * constants.n_parameters


def busiest_cells(batch_size: int, lanes: int, workers: int) -> float:
    """Return the cells of a minibatch that the worker with most lanes has."""
    return -(-lanes // workers) * batch_size / lanes


def step_seconds(
    constants: Constants, cluster: Cluster, batch_size: int, lanes: int
) -> dict[str, float]:
    """Return the parts of a step's seconds; nothing overlaps with the all-reduce."""
    cells = busiest_cells(batch_size, lanes, cluster.workers)
    return {
        "fixed": constants.step_seconds,
        "cells": cells * constants.cell_seconds,
        "all_reduce": all_reduce_seconds(constants, cluster),
    }


def epoch(
    constants: Constants,
    cluster: Cluster,
    *,
    batch_size: int,
    lanes: int,
    n_cells: int,
    n_validation: int,
    checkpoint_interval: float,
) -> dict[str, Any]:
    """Return what an epoch of `n_cells` takes on a cluster, and what it costs."""
    parts = step_seconds(constants, cluster, batch_size, lanes)
    step = sum(parts.values())
    training = step * -(-n_cells // batch_size)
    validation = n_validation * constants.validation_seconds / cluster.workers
    held_up = 1 + constants.checkpoint_seconds / checkpoint_interval
    seconds = (training + validation) * held_up
    return {
        "nodes": cluster.nodes,
        "workers": cluster.workers,
        "batch_size": batch_size,
        "cells_per_second": round(n_cells / seconds),
        "step_ms": {name: round(value * 1e3, 3) for name, value in parts.items()},
        "largest_part": max(parts, key=lambda name: parts[name]),
        "all_reduce_share": round(parts["all_reduce"] / step, 3),
        "sent_mb_per_step": round(sent_bytes(constants, cluster) / 1e6, 2),
        "hours_per_epoch": round(seconds / 3600, 2),
        "cost_per_epoch": round(seconds / 3600 * cluster.nodes * cluster.price_per_hour, 2),
    }


def run_seconds(
    store: Path, out: Path, workers: int, batch_size: int, options: argparse.Namespace
) -> dict[str, float]:
    """Run `rayvaec train` with one core a worker; return its last epoch's cells/s and step."""
    command = [sys.executable, "-m", "rayvaec", "train", str(store), "--out", str(out)]
    command += ["--num-workers", str(workers), "--batch-size", str(batch_size)]
    command += ["--max-epochs", str(options.epochs), "--set", "cpus_per_worker=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate = max(record["cells_per_second"] for record in records)
    return {"cells_per_second": rate, "step_seconds": batch_size / rate}


def measure(store: Path, work: Path, options: argparse.Namespace) -> Constants:
    """Measure; print a line for each run of 1 and 2 workers."""
    small, large = options.batch_sizes
    steps = {}
    for workers in (1, 2):
        for batch_size in (small, large):
            out = work / f"run_{workers}_{batch_size}"
            found = run_seconds(store, out, workers, batch_size, options)
            steps[workers, batch_size] = found["step_seconds"]
            line = {"measured_workers": workers, "batch_size": batch_size, **found}
            print(json.dumps(line), flush=True)
    cell = max((steps[1, large] - steps[1, small]) / (large - small), 0.0)
    fixed = max(steps[1, small] - small * cell, 0.0)
    for batch_size in (small, large):
        without = fixed + batch_size / 2 * cell
        line = {
            "two_workers_over_one": round(steps[1, batch_size] / steps[2, batch_size], 3),
            "batch_size": batch_size,
            "modelled_without_all_reduce": round(steps[1, batch_size] / without, 3),
            "all_reduce_on_one_machine_ms": round((steps[2, batch_size] - without) * 1e3, 2),
        }
        print(json.dumps(line), flush=True)
    # What else two busy cores disturb each other with is in it: the smaller one has less of that.
    reduce = max(min(steps[2, size] - fixed - size / 2 * cell for size in (small, large)), 0.0)
    found = _in_process(store, work, large)
    found["socket_seconds"] = _socket_seconds(found["n_parameters"], work)
    return Constants(step_seconds=fixed, cell_seconds=cell, reduce_seconds=reduce, **found)


def _socket_seconds(n_parameters: int, work: Path) -> float:
    """Return the seconds of one sum of two processes' numbers by gloo, one thread each."""
    command = [sys.executable, "-c", RANK, str(work / "sync"), str(n_parameters)]
    other = subprocess.Popen([*command, "1"])
    first = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    other.wait()
    return float(first.stdout)


def _in_process(store: Path, work: Path, batch_size: int) -> dict[str, Any]:
    """Time the loader alone, validation and a checkpoint, with one thread."""
    import torch

    from rayvaec.data.loading.loader import Loader
    from rayvaec.data.store.open import open_store
    from rayvaec.training.checkpoint import RunState, write_checkpoint
    from rayvaec.training.config import TrainConfig
    from rayvaec.training.distributed.process_group import Ranks
    from rayvaec.training.objective import build_module
    from rayvaec.training.validation import validation_elbo

    torch.set_num_threads(1)
    opened = open_store(store)
    module = build_module(opened, TrainConfig())
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def load() -> None:
        for _ in Loader(opened, batch_size=batch_size, seed=0).epoch(0):
            pass

    def checkpoint() -> None:
        folder = Path(tempfile.mkdtemp(dir=work))
        write_checkpoint(folder, module, optimizer, RunState())

    n_validation = opened.n_cells - opened.n_train
    return {
        "n_parameters": sum(parameter.numel() for parameter in module.parameters()),
        "loader_seconds": _seconds(load) / opened.n_train,
        "validation_seconds": _seconds(lambda: validation_elbo(module, opened, Ranks(), 0))
        / max(n_validation, 1),
        "checkpoint_seconds": _seconds(checkpoint),
    }


def _seconds(work: Any) -> float:
    """Return the seconds of the faster of two calls after a first: it compiles and warms up."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _constants(options: argparse.Namespace) -> Constants:
    if options.constants is not None:
        return Constants(**json.loads(options.constants.read_text())["constants"])
    from rayvaec.datasets import write_atlas

    with tempfile.TemporaryDirectory(prefix="rayvaec-scaling-") as folder:
        work = Path(folder)
        write_atlas(work / "atlas.h5ad", n_cells=options.n_cells, n_genes=options.n_genes)
        command = [sys.executable, "-m", "rayvaec", "prepare", str(work / "atlas.h5ad")]
        command += ["--out", str(work / "store"), "--labels-key", "cell_type"]
        subprocess.run(command, capture_output=True, check=True)
        return measure(work / "store", work, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--n-cells", type=int, default=40_000, help="of the store measured on")
    parser.add_argument("--n-genes", type=int, default=2_886)
    parser.add_argument("--epochs", type=int, default=3, help="of a measured run")
    parser.add_argument("--batch-sizes", type=int, nargs=2, default=[128, 1024])
    parser.add_argument("--modelled-batch-sizes", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--constants", type=Path, help="a file with a line of an earlier call")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--workers-per-node", type=int, default=1)
    parser.add_argument("--gbit", type=float, default=10.0, help="of a node's link")
    parser.add_argument("--latency-us", type=float, default=50.0, help="of a message")
    parser.add_argument("--price-per-hour", type=float, default=0.20, help="of a node")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--atlas-cells", type=int, default=100_000_000, help="of the epoch")
    parser.add_argument("--val-cells", type=int, default=100_000, help="validated each epoch")
    parser.add_argument("--checkpoint-interval", type=float, default=60.0, help="seconds")
    return parser.parse_args()


def main() -> None:
    """Print the measurements, the constants, a line per cluster, and a table."""
    options = _options()
    constants = _constants(options)
    setup = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps({"constants": asdict(constants), "setup": setup}), flush=True)
    found = []
    for batch_size in options.modelled_batch_sizes:
        for nodes in options.nodes:
            cluster = Cluster(
                nodes,
                options.workers_per_node,
                options.gbit,
                options.latency_us,
                options.price_per_hour,
            )
            if cluster.workers > options.lanes:
                problem = f"{cluster.workers} workers are more than {options.lanes} --lanes"
                print(json.dumps({"name": "scaling", "nodes": nodes, "refused": problem}))
                continue
            found.append(
                epoch(
                    constants,
                    cluster,
                    batch_size=batch_size,
                    lanes=options.lanes,
                    n_cells=options.atlas_cells,
                    n_validation=options.val_cells,
                    checkpoint_interval=options.checkpoint_interval,
                )
            )
            print(json.dumps({"name": "scaling", **found[-1]}), flush=True)
    print(
        f"{'minibatch':>9} {'nodes':>6} {'cells/s':>9} {'all-reduce':>11} {'hours':>8} {'cost':>8}"
    )
    for line in found:
        print(
            f"{line['batch_size']:9} {line['nodes']:6} {line['cells_per_second']:9} "
            f"{line['all_reduce_share']:11.0%} {line['hours_per_epoch']:8} "
            f"{line['cost_per_epoch']:8}"
        )


if __name__ == "__main__":
    main()
