"""How well minibatches are mixed, against a perfect shuffle.

Writes two stores of the same cells, one in random order (as `rayvaec prepare` leaves them) and one
sorted by label (as another program may), goes through epochs with the loader, and takes the
total-variation distance between the labels of each minibatch and those of all cells. A perfect
shuffle does not reach 0 either: 1,024 cells drawn at random differ a little from the whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rayvaec.data.loading.loader import Loader
from rayvaec.data.prepare.partitions import (
    CountsDtypes,
    PartitionCells,
    write_manifest,
    write_partition,
)
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest
from rayvaec.data.store.open import open_store


def write_store(folder: Path, labels: np.ndarray, n_labels: int) -> None:
    """Write a store with these labels and one count a cell."""
    n = len(labels)
    names = tuple(f"label{k}" for k in range(n_labels))
    registry = Registry(genes=("gene",), labels=names, labels_key="cell_type")
    cells = PartitionCells(
        indptr=np.arange(n + 1),
        indices=np.zeros(n, np.int64),
        counts=np.ones(n, np.int64),
        names=[f"cell{row}" for row in range(n)],
        labels=labels,
    )
    info = write_partition(folder, "dataset_0", cells, registry, CountsDtypes.smallest(1, 1))
    manifest = Manifest(
        registry=registry,
        n_cells=n,
        nnz=n,
        cells_per_label=tuple(np.bincount(labels, minlength=n_labels).tolist()),
        gene_totals=(n,),
        total_counts=n,
        n_train=n,
        seed=0,
        sources=(),
        partitions=(info,),
        created="",
        rayvaec_version="",
    )
    write_manifest(folder, manifest)


def distances(minibatches: Iterable[np.ndarray], whole: np.ndarray) -> np.ndarray:
    """Return the total-variation distance of each minibatch's label mix from the whole's."""
    mixes = [np.bincount(labels, minlength=len(whole)) / len(labels) for labels in minibatches]
    return np.abs(np.array(mixes) - whole).sum(axis=1) / 2


def summary(values: np.ndarray) -> dict[str, float]:
    """Return the mean, the 95th percentile and the largest of distances."""
    return {
        "mean": round(float(values.mean()), 4),
        "p95": round(float(np.quantile(values, 0.95)), 4),
        "max": round(float(values.max()), 4),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return distances for either store, for a perfect shuffle and for no shuffle."""
    rng = np.random.default_rng(0)
    # Cell types differ in frequency by orders of magnitude: each is 0.8 of the one before.
    weights = 0.8 ** np.arange(options.n_labels)
    labels = rng.choice(options.n_labels, options.n_cells, p=weights / weights.sum())
    whole = np.bincount(labels, minlength=options.n_labels) / len(labels)
    size = options.batch_size
    full = len(labels) // size * size
    results: dict[str, dict[str, float]] = {}
    for name, order in (("shuffled_store", labels), ("sorted_store", np.sort(labels))):
        write_store(folder / name, order, options.n_labels)
        loader = Loader(
            store=open_store(folder / name),
            batch_size=size,
            lanes=options.lanes,
            block_rows=options.block_rows,
            buffer_rows=options.buffer_rows,
        )
        epochs = (loader.epoch(epoch) for epoch in range(options.epochs))
        parts = (part.labels for epoch in epochs for part in epoch if len(part) == size)
        results[name] = summary(distances(parts, whole))
    shuffles = (rng.permutation(labels)[:full].reshape(-1, size) for _ in range(options.epochs))
    perfect = (part for shuffle in shuffles for part in shuffle)
    results["perfect_shuffle"] = summary(distances(perfect, whole))
    in_order = np.sort(labels)[:full].reshape(-1, size)
    results["sorted_unshuffled"] = summary(distances(in_order, whole))
    return results


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-cells", type=int, default=200_000)
    parser.add_argument("--n-labels", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--block-rows", type=int, default=256)
    parser.add_argument("--buffer-rows", type=int, default=16384)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    ours, peer = results["shuffled_store"]["mean"], results["perfect_shuffle"]["mean"]
    line = {
        "name": "shuffle",
        "ours": ours,
        "peer": peer,
        "ratio": round(ours / peer, 3),
        "unit": "mean total-variation distance of a minibatch's labels from all labels",
        "all": results,
        "setup": vars(options) | {"peer": "perfect shuffle"},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
