from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayvaec.data.loading.sampler import LanePlan, permutation


@st.composite
def plans(draw) -> LanePlan:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    start = draw(st.integers(0, 50))
    return LanePlan(
        start=start,
        stop=start + draw(st.integers(0, 700)),
        batch_size=lanes * draw(st.integers(1, 9)),
        lanes=lanes,
        block_rows=draw(st.integers(1, 40)),
        window_blocks=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 5)),
    )


def rows_of(plan: LanePlan, begin: int, end: int) -> np.ndarray:
    return np.concatenate([np.arange(*run) for run in plan.runs(begin, end)])


def windows_of(plan: LanePlan, lane: int) -> list[tuple[int, int]]:
    borders = plan.windows(lane).tolist()
    return [pair for pair in itertools.pairwise(borders) if pair[0] < pair[1]]


@settings(max_examples=300, deadline=None)
@given(plan=plans())
def test_the_windows_of_all_lanes_hold_every_row_once(plan):
    windows = [pair for lane in range(plan.lanes) for pair in windows_of(plan, lane)]
    rows = [rows_of(plan, *window) for window in windows]
    assert [len(part) for part in rows] == [end - begin for begin, end in windows]
    every = np.concatenate([np.empty(0, int), *rows])
    np.testing.assert_array_equal(np.sort(every), np.arange(plan.start, plan.stop))


@settings(max_examples=300, deadline=None)
@given(plan=plans())
def test_windows_are_small_and_end_where_blocks_end(plan):
    for lane in range(plan.lanes):
        windows = windows_of(plan, lane)
        for k, window in enumerate(windows):
            assert window[1] - window[0] <= plan.window_blocks * plan.block_rows
            assert len(plan.runs(*window)) <= plan.window_blocks
            if 0 < k < len(windows) - 1:
                assert len(plan.runs(*window)) == plan.window_blocks
            if k < len(windows) - 1:
                stop = plan.runs(*window)[-1][1]
                assert (stop - plan.start) % plan.block_rows == 0 or stop == plan.stop


@settings(max_examples=300, deadline=None)
@given(plan=plans())
def test_the_shares_of_a_lane_lie_end_to_end_and_only_the_last_step_is_short(plan):
    assert plan.n_steps == -(-plan.n_rows // plan.batch_size)
    for lane in range(plan.lanes):
        at, end = plan.lane(lane)
        for step in range(plan.n_steps):
            share = plan.share(lane, step)
            assert share[0] == at
            at = share[1]
            if step < plan.n_steps - 1:
                assert share[1] - share[0] == plan.lane_rows
        assert at == end
        assert plan.share(lane, plan.n_steps + 3) == (end, end)
    for step in range(plan.n_steps):
        shares = [plan.share(lane, step) for lane in range(plan.lanes)]
        assert sum(end - begin for begin, end in shares) == plan.n_global(step)


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_any_part_of_the_line_is_the_concatenation_of_its_parts(plan):
    if plan.n_rows < 3:
        return
    cuts = [0, plan.n_rows // 3, plan.n_rows // 2, plan.n_rows]
    parts = [rows_of(plan, begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]
    np.testing.assert_array_equal(np.concatenate(parts), rows_of(plan, 0, plan.n_rows))


def test_lanes_take_turns_in_needing_a_window():
    plan = LanePlan(0, 10**6, 1024, 16, 256, 16, 0, 0)
    firsts = [int(np.diff(plan.windows(lane))[0]) // 256 for lane in range(16)]
    assert len(set(firsts)) > 10


@given(n=st.integers(0, 50), key=st.lists(st.integers(0, 2**64 - 1), max_size=4))
def test_permutations_hold_everything_once_and_repeat(n, key):
    order = permutation(n, *key)
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(order, permutation(n, *key))


def test_permutations_differ_with_every_part_of_the_key():
    keys = [(1,), (1, 0), (0, 1), (1, 0, 0), (2**32, 0), (0, 2**32), (1, 1), ()]
    orders = {tuple(permutation(40, *key)) for key in keys}
    assert len(orders) == len(keys)


def test_permutations_stay_what_they_are():
    # Runs that are resumed after an upgrade must go on with the same minibatches.
    assert permutation(10, 0, 0).tolist() == [7, 6, 8, 0, 1, 5, 4, 3, 2, 9]
    assert permutation(10, 7, 3, 2, 1).tolist() == [1, 0, 3, 6, 2, 5, 7, 4, 8, 9]


def test_permutations_are_uniform():
    from scipy.stats import chisquare

    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), permutation(8, 5, key)] += 1
    assert chisquare(counts.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("change", ["seed", "epoch"])
def test_windows_are_in_another_order_with_another_seed_or_epoch(change):
    from dataclasses import replace

    plan = LanePlan(0, 5000, 64, 16, 16, 4, 3, 1)
    other = replace(plan, **{change: 2})
    assert plan.runs(0, 5000) != other.runs(0, 5000)
    assert plan.order(2, 0, 50).tolist() != other.order(2, 0, 50).tolist()
    assert plan.order(2, 0, 50).tolist() != plan.order(2, 1, 50).tolist()
    assert plan.order(2, 0, 50).tolist() != plan.order(3, 0, 50).tolist()
