from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rayvaec.data.store.open import open_store
from rayvaec.training import validation
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.noise import latent_noise
from rayvaec.training.objective import build_module
from rayvaec.training.schedule import noise_seed
from rayvaec.training.validation import validation_elbo

CONFIG = TrainConfig(n_hidden=16)


@dataclass(frozen=True)
class Share(Ranks):
    """A rank whose sums are its own alone."""

    def sums(self, *values: float) -> list[float]:
        return list(values)


def test_it_is_the_mean_bound_of_the_validation_cells(store_path: Path) -> None:
    store = open_store(store_path)
    module = build_module(store, CONFIG).eval()
    rows = store.rows("validation")
    cells = store.read(rows.start, rows.stop)
    x = torch.zeros(len(rows), store.n_genes)
    x[np.repeat(np.arange(len(rows)), np.diff(cells.indptr)), cells.indices.astype(int)] = (
        torch.from_numpy(cells.counts.astype(np.float32))
    )
    y = torch.from_numpy(cells.labels.astype(np.int64))[:, None]
    noise = latent_noise(module, noise_seed(0, "validation"), np.arange(rows.start, rows.stop), 0)
    with torch.no_grad():
        inferred = module.inference(x, y)
        z = inferred["qz"].loc + inferred["qz"].scale * noise[0]
        generated = module.generative(z, inferred["library"], y)
        output = module.loss({"X": x, "labels": y}, inferred, generated)
    expected = -(output.reconstruction_loss + output.kl_local).double().mean()
    assert validation_elbo(module, store, Ranks(), 0) == pytest.approx(float(expected), rel=1e-5)


def test_workers_share_the_blocks(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "BLOCK_ROWS", {"cpu": 16})
    store = open_store(store_path)
    module = build_module(store, CONFIG)
    alone = validation_elbo(module, store, Ranks(), 0)
    shares = [validation_elbo(module, store, Share(rank, 3), 0) for rank in range(3)]
    assert sum(shares) == pytest.approx(alone, rel=1e-6)
    assert all(abs(share) < 0.6 * abs(alone) for share in shares)


def test_more_workers_than_blocks(store_path: Path) -> None:
    store = open_store(store_path)
    assert validation_elbo(build_module(store, CONFIG), store, Share(7, 8), 0) == 0.0


def test_fewer_cells_can_be_used_and_the_mode_comes_back(store_path: Path) -> None:
    store = open_store(store_path)
    module = build_module(store, CONFIG).train()
    whole = validation_elbo(module, store, Ranks(), 0)
    assert validation_elbo(module, store, Ranks(), 0, max_cells=10) != whole
    assert validation_elbo(module, store, Ranks(), 0, max_cells=10**9) == whole
    assert module.training
