"""What code written for scvi-tools' module reads off ours."""

from __future__ import annotations

import pytest
import torch

from rayvaec.errors import CountsError
from rayvaec.model.distributions import NegativeBinomial
from rayvaec.model.vaec import VAEC, LossRecorder

FORMS = {"softplus": {}, "softmax": {"generative": "softmax", "n_batch": 2}}


def cells() -> dict[str, torch.Tensor]:
    column = torch.arange(8)[:, None]
    return {"X": torch.ones(8, 20), "labels": column % 3, "batch": column % 2}


def test_a_module_knows_its_sizes_and_device():
    module = VAEC(20, 3, n_latent=4, n_batch=2)
    assert (module.n_input, module.n_labels, module.n_latent, module.n_batch) == (20, 3, 4, 2)
    assert module.device.type == "cpu"
    assert module.to("meta").device.type == "meta"


def test_a_loss_has_scvi_tools_fields_in_their_order():
    zero, ones = torch.tensor(0.0), torch.ones(3)
    for recorded in (
        LossRecorder(zero, ones, ones, torch.tensor(2.0)),
        LossRecorder(
            loss=zero, reconstruction_loss=ones, kl_local=ones, kl_global=torch.tensor(2.0)
        ),
    ):
        assert recorded.kl_global == 2
    assert LossRecorder(zero, ones, ones).kl_global is None


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_a_distribution_as_scvi_tools_knows_it(form):
    module = VAEC(20, 3, **FORMS[form]).eval()
    _, generated = module(cells(), compute_loss=False)
    px = generated["px"]
    assert torch.equal(px.mu, px.mean)
    assert torch.equal(px.scale, generated["px_scale"])
    assert torch.allclose(px.variance, px.mu + px.mu**2 / px.theta, rtol=1e-4)
    assert px.batch_shape == (8, 20)
    drawn = px.sample((3,))
    assert drawn.shape == (3, 8, 20)
    assert not torch.equal(drawn[0], drawn[1])
    wide = px.expand((5, 8, 20))
    assert wide.sample().shape == (5, 8, 20)
    assert wide.scale.shape == (5, 8, 20)
    assert torch.equal(wide.log_prob(drawn[:1])[4], px.log_prob(drawn[0]))


def test_draws_have_the_mean_of_the_distribution():
    torch.manual_seed(0)
    px = NegativeBinomial(torch.tensor([2.0, 5.0]), torch.tensor([0.5, -0.5]))
    assert px.scale is None
    assert torch.allclose(px.sample((20_000,)).mean(0), px.mu, rtol=0.05)


@pytest.mark.parametrize("name", ["labels", "batch"])
def test_one_hot_codes_are_named(name):
    given = cells()
    given[name] = torch.nn.functional.one_hot(given[name].ravel())
    with pytest.raises(CountsError, match=rf"{name} has shape .* one-hot; .*{name}.argmax"):
        VAEC(20, 3, n_batch=2)(given)


def test_codes_of_another_shape_are_refused():
    with pytest.raises(CountsError, match=r"labels has shape \(8, 2\); give one code a cell"):
        VAEC(20, 3)({**cells(), "labels": torch.zeros(8, 2, dtype=torch.long)})
