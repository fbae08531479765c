from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy import sparse

from rayvaec.kernels.counts import CsrCounts


@pytest.fixture
def make_counts() -> Callable[..., CsrCounts]:
    """Return a function that draws sparse counts: one cell has none; large ones on demand."""

    def make(n_cells: int, n_genes: int, *, large: bool = False, seed: int = 0) -> CsrCounts:
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.gamma(0.3, 0.5, (n_cells, n_genes)))
        if large:
            counts[0, :6] = [1, 32, 33, 40, 1_000, 1_000_000]
        counts[n_cells // 2] = 0
        matrix = sparse.csr_matrix(counts)
        return CsrCounts.from_numpy(
            matrix.indptr, matrix.indices.astype("u2"), matrix.data.astype("u4"), n_genes
        )

    return make


@pytest.fixture(autouse=True, scope="module")
def share_small_work() -> Iterator[None]:
    """Let small work, too, go to all threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayvaec.kernels.threads.LEAST_SHARED", 0)
        yield
