from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from rayvaec.model.vaec import VAEC
from rayvaec.training.noise import CellDropout, CellNoise, latent_noise


def module(rate: float = 0.3) -> VAEC:
    torch.manual_seed(0)
    return VAEC(10, 3, n_hidden=32, n_layers=2, dropout_rate=rate)


def test_every_dropout_layer_is_replaced_and_no_weight_is() -> None:
    ours, theirs = module(), module()
    CellNoise(0, ours)
    assert not [layer for layer in ours.modules() if isinstance(layer, nn.Dropout)]
    layers = [layer for layer in ours.modules() if isinstance(layer, CellDropout)]
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_noise_depends_on_the_cell_and_the_step_alone() -> None:
    noise = CellNoise(0, module())
    cells = np.array([5, 900, 17, 3])
    z, mask = noise.at(8, cells), noise.mask(1, 32, 0.3)
    assert z.shape == (1, 4, 5)
    for i in range(4):
        assert torch.equal(noise.at(8, cells[i : i + 1])[:, 0], z[:, i])
        assert np.array_equal(noise.mask(1, 32, 0.3)[0], mask[i])
    noise.at(8, cells)
    assert not np.array_equal(noise.mask(0, 32, 0.3), mask)
    other = noise.at(9, cells)
    assert not torch.equal(other, z)
    assert not np.array_equal(noise.mask(1, 32, 0.3), mask)
    assert not torch.equal(CellNoise(1, module()).at(8, cells), z)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_units_are_dropped_at_the_rate_and_the_mean_stays(rate: float) -> None:
    noise = CellNoise(3, module())
    noise.at(0, np.arange(4000))
    mask = noise.mask(2, 64, rate)
    dropped = int((mask == 0).sum())
    assert stats.binomtest(dropped, mask.size, round(rate * 2**16) / 2**16).pvalue > 1e-4
    assert np.unique(mask[mask > 0]) == pytest.approx([1 / (1 - rate)], rel=1e-3)
    # Independent between neighbouring units, which partly come from one random word.
    both = np.count_nonzero((mask[:, 0::2] == 0) & (mask[:, 1::2] == 0))
    assert stats.binomtest(both, mask.size // 2, rate**2).pvalue > 1e-4


def test_dropout_is_off_outside_training() -> None:
    noise = CellNoise(0, module())
    noise.at(0, np.arange(3))
    layer, x = CellDropout(noise.mask, 0, 0.5), torch.ones(3, 32)
    assert set(layer(x).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(layer.eval()(x), x)


def test_latent_noise_is_standard_normal() -> None:
    z = latent_noise(module(), 0, np.arange(5000), 0).numpy().ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-4
