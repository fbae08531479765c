from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from rayvaec.errors import ConfigError, CountsError
from rayvaec.kernels.cpu.gene_tables import MAX_LOG_ODDS, MAX_MEAN
from rayvaec.kernels.nb_sample import draw_counts
from rayvaec.kernels.rng import normal_noise, position_keys

N_DRAWS = 100_000
# Bonferroni: below 200 chi-square tests in this module, and their seeds are fixed.
ALPHA = 1e-4 / 200


def dense(draws, n_genes):
    matrix = sparse.csr_matrix(
        (draws.counts, draws.indices, draws.indptr), (len(draws.indptr) - 1, n_genes)
    )
    assert matrix.has_canonical_format or not matrix.nnz
    return matrix.toarray()


def draw_columns(sizes, log_odds, generative="softplus", seed=0, n=N_DRAWS):
    """Draw n values of NB(size, odds) for every column."""
    sizes, log_odds = np.asarray(sizes, float), np.asarray(log_odds, float)
    if generative == "softplus":
        rate, px_r = sizes, log_odds
    else:
        rate, px_r = sizes * np.exp(log_odds), np.log(sizes)
    rates = np.broadcast_to(rate.astype("f4"), (n, len(sizes)))
    keys = position_keys(0, n)
    samples = np.zeros(n, np.uint64)
    draws = draw_counts(rates, px_r.astype("f4"), seed, keys, samples, generative=generative)
    assert draws.indptr.dtype == np.int64
    assert draws.indices.dtype == draws.counts.dtype == np.int32
    return dense(draws, len(sizes))


def chi_square(values, size, log_odds):
    """p-value of draws against NB(size, odds), in at most 40 bins of 20 or more expected draws."""
    law = stats.nbinom(size, 1 / (1 + np.exp(log_odds)))
    edges = np.unique(law.ppf(np.linspace(0, 1, 41)[1:-1]))
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * len(values)
    observed = np.bincount(np.searchsorted(edges, values), minlength=len(expected))
    e, o = [0.0], [0]
    for each, seen in zip(expected, observed, strict=True):
        if e[-1] >= 20:
            e.append(0.0)
            o.append(0)
        e[-1] += each
        o[-1] += seen
    if len(e) > 1 and e[-1] < 20:
        e[-2:], o[-2:] = [e[-2] + e[-1]], [o[-2] + o[-1]]
    return 1.0 if len(e) == 1 else stats.chisquare(o, np.array(e) * sum(o) / sum(e)).pvalue


def mean_is_right(values, size, log_odds):
    """Whether the mean lies where the central limit theorem puts it."""
    law = stats.nbinom(size, 1 / (1 + np.exp(log_odds)))
    z = (values.mean() - law.mean()) / (law.std() / np.sqrt(len(values)))
    return abs(z) < stats.norm.isf(ALPHA / 2)


# Sizes 0.001 to 1e4 and log odds -15 to 12; lambda on both sides of the switch to gamma-Poisson.
GRID = list(
    itertools.product([1e-3, 0.03, 0.5, 1.0, 7.0, 300.0, 1e4], [-15, -6, -2, 0, 2, 5, 8, 12])
)


@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_draws_follow_the_negative_binomial(generative):
    sizes, log_odds = zip(*[g for g in GRID if g[0] * np.exp(g[1]) <= MAX_MEAN], strict=True)
    values = draw_columns(sizes, log_odds, generative, seed=1)
    for column, (size, odds) in enumerate(zip(sizes, log_odds, strict=True)):
        pvalue = chi_square(values[:, column], size, odds)
        assert pvalue > ALPHA, (size, odds)
        # Elsewhere the mean of so many draws is still far from normal.
        if size >= 0.5 and size * np.exp(odds) >= 0.01:
            assert mean_is_right(values[:, column], size, odds), (size, odds)


def test_draws_of_large_lambdas_follow_the_negative_binomial():
    # Gamma shapes below and above 1, Poisson means below and above 10, means up to 1e8.
    cases = [
        (0.95, 16.95),
        (1.2, 15),
        (30, -0.2),
        (1e3, -4),
        (1e8, -15),
        (1e8, 0),
        (1e5, 5),
        (2, 17),
    ]
    values = draw_columns(*zip(*cases, strict=True), seed=2)
    for column, (size, odds) in enumerate(cases):
        assert chi_square(values[:, column], size, odds) > ALPHA, (size, odds)
        assert mean_is_right(values[:, column], size, odds), (size, odds)


@pytest.mark.parametrize(("size", "log_odds"), [(1e-6, 8.0), (1e-5, -1.0), (1e-6, 15.0)])
def test_rare_counts_have_the_right_rate_and_law(size, log_odds):
    n_genes = 2_000
    values = draw_columns(np.full(n_genes, size), np.full(n_genes, log_odds), seed=3, n=20_000)
    some = values[values > 0]
    expected = values.size * size * np.log1p(np.exp(log_odds))
    assert stats.poisson.sf(len(some) - 1, expected) > ALPHA
    assert stats.poisson.cdf(len(some), expected) > ALPHA
    # At such sizes a count above 0 is one logarithmic draw.
    edges = np.unique(stats.logser(1 / (1 + np.exp(-log_odds))).ppf([0.2, 0.4, 0.6, 0.8]))
    law = np.diff(stats.logser(1 / (1 + np.exp(-log_odds))).cdf([0, *edges, np.inf]))
    law, seen = law[law > 0.01], np.bincount(np.searchsorted(edges, some))
    assert (
        stats.chisquare(seen[: len(law)], law / law.sum() * seen[: len(law)].sum()).pvalue > ALPHA
    )


def test_the_chi_square_catches_wrong_draws():
    right = draw_columns([0.5, 7.0], [2.0, 0.0], seed=4)
    assert chi_square(right[:, 0], 0.5, 2.0) > ALPHA
    assert chi_square(right[:, 0], 0.53, 2.0) < ALPHA
    assert chi_square(right[:, 1], 7.0, 0.05) < ALPHA
    poisson = np.random.default_rng(0).poisson(7.0, N_DRAWS)
    assert chi_square(poisson, 7.0, 0.0) < ALPHA


@pytest.mark.parametrize("vary", ["keys", "samples", "seeds"])
def test_neighbouring_streams_are_independent(vary):
    n, n_genes = 6_000, 6
    steps, zeros = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    rates = np.full((n, n_genes), 2.0, "f4")
    px_r = np.zeros(n_genes, "f4")
    if vary == "seeds":
        rows = [draw_counts(rates[:1], px_r, seed, zeros[:1], zeros[:1]) for seed in range(n)]
        values = np.concatenate([dense(row, n_genes) for row in rows])
    else:
        keys, samples = (steps, zeros) if vary == "keys" else (zeros, steps)
        values = dense(draw_counts(rates, px_r, 0, keys, samples), n_genes)
    z = (values - 2.0) / 2.0
    limit = stats.norm.isf(ALPHA) / np.sqrt(n) * 1.5
    within = z.T @ z / n
    np.fill_diagonal(within, 0)
    assert np.abs(within).max() < limit
    for lag in (1, 2, 64):
        assert np.abs(z[lag:].T @ z[:-lag] / n).max() < limit
    noise = normal_noise(0, steps, zeros, n_genes) if vary == "keys" else np.zeros((n, 1))
    assert np.abs(z.T @ noise / n).max() < limit


def case(n_rows, n_genes, seed=0):
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(-3, 2, (n_rows, n_genes)).astype("f4")
    rate[rng.random(rate.shape) < 0.2] = 0
    rate[:, 0] = 1e4
    px_r = rng.normal(0, 2, n_genes).astype("f4")
    keys = rng.integers(0, 2**64, n_rows, dtype=np.uint64)
    samples = rng.integers(0, 5, n_rows, dtype=np.uint64)
    return rate, px_r, keys, samples


@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_a_row_does_not_depend_on_batching_order_or_threads(generative):
    n, n_genes = 1_000, 300
    rate, px_r, keys, samples = case(n, n_genes)

    def draw(rows):
        found = draw_counts(rate[rows], px_r, 7, keys[rows], samples[rows], generative=generative)
        return dense(found, n_genes)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = draw(np.arange(n))
        torch.set_num_threads(1)
        np.testing.assert_array_equal(draw(np.arange(n)), together)
    finally:
        torch.set_num_threads(threads)
    one_by_one = np.concatenate([draw(np.array([row])) for row in range(n)])
    np.testing.assert_array_equal(one_by_one, together)
    order = np.random.default_rng(1).permutation(n)
    shuffled = np.concatenate([draw(group) for group in np.array_split(order, 37)])
    np.testing.assert_array_equal(shuffled, together[order])
    assert (together > 0).any(1).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_draw_is_a_sorted_positive_csr_row(data):
    n_rows = data.draw(st.integers(0, 5))
    n_genes = data.draw(st.integers(0, 12))
    size = st.floats(0, 1e4, width=32)
    rate = data.draw(st.lists(size, min_size=n_rows * n_genes, max_size=n_rows * n_genes))
    px_r = data.draw(st.lists(st.floats(-30, 9, width=32), min_size=n_genes, max_size=n_genes))
    rates = np.array(rate, "f4").reshape(n_rows, n_genes)
    generative = data.draw(st.sampled_from(["softplus", "softmax"]))
    if generative == "softmax":
        px_r = np.abs(px_r)
    keys = position_keys(0, n_rows)
    seed = data.draw(st.integers(0, 2**64 - 1))
    draws = draw_counts(rates, np.array(px_r, "f4"), seed, keys, keys, generative=generative)
    assert len(draws.indptr) == n_rows + 1
    assert draws.indptr[0] == 0
    assert draws.indptr[-1] == len(draws.indices) == len(draws.counts)
    assert (draws.counts > 0).all()
    for row, (start, stop) in enumerate(itertools.pairwise(draws.indptr)):
        genes = draws.indices[start:stop]
        assert (np.diff(genes) > 0).all()
        assert (rates[row, genes] > 0).all()


@pytest.mark.parametrize(("size", "log_odds"), [(7.0, 0.0), (0.3, -1.0), (60.0, -2.0)])
def test_no_draw_lies_beyond_the_tail(size, log_odds):
    # Rounding must not leave a gap without a count: it would end at an absurd one.
    n_genes = 2_000
    values = draw_columns(np.full(n_genes, size), np.full(n_genes, log_odds), seed=6, n=10_000)
    law = stats.nbinom(size, 1 / (1 + np.exp(log_odds)))
    assert values.max() <= law.isf(1e-13)


def test_extreme_means_are_drawn_and_bounded():
    values = draw_columns([1e5, 1e5, 1e-30, 1e29], [0.0, 6.9, 15.0, -60.0], seed=5, n=2_000)
    assert abs(values[:, 0].mean() / 1e5 - 1) < 1e-3
    assert abs(values[:, 1].mean() / (1e5 * np.exp(6.9)) - 1) < 1e-3
    assert not values[:, 2].any()
    assert abs(values[:, 3].mean() / (1e29 * np.exp(-60)) - 1) < 1e-2


def test_rate_zero_gives_no_counts_whatever_px_r_is():
    px_r = np.array([-300, 0, 16, 40, 300], "f4")
    keys = position_keys(0, 3)
    for generative in ("softplus", "softmax"):
        draws = draw_counts(np.zeros((3, 5)), px_r, 0, keys, keys, generative=generative)
        assert draws.indptr.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("generative", ["softplus", "softmax"])
@pytest.mark.parametrize("value", [np.nan, -1e-3, np.inf, 3 * MAX_MEAN])
def test_bad_rates_are_refused_by_place(generative, value):
    rates = np.ones((4, 6), "f4")
    rates[2, 3] = value
    keys = position_keys(0, 4)
    with pytest.raises(CountsError, match=r"rate of row 2, gene 3 is"):
        draw_counts(rates, np.zeros(6), 0, keys, keys, generative=generative)


@pytest.mark.parametrize(
    ("generative", "px_r"), [("softplus", MAX_LOG_ODDS + 1), ("softmax", -MAX_LOG_ODDS - 1)]
)
def test_log_odds_beyond_the_bound_are_refused(generative, px_r):
    keys = position_keys(0, 1)
    terms = np.array([0.0, px_r], "f4")
    with pytest.raises(CountsError, match=r"gene 1 is 1, .*log odds up to 17"):
        draw_counts(np.ones((1, 2)), terms, 0, keys, keys, generative=generative)


def test_other_bad_arguments_are_refused():
    keys = position_keys(0, 2)
    rates = np.ones((2, 3), "f4")
    with pytest.raises(ConfigError, match="choose softplus or softmax"):
        draw_counts(rates, np.zeros(3), 0, keys, keys, generative="log")
    with pytest.raises(ConfigError, match=r"rate has shape \(2, 3\) and px_r \(4,\)"):
        draw_counts(rates, np.zeros(4), 0, keys, keys)
    with pytest.raises(ConfigError, match="keys have shape"):
        draw_counts(rates, np.zeros(3), 0, keys[:1], keys)
    with pytest.raises(CountsError, match="px_r of gene 1 is nan"):
        draw_counts(rates, np.array([0, np.nan, 0]), 0, keys, keys)
