from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from rayvaec.errors import ConfigError, CountsError
from rayvaec.kernels import nb_loss_types
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu import nb_loss_softplus
from rayvaec.kernels.nb_loss import nb_reconstruction

FORMS = ["softplus", "softmax"]
NAMES = ["total", "reconstruction", "h", "weight", "bias", "px_r"]


def leaves_of(x, n_hidden=24, seed=0):
    """h, weight, bias and px_r, library and factor in float32."""
    torch.manual_seed(seed)
    h = torch.randn(x.n_cells, n_hidden).relu()
    weight = 0.3 * torch.randn(x.n_genes, n_hidden)
    bias, px_r = torch.randn(x.n_genes) - 5, torch.randn(x.n_genes)
    return (h, weight, bias, px_r), x.library(), torch.rand(x.n_cells)


def evaluate(leaves, library, x, factor, dtype, version, generative):
    """Return total, reconstruction and the four gradients, in float64."""
    leaves = [leaf.to(dtype).clone().requires_grad_() for leaf in leaves]
    total, reconstruction = nb_reconstruction(
        *leaves, library.to(dtype), x, factor.to(dtype), generative=generative, version=version
    )
    total.backward()
    assert not reconstruction.requires_grad
    return [v.detach().double() for v in (total, reconstruction, *(leaf.grad for leaf in leaves))]


def largest_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=[None, 5])
def chunks(request, monkeypatch):
    """One chunk, and chunks of five cells and groups of one and two tiles, the last ones short."""
    if request.param:
        monkeypatch.setitem(nb_loss_types.CHUNK_ENTRIES, "cpu", request.param * 257)
        monkeypatch.setattr(nb_loss_softplus, "CHUNK_CELLS", request.param)
        monkeypatch.setattr(nb_loss_softplus, "_tile_width", lambda *_: 50)
        monkeypatch.setattr(nb_loss_softplus, "_GROUPS", 4)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("generative", FORMS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("version", "dtype", "limit"),
    [("cpu", torch.float32, 1e-5), ("cuda", torch.float32, 1e-5), ("cuda", torch.float64, 1e-8)],
)
def test_every_version_equals_the_reference(make_counts, version, dtype, limit, large, generative):
    x = make_counts(33, 257, large=large)
    leaves, library, factor = leaves_of(x)
    expected = evaluate(leaves, library, x, factor, torch.float64, "reference", generative)
    found = evaluate(leaves, library, x, factor, dtype, version, generative)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a, b) < limit, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("generative", FORMS)
@pytest.mark.parametrize("large", [False, True])
def test_the_cuda_version_on_a_gpu_equals_the_reference(make_counts, large, generative):
    x = make_counts(33, 257, large=large)
    leaves, library, factor = leaves_of(x)
    expected = evaluate(leaves, library, x, factor, torch.float64, "reference", generative)
    on_gpu = [leaf.cuda() for leaf in leaves], library.cuda(), x.to("cuda"), factor.cuda()
    assert torch.equal(on_gpu[2].library().cpu(), library)
    found = evaluate(*on_gpu, torch.float32, None, generative)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a.cpu(), b) < 1e-5, name


@pytest.mark.parametrize("generative", FORMS)
def test_the_reference_is_the_negative_binomial(make_counts, generative):
    x = make_counts(9, 40, large=True)
    (h, weight, bias, px_r), library, factor = leaves_of(x)
    h, weight, bias, px_r = (t.double() for t in (h, weight, bias, px_r))
    _, found = nb_reconstruction(
        h, weight, bias, px_r, library.double(), x, factor.double(), generative=generative
    )
    a = functional.linear(h, weight, bias)
    if generative == "softplus":
        size, odds = library * functional.softplus(a), px_r.exp().expand_as(a)
    else:
        size = px_r.exp().expand_as(a)
        odds = library * torch.softmax(a, 1) / size
    law = stats.nbinom(size.numpy(), 1 / (1 + odds.numpy()))
    cells = np.diff(x.indptr.numpy()) > 0
    expected = -law.logpmf(x.to_dense().numpy()).sum(1)
    np.testing.assert_allclose(found.numpy()[cells], expected[cells], rtol=1e-7)
    assert (found[~torch.from_numpy(cells)] == 0).all()


@pytest.mark.parametrize("version", ["reference", "cuda"])
@pytest.mark.parametrize("generative", FORMS)
def test_gradcheck(make_counts, version, generative):
    x = make_counts(4, 7)
    leaves, library, factor = leaves_of(x, n_hidden=3)
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def total(*args):
        return nb_reconstruction(
            *args, library.double(), x, factor.double(), generative=generative, version=version
        )[0]

    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("version", ["reference", "cpu", "cuda"])
def test_row_biases_are_biases_by_kind(make_counts, version):
    x = make_counts(20, 30)
    (h, weight, bias, px_r), library, factor = leaves_of(x)
    table = torch.randn(3, 30).requires_grad_()
    kind = torch.arange(20) % 3
    total, each = nb_reconstruction(
        h, weight, bias, px_r, library, x, factor,
        generative="softmax", row_bias=(table, kind), version=version,
    )  # fmt: skip
    total.backward()
    for k in range(3):
        rows = kind == k
        own = bias + table[k].detach()
        own.requires_grad_()
        part, expected = nb_reconstruction(
            h, weight, own, px_r, library, x, factor * rows, generative="softmax"
        )
        part.backward()
        torch.testing.assert_close(each[rows], expected[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table.grad[k], own.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("generative", FORMS)
@pytest.mark.parametrize("px_r", [-30.0, 0.0, 30.0])
def test_extremes_stay_finite(version, generative, px_r):
    # Total counts from 1e-12 to 1e6 by way of library and bias, at counts of 0, 1, 2 and 1e6.
    wide = torch.cat([torch.linspace(-28, 13, 42), torch.full((2,), -200.0)])
    bias = wide.repeat(4).requires_grad_()
    n_genes = len(bias)
    dense = np.repeat([0, 1, 2, 1_000_000], n_genes // 4)[None]
    x = CsrCounts.from_numpy(
        np.array([0, n_genes]), np.arange(n_genes), dense[0].astype("i4"), n_genes
    )
    h = torch.zeros(1, 2, requires_grad=True)
    weight = torch.zeros(n_genes, 2, requires_grad=True)
    logits = torch.full((n_genes,), px_r, requires_grad=True)
    for library in (1.0, 1e6):
        total, _ = nb_reconstruction(
            h, weight, bias, logits, torch.full((1, 1), library), x, torch.ones(1),
            generative=generative, version=version,
        )  # fmt: skip
        total.backward()
        for value in (total, h.grad, weight.grad, bias.grad, logits.grad):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("version", ["cpu", "cuda"])
@pytest.mark.parametrize("generative", FORMS)
def test_float32_holds_at_extremes(version, generative):
    """Each gene's loss and gradients alone, so that no large term hides a small one."""
    found, expected = [], []
    for a in (-27.0, -10.0, 0.0, 12.0):
        for px_r in (-12.0, -1.0, 6.0, 12.0):
            for count in (0, 1, 3, 50, 100_000):
                row = (np.array([0, 2]), np.array([0, 1]), np.array([count, 7], "i4"))
                x = CsrCounts.from_numpy(*row, 2)
                leaves = (
                    torch.ones(1, 1),
                    torch.tensor([[a], [0.5]]),
                    torch.zeros(2),
                    torch.tensor([px_r, 0.0]),
                )
                args = (leaves, torch.tensor([[30.0]]), x, torch.ones(1))
                expected.append(evaluate(*args, torch.float64, "reference", generative))
                found.append(evaluate(*args, torch.float32, version, generative))
    # The softmax form's gradients with respect to a sum to zero over genes; of two genes, one of
    # which takes all, only rounding is left.
    compared = NAMES if generative == "softplus" else ["total", "reconstruction", "px_r"]
    for each, exact in zip(found, expected, strict=True):
        for name in compared:
            place = NAMES.index(name)
            assert largest_error(each[place], exact[place]) < 1e-5, name


@pytest.mark.parametrize("version", ["reference", "cpu", "cuda"])
def test_gradients_scale_with_the_incoming_one(make_counts, version):
    x = make_counts(6, 20)
    leaves, library, factor = leaves_of(x)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    total, _ = nb_reconstruction(*leaves, library, x, factor, version=version)
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * total, leaves)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("version", ["cpu", "cuda"])
def test_gradients_only_where_wanted(make_counts, version):
    x = make_counts(6, 20)
    (h, weight, bias, px_r), library, factor = leaves_of(x)
    weight.requires_grad_()
    total, each = nb_reconstruction(h, weight, bias, px_r, library, x, factor, version=version)
    total.backward()
    assert h.grad is None
    assert weight.grad.abs().max() > 0
    with torch.no_grad():
        again, alone = nb_reconstruction(h, weight, bias, px_r, library, x, factor, version=version)
    assert not again.requires_grad
    torch.testing.assert_close(again, total.detach())
    torch.testing.assert_close(alone, each)


@pytest.mark.parametrize("version", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("generative", FORMS)
def test_no_cells_have_no_loss(version, generative):
    nobody = CsrCounts.from_numpy(np.zeros(1, "i8"), np.zeros(0, "i4"), np.zeros(0, "i4"), 5)
    leaves, library, factor = leaves_of(nobody)
    total, each, *grads = evaluate(
        leaves, library, nobody, factor, torch.float32, version, generative
    )
    assert total == 0
    assert len(each) == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("generative", FORMS)
def test_calls_and_numbers_of_threads_change_no_bit(make_counts, generative):
    x = make_counts(300, 1_300)
    leaves, library, factor = leaves_of(x)
    args = (leaves, library, x, factor, torch.float32, "cpu", generative)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = evaluate(*args)
        for n_threads in (2, 2, 3, 1):
            torch.set_num_threads(n_threads)
            for a, b in zip(evaluate(*args), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("generative", FORMS)
@pytest.mark.parametrize("place", range(4))
def test_a_weight_that_is_not_a_number_shows(make_counts, generative, place):
    x = make_counts(5, 40)
    leaves, library, factor = leaves_of(x)
    leaves[place].view(-1)[3] = float("nan")
    total, _ = nb_reconstruction(*leaves, library, x, factor, generative=generative, version="cpu")
    assert torch.isnan(total)


def test_memory_does_not_grow_with_cells_times_genes(make_counts, monkeypatch):
    monkeypatch.setitem(nb_loss_types.CHUNK_ENTRIES, "cpu", 1 << 14)
    monkeypatch.setattr(nb_loss_softplus, "CHUNK_CELLS", 64)
    x = make_counts(600, 3_000)
    leaves, library, factor = leaves_of(x, n_hidden=4)
    for version in ("cpu", "cuda"):
        largest = largest_tensor(leaves, library, x, factor, version)
        assert largest < 600 * 3_000 // 4, version


def largest_tensor(leaves, library, x, factor, version):
    """Elements of the largest tensor that any torch operation returned."""
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        nb_reconstruction(*leaves, library, x, factor, version=version)
    return max(sizes)


def test_bad_arguments_are_refused(make_counts):
    x = make_counts(6, 20)
    (h, weight, bias, px_r), library, factor = leaves_of(x)
    with pytest.raises(ConfigError, match=r"bias has shape \(19,\) for counts of 6 cells x 20"):
        nb_reconstruction(h, weight, bias[:-1], px_r, library, x, factor)
    with pytest.raises(ConfigError, match=r"weight has shape \(21, 24\)"):
        nb_reconstruction(h, torch.zeros(21, 24), bias, px_r, library, x, factor)
    with pytest.raises(ConfigError, match="choose one of reference, cpu, cuda"):
        nb_reconstruction(h, weight, bias, px_r, library, x, factor, version="tpu")
    with pytest.raises(ConfigError, match="choose softplus or softmax"):
        nb_reconstruction(h, weight, bias, px_r, library, x, factor, generative="log")
    with pytest.raises(ConfigError, match=r"h is torch.float64 on cpu"):
        nb_reconstruction(h.double(), weight, bias, px_r, library, x, factor, version="cpu")
    beyond = x._replace(indices=torch.full_like(x.indices.int(), 20))
    with pytest.raises(CountsError, match="index 20 at entry 0 is outside 0 to 19"):
        nb_reconstruction(h, weight, bias, px_r, library, beyond, factor)
    negative = x._replace(counts=-x.counts.int())
    with pytest.raises(CountsError, match="count -"):
        nb_reconstruction(h, weight, bias, px_r, library, negative, factor)
