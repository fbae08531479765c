from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from rayvaec.errors import CountsError
from rayvaec.kernels.counts import CsrCounts


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.4, (6, 9))
    dense[2] = 0
    dense[0, 3] = 40_000
    return sparse.csr_matrix(dense)


@pytest.mark.parametrize("index_dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("count_dtype", ["uint16", "uint32", "int32", "int64"])
def test_dense_and_library_in_every_dtype(matrix, index_dtype, count_dtype):
    x = CsrCounts.from_numpy(
        matrix.indptr, matrix.indices.astype(index_dtype), matrix.data.astype(count_dtype), 9
    )
    assert x.n_cells == 6
    assert x.indptr.dtype == torch.int64
    np.testing.assert_array_equal(x.to_dense(torch.float64).numpy(), matrix.toarray())
    library = x.library()
    assert library.dtype == torch.float32
    np.testing.assert_array_equal(library.numpy(), matrix.sum(1))


def test_no_cells_and_no_entries():
    nobody = CsrCounts.from_numpy(np.zeros(1, "i8"), np.zeros(0, "u2"), np.zeros(0, "u1"), 5)
    assert nobody.to_dense().shape == (0, 5)
    assert nobody.library().shape == (0, 1)
    empty = CsrCounts.from_numpy(np.zeros(4, "i8"), np.zeros(0, "u2"), np.zeros(0, "u1"), 5)
    assert not empty.to_dense().any()
    assert empty.library().tolist() == [[0.0]] * 3


def test_entries_are_not_copied(matrix):
    counts = matrix.data.astype("u2")
    x = CsrCounts.from_numpy(matrix.indptr, matrix.indices, counts, 9)
    counts[0] = 7
    assert int(x.counts[0]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": np.array([0, 5])}, "indptr does not run"),
        ({"indptr": np.zeros(0, "i8")}, "indptr does not run"),
        ({"counts": np.ones(2, "i4")}, "3 indices but 2 counts"),
        ({"counts": np.ones(3)}, "counts is float64"),
    ],
)
def test_contradicting_arrays_are_refused(change, message):
    arrays = {
        "indptr": np.array([0, 1, 3]),
        "indices": np.array([0, 1, 2]),
        "counts": np.array([1, 1, 1]),
    }
    with pytest.raises(CountsError, match=message):
        CsrCounts.from_numpy(**(arrays | change), n_genes=4)
