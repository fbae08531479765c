from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cells import N_CELLS, make_cells, make_module, take

from rayvaec.inference.analyses.group_stats import Populations, merge, pooled, summarise

KEEP = 7


@pytest.fixture(scope="module")
def module():
    return make_module()


def _same(one: Populations, two: Populations) -> None:
    for name, left, right in zip(Populations._fields, one, two, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_summaries_of_parts_merge_to_that_of_all(data):
    module, cells = make_module(), make_cells()
    groups = np.arange(N_CELLS) % 4 - 1
    whole = summarise(module, cells, groups, 3, KEEP, seed=2)
    order = np.array(data.draw(st.permutations(range(N_CELLS))))
    edges = sorted(data.draw(st.lists(st.integers(0, N_CELLS), max_size=4)))
    parts = [part for part in np.split(order, edges) if len(part)]
    merged = merge(
        (summarise(module, take(cells, part), groups[part], 3, KEEP, seed=2) for part in parts),
        KEEP,
    )
    _same(whole, merged)
    assert np.bincount(whole.group).tolist() == [KEEP] * 3


def test_pooled_groups_are_the_group_of_all_their_cells(module):
    cells = make_cells()
    groups = np.arange(N_CELLS) % 4 - 1
    whole = summarise(module, cells, groups, 3, KEEP, seed=0)
    joined = np.where(groups == 1, -1, np.minimum(groups, 0))
    _same(pooled(whole, [0, 2], KEEP), summarise(module, cells, joined, 1, KEEP, seed=0))


def test_sums_are_those_of_the_cells(module):
    cells = make_cells()
    dense = np.zeros((N_CELLS, module.config.n_input))
    dense[np.repeat(np.arange(N_CELLS), np.diff(cells.indptr)), cells.indices] = cells.counts
    inside = cells.labels == 1
    found = summarise(module, cells, np.where(inside, 0, -1), 1, KEEP, seed=0)
    assert found.n_cells[0] == inside.sum()
    np.testing.assert_allclose(found.raw[0], dense[inside].sum(0))
    np.testing.assert_allclose(found.nonzero[0], (dense[inside] > 0).sum(0))
    shares = dense[inside] / dense[inside].sum(1, keepdims=True)
    np.testing.assert_allclose(found.normalized[0], 1e4 * shares.sum(0))


def test_the_choice_is_even_and_follows_the_seed(module):
    cells = make_cells()
    everyone = np.zeros(N_CELLS, np.int64)
    times = np.zeros(N_CELLS)
    for seed in range(200):
        chosen = summarise(module, cells, everyone, 1, 30, seed).keys
        times += np.isin(cells.keys, chosen)
    assert times.sum() == 200 * 30
    # Each cell is chosen in a fifth of the seeds: 40 times, with a deviation of 5.7.
    assert times.min() > 15
    assert times.max() < 65
