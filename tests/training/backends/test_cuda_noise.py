from __future__ import annotations

import pytest
import torch

from rayvaec.model.vaec import VAEC
from rayvaec.training.backends.cuda_noise import DeviceNoise
from rayvaec.training.noise import CellDropout, CellNoise

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
CELLS = torch.tensor([0, 5, 900, 17, 2**40 + 3])


def module(n_hidden: int, **settings: object) -> VAEC:
    torch.manual_seed(0)
    return VAEC(10, 3, n_hidden=n_hidden, n_layers=2, **settings)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("n_latent", [5, 4])
@pytest.mark.parametrize("prior", ["normal", "mog"])
def test_latent_noise_is_that_of_the_host(device: str, n_latent: int, prior: str) -> None:
    settings = {"n_latent": n_latent, "prior": prior, "generative": "softmax", "n_batch": 1}
    expected = CellNoise(7, module(32, **settings)).at(1234, CELLS.numpy())
    noise = DeviceNoise(7, module(32, **settings).to(device))
    found = noise.at(torch.tensor([1234], device=device), CELLS.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("n_hidden", [32, 33, 34])
def test_masks_have_the_bits_of_those_of_the_host(device: str, n_hidden: int) -> None:
    host, there = CellNoise(7, module(n_hidden)), module(n_hidden).to(device)
    noise = DeviceNoise(7, there)
    host.at(99, CELLS.numpy())
    noise.at(torch.tensor([99], device=device), CELLS.to(device))
    layers = [layer for layer in there.modules() if isinstance(layer, CellDropout)]
    assert len(layers) == 4
    for layer in layers:
        expected = torch.from_numpy(host.mask(layer.layer, n_hidden, layer.rate))
        assert (expected == 0).any()
        x = torch.ones(len(CELLS), n_hidden, device=device)
        assert torch.equal(layer(x).cpu(), expected)


def test_every_layer_drops_at_its_own_rate() -> None:
    host, there = module(300), module(300)
    for model in (host, there):
        dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        dropouts[1].p, dropouts[2].p = 0.5, 0.0
    cell_noise, noise = CellNoise(1, host), DeviceNoise(1, there)
    cell_noise.at(3, CELLS.numpy())
    noise.at(torch.tensor([3]), CELLS)
    for layer, rate in enumerate([0.05, 0.5, 0.05]):
        expected = torch.from_numpy(cell_noise.mask(layer, 300, rate))
        assert torch.equal(noise.mask(layer, 300, rate), expected)
