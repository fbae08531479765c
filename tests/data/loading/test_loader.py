from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rayvaec.data import Loader, open_store
from rayvaec.data.loading.loader import prefetched
from rayvaec.data.loading.sampler import LanePlan
from rayvaec.data.loading.shuffle_buffer import Minibatch, ReusableBuffers
from rayvaec.errors import ConfigError, StoreError

SMALL = {"block_rows": 8, "buffer_rows": 512, "lanes": 16}
WORLD_SIZES = [1, 2, 3, 4, 5, 8, 16]


def dense(minibatch: Minibatch) -> np.ndarray:
    csr = (minibatch.counts, minibatch.indices, minibatch.indptr)
    return sparse.csr_matrix(csr, (len(minibatch), minibatch.n_genes)).toarray()


def cells(minibatches: Sequence[Minibatch]) -> list[list[int]]:
    return [minibatch.cells.tolist() for minibatch in minibatches]


def loader_threads() -> list[threading.Thread]:
    names = ("rayvaec-decode", "rayvaec-loader")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def by_lane(parts: Sequence[Minibatch], plan: LanePlan, step: int) -> list[int]:
    """Put the ranks' parts of a minibatch together in the order of the lanes."""
    sizes = [end - begin for begin, end in (plan.share(k, step) for k in range(plan.lanes))]
    remaining = [part.cells.tolist() for part in parts]
    whole = []
    for lane, size in enumerate(sizes):
        rank = lane % len(parts)
        whole += remaining[rank][:size]
        remaining[rank] = remaining[rank][size:]
    assert not any(remaining)
    return whole


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 3),
    lane_rows=st.integers(1, 9),
    block_rows=st.integers(1, 10),
    window_blocks=st.integers(1, 5),
    split=st.sampled_from(["train", "validation"]),
)
def test_every_number_of_workers_sees_the_same_minibatches(
    smaller_store, seed, epoch, lane_rows, block_rows, window_blocks, split
):
    store = open_store(smaller_store.path)
    rows = store.rows(split)
    options = {
        "batch_size": 16 * lane_rows,
        "seed": seed,
        "block_rows": block_rows,
        "buffer_rows": 16 * block_rows * window_blocks,
        "split": split,
    }
    plan = LanePlan(
        start=rows.start,
        stop=rows.stop,
        batch_size=16 * lane_rows,
        lanes=16,
        block_rows=block_rows,
        window_blocks=window_blocks,
        seed=seed,
        epoch=epoch,
    )
    alone = cells(Loader(store, **options).epoch(epoch))
    assert sorted(cell for part in alone for cell in part) == list(rows)
    assert {len(part) for part in alone[:-1]} <= {16 * lane_rows}
    for world_size in WORLD_SIZES[1:]:
        loaders = [
            Loader(store, rank=k, world_size=world_size, **options) for k in range(world_size)
        ]
        ranks = [list(loader.epoch(epoch)) for loader in loaders]
        assert {len(rank) for rank in ranks} == {plan.n_steps}
        assert {loader.steps_per_epoch for loader in loaders} == {plan.n_steps}
        for step, parts in enumerate(zip(*ranks, strict=True)):
            assert by_lane(parts, plan, step) == alone[step]
            assert {part.n_global for part in parts} == {len(alone[step])}
            assert {part.step for part in parts} == {step}


def test_minibatches_hold_what_was_stored(random_store):
    store = open_store(random_store.path)
    for rank in range(3):
        for minibatch in Loader(store, 64, rank=rank, world_size=3, **SMALL).epoch(1):
            rows = minibatch.cells
            np.testing.assert_array_equal(dense(minibatch), random_store.matrix[rows])
            np.testing.assert_array_equal(minibatch.labels, random_store.labels[rows])
            np.testing.assert_array_equal(minibatch.batches, random_store.batches[rows])
            types = [x.dtype for x in (minibatch.indptr, minibatch.labels, minibatch.batches)]
            assert types == ["i8", "i4", "i4"]
            assert (minibatch.counts.dtype, minibatch.indices.dtype) == ("u2", "u2")


@pytest.mark.parametrize("largest", [255, 70_000])
def test_minibatches_of_other_types_and_without_batches(make_store, largest):
    made = make_store(n_cells=100, largest=largest)
    (minibatch,) = Loader(open_store(made.path), 128, **SMALL).epoch(0)
    np.testing.assert_array_equal(dense(minibatch), made.matrix[minibatch.cells])
    assert minibatch.batches is None


def test_fewer_cells_than_lanes(make_store):
    made = make_store(n_cells=5, n_partitions=2)
    store = open_store(made.path)
    parts = [list(Loader(store, 16, rank=k, world_size=16).epoch(0)) for k in range(16)]
    assert {len(part) for part in parts} == {1}
    assert sorted(cell for (part,) in parts for cell in part.cells) == [0, 1, 2, 3, 4]
    empty = next(part for (part,) in parts if not len(part))
    assert empty.indptr.tolist() == [0]
    assert len(empty.counts) == len(empty.indices) == 0
    assert empty.n_global == 5


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_is_skipping(random_store, world_size):
    store = open_store(random_store.path)
    loader = Loader(store, 64, seed=5, rank=world_size - 1, world_size=world_size, **SMALL)
    whole = cells(loader.epoch(2))
    for step in range(loader.steps_per_epoch + 1):
        assert cells(loader.epoch(2, start_step=step)) == whole[step:]
        assert (
            cells(Loader(store, 64, seed=5, shuffle=False).epoch(2, step))
            == cells(Loader(store, 64, shuffle=False).epoch(0))[step:]
        )


def test_resuming_reads_nothing_that_went_before(random_store, monkeypatch):
    read: list[tuple[int, int]] = []
    from rayvaec.data.loading import lane_reader

    def spy(store, runs, buffers, line, order):
        read.append(line)
        return load_window(store, runs, buffers, line, order)

    load_window = lane_reader.load_window
    monkeypatch.setattr(lane_reader, "load_window", spy)
    loader = Loader(open_store(random_store.path), 16, **SMALL)
    list(loader.epoch(0))
    whole = set(read)
    assert len(read) == len(whole)
    read.clear()
    list(loader.epoch(0, start_step=loader.steps_per_epoch - 1))
    # The last window of each lane, and of some the one before, where a window begins in the step.
    assert len(read) <= 2 * 16 < len(whole) / 2
    assert set(read) <= whole


def test_seeds_and_epochs_differ_and_repeat(random_store):
    store = open_store(random_store.path)
    orders = {
        (seed, epoch): str(cells(Loader(store, 64, seed=seed, **SMALL).epoch(epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert str(cells(Loader(store, 64, seed=1, **SMALL).epoch(1))) == orders[1, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_without_shuffling_the_order_is_that_of_the_store(random_store, world_size):
    store = open_store(random_store.path)
    options = {"batch_size": 100, "split": "validation", "shuffle": False}
    ranks = [
        list(Loader(store, rank=k, world_size=world_size, **options).epoch(0))
        for k in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        rows = np.concatenate([part.cells for part in parts])
        assert rows.tolist() == list(range(2100 + 100 * step, min(2200 + 100 * step, 2345)))
        assert {part.n_global for part in parts} == {len(rows)}
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            np.testing.assert_array_equal(dense(part), random_store.matrix[part.cells])
            np.testing.assert_array_equal(part.batches, random_store.batches[part.cells])


def test_a_minibatch_keeps_its_values_for_as_long_as_it_is_held(random_store):
    store = open_store(random_store.path)
    kept = list(Loader(store, 64, **SMALL).epoch(0))
    for minibatch in kept:
        np.testing.assert_array_equal(dense(minibatch), random_store.matrix[minibatch.cells])


def test_a_tensor_of_a_minibatch_keeps_its_values_too(random_store):
    # The tensor is all that is held: the minibatch and its arrays are gone.
    loader = Loader(open_store(random_store.path), 64, **SMALL)
    kept = [(torch.from_numpy(m.counts), m.counts.copy()) for m in loader.epoch(0)]
    for tensor, wanted in kept:
        np.testing.assert_array_equal(tensor.numpy(), wanted)


def test_room_is_used_again(random_store, monkeypatch):
    made = []
    count = ReusableBuffers.__init__

    def counting(self, store):
        made.append(self)
        count(self, store)

    monkeypatch.setattr(ReusableBuffers, "__init__", counting)
    loader = Loader(open_store(random_store.path), 16, prefetch=2, **SMALL)
    assert loader.steps_per_epoch == 132
    for _ in loader.epoch(0):
        pass
    # One for each lane's window and one for the next; those ahead, one in hand, one being made.
    assert len(made) <= 2 * 16 + 4
    for epoch in range(1, 4):
        for _ in loader.epoch(epoch):
            pass
    # What one epoch made is enough for the next.
    assert len(made) <= 2 * 16 + 4


def test_a_minibatch_keeps_its_values_into_the_next_epoch(random_store):
    loader = Loader(open_store(random_store.path), 64, **SMALL)
    kept = []
    for epoch in range(4):
        # The only one held: a list of all of them would hold the room of the first.
        kept += deque(loader.epoch(epoch), maxlen=1)
    for minibatch in kept:
        np.testing.assert_array_equal(dense(minibatch), random_store.matrix[minibatch.cells])


def test_the_threads_end_with_the_epoch(random_store):
    loader = Loader(open_store(random_store.path), 64, **SMALL)
    for _ in loader.epoch(0):
        assert loader_threads()
    assert not loader_threads()


@pytest.mark.parametrize("how", ["close", "drop", "never started", "break"])
def test_the_threads_end_when_the_iterator_is_given_up(random_store, how):
    loader = Loader(open_store(random_store.path), 64, **SMALL)
    minibatches = loader.epoch(0)
    if how != "never started":
        next(minibatches)
        assert loader_threads()
    if how == "close":
        minibatches.close()
    elif how == "break":
        for _ in minibatches:
            break
    del minibatches
    gc.collect()
    assert not loader_threads()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("name", ["X/data", "X/indptr"])
def test_an_error_in_the_thread_reaches_the_consumer(make_store, name, shuffle):
    made = make_store(n_cells=2000, rows_per_chunk=1)
    store = open_store(made.path)
    file = made.path / "dataset_1" / name / "c/0"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match=rf"the file {file} is damaged"):
        list(Loader(store, 64, shuffle=shuffle, **SMALL).epoch(0))
    assert not loader_threads()


@pytest.mark.parametrize("name", ["X/indices", "obs/cell_type/codes"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_an_interrupted_copy_is_named_in_training(make_store, name, how):
    made = make_store(n_cells=2000, rows_per_chunk=1)
    file = made.path / "dataset_1" / name / "c/0"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StoreError, match=rf"the file {file} is (missing|damaged or cut short)"):
        list(Loader(open_store(made.path), 64, **SMALL).epoch(0))
    assert not loader_threads()


def test_a_failure_of_the_consumer_ends_the_threads(random_store):
    def train(loader: Loader) -> None:
        for _ in loader.epoch(0):
            raise ValueError("the loss is NaN")

    loader = Loader(open_store(random_store.path), 64, **SMALL)
    with pytest.raises(ValueError, match="the loss is NaN") as caught:
        train(loader)
    del caught
    gc.collect()
    assert not loader_threads()


def test_a_process_ends_though_an_epoch_does_not(random_store):
    code = (
        "from rayvaec.data import Loader, open_store\n"
        f"loader = Loader(open_store({str(random_store.path)!r}), 64, block_rows=8, "
        "buffer_rows=512)\n"
        "minibatches = loader.epoch(0)\n"
        "print(len(next(minibatches)))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ended.stdout, ended.stderr) == ("64\n", "")


@pytest.mark.parametrize("n_cells", [1_000, 10_000])
def test_memory_does_not_grow_with_the_store(make_store, monkeypatch, n_cells):
    store = open_store(make_store(n_cells=n_cells, n_genes=20).path)
    one = ReusableBuffers(store)
    made: list[ReusableBuffers] = []
    start = ReusableBuffers.__init__

    def counting(self, store):
        made.append(self)
        start(self, store)

    monkeypatch.setattr(ReusableBuffers, "__init__", counting)
    for _ in Loader(store, 64, prefetch=2, **SMALL).epoch(0):
        pass
    held = sum(room.counts.nbytes + room.indices.nbytes for room in made)
    assert held <= (2 * 16 + 4) * (one.counts.nbytes + one.indices.nbytes)


def test_little_is_held_in_little_room(random_store):
    room = ReusableBuffers(open_store(random_store.path))
    fits = len(room.counts)
    for n, most in ((fits, 2**19), (fits + 1, 2**23), (4 * fits, 2**23)):
        room.reserve(n, 0)
        assert len(room.counts) >= n
        assert room.counts.base.nbytes <= most
        assert room.indices.base.nbytes <= 2**19
        assert not room.in_use()
    before = room.counts
    room.reserve(fits, fits)
    assert room.counts is before


def test_offsets_that_decrease_are_refused(make_store):
    # A partition that another program wrote, without checksums: rows would be copied from anywhere.
    made = make_store(n_partitions=1)
    offsets = zarr.open_array(made.path / "dataset_0/X/indptr", mode="r+")
    offsets[100] = offsets[100] + 10_000
    with pytest.raises(StoreError, match=r"the offsets in dataset_0/X/indptr decrease"):
        list(Loader(open_store(made.path), 64, **SMALL).epoch(0))
    assert not loader_threads()


def test_no_more_than_asked_for_is_prepared_ahead():
    prepared = []
    minibatches = prefetched(lambda step: prepared.append(step) or step, range(3, 20), 2)
    assert prepared == []
    assert next(minibatches) == 3
    time.sleep(0.1)
    assert prepared == [3, 4, 5]
    assert next(minibatches) == 4
    for step in minibatches:
        time.sleep(0.01)  # so that a step too many would have begun
        assert prepared[-1] <= step + 2
    assert prepared == list(range(3, 20))
    assert list(prefetched(lambda step: step, range(3, 4), 5)) == [3]
    assert list(prefetched(lambda step: step, range(3, 3), 5)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 1000},
            "batch_size is 1000 and must be a multiple of the 16 lanes; use 992 or 1008",
        ),
        ({"batch_size": 7}, "must be a multiple of the 16 lanes; use 16"),
        ({"batch_size": 0}, "batch_size is 0; give a number above 0"),
        ({"lanes": -1}, "lanes is -1"),
        ({"block_rows": 0}, "block_rows is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"world_size": 17, "rank": 3}, "17 workers and 16 lanes .*; use at most 16 workers"),
        ({"world_size": 2, "rank": 2}, "rank is 2 of 2 workers; ranks go from 0 to 1"),
        ({"seed": -1}, "seed is -1; give a number from 0 to"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"buffer_rows": 4095}, "buffer_rows is 4095, .*; use at least 4096"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(random_store, options, message):
    with pytest.raises(ConfigError, match=message):
        Loader(open_store(random_store.path), **options)


def test_epochs_and_steps_that_do_not_exist_are_refused(random_store):
    loader = Loader(open_store(random_store.path))
    assert loader.steps_per_epoch == 3
    with pytest.raises(ConfigError, match="epoch is -1"):
        loader.epoch(-1)
    for step in (-1, 4):
        with pytest.raises(ConfigError, match=f"start_step is {step}; an epoch has 3 steps"):
            loader.epoch(0, start_step=step)
    with pytest.raises(StoreError, match="no split 'test'"):
        Loader(open_store(random_store.path), split="test")


@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_made_of_minibatches_is_made_ahead_in_their_order(shuffle, store_path):
    loader, seen = Loader(open_store(store_path), 64, shuffle=shuffle, **SMALL), []

    def prepare(minibatch):
        seen.append((minibatch.step, threading.current_thread().name))
        return minibatch.step, cells([minibatch])

    found = list(loader.prepared(1, prepare, 2))
    assert [step for step, _ in found] == list(range(2, loader.steps_per_epoch))
    assert [made for _, made in found] == [cells([m]) for m in loader.epoch(1, 2)]
    assert [step for step, _ in seen] == [step for step, _ in found]
    assert all(name.startswith("rayvaec-loader") for _, name in seen)
