"""AnnData files in every form that `prepare` reads, and random stores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from scipy import sparse

from rayvaec.data.manifest import Manifest
from rayvaec.data.partition import CountsDtypes, PartitionCells, write_manifest, write_partition
from rayvaec.data.registry import Registry

FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "dense": lambda x: x.toarray() if sparse.issparse(x) else np.asarray(x),
}


@pytest.fixture
def counts() -> np.ndarray:
    """Counts of 30 cells and 12 genes, mostly zeros; no cell is empty."""
    rng = np.random.default_rng(3)
    x = rng.poisson(0.4, (30, 12)) * rng.integers(1, 40, (30, 12))
    x[np.arange(30), rng.integers(12, size=30)] += 1
    return x


@pytest.fixture
def write_input(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an AnnData file and returns its path."""

    def write(
        x: np.ndarray,
        name: str = "a.h5ad",
        form: str = "csr",
        labels: object = None,
        obs: dict[str, object] | None = None,
        genes: list[str] | None = None,
        cells: list[str] | None = None,
        layers: dict[str, np.ndarray] | None = None,
        raw: np.ndarray | None = None,
    ) -> Path:
        n_cells, n_genes = x.shape
        labels = [f"type {row % 3}" for row in range(n_cells)] if labels is None else labels
        frame = pd.DataFrame(
            {"cell_type": labels, **(obs or {})},
            index=cells or [f"{Path(name).stem}_{row}" for row in range(n_cells)],
        )
        var = pd.DataFrame(index=genes or [f"g{column}" for column in range(n_genes)])
        adata = anndata.AnnData(FORMS[form](x), frame, var, layers=layers)
        if raw is not None:
            names = pd.DataFrame(index=[f"g{column}" for column in range(raw.shape[1])])
            adata.raw = anndata.AnnData(FORMS[form](raw), frame, names)
        path = tmp_path / name
        if path.suffix == ".zarr":
            version = 2 if ".v2" in path.suffixes else 3
            with anndata.settings.override(auto_shard_zarr_v3=True):
                write_elem(zarr.open_group(path, mode="w", zarr_format=version), "/", adata)
        else:
            adata.write_h5ad(path)
        return path

    return write


class RandomStore(NamedTuple):
    """A store of random cells, and what was written into it."""

    path: Path
    matrix: np.ndarray
    labels: np.ndarray
    batches: np.ndarray | None
    names: list[str]
    registry: Registry


def write_random_store(
    path: Path,
    n_cells: int = 300,
    n_genes: int = 40,
    n_partitions: int = 2,
    n_train: int | None = None,
    n_batches: int = 0,
    largest: int = 300,
    density: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> RandomStore:
    """Write a store of `n_partitions` partitions of unequal size."""
    rng = np.random.default_rng(seed)
    matrix = rng.integers(1, largest + 1, (n_cells, n_genes)) * (
        rng.random((n_cells, n_genes)) < density
    )
    matrix[0, 0] = largest if density else 0
    labels = rng.integers(0, 3, n_cells)
    batches = rng.integers(0, n_batches, n_cells) if n_batches else None
    names = [f"cell {row}" for row in range(n_cells)]
    registry = Registry(
        genes=tuple(f"gene {column}" for column in range(n_genes)),
        labels=("T", "B", "NK"),
        labels_key="cell_type",
        batches=tuple(f"batch {k}" for k in range(n_batches)),
        batch_key="batch" if n_batches else None,
    )
    borders = np.linspace(0, 1, n_partitions + 1) ** 1.5 * n_cells
    partitions = []
    for k, (start, stop) in enumerate(pairwise(borders.round().astype(int))):
        csr = sparse.csr_matrix(matrix[start:stop])
        cells = PartitionCells(
            *(csr.indptr, csr.indices, csr.data, names[start:stop], labels[start:stop]),
            batches=None if batches is None else batches[start:stop],
        )
        dtypes = CountsDtypes.smallest(largest, n_genes)
        partitions.append(write_partition(path, f"dataset_{k}", cells, registry, dtypes, **options))
    manifest = Manifest(
        registry=registry,
        n_cells=n_cells,
        nnz=int((matrix > 0).sum()),
        cells_per_label=tuple(np.bincount(labels, minlength=3).tolist()),
        gene_totals=tuple(matrix.sum(axis=0).tolist()),
        total_counts=int(matrix.sum()),
        n_train=n_cells if n_train is None else n_train,
        seed=seed,
        sources=({"path": "random"},),
        partitions=tuple(partitions),
        created="2026-01-01T00:00:00+00:00",
        rayvaec_version="0",
    )
    write_manifest(path, manifest)
    return RandomStore(path, matrix, labels, batches, names, registry)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., RandomStore]:
    """Return a function that writes a random store; see `write_random_store`."""

    def make(name: str = "store", **options: Any) -> RandomStore:
        return write_random_store(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> RandomStore:
    """2,345 cells in three partitions, 2,100 of them for training; not to be changed."""
    path = tmp_path_factory.mktemp("random") / "store"
    return write_random_store(
        path, n_cells=2345, n_partitions=3, n_train=2100, n_batches=2, rows_per_chunk=1
    )
