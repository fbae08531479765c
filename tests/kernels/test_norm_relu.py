from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rayvaec.kernels.norm_relu import norm_relu


def reference(a, mask):
    return functional.relu(functional.layer_norm(a, a.shape[-1:])) * mask


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(2, 200),
    scale=st.sampled_from([0.1, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_three_steps(rows, width, scale, seed):
    torch.manual_seed(seed)
    values = torch.randn(rows, width) * scale + scale
    mask = torch.empty(rows, width).bernoulli_(0.8) / 0.8
    upstream = torch.randn(rows, width)
    exact = values.double().requires_grad_()
    expected = reference(exact, mask.double())
    (expected * upstream.double()).sum().backward()
    # Next to the kink of ReLU rounding decides, and rows of nearly equal values have no digits.
    centred = values.double() - values.double().mean(-1, keepdim=True)
    normed = functional.layer_norm(values.double(), (width,))
    assume(not ((normed.abs() < 1e-5) | (centred.std(-1, keepdim=True) < 0.01 * scale)).any())
    fused = values.clone().requires_grad_()
    out = norm_relu(fused, mask)
    (out * upstream).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fused.grad.double() * scale, exact.grad * scale, rtol=1e-3, atol=1e-3
    )


def test_a_row_does_not_depend_on_those_beside_it():
    a, mask = torch.randn(40, 128), torch.ones(40, 128)
    together = norm_relu(a, mask)
    for row in range(40):
        assert torch.equal(norm_relu(a[row : row + 1], mask[:1])[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_shapes_and_dtypes_take_the_three_steps(dtype):
    a = torch.randn(2, 5, 7, dtype=dtype)
    mask = torch.empty_like(a).bernoulli_(0.5)
    torch.testing.assert_close(norm_relu(a, mask), reference(a, mask))
    torch.testing.assert_close(norm_relu(a, None), reference(a, torch.ones_like(a)))


def test_no_rows():
    a = torch.randn(0, 8, requires_grad=True)
    norm_relu(a, torch.ones(0, 8)).sum().backward()
    assert a.grad.shape == (0, 8)
