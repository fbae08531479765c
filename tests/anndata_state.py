"""What an AnnData holds, to the stored entry: to see that nobody changed it."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
from scipy import sparse


def state(adata: anndata.AnnData) -> Any:
    """Return all that an AnnData holds, as comparable values."""
    matrices = {"X": adata.X, **{f"layers/{name}": x for name, x in adata.layers.items()}}
    if adata.raw is not None:
        matrices["raw"] = adata.raw.X
    return {
        **{name: _stored(matrix) for name, matrix in matrices.items()},
        "obs": adata.obs.to_csv(),
        "categories": [str(adata.obs[key].dtype) for key in adata.obs],
        "var": adata.var.to_csv(),
    }


def _stored(matrix: Any) -> Any:
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    is_sparse = sparse.issparse(matrix)
    parts = [matrix.data, matrix.indices, matrix.indptr] if is_sparse else [np.asarray(matrix)]
    return [(part.dtype.str, part.tobytes()) for part in parts]
