"""AnnData files in every form that `prepare` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from scipy import sparse

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
