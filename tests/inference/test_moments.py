from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rayvaec.inference.moments import Histogram

COUNTS = arrays.arrays(
    np.int32,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.sampled_from([0, 0, 0, 1, 2, 7, 2**31 - 1]),
)


@given(COUNTS, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 5))
def test_quantiles_of_any_counts_are_numpys(draws, quantiles, step):
    n_places, n_draws = draws.shape
    histogram = Histogram(n_places)
    for start in range(0, n_draws, step):
        place, sample = np.nonzero(draws[:, start : start + step])
        histogram.add(place, draws[:, start : start + step][place, sample])
    found = histogram.quantiles(quantiles, n_draws)
    np.testing.assert_allclose(found, np.quantile(draws.astype(float), quantiles, axis=1))


def test_a_histogram_holds_each_count_once():
    histogram = Histogram(2)
    for _ in range(100):
        histogram.add(np.array([0, 0, 1]), np.array([3, 4, 3], np.int32))
    assert len(histogram._keys) == 3
    assert histogram._times.tolist() == [100, 100, 100]
