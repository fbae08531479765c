from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from rayvaec.data.store.open import open_store
from rayvaec.model.vaec import VAEC
from rayvaec.training.config import TrainConfig
from rayvaec.training.noise import CellNoise
from rayvaec.training.objective import Replica, as_tensors, build_module, label_weights

CONFIG = TrainConfig(n_hidden=16)


def gradients(module: VAEC) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def loss_of_rows(
    store_path: Path, bounds: tuple[int, int], n_global: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of a worker that holds rows `bounds` of the minibatch."""
    store = open_store(store_path)
    module = build_module(store, CONFIG).train()
    noise = CellNoise(0, module).at(3, np.arange(*bounds))
    tensors = as_tensors(store.read(*bounds), module)
    loss, per_cell = Replica(module)(*tensors, noise, 0.5, n_global)
    loss.backward()
    assert len(per_cell) == bounds[1] - bounds[0]
    return float(loss.detach()), gradients(module)


@pytest.mark.parametrize("cut", [20, 5, 40, 0])
def test_summing_unequal_shares_gives_the_exact_gradient(store_path: Path, cut: int) -> None:
    loss, whole = loss_of_rows(store_path, (0, 40), 40)
    first, left = loss_of_rows(store_path, (0, cut), 40)
    second, right = loss_of_rows(store_path, (cut, 40), 40)
    assert first + second == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        total = left[name] + right[name]
        torch.testing.assert_close(total, gradient, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_a_model_starts_at_the_genes_shares(store_path: Path, generative: str) -> None:
    store = open_store(store_path)
    config = replace(CONFIG, generative=generative)
    module = build_module(store, config)
    totals = np.array(store.manifest.gene_totals)
    share = np.maximum(totals, 0.5) / store.manifest.total_counts
    bias = module.output.bias.double()
    if generative == "softplus":
        started = (functional.softplus(bias) * module.px_r.double().exp()).detach().numpy()
    else:
        started = bias.softmax(0).detach().numpy() * share.sum()
    # A gene with but a few counts may start higher: no form can give it nothing.
    np.testing.assert_allclose(started[totals > 50], share[totals > 50], rtol=1e-3)
    upstream = build_module(store, replace(config, start_from_counts=False))
    assert not torch.equal(upstream.output.bias, module.output.bias)
    assert not torch.equal(upstream.px_r, module.px_r)


def test_the_model_is_the_same_for_every_worker_and_seed_decides(store_path: Path) -> None:
    store = open_store(store_path)

    def first_weight(seed: int) -> torch.Tensor:
        return next(build_module(store, replace(CONFIG, seed=seed)).z_encoder.parameters())

    torch.manual_seed(1)
    first = first_weight(0)
    torch.manual_seed(2)
    assert torch.equal(first_weight(0), first)
    assert not torch.equal(first_weight(1), first)


def test_label_weights_are_those_of_scvi() -> None:
    # Shares 0.9, 0.08, 0.02: the last counts as 0.05, and all are divided by their sum, 1.03.
    weights = label_weights(np.array([900, 80, 20]))
    np.testing.assert_allclose(weights, [1.03 / 0.9, 1.03 / 0.08, 1.03 / 0.05])


def test_labels_are_weighted_where_asked(store_path: Path) -> None:
    store = open_store(store_path)
    weighted = build_module(store, replace(CONFIG, weight_obs=True)).ct_weight
    expected = label_weights(np.array(store.manifest.cells_per_label))
    np.testing.assert_allclose(weighted.numpy(), expected, rtol=1e-6)
    assert build_module(store, CONFIG).ct_weight.tolist() == [1.0] * store.registry.n_labels
