"""Speed, peak memory and size on disk of `rayvaec prepare`, at two sizes of input.

Writes random h5ad files (gzip, or as ``--compression`` says), runs `rayvaec prepare` on them in a
process of its own for every codec, and asks the system for that process's peak resident set. All
figures are of one run each; the store's bytes per cell are compared with the files' own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

from rayvaec.data.prepare.memory import machine_memory, parse_bytes

BLOCK = 10_000

# The kernel's record of the process itself; what `wait4` says would count this one's memory too.
COMMAND = """
import sys
from rayvaec.cli import main
code = main()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


def draw(rng: np.random.Generator, chance: np.ndarray, n: int) -> sparse.csr_matrix:
    """Draw cells: which genes are seen, by their chance, and how often."""
    seen = rng.random((n, len(chance)), np.float32) < chance
    indptr = np.concatenate([[0], seen.sum(axis=1).cumsum()])
    indices = np.nonzero(seen)[1].astype(np.int32)
    mean = -np.log1p(-chance.astype(np.float64))[indices] * rng.gamma(0.5, 2.0, len(indices))
    counts = 1 + rng.poisson(np.minimum(mean, 500)).astype(np.float32)
    return sparse.csr_matrix((counts, indices, indptr), shape=(n, len(chance)))


def write_input(path: Path, options: argparse.Namespace, n_cells: int) -> None:
    """Write an h5ad file of random cells, some at a time."""
    rng = np.random.default_rng(0)
    chance = rng.gamma(0.5, size=options.n_genes)
    low, high = 1e-6, 1e6
    for _ in range(100):  # solve for the scale that gives the mean number of genes asked for
        scale = np.sqrt(low * high)
        few = -np.expm1(-chance * scale).sum() < options.nnz
        low, high = (scale, high) if few else (low, scale)
    chance = np.minimum(-np.expm1(-chance * scale), 1 - 1e-7).astype(np.float32)
    var = pd.DataFrame(index=[f"gene{gene}" for gene in range(options.n_genes)])
    how = {"compression": options.compression, "chunks": (2**17,), "maxshape": (None,)}
    if options.compression == "none":
        del how["compression"]
    with h5py.File(path, "w") as file:
        write_elem(file, "/", anndata.AnnData(obs=pd.DataFrame(index=["x"]), var=var))
        obs = pd.DataFrame(
            {"cell_type": pd.Categorical(rng.choice(list("abcdefgh"), n_cells))},
            index=[f"cell{cell}" for cell in range(n_cells)],
        )
        write_elem(file, "obs", obs, dataset_kwargs=how)
        if "X" in file:
            del file["X"]
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = np.array([n_cells, options.n_genes])
        data = x.create_dataset("data", (0,), "f4", **how)
        indices = x.create_dataset("indices", (0,), "i4", **how)
        lengths = []
        for start in range(0, n_cells, BLOCK):
            cells = draw(rng, chance, min(BLOCK, n_cells - start))
            for array, values in ((data, cells.data), (indices, cells.indices)):
                array.resize(len(array) + len(values), axis=0)
                array[-len(values) :] = values
            lengths.append(np.diff(cells.indptr))
        indptr = np.concatenate([[0], np.concatenate(lengths).cumsum()])
        x.create_dataset("indptr", data=indptr, compression=how.get("compression"))


def write_inputs(folder: Path, options: argparse.Namespace, n_cells: int) -> list[Path]:
    """Write files of `n_cells` together; all but the first are copies with names of their own."""
    each = n_cells // options.files
    paths = [folder / f"{n_cells}_{number}.h5ad" for number in range(options.files)]
    write_input(paths[0], options, each)
    for number, path in enumerate(paths[1:], 1):
        shutil.copyfile(paths[0], path)
        with h5py.File(path, "a") as file:
            key = file["obs"].attrs["_index"]
            names = [f"cell{number}_{cell}" for cell in range(each)]
            file["obs"][key][...] = np.array(names, object)
    return paths


def measure(arguments: list[str]) -> tuple[float, int]:
    """Run rayvaec; return its seconds and the bytes of its peak resident set."""
    started = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, int(ended.stdout.split()[-1]) * 1024


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def run(folder: Path, options: argparse.Namespace, n_cells: int) -> None:
    """Write inputs of one size, prepare them with every codec, and print a line for each."""
    paths = write_inputs(folder, options, n_cells)
    n_cells = n_cells // options.files * options.files
    given = sum(map(size, paths)) / n_cells
    budget = parse_bytes(options.memory) if options.memory else machine_memory() // 4
    for codec in options.codecs.split(","):
        out = folder / f"store_{n_cells}_{codec}"
        seconds, peak = measure(
            [
                *("prepare", *map(str, paths), "--out", str(out)),
                *("--labels-key", "cell_type", "--codec", codec),
                *("--memory", str(budget)),
            ]
        )
        stored = size(out) / n_cells
        line = {
            "name": "prepare",
            "ours": round(stored, 1),
            "peer": round(given, 1),
            "ratio": round(stored / given, 3),
            "unit": "bytes a cell on disk",
            "cells_per_s": round(n_cells / seconds),
            "seconds": round(seconds, 1),
            "peak_mib": round(peak / 2**20),
            "memory_mib": round(budget / 2**20),
            "peak_to_budget": round(peak / budget, 2),
            "setup": {
                "n_cells": n_cells,
                "n_genes": options.n_genes,
                "nnz_per_cell": options.nnz,
                "files": options.files,
                "codec": codec,
                "peer": f"h5ad, CSR of float32 and int32, {options.compression}",
                "cpus": len(os.sched_getaffinity(0)),
            },
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(out)
    for path in paths:
        path.unlink()


def main() -> None:
    """Print a JSON line for every size and codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-cells", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--n-genes", type=int, default=2_000)
    parser.add_argument("--nnz", type=int, default=200, help="stored values of a cell")
    parser.add_argument("--files", type=int, default=1, help="how many files to spread them over")
    parser.add_argument("--compression", choices=("gzip", "lzf", "none"), default="gzip")
    parser.add_argument("--codecs", default="lz4,zstd")
    parser.add_argument("--memory", help="budget (default: a quarter of the machine's)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for n_cells in options.n_cells:
            run(Path(folder), options, n_cells)


if __name__ == "__main__":
    main()
