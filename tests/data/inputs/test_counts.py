from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rayvaec.data.inputs.counts import LARGEST_COUNT, as_counts
from rayvaec.errors import CountsError

DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def check(data, **options):
    return as_counts(data, lambda at: (f"cell{at}", f"gene{at}"), where="a.h5ad, X", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_counts_of_every_type_come_back_as_they_are(dtype, data):
    values = data.draw(hnp.arrays("i8", st.integers(0, 20), elements=st.integers(0, 127)))
    result = check(values.astype(dtype))
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize("dtype", ["u4", "i8", "u8", "f8"])
def test_the_largest_count_passes_and_the_next_does_not(dtype):
    assert check(np.array([LARGEST_COUNT], dtype)) == LARGEST_COUNT
    with pytest.raises(CountsError, match=f"at cell cell1, gene gene1 .* {LARGEST_COUNT}"):
        check(np.array([0, LARGEST_COUNT + 1], dtype))


def test_a_float32_that_rounds_to_the_bound_is_refused():
    with pytest.raises(CountsError, match="is above the largest count"):
        check(np.array([2.0**31], "f4"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1.3862944, "1.3862944 at cell cell2, gene gene2 is not a whole number"),
        (-1, "-1.0 at cell cell2, gene gene2 is negative"),
        (np.nan, "nan at cell cell2, gene gene2 is not finite"),
        (np.inf, "inf at cell cell2, gene gene2 is not finite"),
        (-np.inf, "-inf at cell cell2, gene gene2 is not finite"),
    ],
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_bad_value_is_named_with_its_place(value, problem, dtype):
    with pytest.raises(CountsError) as caught:
        check(np.array([3, 0, value, 5, np.nan], dtype))
    assert problem in str(caught.value)
    assert "a.h5ad, X" in str(caught.value)


def test_a_negative_integer_is_refused():
    with pytest.raises(CountsError, match="-2 at cell cell1, gene gene1 is negative"):
        check(np.array([3, -2], "i4"))


@given(
    values=hnp.arrays("i4", st.integers(1, 30), elements=st.integers(0, 1000)),
    bad=st.sampled_from([0.5, -1.0, np.nan, np.inf, 2.0**31]),
    data=st.data(),
)
def test_one_bad_value_anywhere_is_found(values, bad, data):
    at = data.draw(st.integers(0, len(values) - 1))
    spoiled = values.astype("f8")
    spoiled[at] = bad
    with pytest.raises(CountsError, match=f"at cell cell{at}, gene gene{at} "):
        check(spoiled)


def test_the_fix_names_a_layer_that_exists():
    with pytest.raises(CountsError) as caught:
        check(np.array([0.5]), layers=["scaled", "raw_counts"])
    assert (
        caught.value.fix
        == "pass raw counts, such as `layer='raw_counts'` (layers: scaled, raw_counts)"
    )
    with pytest.raises(CountsError, match=r"such as layer='scaled'"):
        check(np.array([0.5]), layers=["scaled"], option="layer=")
    with pytest.raises(CountsError, match="there are no other layers"):
        check(np.array([0.5]))


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(CountsError, match="type <U1"):
        check(np.array(["1"]))
