from __future__ import annotations

import pytest
import torch

from rayvaec.errors import ModelError
from rayvaec.model.losses import kl_to_mixture, kl_to_standard_normal
from rayvaec.model.scvi.versions import (
    arguments_of,
    build,
    form_of,
    standard_mixture,
    without_standard_mixture,
)
from rayvaec.model.vaec import VAEC

SOFTMAX = {"generative": "softmax", "n_batch": 2}
MODELS = {
    "plain": {},
    "shapes": {"n_hidden": 7, "n_latent": 3, "n_layers": 3},
    "one layer": {"n_layers": 1},
    "one label": {"n_labels": 1},
    "weights": {"ct_weight": [1.0, 0.25, 3.0]},
    "batches": {"n_batch": 4},
    "encoded batches": {"n_batch": 2, "encode_covariates": True},
    "softmax": {"generative": "softmax", "n_batch": 1},
    "softmax encoded": {**SOFTMAX, "encode_covariates": True},
    "mog": {**SOFTMAX, "prior": "mog", "num_classes_mog": 4},
    "fine": {**SOFTMAX, "n_fine_labels": 6},
    "all": {**SOFTMAX, "prior": "mog", "n_fine_labels": 6, "encode_covariates": True},
}


def vaec(changes):
    return VAEC(**{"n_input": 11, "n_labels": 3, "n_hidden": 8, **changes})


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_weights_tell_the_arguments_and_come_back(changes):
    module = vaec(changes)
    again = build(arguments_of(module.state_dict()), module.state_dict())
    assert again.config == module.config
    assert not again.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "the softplus form (scvi-tools 0.11 to 1.4.0)"),
        (MODELS["softmax"], "the softmax form (scvi-tools 1.4.1 on)"),
        (MODELS["mog"], "the softmax form (scvi-tools 1.4.1 on) with a mixture prior"),
        (
            MODELS["all"],
            "the softmax form (scvi-tools 1.4.1 on) with a mixture prior and fine labels",
        ),
    ],
)
def test_forms_are_named(changes, form):
    assert form_of(vaec(changes).state_dict()) == form


def test_what_is_no_vaec_is_named():
    assert form_of({}) == "no VAEC"
    assert form_of({"px_r": torch.ones(3)}) == "no VAEC"
    state = vaec({}).state_dict()
    del state["px_decoder.0.weight"]
    assert form_of(state) == "an unknown form of VAEC"
    with pytest.raises(ModelError, match="look like an unknown form of VAEC"):
        arguments_of(state)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("ct_weight", torch.tensor(1.0), "do not go together"),
        ("z_encoder.mean_encoder.weight", torch.ones(5), "do not go together"),
        ("px_r", torch.ones(12), "Layer 0.0.weight' has shape (8, 14) where the others ask"),
        ("px_decoder.0.bias", torch.full((11,), torch.nan), "'px_decoder.0.bias' holds values"),
        ("extra", torch.ones(1), "1 are unknown, such as 'extra'"),
        ("z_encoder.mean_encoder.bias", None, "1 are missing, such as 'z_encoder.mean_encoder"),
        ("decoder.fc_layers.Layer 0.0.weight", torch.ones(8, 3), "n_batch=-5 is out of range"),
        ("z_encoder.mean_encoder.weight", torch.ones(5, 1).expand(5, 10**9), "where the"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name, value, found):
    state = vaec({}).state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(ModelError) as error:
        build(arguments_of(state), state)
    assert found in str(error.value)


def test_the_standard_mixture_is_the_standard_normal():
    torch.manual_seed(0)
    label = torch.tensor([0, 1, 1, 2])
    qz = torch.distributions.Normal(torch.randn(4, 5), torch.rand(4, 5) + 0.1)
    prior = [
        standard_mixture(3, 5)[f"prior_{part}"][label] for part in ("means", "log_std", "logits")
    ]
    noise = torch.randn(40_000, 4, 5)
    torch.testing.assert_close(
        kl_to_mixture(qz, *prior, noise), kl_to_standard_normal(qz), rtol=0.01, atol=0.01
    )


def test_only_the_standard_mixture_is_dropped():
    module = vaec({**SOFTMAX, "prior": "mog", "num_classes_mog": 1})
    state = module.state_dict()
    assert without_standard_mixture(state).keys() == state.keys()
    standard = {**state, **standard_mixture(3, 5)}
    assert arguments_of(without_standard_mixture(standard)) == {
        name: value
        for name, value in arguments_of(state).items()
        if name not in ("prior", "num_classes_mog")
    }
    assert without_standard_mixture(vaec({}).state_dict()).keys() == vaec({}).state_dict().keys()
