"""Shuffled minibatches from disk, against zarr-python and against decompression alone.

Writes a random store in a temporary folder (or takes ``--store``), then times, in turns and with
a warm cache: an epoch of the loader, alone and beside computing on one core; reading the same runs
of rows in the same order by slicing zarr arrays, without gathering them; and reading the shard
files of X and decompressing every chunk once, in one thread. Where annbatch is installed (Python
3.12; `benchmarks/annbatch_check.py` says how), also its shuffled epoch of the same store, with
blocks and buffer of the same sizes, alone and beside the same computing.

Cells per second of CPU time, over all threads, come beside those of the clock: on a machine that
others use they say more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numcodecs.blosc
import numpy as np
import zarr

from rayvaec.data.loading.loader import Loader
from rayvaec.data.loading.sampler import LanePlan
from rayvaec.data.prepare.partitions import (
    CountsDtypes,
    PartitionCells,
    write_manifest,
    write_partition,
)
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest
from rayvaec.data.store.open import Store, open_store

LANES, BLOCK_ROWS, BUFFER_ROWS = 16, 256, 16384


def write_store(folder: Path, options: argparse.Namespace) -> None:
    """Write a store of random cells: genes of skewed frequency, small counts with a long tail."""
    rng = np.random.default_rng(0)
    n, g = options.n_cells, options.n_genes
    genes = tuple(f"gene{i}" for i in range(g))
    registry = Registry(genes=genes, labels=("a", "b", "c"), labels_key="cell_type")
    chance = rng.gamma(0.5, size=g)
    # Solve for the scale at which the expected number of genes per cell is the one asked for.
    low, high = 1e-6, 1e6
    for _ in range(100):
        scale = np.sqrt(low * high)
        low, high = (
            (scale, high) if -np.expm1(-chance * scale).sum() < options.nnz else (low, scale)
        )
    rate = chance * scale
    seen = -np.expm1(-rate)
    partitions = []
    for k, start in enumerate(range(0, n, options.partition_cells)):
        rows = min(options.partition_cells, n - start)
        indptr, indices, counts = random_cells(rng, rows, seen, rate)
        cells = PartitionCells(
            indptr=indptr,
            indices=indices,
            counts=counts,
            names=[f"cell{start + i}" for i in range(rows)],
            labels=rng.integers(0, 3, rows),
        )
        partitions.append(
            write_partition(
                folder=folder,
                name=f"dataset_{k}",
                cells=cells,
                registry=registry,
                dtypes=CountsDtypes(
                    np.dtype("uint16"), np.dtype("uint16" if g <= 2**16 else "uint32")
                ),
                codec=options.codec,
                rows_per_chunk=options.rows_per_chunk,
            )
        )
    manifest = Manifest(
        registry=registry,
        n_cells=n,
        nnz=sum(info.nnz for info in partitions),
        cells_per_label=(n, 0, 0),
        gene_totals=(0,) * g,
        total_counts=0,
        n_train=n,
        seed=0,
        sources=(),
        partitions=tuple(partitions),
        created="",
        rayvaec_version="",
    )
    write_manifest(folder, manifest)


def random_cells(
    rng: np.random.Generator, n: int, seen: np.ndarray, rate: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw which genes a cell has and how many counts of each: Poisson rates times a gamma."""
    indices, lengths = [], []
    for start in range(0, n, 1000):
        rows = min(1000, n - start)
        drawn = rng.random((rows, len(seen)), np.float32) < seen.astype(np.float32)
        lengths.append(drawn.sum(axis=1))
        indices.append(np.nonzero(drawn)[1])
    flat = np.concatenate(indices)
    counts = 1 + rng.poisson(np.minimum(rate[flat], 50) * rng.gamma(0.5, 2.0, len(flat)))
    return np.concatenate([[0], np.concatenate(lengths).cumsum()]), flat, counts


class RawChunks:
    """Every shard file of X, to be read and decompressed as a whole, into memory used again.

    Parameters
    ----------
    store : Store
        Whose files.
    """

    def __init__(self, store: Store) -> None:
        self._shards = []
        self._cells = store.n_cells
        largest: dict[np.dtype, int] = {}
        for partition in store.partitions:
            for name, vector in (("data", partition.counts), ("indices", partition.indices)):
                folder = store.path / partition.info.name / "X" / name / "c"
                chunk = vector._layout.chunk
                for shard in range(-(-len(vector) // vector._layout.shard)):
                    places = vector._index(shard).tolist()
                    self._shards.append((folder / str(shard), places, chunk, vector.dtype))
                    room = largest.get(vector.dtype, 0)
                    largest[vector.dtype] = max(room, len(places) * chunk)
        self._room = {dtype: np.empty(n, dtype) for dtype, n in largest.items()}

    def run(self) -> int:
        """Read and decompress every chunk once; return how many cells came."""
        for path, places, chunk, dtype in self._shards:
            data, room = np.fromfile(path, np.uint8), self._room[dtype]
            for k, (begin, length) in enumerate(places):
                if begin < 2**63:  # else the chunk is empty
                    encoded = data[begin : begin + length - 4]
                    numcodecs.blosc.decompress(encoded, room[k * chunk : (k + 1) * chunk])
        return self._cells


def consume(sizes: Iterable[int], compute_s: float) -> int:
    """Go through minibatches, computing for some seconds each; return how many cells came."""
    # Not a product of matrices: BLAS takes every core, and goes on spinning on them for a while.
    values, out, cells = np.ones(2**16, np.float32), np.empty(2**16, np.float32), 0
    for size in sizes:
        cells += size
        until = time.perf_counter() + compute_s
        while time.perf_counter() < until:
            np.exp(values, out=out)
    return cells


def run_loader(loader: Loader, epoch: int, compute_s: float = 0.0) -> int:
    """Go through an epoch of the loader; return how many cells came."""
    return consume(map(len, loader.epoch(epoch)), compute_s)


def run_annbatch(store: Store, batch_size: int, compute_s: float = 0.0) -> int:
    """Go through a shuffled epoch of annbatch; return how many cells came."""
    from annbatch import DatasetCollection
    from annbatch import Loader as AnnbatchLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It is highly recommended to make your")
        collection = DatasetCollection(store.path, mode="r")
    loader = AnnbatchLoader(
        batch_size=batch_size,
        chunk_size=BLOCK_ROWS,
        preload_nchunks=BUFFER_ROWS // BLOCK_ROWS,
        shuffle=True,
    ).use_collection(collection)
    return consume((minibatch["X"].shape[0] for minibatch in loader), compute_s)


def run_zarr(store: Store, n_blocks: int) -> int:
    """Slice the first blocks of an epoch out of zarr arrays; return how many cells came."""
    plan = LanePlan(0, store.n_train, 1024, LANES, BLOCK_ROWS, 4, 0, 0)
    end = min(n_blocks * BLOCK_ROWS, store.n_train)
    arrays = [zarr.open_group(store.path / p.info.name, mode="r")["X"] for p in store.partitions]
    opened = {
        p.info.name: [x[key] for key in ("indptr", "data", "indices")]
        for p, x in zip(store.partitions, arrays, strict=True)
    }
    for run in plan.runs(0, end):
        for partition, start, stop in store.pieces(*run):
            indptr, data, indices = opened[partition.info.name]
            offsets = indptr[start : stop + 1]
            data[offsets[0] : offsets[-1]]
            indices[offsets[0] : offsets[-1]]
    return end


def rates(work: Callable[[], int]) -> tuple[float, float]:
    """Return cells per second of the clock and of CPU time."""
    started, cpu_started = time.perf_counter(), time.process_time()
    cells = work()
    return cells / (time.perf_counter() - started), cells / (time.process_time() - cpu_started)


def measure(store: Store, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Time every way, in turns."""
    loader = Loader(
        store=store,
        batch_size=options.batch_size,
        lanes=LANES,
        block_rows=BLOCK_ROWS,
        buffer_rows=BUFFER_ROWS,
        threads=options.threads,
    )
    raw, size, compute_s = RawChunks(store), options.batch_size, options.compute_ms / 1000
    ways: dict[str, Callable[[int], int]] = {
        "beside": lambda epoch: run_loader(loader, epoch, compute_s),
        "loader": lambda epoch: run_loader(loader, epoch),
        "raw": lambda epoch: raw.run(),
        "zarr": lambda epoch: run_zarr(store, options.zarr_blocks),
    }
    if importlib.util.find_spec("annbatch"):
        ways["annbatch"] = lambda epoch: run_annbatch(store, size)
        ways["annbatch_beside"] = lambda epoch: run_annbatch(store, size, compute_s)
    run_loader(loader, 0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for epoch in range(1, options.rounds + 1):
        for name, way in ways.items():
            times[name].append(rates(lambda way=way, epoch=epoch: way(epoch)))
    return times


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-cells", type=int, default=50_000)
    parser.add_argument("--n-genes", type=int, default=20_000)
    parser.add_argument("--nnz", type=int, default=1_500, help="stored values of a cell")
    parser.add_argument("--partition-cells", type=int, default=50_000)
    parser.add_argument("--rows-per-chunk", type=int)
    parser.add_argument("--codec", default="lz4")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--compute-ms", type=float, default=10.0, help="work beside the loader")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--zarr-blocks", type=int, default=40, help="blocks that zarr reads a round"
    )
    parser.add_argument("--store", type=Path, help="use this store, or write it there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store or Path(temporary) / "store"
        if not folder.exists():
            write_store(folder, options)
        store = open_store(folder)
        times = measure(store, options)
        stored = sum(file.stat().st_size for file in folder.glob("dataset_*/X/**/*"))
    medians = {
        name: round(statistics.median(clock for clock, _ in values))
        for name, values in times.items()
    }
    cpu = {name: round(statistics.median(cpu for _, cpu in times[name])) for name in times}
    setup = {
        "n_cells": store.n_cells,
        "n_genes": store.n_genes,
        "nnz_per_cell": round(store.manifest.nnz / store.n_cells),
        "batch_size": options.batch_size,
        "codec": options.codec,
        "threads": options.threads,
        "compute_ms": options.compute_ms,
        "cpus": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
        "peer": "zarr-python slicing the same runs of rows",
    }
    result = {
        "name": "loader",
        "ours": medians["loader"],
        "peer": medians["zarr"],
        "ratio": round(medians["loader"] / medians["zarr"], 2),
        "unit": "cells/s",
        "megabytes_per_s": round(medians["loader"] * stored / store.n_cells / 1e6, 1),
        "beside_compute": medians["beside"],
        "compute_alone": round(options.batch_size / options.compute_ms * 1000),
        "raw_decompression": medians["raw"],
        "ratio_to_raw": round(medians["loader"] / medians["raw"], 2),
        "annbatch": medians.get("annbatch"),
        "annbatch_beside": medians.get("annbatch_beside"),
        "cpu": {name: cpu[name] for name in ("loader", "raw")},
        "cpu_ratio_to_raw": round(cpu["loader"] / cpu["raw"], 2),
        "setup": setup,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
