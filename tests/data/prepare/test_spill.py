from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rayvaec.data.prepare.partitions import CountsDtypes
from rayvaec.data.prepare.spill import Scatter, gather, offsets, runs

DTYPES = CountsDtypes(np.dtype("u1"), np.dtype("u2"))


def test_runs():
    assert offsets(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert runs(np.array([10, 5, 7]), np.array([2, 0, 3])).tolist() == [10, 11, 7, 8, 9]
    assert runs(np.array([], int), np.array([], int)).tolist() == []


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_cells=st.integers(1, 40),
    n_partitions=st.integers(1, 6),
    block=st.integers(1, 40),
    buffer=st.integers(0, 200),
)
@pytest.mark.parametrize("has_batches", [False, True])
def test_cells_arrive_in_order_of_their_positions(
    has_batches, seed, n_cells, n_partitions, block, buffer
):
    rng = np.random.default_rng(seed)
    n_partitions = min(n_partitions, n_cells)
    x = sparse.csr_array(rng.poisson(0.7, (n_cells, 9)))
    positions = rng.permutation(n_cells)
    labels, batches = rng.integers(3, size=n_cells), rng.integers(3, size=n_cells)
    names = [f"zelle_ä{'x' * row}" for row in range(n_cells)]
    cuts = rng.choice(np.arange(1, n_cells), n_partitions - 1, replace=False)
    bounds = np.array([0, *sorted(cuts), n_cells])
    with TemporaryDirectory() as folder:
        scatter = Scatter(Path(folder) / "parts", bounds, DTYPES, buffer)
        for start in range(0, n_cells, block):
            rows = slice(start, start + block)
            given_batches = batches[rows] if has_batches else None
            scatter.add(positions[rows], x[rows], labels[rows], given_batches, names[rows])
        scatter.flush()
        parts = [
            gather(Path(folder) / "parts" / str(k), DTYPES, has_batches)
            for k in range(n_partitions)
        ]
    assert [len(part.labels) for part in parts] == np.diff(bounds).tolist()
    order = np.argsort(positions)
    assert [name for part in parts for name in part.names] == [names[row] for row in order]
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), labels[order])
    if has_batches:
        found = np.concatenate([part.batches for part in parts])
        np.testing.assert_array_equal(found, batches[order])
    else:
        assert all(part.batches is None for part in parts)
    matrices = [
        sparse.csr_array(
            (part.counts, part.indices.astype("i4"), part.indptr), (len(part.labels), 9)
        )
        for part in parts
    ]
    np.testing.assert_array_equal(sparse.vstack(matrices).toarray(), x.toarray()[order])
    assert {part.counts.dtype for part in parts} == {DTYPES.counts}
    assert {part.indices.dtype for part in parts} == {DTYPES.indices}
