from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import carray, njit

from rayvaec.kernels import simd
from rayvaec.kernels.cpu.nb_walk import LANES
from rayvaec.kernels.simd import (
    WIDTH,
    address,
    advance,
    chains,
    gathers,
    lowest_bit,
    prefetch,
    scatters,
)

UNTOUCHED = np.float32(-7)


@njit
def element(array, index):
    return carray(address(array, index), 1)[0]


@njit
def touch(array, index):
    prefetch(address(array, index))
    return array.sum()


@njit
def lowest(mask):
    return lowest_bit(mask)


@njit
def advance_at(lam, gap, first, large):
    return advance(address(lam, first), address(gap, first), large)


@pytest.fixture(scope="module", params=[(1, 8), (8, 8), (1, 16), (8, 16)], ids=str)
def product(request):
    """Genes, lanes taken at once, and the product of both with vectors of this and that width."""
    n_genes, width = request.param
    multiply = chains(n_genes)

    @njit
    def into(weight, gene, lanes, lane, out):
        n_hidden, n_lanes = lanes.shape
        of_lane, to = address(lanes, lane), address(out, lane)
        multiply(address(weight, gene * n_hidden), n_hidden, of_lane, n_lanes, to)

    with pytest.MonkeyPatch.context() as patch:
        # Read as the function is compiled: every machine has vectors of both widths, or halves.
        patch.setattr(simd, "PRODUCT_WIDTH", width)
        weight, lanes = _operands(n_genes, 1, width)
        into(weight, 0, lanes, 0, np.zeros((n_genes, width), np.float32))
    return n_genes, width, into


def _operands(n_rows, n_hidden, n_lanes, seed=0):
    """A weight and lanes."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n_rows, n_hidden)).astype(np.float32)
    return weight, rng.normal(size=(n_hidden, n_lanes)).astype(np.float32)


def _one_by_one(weight, lanes):
    """Multiply-adds from the first column to the last, each rounded once."""
    total = np.zeros((len(weight), lanes.shape[1]), np.float32)
    wide_weight, wide_lanes = weight.astype(np.longdouble), lanes.astype(np.longdouble)
    for i in range(weight.shape[1]):
        total = (total + wide_weight[:, i, None] * wide_lanes[i]).astype(np.float32)
    return total


@pytest.mark.parametrize("n_hidden", [0, 1, 7, 128, 1000])
def test_a_product_is_a_chain_of_multiply_adds(product, n_hidden):
    n_genes, width, into = product
    weight, lanes = _operands(n_genes + 3, n_hidden, 3 * width, seed=n_hidden)
    out = np.full((n_genes, 3 * width), UNTOUCHED)
    into(weight, 2, lanes, width, out)
    own_weight, own_lanes = weight[2 : 2 + n_genes], lanes[:, width : 2 * width]
    found = out[:, width : 2 * width]
    np.testing.assert_array_equal(found, _one_by_one(own_weight, own_lanes))
    exact = own_weight.astype(np.float64) @ own_lanes.astype(np.float64)
    bound = np.abs(own_weight).astype(np.float64) @ np.abs(own_lanes)
    assert (np.abs(found - exact) <= n_hidden * np.finfo(np.float32).eps * bound).all()
    beside = np.delete(out, np.arange(width, 2 * width), axis=1)
    assert (beside == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("row", "total"),
    [
        ([1e8, 1.0, -1e8], 0.0),
        ([1e8, -1e8, 1.0], 1.0),
        # (1 + 2**-12)**2 has a digit too many for float32, which is there before the sum is.
        ([-(1 + 2.0**-11), 1 + 2.0**-12], 2.0**-24),
        ([np.inf, 1.0], np.inf),
        ([1.0, np.nan, 1.0], np.nan),
    ],
)
def test_the_order_of_a_sum_and_its_rounding_are_fixed(product, row, total):
    n_genes, width, into = product
    weight = np.full((n_genes, len(row)), row, np.float32)
    lanes = np.ones((len(row), width), np.float32)
    if len(row) == 2:
        lanes[1] = row[1]
    out = np.empty((n_genes, width), np.float32)
    into(weight, 0, lanes, 0, out)
    np.testing.assert_array_equal(out, np.float32(total))


@pytest.fixture(scope="module", params=[(1, 1), (1, 8), (3, 16)], ids=str)
def rows_of_a_matrix(request):
    """Columns that are taken, and what adds rows to a total, and a row to rows."""
    n_vectors, lanes = request.param
    gather, scatter = gathers(n_vectors, lanes), scatters(n_vectors, lanes)

    @njit
    def add_rows(matrix, column, rows, factors, first, total):
        at, n, to = address(matrix, column), len(rows) - first, address(total, column)
        gather(at, matrix.shape[1], address(rows, first), address(factors, first), n, to)

    @njit
    def add_to_rows(matrix, column, rows, factors, first, source):
        at, n, of = address(matrix, column), len(rows) - first, address(source, column)
        scatter(at, matrix.shape[1], address(rows, first), address(factors, first), n, of)

    return n_vectors * lanes, add_rows, add_to_rows


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("n", [0, 1, 30])
def test_rows_are_added_in_order_and_columns_beside_stay(rows_of_a_matrix, kind, n):
    taken, add_rows, add_to_rows = rows_of_a_matrix
    factors, matrix = _operands(1, 2 + n, taken + 5)
    rng, factors, column = np.random.default_rng(n), factors[0], 3
    rows = rng.integers(0, len(matrix), 2 + n).astype(kind)  # some of them more than once
    total, own = rng.normal(size=taken + 5).astype(np.float32), slice(column, column + taken)
    expected, scattered = total.copy(), matrix.copy()
    chain = np.concatenate([total[None, own], matrix[rows[2:], own]])
    expected[own] = _one_by_one(np.append(np.float32(1), factors[2:])[None], chain)[0]
    for row, factor in zip(rows[2:], factors[2:], strict=True):
        pair = np.stack([scattered[row, own], total[own]])
        scattered[row, own] = _one_by_one(np.array([[1, factor]], np.float32), pair)[0]
    found = total.copy()
    add_rows(matrix, column, rows, factors, 2, found)
    np.testing.assert_array_equal(found, expected)
    add_to_rows(matrix, column, rows, factors, 2, total)
    np.testing.assert_array_equal(matrix, scattered)


def test_vectors_fill_the_lanes_of_a_block():
    assert WIDTH % simd.PRODUCT_WIDTH == 0
    assert LANES % WIDTH == 0


SINGLES = st.floats(0, 64, width=32)


@settings(max_examples=50, deadline=None)
@given(
    lam=arrays(np.float32, 3 * WIDTH, elements=SINGLES),
    gap=arrays(np.float64, 3 * WIDTH, elements=st.floats(0, 64)),
    equal=st.integers(0, 3 * WIDTH),
    large=st.sampled_from([0.0, 16.0, 64.0]),
)
def test_lanes_stop_where_a_gap_ends_or_a_lambda_is_large(lam, gap, equal, large):
    gap[:equal] = lam[:equal]  # a gap that just reaches past its gene does not end there
    before, middle = gap.copy(), slice(WIDTH, 2 * WIDTH)
    mask = advance_at(lam, gap, WIDTH, np.float32(large))
    is_large = lam[middle] > large
    ends = ~is_large & (lam[middle] > before[middle])
    stops = [bool(mask >> lane & 1) for lane in range(WIDTH)]
    assert stops == (is_large | ends).tolist()
    assert 0 <= mask < 1 << WIDTH
    moved = np.where(is_large | ends, before[middle], before[middle] - lam[middle])
    np.testing.assert_array_equal(gap[middle], moved)
    gap[middle] = before[middle]
    np.testing.assert_array_equal(gap, before)


@given(st.integers(-(2**63), 2**63 - 1).filter(bool))
def test_the_lowest_bit_is_found(mask):
    assert 2 ** lowest(mask) == mask & -mask


def test_every_bit_is_found():
    assert [lowest(int(np.uint64(1 << bit).view(np.int64))) for bit in range(64)] == [*range(64)]


def test_addresses_count_from_the_first_element_of_a_view():
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    assert [element(array, i) for i in (0, 9, 10, 59)] == [0, 9, 10, 59]
    assert element(array[2:, 3:], 1) == 24
    assert element(np.arange(5), 4) == 4


def test_what_is_asked_for_ahead_is_not_read():
    array = np.arange(6, dtype=np.float32)
    assert touch(array, 3) == touch(array, 2**45) == 15
    (code,) = touch.inspect_llvm().values()
    assert "llvm.prefetch" in code
