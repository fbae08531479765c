from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, nbinom
from small_cells import N_CELLS, N_GENES, make_cells, make_module, take

from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.kernels.rng import cell_keys


@pytest.fixture(scope="module")
def module():
    return make_module()


@pytest.fixture(scope="module")
def cells():
    return make_cells()


def dense_draws(draws, n_samples=1):
    rows = np.repeat(np.arange(len(draws.indptr) - 1), np.diff(draws.indptr))
    counts = np.zeros((len(draws.indptr) - 1, N_GENES), np.int64)
    counts[rows, draws.indices] = draws.counts
    return counts.reshape(-1, n_samples, N_GENES)


def test_latent_equals_the_dense_module(module, cells):
    mean, variance = posterior.latent(module, cells)
    x = np.zeros((N_CELLS, N_GENES), np.float32)
    x[np.repeat(np.arange(N_CELLS), np.diff(cells.indptr)), cells.indices] = cells.counts
    with torch.no_grad():
        qz = module.inference(torch.from_numpy(x), torch.from_numpy(cells.labels)[:, None])["qz"]
    np.testing.assert_allclose(mean, qz.loc, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, qz.variance, rtol=1e-4)


FORMS = ({}, {"generative": "softmax", "n_batch": 1, "prior": "mog"})


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_results_do_not_depend_on_the_cells_beside_them(data):
    module, cells = make_module(**data.draw(st.sampled_from(FORMS))), make_cells()
    order = np.array(data.draw(st.lists(st.integers(0, N_CELLS - 1), min_size=1, max_size=140)))
    part = take(cells, order)
    for whole, ours in (
        (posterior.latent(module, cells)[0], posterior.latent(module, part)[0]),
        (posterior.elbo(module, cells), posterior.elbo(module, part)),
        (posterior.expression(module, cells), posterior.expression(module, part)),
        (
            dense_draws(posterior.draw(module, cells, 2, 7), 2),
            dense_draws(posterior.draw(module, part, 2, 7), 2),
        ),
    ):
        np.testing.assert_array_equal(whole[order], ours)


def test_draws_can_be_made_in_parts(module, cells):
    whole = dense_draws(posterior.draw(module, cells, 5, 3), 5)
    first = dense_draws(posterior.draw(module, cells, 2, 3), 2)
    rest = dense_draws(posterior.draw(module, cells, 3, 3, first_sample=2), 3)
    np.testing.assert_array_equal(whole, np.concatenate([first, rest], axis=1))
    assert not np.array_equal(whole[:, 0], whole[:, 1])
    assert not np.array_equal(whole, dense_draws(posterior.draw(module, cells, 5, 4), 5))


def test_generated_counts_follow_the_model(module):
    # Many draws at one z: the label's decoder at z ~ N(0, I), integrated by the draws themselves.
    n = 20_000
    labels, library = np.ones(1, np.int64), np.full(1, 60, np.float32)
    draws = posterior.generate(module, labels, library, cell_keys(["a"]), n, 0)
    drawn = dense_draws(draws, n)[0]
    with torch.no_grad():
        z = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
        y = torch.ones(4000, 1, dtype=torch.long)
        rate = module.decode(z, torch.full((4000, 1), 60.0), y).double().numpy()
        p = torch.sigmoid(-module.px_r.double()).numpy()
    for gene in range(0, N_GENES, 6):
        expected = nbinom.pmf(np.arange(40)[:, None], rate[:, gene], p[gene]).mean(1)
        large = np.flatnonzero(expected * n > 20)
        observed = np.bincount(drawn[:, gene], minlength=40)[large]
        share = expected[large] / expected[large].sum()
        assert chisquare(observed, share * observed.sum()).pvalue > 1e-5


def test_new_cells_of_a_mixture_prior_come_from_the_mixture_of_their_label():
    module, n = make_module(generative="softmax", n_batch=1, prior="mog", num_classes_mog=3), 20_000
    with torch.no_grad():
        module.prior_logits[1] = torch.tensor([0.0, 1.0, -1.0])
    labels, library = np.ones(1, np.int64), np.full(1, 60, np.float32)
    found = []
    for keys in (cell_keys(["a"]), cell_keys(["b"])):
        draws = posterior.generate(module, labels, library, keys, n, 0)
        found.append(dense_draws(draws, n)[0])
    assert not np.array_equal(*found)
    weights = torch.softmax(module.prior_logits[1], 0).detach().double()
    with torch.no_grad():
        # By quadrature over the components: as many z of each, weighted.
        noise = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
        z = module.prior_means[1][:, None] + module.prior_log_std[1].exp()[:, None] * noise
        y = torch.ones(4000, 1, dtype=torch.long)
        rate = [module.decode(part, torch.full((4000, 1), 60.0), y).double() for part in z]
    theta = module.px_r.exp().double().detach().numpy()
    for gene in range(0, N_GENES, 3):
        expected = np.zeros(40)
        for weight, mu in zip(weights.tolist(), rate, strict=True):
            p = theta[gene] / (theta[gene] + mu[:, gene].numpy())
            expected += weight * nbinom.pmf(np.arange(40)[:, None], theta[gene], p).mean(1)
        large = np.flatnonzero(expected * n > 20)
        observed = np.bincount(found[0][:, gene], minlength=40)[large]
        share = expected[large] / expected[large].sum()
        assert chisquare(observed, share * observed.sum()).pvalue > 1e-5
    # A draw does not depend on how many are drawn, nor from which one on.
    later = posterior.generate(module, labels, library, cell_keys(["b"]), 3, 0, first_sample=100)
    np.testing.assert_array_equal(dense_draws(later, 3)[0], found[1][100:103])


def test_elbo_is_below_the_likelihood_and_finite(module, cells):
    bound = posterior.elbo(module, cells)
    assert bound.shape == (N_CELLS,)
    assert np.isfinite(bound).all()
    assert (bound < 0).all()
    assert not np.array_equal(bound, posterior.elbo(module, cells, seed=1))


def test_expression_is_a_share_of_the_counts(module, cells):
    share = posterior.expression(module, cells)
    assert share.shape == (N_CELLS, N_GENES)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-5)


def test_no_cells_and_empty_cells_are_fine(module, cells):
    assert len(posterior.draw(module, cells.part(0, 0), 3, 0).indptr) == 1
    assert posterior.latent(module, cells.part(0, 0))[0].shape == (0, 5)
    empty = Cells(
        np.zeros(3, np.int64),
        cells.indices[:0],
        cells.counts[:0],
        cells.labels[:2],
        None,
        cells.keys[:2],
    )
    assert dense_draws(posterior.draw(module, empty, 2, 0), 2).sum() == 0


def test_batches_reach_the_decoder():
    module = make_module(n_batch=2, encode_covariates=True)
    zero, one = (make_cells(20, np.full(20, batch)) for batch in (0, 1))
    assert not np.array_equal(posterior.latent(module, zero)[0], posterior.latent(module, one)[0])
    assert not np.array_equal(posterior.expression(module, zero), posterior.expression(module, one))
