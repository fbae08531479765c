"""Between forward and backward no tensor that the gradient depends on may change unseen."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import rayvaec.kernels
import rayvaec.model
from rayvaec.kernels import nb_loss_types
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu.hidden_layers import Layer, hidden_layers
from rayvaec.kernels.cpu.latent import Heads, draw_latent
from rayvaec.kernels.cpu.sparse_linear import sparse_linear
from rayvaec.kernels.nb_loss import nb_reconstruction

N_CELLS, N_GENES, N_OUT = 9, 7, 5
Tensors = dict[str, Tensor]


def leaves(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, dtype=dtype, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def counts() -> Tensors:
    dense = torch.arange(N_CELLS * N_GENES).view(N_CELLS, N_GENES) % 4
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense > 0).sum(1).cumsum(0)))
    entries = dense.nonzero()[:, 1].int(), dense[dense > 0].int()
    return dict(zip(("indptr", "indices", "counts"), (indptr, *entries), strict=True))


def as_csr(t: Tensors) -> CsrCounts:
    return CsrCounts(t["indptr"], t["indices"], t["counts"], N_GENES)


def loss(version: str, generative: str) -> tuple[Tensors, Callable[[Tensors], Tensor]]:
    shapes = {"h": (N_CELLS, N_OUT), "weight": (N_GENES, N_OUT), "bias": (N_GENES,)}
    x, ones = as_csr(counts()), torch.ones(N_CELLS)

    def call(t: Tensors) -> Tensor:
        return nb_reconstruction(
            h=t["h"],
            weight=t["weight"],
            bias=t["bias"],
            px_r=t["px_r"],
            library=x.library(),
            x=x,
            cell_factor=ones,
            generative=generative,
            version=version,
        )[0]

    return leaves(torch.float32, **shapes, px_r=(N_GENES,)), call


def linear(dtype: torch.dtype) -> tuple[Tensors, Callable[[Tensors], Tensor]]:
    tensors = leaves(dtype, weight=(N_OUT, N_GENES + 2), beside=(N_CELLS, 2)) | counts()

    def call(t: Tensors) -> Tensor:
        out = sparse_linear(as_csr(t), t["weight"], None, log1p=True, beside=t["beside"])
        return out.square().sum()

    return tensors, call


def layers(on_counts: bool) -> tuple[Tensors, Callable[[Tensors], Tensor]]:
    shapes = {"weight_0": (N_OUT, N_GENES + 2), "weight_1": (N_OUT, N_OUT + 2)}
    tensors = leaves(torch.float32, x=(N_CELLS, N_GENES), mask=(N_CELLS, N_OUT), **shapes)
    tensors |= counts() if on_counts else {}
    if on_counts:
        del tensors["x"]
    codes = [torch.arange(N_CELLS) % 2]

    def call(t: Tensors) -> Tensor:
        bias, mask = torch.zeros(N_OUT), t["mask"].detach()
        stack = [Layer(t["weight_0"], bias, mask), Layer(t["weight_1"], bias, mask)]
        x = as_csr(t) if on_counts else t["x"]
        return hidden_layers(x, codes, stack).square().sum()

    return tensors, call


def latent() -> tuple[Tensors, Callable[[Tensors], Tensor]]:
    shapes = dict.fromkeys(("mean_weight", "variance_weight"), (2, N_OUT))
    tensors = leaves(torch.float32, hidden=(N_CELLS, N_OUT), **shapes)
    tensors |= {"noise": torch.ones(N_CELLS, 2), "factor": torch.ones(N_CELLS)}

    def call(t: Tensors) -> Tensor:
        heads = Heads(t["mean_weight"], torch.zeros(2), t["variance_weight"], torch.zeros(2))
        z, total, _ = draw_latent(t["hidden"], heads, t["noise"], t["factor"], floor=1e-4)
        return z.square().sum() + total

    return tensors, call


CALLS: dict[str, tuple[str, Callable[[], tuple[Tensors, Callable[[Tensors], Tensor]]]]] = {
    "loss-cpu-softplus": ("_Fused", lambda: loss("cpu", "softplus")),
    "loss-cpu-softmax": ("_Fused", lambda: loss("cpu", "softmax")),
    "loss-cuda-softplus": ("_Fused", lambda: loss("cuda", "softplus")),
    "loss-cuda-softmax": ("_Fused", lambda: loss("cuda", "softmax")),
    "linear": ("_Sparse", lambda: linear(torch.float32)),
    "linear-dense": ("_DenseChunks", lambda: linear(torch.float64)),
    "layers": ("_HiddenLayers", lambda: layers(on_counts=False)),
    "layers-of-counts": ("_HiddenLayers", lambda: layers(on_counts=True)),
    "latent": ("_DrawLatent", latent),
}
CHANGES = [(call, name) for call, (_, make) in CALLS.items() for name in make()[0]]


def test_every_function_of_autograd_is_here():
    for package in (rayvaec.kernels, rayvaec.model):
        for _, name, _ in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            import_module(name)
    found = {
        function.__name__
        for function in torch.autograd.Function.__subclasses__()
        if function.__module__.startswith("rayvaec.")
    }
    assert found == {function for function, _ in CALLS.values()}


@pytest.mark.parametrize(("call", "name"), CHANGES)
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_a_change_in_place_before_backward_is_refused(call, name, chunks, monkeypatch):
    if chunks == "many":
        monkeypatch.setitem(nb_loss_types.CHUNK_ENTRIES, "cpu", 2 * N_GENES)
    function, make = CALLS[call]
    tensors, compute = make()
    result = compute(tensors)
    seen: list[Any] = []
    pending = [result.grad_fn]
    while pending:
        node = pending.pop()
        seen.append(type(node).__name__)
        pending += [below for below, _ in node.next_functions if below is not None]
    assert f"{function}Backward" in seen
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize("call", CALLS)
def test_without_a_change_there_is_a_gradient(call):
    tensors, compute = CALLS[call][1]()
    compute(tensors).backward()
    for name, tensor in tensors.items():
        if tensor.requires_grad and name != "mask":
            assert tensor.grad is not None, name
            assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("call", CALLS)
def test_backward_frees_what_it_has_used(call):
    tensors, compute = CALLS[call][1]()
    result = compute(tensors)
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()
