from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.training.backends.host_to_device import Block, DeviceRows, Layout, Staging, StepNumbers

CPU = torch.device("cpu")
N_GENES = 50


def minibatch(
    lengths: list[int], step: int = 0, batches: bool = True, dtype: type = np.uint16
) -> Minibatch:
    """Cells with so many counts each."""
    rng = np.random.default_rng([len(lengths), sum(lengths), step])
    n, nnz = len(lengths), sum(lengths)
    return Minibatch(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        indices=np.concatenate([np.sort(rng.permutation(N_GENES)[:k]) for k in [0, *lengths]])
        .astype(np.uint16),
        counts=rng.integers(1, 200, nnz).astype(dtype),
        labels=rng.integers(0, 9, n).astype(np.int32),
        batches=rng.integers(0, 3, n).astype(np.int32) if batches else None,
        cells=rng.integers(0, 2**40, n),
        n_genes=N_GENES,
        n_global=n + 3,
        step=step,
    )  # fmt: skip


def assert_holds(rows: DeviceRows, expected: Minibatch, numbers: StepNumbers) -> None:
    """The rows are the minibatch, and what fills them up has no counts and no weight."""
    n = len(expected)
    dense = np.zeros((n, N_GENES), np.int64)
    lengths = np.diff(expected.indptr)
    dense[np.repeat(np.arange(n), lengths), expected.indices] = expected.counts
    found = rows.x.to_dense(torch.int64).numpy()
    assert np.array_equal(found[:n], dense)
    assert not found[n:].any()
    assert rows.x.indptr.diff().min() >= 0
    assert rows.labels[:n, 0].tolist() == expected.labels.tolist()
    if expected.batches is not None:
        assert rows.batches[:n, 0].tolist() == expected.batches.tolist()
    assert rows.cells[:n].tolist() == expected.cells.tolist()
    for filled in (rows.labels, rows.batches, rows.cells):
        assert not filled[n:].any()
    assert rows.divisor[:n].tolist() == [expected.n_global] * n
    assert rows.divisor[n:].tolist() == [math.inf] * (len(rows.divisor) - n)
    assert rows.step.item() == numbers.step
    rates = np.float32([numbers.lr, numbers.kl_weight, expected.n_global])
    assert rows.rates.tolist() == rates.tolist()


@given(
    first=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    then=st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=4),
    batches=st.booleans(),
    ahead=st.integers(0, 3),
)
def test_minibatches_of_any_size_arrive_whole(
    first: list[int], then: list[list[int]], batches: bool, ahead: int
) -> None:
    sent = [minibatch(lengths, i, batches) for i, lengths in enumerate([first, *then])]
    numbers = [StepNumbers(7 + i, 0.1 * i, 1 / (1 + i)) for i in range(len(sent))]
    staging = Staging(CPU)
    under_way: list[tuple[int, Block]] = []
    for i in range(len(sent) + ahead):
        if i < len(sent):
            under_way.append((i, staging.send(sent[i], numbers[i])))
        if i >= ahead:
            at, block = under_way.pop(0)
            room = torch.full((block.layout.n_bytes,), 255, dtype=torch.uint8)
            staging.take(block, room)
            assert_holds(block.layout.rows(room), sent[at], numbers[at])
    assert not under_way


def test_blocks_are_used_again() -> None:
    staging, seen = Staging(CPU), set()
    for step in range(20):
        block = staging.send(minibatch([step % 3] * 4, step), StepNumbers(step, 0, 0))
        seen.add(block)
        staging.take(block, torch.empty(block.layout.n_bytes, dtype=torch.uint8))
    assert len(seen) == 1


def test_a_layout_stays_while_it_holds_what_comes() -> None:
    layout = Layout.of(minibatch([10] * 8))
    assert layout.holds(minibatch([3] * 8))
    assert layout.holds(minibatch([]))
    assert not layout.holds(minibatch([1] * 9))
    assert not layout.holds(minibatch([10] * 8, dtype=np.uint32))
    many = minibatch([50] * 8)
    narrow = Layout(9, 64, N_GENES, many.indices.dtype, many.counts.dtype)
    assert not narrow.holds(many)
    wider = Layout.of(minibatch([1] * 3), layout)
    assert (wider.n_rows, wider.n_entries) == (layout.n_rows, layout.n_entries)
