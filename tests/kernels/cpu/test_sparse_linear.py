from __future__ import annotations

import numpy as np
import pytest
import torch

from rayvaec.errors import ConfigError, CountsError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu import spmm as module
from rayvaec.kernels.cpu.sparse_linear import sparse_linear


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Several tiles, the last one short."""
    monkeypatch.setattr(module, "_TILE_GENES", 24)


def evaluate(x, weight, bias, outer, log1p):
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    out = sparse_linear(x, weight, bias, log1p=log1p)
    out.backward(outer)
    return out.detach(), weight.grad, bias.grad


@pytest.mark.parametrize("log1p", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(("n_genes", "n_out", "extra"), [(57, 150, 3), (64, 1, 0), (5, 33, 7)])
def test_values_and_gradients_of_the_dense_product(
    make_counts, dtype, limit, n_genes, n_out, extra, log1p
):
    torch.manual_seed(0)
    x = make_counts(41, n_genes, large=n_genes > 6)
    weight = torch.randn(n_out, n_genes + extra, dtype=dtype)
    bias, outer = torch.randn(n_out, dtype=dtype), torch.randn(41, n_out, dtype=dtype)
    out, grad_weight, grad_bias = evaluate(x, weight, bias, outer, log1p)
    dense = x.to_dense(torch.float64)
    dense = dense.log1p() if log1p else dense
    expected = dense @ weight[:, :n_genes].double().t() + bias
    assert (out - expected).abs().max() < limit * expected.abs().max()
    expected = outer.double().t() @ dense
    assert (grad_weight[:, :n_genes] - expected).abs().max() < limit * expected.abs().max()
    assert not grad_weight[:, n_genes:].any()
    torch.testing.assert_close(grad_bias, outer.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_beside_the_genes(make_counts, dtype):
    torch.manual_seed(0)
    x = make_counts(30, 50)
    weight = torch.randn(8, 56, dtype=dtype, requires_grad=True)
    beside = torch.randn(30, 4, dtype=dtype, requires_grad=True)
    out = sparse_linear(x, weight, None, log1p=True, beside=beside)
    outer = torch.randn_like(out)
    found = torch.autograd.grad(out, [weight, beside], outer)
    joined = torch.cat((x.to_dense(dtype).log1p(), beside, torch.zeros(30, 2)), 1)
    expected = joined @ weight.t()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    exact = torch.autograd.grad(expected, [weight, beside], outer)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not found[0][:, 54:].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(make_counts):
    torch.manual_seed(0)
    x = make_counts(41, 57, large=True)
    weight, bias, outer = torch.randn(20, 60), torch.randn(20), torch.randn(41, 20)
    expected = evaluate(x, weight.double(), bias.double(), outer.double(), True)
    found = evaluate(x.to("cuda"), weight.cuda(), bias.cuda(), outer.cuda(), True)
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-5 * b.abs().max()


def test_unsorted_rows_are_sorted_and_duplicates_refused():
    weight = torch.randn(3, 5)
    mixed = CsrCounts.from_numpy(
        np.array([0, 1, 4]), np.array([4, 3, 0, 1]), np.array([1, 2, 3, 4]), 5
    )
    out = sparse_linear(mixed, weight, None, log1p=False)
    torch.testing.assert_close(out, mixed.to_dense() @ weight.t())
    twice = mixed._replace(indices=torch.tensor([4, 3, 0, 3]))
    with pytest.raises(CountsError, match="gene 3 occurs twice in cell 1"):
        sparse_linear(twice, weight, None, log1p=False)


def test_gradcheck_off_the_fast_path(make_counts):
    x = make_counts(4, 6)
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: sparse_linear(x, w, None, log1p=True), [weight])


def test_threads_and_neighbouring_rows_change_no_bit(make_counts):
    torch.manual_seed(0)
    x = make_counts(200, 300, large=True)
    weight, bias = torch.randn(64, 300), torch.randn(64)
    outer = torch.randn(200, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = evaluate(x, weight, bias, outer, True)
        torch.set_num_threads(1)
        one = evaluate(x, weight, bias, outer, True)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(two, one, strict=True):
        assert torch.equal(a, b)
    first, last = int(x.indptr[7]), int(x.indptr[8])
    alone = CsrCounts(
        torch.tensor([0, last - first]), x.indices[first:last], x.counts[first:last], 300
    )
    assert torch.equal(sparse_linear(alone, weight, bias, log1p=True)[0], two[0][7])


def test_no_cells():
    nobody = CsrCounts.from_numpy(np.zeros(1, "i8"), np.zeros(0, "i4"), np.zeros(0, "i4"), 5)
    out, grad, _ = evaluate(nobody, torch.ones(3, 6), torch.ones(3), torch.ones(0, 3), True)
    assert out.shape == (0, 3)
    assert not grad.any()


def test_what_does_not_fit_is_refused(make_counts):
    x = make_counts(6, 20)
    with pytest.raises(ConfigError, match=r"weight has shape \(8, 19\) for 20 inputs, 20 of them"):
        sparse_linear(x, torch.ones(8, 19), None, log1p=True)
    beyond = x._replace(indices=x.indices.int() + 20)
    with pytest.raises(CountsError, match="is outside 0 to 19"):
        sparse_linear(beyond, torch.ones(8, 20), None, log1p=True)


def test_only_memory_in_order_is_addressed(make_counts):
    x = make_counts(41, 57)
    products = module.SparseProducts(x, log1p=False)
    columns, outer = (
        products.columns(torch.randn(20, 57)),
        np.random.default_rng(0).random((41, 20)),
    )
    outer = outer.astype(np.float32)
    straight, turned = torch.zeros(20, 57), torch.zeros(20, 57)
    products.gradient_into(outer, straight)
    products.gradient_into(np.asfortranarray(outer), turned)
    assert torch.equal(straight, turned)
    with pytest.raises(ValueError, match="not C-contiguous"):
        products.add_to(np.zeros((20, 41), np.float32).T, columns, slice(0, 41))
