from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu.hidden_layers import Layer, hidden_layers


def reference(x, codes, layers, n_codes):
    """The same in float64 and torch's own operations."""
    hot = [functional.one_hot(code, n_codes).double() for code in codes]
    for weight, bias, mask in layers:
        joined = torch.cat((x, sum(hot, torch.zeros(len(x), n_codes).double())), 1)
        normed = functional.layer_norm(joined @ weight.t() + bias, bias.shape)
        x = functional.relu(normed) * (1 if mask is None else mask)
    return x


def make_layers(widths, n_codes, n_cells, dropped):
    layers = []
    for n_in, n_out in pairwise(widths):
        mask = torch.empty(n_cells, n_out).bernoulli_(0.8) / 0.8 if dropped else None
        layers.append(Layer(torch.randn(n_out, n_in + n_codes) * 0.3, torch.randn(n_out), mask))
    return layers


def differentiated(function, x, layers, upstream):
    """Value, and gradients of every parameter and of a dense input."""
    layers = [
        Layer(*(t.clone().requires_grad_() for t in layer[:2]), layer.mask) for layer in layers
    ]
    leaves = [tensor for layer in layers for tensor in layer[:2]]
    if isinstance(x, torch.Tensor):
        x = x.clone().requires_grad_()
        leaves.append(x)
    out = function(x, layers)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def doubled(layers):
    return [Layer(*(None if t is None else t.double() for t in layer)) for layer in layers]


@settings(max_examples=25, deadline=None)
@given(
    n_cells=st.sampled_from([1, 3, 70, 200]),
    depth=st.integers(1, 3),
    width=st.sampled_from([8, 33]),
    n_codes=st.sampled_from([0, 4]),
    n_covariates=st.integers(0, 2),
    dropped=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_steps_one_by_one(
    n_cells, depth, width, n_codes, n_covariates, dropped, seed
):
    torch.manual_seed(seed)
    x = torch.randn(n_cells, 5)
    codes = [torch.randint(n_codes, (n_cells,)) for _ in range(n_covariates if n_codes else 0)]
    layers = make_layers([5, *[width] * depth], n_codes, n_cells, dropped)
    upstream = torch.randn(n_cells, width)
    found = differentiated(lambda *a: hidden_layers(a[0], codes, a[1]), x, layers, upstream)
    expected = differentiated(
        lambda *a: reference(a[0], codes, a[1], n_codes), x.double(), doubled(layers), upstream
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-4  # next to ReLU's kink rounding decides
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("log1p", [True, False])
def test_counts_as_input(make_counts, log1p):
    torch.manual_seed(0)
    x, codes = make_counts(150, 60, large=True), [torch.randint(3, (150,))]
    layers = make_layers([60, 16, 16], 3, 150, dropped=True)
    upstream = torch.randn(150, 16)
    dense = x.to_dense(torch.float64)
    found = differentiated(
        lambda *a: hidden_layers(a[0], codes, a[1], log1p=log1p), x, layers, upstream
    )
    expected = differentiated(
        lambda *a: reference(a[0], codes, a[1], 3),
        dense.log1p() if log1p else dense,
        doubled(layers),
        upstream,
    )
    for a, b in zip(found, expected, strict=False):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_number_of_threads_changes_no_bit(make_counts):
    torch.manual_seed(0)
    x, codes = make_counts(300, 60), [torch.randint(3, (300,))]
    layers, upstream = make_layers([60, 16, 16], 3, 300, dropped=True), torch.randn(300, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                differentiated(
                    lambda *a: hidden_layers(a[0], codes, a[1], log1p=True), x, layers, upstream
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_result_needs_goes_with_it(make_counts):
    x, layers = make_counts(70, 60), make_layers([60, 16, 16], 0, 70, dropped=True)
    layers[0].weight.requires_grad_()
    gc.disable()
    try:
        out = hidden_layers(x, [], layers)
        needed = [weakref.ref(tensor) for tensor in (out, layers[0].mask, layers[1].mask)]
        del layers
        assert all(ref() is not None for ref in needed)
        del out
        assert all(ref() is None for ref in needed)
    finally:
        gc.enable()


def test_no_cells():
    layers = make_layers([5, 8, 8], 2, 0, dropped=False)
    for x in (
        torch.zeros(0, 5),
        CsrCounts.from_numpy(np.zeros(1, "i8"), np.zeros(0, "i4"), np.zeros(0, "i4"), 5),
    ):
        out, *grads = differentiated(
            lambda *a: hidden_layers(a[0], [torch.zeros(0, dtype=torch.int64)], a[1]),
            x,
            layers,
            torch.zeros(0, 8),
        )
        assert out.shape == (0, 8)
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("code", [-1, 2])
def test_a_code_without_a_column_is_refused(code):
    layers = make_layers([5, 8], 2, 3, dropped=False)
    with pytest.raises(ConfigError, match=f"code {code} is none of 2 columns"):
        hidden_layers(torch.zeros(3, 5), [torch.full((3,), code)], layers)


def test_a_weight_that_does_not_fit_is_refused():
    first, second = make_layers([5, 8, 8], 2, 3, dropped=False)
    layers = [first, second._replace(weight=second.weight[:, :9])]
    with pytest.raises(ConfigError, match=r"shape \(8, 9\) for 8 inputs and 2 codes"):
        hidden_layers(torch.zeros(3, 5), [torch.zeros(3, dtype=torch.int64)], layers)
