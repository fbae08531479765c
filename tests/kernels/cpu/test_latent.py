from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.kernels.cpu.latent import Heads, draw_latent

FLOOR = 1e-4


def reference(hidden, heads, noise, factor, *, floor):
    """The same in torch's own operations."""
    mean = functional.linear(hidden, heads.mean_weight, heads.mean_bias)
    variance = functional.linear(hidden, heads.variance_weight, heads.variance_bias).exp() + floor
    qz = Normal(mean, variance.sqrt())
    kl = kl_divergence(qz, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    return mean + qz.scale * noise, (factor * kl).sum(), kl


def make_inputs(n_cells, n_hidden, n_latent, spread=1.0):
    weights = [
        shape
        for _ in range(2)
        for shape in (torch.randn(n_latent, n_hidden) / n_hidden**0.5, torch.randn(n_latent))
    ]
    heads = Heads(*(spread * weight for weight in weights))
    return (
        torch.randn(n_cells, n_hidden),
        heads,
        torch.randn(n_cells, n_latent),
        torch.rand(n_cells),
    )


def differentiated(function, inputs, dtype, upstream, scale):
    """z, the sum, each cell's divergence, and the gradients of all leaves."""
    hidden, heads, noise, factor = inputs
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, *heads)]
    z, total, kl = function(
        leaves[0], Heads(*leaves[1:]), noise.to(dtype), factor.to(dtype), floor=FLOOR
    )
    loss = (upstream.to(dtype) * z).sum() + scale * total
    return [z.detach(), total.detach(), kl.detach(), *torch.autograd.grad(loss, leaves)]


@settings(max_examples=25, deadline=None)
@given(
    n_cells=st.sampled_from([0, 1, 7, 130]),
    n_hidden=st.sampled_from([1, 8, 33]),
    n_latent=st.sampled_from([1, 5, 20]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    scale=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_steps_one_by_one(
    n_cells, n_hidden, n_latent, spread, scale, seed
):
    torch.manual_seed(seed)
    inputs = make_inputs(n_cells, n_hidden, n_latent, spread)
    upstream = torch.randn(n_cells, n_latent)
    found = differentiated(draw_latent, inputs, torch.float32, upstream, scale)
    expected = differentiated(reference, inputs, torch.float64, upstream, scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * largest + 1e-6)


def test_what_is_not_a_number_stays_so():
    torch.manual_seed(0)
    hidden, heads, noise, factor = make_inputs(4, 8, 3)
    hidden[2, 5] = math.nan
    z, total, kl = draw_latent(hidden, heads, noise, factor, floor=FLOOR)
    assert z.isnan().any(1).tolist() == kl.isnan().tolist() == [False, False, True, False]
    assert total.isnan()
    large = heads._replace(variance_bias=torch.full((3,), 1e4))
    assert not draw_latent(hidden[:1], large, noise[:1], factor[:1], floor=FLOOR)[2].isfinite()


@pytest.mark.parametrize("part", ["noise", "factor", "mean_weight"])
def test_shapes_that_contradict_each_other_are_refused(part):
    hidden, heads, noise, factor = make_inputs(4, 8, 3)
    if part == "noise":
        noise = noise[:3]
    elif part == "factor":
        factor = factor[:, None]
    else:
        heads = heads._replace(mean_weight=torch.randn(3, 7))
    with pytest.raises(ConfigError, match=r"for a hidden layer of \(4, 8\)"):
        draw_latent(hidden, heads, noise, factor, floor=FLOOR)
