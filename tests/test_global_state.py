"""The package leaves the caller's random numbers and torch's global settings alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import rayvaec
from rayvaec.data.store.open import open_store
from rayvaec.datasets import simulate
from rayvaec.model.saved import read_model, save_model
from rayvaec.model.scvi.importer import export_condscvi, import_condscvi
from rayvaec.training.config import TrainConfig
from rayvaec.training.objective import build_module

SETTINGS = (
    torch.get_default_dtype,
    torch.get_num_threads,
    torch.is_grad_enabled,
    torch.get_float32_matmul_precision,
    torch.are_deterministic_algorithms_enabled,
    lambda: torch.backends.cudnn.benchmark,
    lambda: torch.tensor([]).device,
)


def state() -> list[Any]:
    """Whatever a library could change under its user."""
    return [
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        random.getstate(),
        *(setting() for setting in SETTINGS),
        np.geterr(),
    ]


def everything(model_path: Path, store_path: Path, atlas: Path, tmp: Path) -> dict[str, Any]:
    model = rayvaec.load_model(model_path)
    adata = anndata.read_h5ad(atlas)[:40].copy()
    saved = read_model(model_path)
    more = {"softmax": TrainConfig(generative="softmax"), "softplus": TrainConfig()}
    calls: dict[str, Callable[[], Any]] = {
        "load_model": lambda: rayvaec.load_model(model_path),
        "save_model": lambda: save_model(tmp / "m", saved.module, saved.registry, {}),
        "simulate": lambda: simulate(50, 20, 2, seed=0),
        "export": lambda: export_condscvi(saved, tmp / "x"),
        "import": lambda: import_condscvi(tmp / "x"),
        "latent": lambda: model.latent(adata),
        "sample": lambda: model.sample(adata, 2),
        "expression": lambda: model.expression(adata),
        "elbo": lambda: model.elbo(adata),
        "marginal_ll": lambda: model.get_marginal_ll(adata, n_mc_samples=20),
        "differential": lambda: model.differential_expression(
            adata, delta=None, n_samples_overall=32, idx1=range(20), idx2=range(20, 40)
        ),
        "vamp_prior": lambda: model.get_vamp_prior(adata, p=2),
        "correlation": lambda: model.get_feature_correlation_matrix(adata, n_samples=1),
    }
    store = open_store(store_path)
    for form, config in more.items():
        calls[f"new weights, {form}"] = lambda config=config: build_module(store, config)
    return calls


def test_nothing_moves_global_state(
    model_path: Path, store_path: Path, atlas_h5ad: Path, tmp_path: Path
) -> None:
    import sklearn.mixture  # noqa: F401  draws from Python's generator when it is imported

    calls = everything(model_path, store_path, atlas_h5ad, tmp_path)
    for name, call in calls.items():
        before = state()
        call()
        assert state() == before, name


def test_results_do_not_depend_on_the_default_dtype(model_path: Path, atlas_h5ad: Path) -> None:
    adata = anndata.read_h5ad(atlas_h5ad)[:70].copy()

    def results() -> list[Any]:
        model = rayvaec.load_model(model_path)
        return [
            *model.latent(adata, return_dist=True),
            model.expression(adata),
            model.elbo(adata),
            model.sample(adata, 2),
            model.get_marginal_ll(adata, n_mc_samples=20, return_mean=False),
            model.differential_expression(adata, n_samples_overall=32)["scale1"].to_numpy(),
            *model.get_vamp_prior(adata, p=2).values(),
        ]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change", [None, "torch.manual_seed(0)"])
def test_importing_the_package_moves_nothing(change: str | None) -> None:
    program = f"""
import random, sys
import numpy as np
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.manual_seed(7)
def state():
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()]
before = state()
import rayvaec
from rayvaec.inference import trained_model
from rayvaec.inference.bulk import api
from rayvaec.serving.engine import engine
from rayvaec.training import loop
from rayvaec.training.driver import train_fn
rayvaec.load_model, rayvaec.training
{change or "pass"}
sys.exit(state() != before)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == (change is not None), ended.stderr
