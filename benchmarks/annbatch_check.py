"""Open a store with annbatch itself and compare every cell with what rayvaec reads.

annbatch needs Python 3.12, and of rayvaec only the reading part is used, so a small environment
is enough; from the repository:

    python3.12 -m venv annbatch-env
    annbatch-env/bin/pip install annbatch anndata google-crc32c h5py numba tqdm
    PYTHONPATH=. annbatch-env/bin/python benchmarks/annbatch_check.py STORE

Compares names, labels, batches, genes and counts of every cell as `anndata.read_zarr` reads the
partitions, and as annbatch's collection and loader give them. Ends with exit code 1 at the first
difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from rayvaec.data.store.open import Store, open_store
from rayvaec.errors import RayvaecError


class DifferenceError(Exception):
    """What two readers do not agree on."""


class Expected:
    """What rayvaec reads, cell by cell in the order of the partitions.

    Parameters
    ----------
    store : Store
        Where to read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        ends = np.cumsum([0] + [partition.info.n_cells for partition in store.partitions])
        first = {id(p): int(end) for p, end in zip(store.partitions, ends[:-1], strict=True)}
        # The store's row of each cell, counted through the partitions: with cells appended to it,
        # a store lists every portion's training cells first.
        self._rows = np.empty(store.n_cells, np.int64)
        row = 0
        for partition, start, stop in store.pieces(0, store.n_cells):
            begin = first[id(partition)]
            self._rows[begin + start : begin + stop] = np.arange(row, row + stop - start)
            row += stop - start

    def compare(self, cells: np.ndarray, x: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        """Compare some cells, counted through the partitions; raise `DifferenceError`."""
        rows = self._rows[cells]
        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
        for begin, end in pairwise(cuts):
            if begin < end:
                at = slice(begin, end)
                self._compare_run(int(rows[begin]), int(rows[end - 1]) + 1, x[at], obs.iloc[at])

    def _compare_run(self, start: int, stop: int, x: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        registry, read = self._store.registry, self._store.read(start, stop)
        place = f"cells {start} to {stop}"
        same(obs.index.tolist(), self._store.obs_names(start, stop), f"the names of {place}")
        labels = np.array(registry.labels, object)[read.labels]
        same(obs[registry.labels_key].tolist(), labels.tolist(), f"the labels of {place}")
        if read.batches is not None:
            batches = np.array(registry.batches, object)[read.batches]
            same(obs[registry.batch_key].tolist(), batches.tolist(), f"the batches of {place}")
        same(np.diff(x.indptr), np.diff(read.indptr), f"the numbers of values of {place}")
        same(x.indices, read.indices, f"the genes of {place}")
        same(x.data, read.counts, f"the counts of {place}")


def same(theirs: object, ours: object, what: str) -> None:
    """Raise `DifferenceError` where two lists or arrays are not equal."""
    if not np.array_equal(np.asarray(theirs), np.asarray(ours)):
        raise DifferenceError(what)


def check_anndata(store: Store, expected: Expected) -> int:
    """Compare every partition as AnnData reads it; return how many cells came."""
    n = 0
    for partition in store.partitions:
        adata = anndata.read_zarr(store.path / partition.info.name)
        same(adata.var_names.tolist(), store.registry.genes, f"genes of {partition.info.name}")
        expected.compare(np.arange(n, n + adata.n_obs), adata.X, adata.obs)
        n += adata.n_obs
    return n


def annbatch_minibatches(
    folder: Path, shuffle: bool
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix, pd.DataFrame]]:
    """Yield position, counts and obs of what annbatch loads."""
    from annbatch import DatasetCollection, Loader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It is highly recommended to make your")
        collection = DatasetCollection(folder, mode="r")
    if collection.is_empty:
        raise DifferenceError("whether this is a collection of annbatch at all")
    loader = Loader(
        batch_size=256, chunk_size=256, preload_nchunks=8, shuffle=shuffle, return_index=True
    )
    for minibatch in loader.use_collection(collection):
        yield minibatch["index"], minibatch["X"], minibatch["obs"]


def check_annbatch(store: Store, expected: Expected, shuffle: bool) -> int:
    """Compare every cell that annbatch loads, each of which must come once; return how many."""
    seen = np.zeros(store.n_cells, np.int64)
    for cells, x, obs in annbatch_minibatches(store.path, shuffle):
        order = np.argsort(cells)
        expected.compare(cells[order], x[order], obs.iloc[order])
        seen[cells] += 1
    same(seen, np.ones_like(seen), "how often each cell comes")
    return int(seen.sum())


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    options = parser.parse_args()
    result = {"name": "annbatch_check", "anndata": 0, "annbatch": 0, "annbatch_shuffled": 0}
    try:
        store = open_store(options.store)
        expected = Expected(store)
        result["anndata"] = check_anndata(store, expected)
        result["annbatch"] = check_annbatch(store, expected, shuffle=False)
        result["annbatch_shuffled"] = check_annbatch(store, expected, shuffle=True)
    except (RayvaecError, DifferenceError) as error:
        sys.exit(f"the readers differ: {error}")
    except ImportError as error:
        sys.exit(f"{error}; this check needs Python 3.12 and annbatch, see --help")
    versions = {name: version(name) for name in ("annbatch", "anndata", "zarr")}
    print(json.dumps({**result, "unit": "cells compared", "setup": versions}))


if __name__ == "__main__":
    main()
