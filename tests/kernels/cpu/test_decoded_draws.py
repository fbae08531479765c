from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from rayvaec.errors import ConfigError, CountsError
from rayvaec.kernels.cpu import decoded_draws
from rayvaec.kernels.nb_sample import join_rows
from rayvaec.kernels.rng import position_keys

FORMS = ["softplus", "softmax"]
N_GENES, N_HIDDEN = 203, 16


def case(n_rows, seed=0):
    """h, weight, bias, px_r, library, keys and samples."""
    torch.manual_seed(seed)
    h = torch.randn(n_rows, N_HIDDEN)
    weight = 0.3 * torch.randn(N_GENES, N_HIDDEN)
    rest = torch.randn(N_GENES) - 4, torch.randn(N_GENES), torch.rand(n_rows, 1) * 50
    return (h, weight, *rest), position_keys(0, n_rows), np.arange(n_rows, dtype=np.uint64) % 3


def draw_decoded(*args, **kwargs):
    return join_rows(decoded_draws.draw_decoded(*args, **kwargs))


def dense(draws):
    counts = np.zeros((len(draws.indptr) - 1, N_GENES), np.int64)
    counts[np.repeat(np.arange(len(counts)), np.diff(draws.indptr)), draws.indices] = draws.counts
    return counts


@pytest.mark.parametrize("generative", FORMS)
def test_draws_follow_the_decoded_distribution(generative):
    (h, weight, bias, px_r, _), _, _ = case(1)
    n = 50_000
    library = torch.full((n, 1), 80.0)
    keys, samples = position_keys(0, n), np.zeros(n, np.uint64)
    draws = draw_decoded(
        h.expand(n, -1), weight, bias, px_r, library, 3, keys, samples, generative=generative
    )
    values = dense(draws)
    a = functional.linear(h, weight, bias)[0].double()
    if generative == "softplus":
        size, odds = 80 * functional.softplus(a), px_r.double().exp()
    else:
        size = px_r.double().exp()
        odds = 80 * torch.softmax(a, 0) / size
    law = stats.nbinom(size.numpy(), 1 / (1 + odds.numpy()))
    for count in range(3):
        expected = law.pmf(count) * n
        seen = (values == count).sum(0)
        z = (seen - expected) / np.sqrt(expected * (1 - law.pmf(count)) + 1)
        assert np.abs(z).max() < stats.norm.isf(1e-7)
    z = (values.mean(0) - law.mean()) / (law.std() / np.sqrt(n))
    assert np.abs(z).max() < 6


@pytest.mark.parametrize("generative", FORMS)
def test_a_row_does_not_depend_on_batching_order_or_threads(generative):
    tensors, keys, samples = case(300)
    weights = tensors[1:4]

    def draw(rows):
        return dense(
            draw_decoded(
                tensors[0][rows], *weights, tensors[4][rows], 5, keys[rows], samples[rows],
                generative=generative,
            )
        )  # fmt: skip

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = draw(np.arange(300))
        torch.set_num_threads(1)
        np.testing.assert_array_equal(draw(np.arange(300)), together)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(
        np.concatenate([draw(np.array([row])) for row in range(300)]), together
    )
    order = np.random.default_rng(0).permutation(300)
    groups = [draw(group) for group in np.array_split(order, 11)]
    np.testing.assert_array_equal(np.concatenate(groups), together[order])
    assert together.any(1).mean() > 0.9


def test_row_biases_are_biases_by_kind():
    (h, weight, bias, px_r, library), keys, samples = case(90)
    table, kind = torch.randn(3, N_GENES), torch.arange(90) % 3
    found = dense(
        draw_decoded(
            h, weight, bias, px_r, library, 0, keys, samples,
            generative="softmax", row_bias=(table, kind),
        )
    )  # fmt: skip
    for k in range(3):
        rows = torch.nonzero(kind == k)[:, 0]
        alone = draw_decoded(
            h[rows], weight, bias + table[k], px_r, library[rows], 0, keys[rows], samples[rows],
            generative="softmax",
        )  # fmt: skip
        # The two add up in another order: a few draws may fall on the other side of a threshold.
        assert (dense(alone) != found[rows]).mean() < 1e-4


def test_no_rows():
    tensors, keys, samples = case(0)
    assert draw_decoded(*tensors, 0, keys, samples).indptr.tolist() == [0]


def test_what_does_not_fit_is_refused():
    (h, weight, bias, px_r, library), keys, samples = case(70)
    with pytest.raises(ConfigError, match=r"h has shape \(70, 16\), weight \(202, 16\)"):
        draw_decoded(h, weight[1:], bias, px_r, library, 0, keys, samples)
    with pytest.raises(ConfigError, match="keys have shape"):
        draw_decoded(h, weight, bias, px_r, library, 0, keys[1:], samples)
    with pytest.raises(ConfigError, match="choose softplus or softmax"):
        draw_decoded(h, weight, bias, px_r, library, 0, keys, samples, generative="log")
    library[65] = -1
    with pytest.raises(CountsError, match="rate of row 65, gene 0 is -"):
        draw_decoded(h, weight, bias, px_r, library, 0, keys, samples)
    library[65] = 1
    h[3, 2] = float("nan")
    for generative in FORMS:
        with pytest.raises(CountsError, match="rate of row 3, gene 0 is nan"):
            draw_decoded(h, weight, bias, px_r, library, 0, keys, samples, generative=generative)
