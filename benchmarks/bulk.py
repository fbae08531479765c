"""Bulk inference over a store against the same work in memory, and against scvi-tools.

Writes a random store in a temporary folder (or keeps it where ``--store`` says), then times

- ``latent``: `embed` with two workers, against `posterior.latent` of cells that lie in memory, and
  against scvi-tools' `get_latent_representation` on some of them;
- ``expression``: `expression --by-label`, against `posterior.expression`;
- ``moments``: `sample --reduce mean,var` of the first cells, against the same in memory;
- ``draws``: `sample`, written and compressed, against the bare draws;
- ``memory``: the largest resident size of a worker, over all cells and over ``--few-cells``.

In memory one process works on as many threads as there are workers, on minibatches of the regions'
size. Of bulk work the time counts from when the first worker has opened model and store, to when
the last file is written: starting Ray and importing torch take some ten seconds beside it, which
``setup`` has as ``command_s``.

    python benchmarks/bulk.py [--store FOLDER] [--only latent draws] [--n-cells 500000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import write_store

from rayvaec.data.store.open import open_store
from rayvaec.inference import posterior
from rayvaec.inference.bulk import api, runner
from rayvaec.inference.bulk.per_cell import Moments
from rayvaec.inference.bulk.run_state import RunState
from rayvaec.inference.bulk.worker import RegionWorker
from rayvaec.inference.store_cells import StoreCells
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC

FIGURES = ("latent", "expression", "moments", "draws", "memory")
MINIBATCH = 16384
NNZ = 190


class Timed(RegionWorker):
    """Notes when it begins and ends, and how large it has become."""

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Compute a region, or write a file of a layer."""
        if not hasattr(self, "_warm"):
            self._warm = True
            model, store_cells = self.models[0]
            _, _, cells = store_cells.read(0, 256)
            posterior.draw(model.module, cells, 1, 0)
            posterior.expression(model.module, cells)
        began = time.time()
        record = super().call(method, *arguments)
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {**record, "began": began, "ended": time.time(), "kib": size}


def run_bulk(verb: Callable[..., None], *arguments: Any, **options: Any) -> dict[str, float]:
    """Run a verb of bulk inference; return seconds of work, of the command, and worker's MiB."""
    records: list[dict[str, Any]] = []
    finish = RunState.finish

    def noted(self: RunState, stage: str, item: int, record: Any) -> None:
        records.append(record)
        finish(self, stage, item, record)

    runner.RegionWorker, RunState.finish = Timed, noted  # type: ignore[misc, method-assign]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        verb(*arguments[:2], Path(folder) / "out.zarr", *arguments[2:], num_workers=2, **options)
        command = time.perf_counter() - began
    timed = [record for record in records if "began" in record]
    return {
        "seconds": max(r["ended"] for r in timed) - min(r["began"] for r in timed),
        "command_s": round(command, 1),
        "worker_mib": max(r["kib"] for r in timed) / 1024,
    }


def in_memory(cells: list[Any], compute: Callable[[Any], Any], rounds: int) -> float:
    """Return cells per second of a computation on minibatches that lie in memory."""
    compute(cells[0].part(0, 256))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for part in cells:
            compute(part)
        times.append(time.perf_counter() - began)
    return sum(map(len, cells)) / statistics.median(times)


def scvi_latent(parts: list[Any], registry: Any) -> float:
    """Return cells per second of scvi-tools on an AnnData in memory."""
    import warnings

    warnings.simplefilter("ignore")
    import anndata
    import scipy.sparse as sp
    import scvi

    counts = sp.vstack(
        [
            sp.csr_matrix(
                (part.counts.astype(np.float32), part.indices.astype(np.int32), part.indptr),
                shape=(len(part), registry.n_genes),
            )
            for part in parts
        ]
    ).tocsr()
    labels = np.concatenate([part.labels for part in parts])
    adata = anndata.AnnData(counts)
    adata.var_names = list(registry.genes)
    adata.obs["cell_type"] = np.array(registry.labels)[labels]
    scvi.model.CondSCVI.setup_anndata(adata, labels_key="cell_type")
    peer = scvi.model.CondSCVI(adata)
    peer.is_trained_ = True
    peer.module.eval()
    peer.get_latent_representation(indices=np.arange(1024))
    began = time.perf_counter()
    peer.get_latent_representation()
    return len(labels) / (time.perf_counter() - began)


def line(name: str, ours: float, peer: float, unit: str, setup: dict[str, Any]) -> None:
    """Print a figure."""
    load = round(os.getloadavg()[0], 1)
    figure = {"name": name, "ours": round(ours), "peer": round(peer)}
    figure |= {"ratio": round(ours / peer, 2), "unit": unit, "setup": setup | {"load": load}}
    print(json.dumps(figure), flush=True)


def made_store(folder: Path, n_cells: int) -> Path:
    """Write a random store, unless it is there."""
    if not folder.exists():
        options = Namespace(n_cells=n_cells, n_genes=2000, nnz=NNZ, partition_cells=100_000)
        write_store(folder, Namespace(**vars(options), codec="lz4", rows_per_chunk=256))
    return folder


def made_model(folder: Path, store: Path) -> Path:
    """Save a model of the store's genes and labels."""
    registry = open_store(store).registry
    torch.manual_seed(0)
    module = VAEC(registry.n_genes, registry.n_labels)
    module.init_from_counts(torch.distributions.Dirichlet(torch.full((2000,), 0.3)).sample())
    save_model(folder, module, registry.to_json(), {})
    return folder


def read(model: TrainedModel, store: Path, n_cells: int) -> list[Any]:
    """Read minibatches into memory."""
    cells = StoreCells(open_store(store), model.registry)
    starts = range(0, n_cells, MINIBATCH)
    return [cells.read(start, min(start + MINIBATCH, n_cells))[2] for start in starts]


def measure(options: Namespace, folder: Path) -> None:
    """Print one JSON line per figure."""
    store = made_store(options.store or folder / "store", options.n_cells)
    few = made_store(Path(f"{store}-few"), options.few_cells)
    paths = made_model(folder / "model", store), store
    model = load_model(paths[0])
    module, setup = model.module, {"n_cells": options.n_cells, "n_genes": 2000, "workers": 2}
    some = read(model, store, options.memory_cells)
    draws = options.n_samples
    reduce = ("mean", "var")

    def compared(
        name: str, n: int, compute: Callable[[Any], Any], cells: list[Any], *verb: Any, **more: Any
    ) -> float:
        peer = in_memory(cells, compute, options.rounds)
        done = run_bulk(*verb, **more)
        rate = n / done["seconds"]
        line(name, rate, peer, "cells/s", setup | {"n_cells": n} | done)
        return rate

    if "latent" in options.only:
        ours = compared(
            "bulk_latent",
            options.n_cells,
            lambda part: posterior.latent(module, part),
            some,
            api.embed_store,
            *paths,
        )
        peer = scvi_latent(some, model.registry)
        line(
            "bulk_latent_against_scvi_tools",
            ours,
            peer,
            "cells/s",
            {"peer_cells": len(some) * MINIBATCH},
        )
    if "expression" in options.only:
        compared(
            "bulk_expression_by_label",
            options.n_cells,
            lambda part: posterior.expression(module, part),
            [some[0].part(0, 4096)],
            api.expression_store,
            *paths,
            by_label=True,
        )
    if "moments" in options.only:
        moments = Moments(draws, 0, reduce)
        compared(
            "bulk_moments",
            options.few_cells,
            lambda part: moments.values(module, part),
            [some[0].part(0, 2048)],
            api.sample_store,
            paths[0],
            few,
            draws,
            reduce=reduce,
        )
    if "draws" in options.only:
        compared(
            "bulk_draws",
            options.few_cells,
            lambda part: posterior.draw(module, part, draws, 0),
            [some[0].part(0, 2048)],
            api.sample_store,
            paths[0],
            few,
            draws,
        )
    if "memory" in options.only:
        sizes = [run_bulk(api.embed_store, paths[0], path)["worker_mib"] for path in (few, store)]
        numbers = {"few_cells": options.few_cells, "n_cells": options.n_cells}
        line("bulk_worker_memory", sizes[1], sizes[0], "MiB, all cells against few", numbers)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--store", type=Path, help="where to keep the store; a temporary folder")
    parser.add_argument("--n-cells", type=int, default=500_000)
    parser.add_argument("--few-cells", type=int, default=50_000)
    parser.add_argument("--memory-cells", type=int, default=65_536)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
