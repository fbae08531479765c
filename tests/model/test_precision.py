"""Models of every floating dtype, under every default dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from rayvaec.errors import ConfigError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.model.config import VAECConfig
from rayvaec.model.vaec import VAEC

N_CELLS, N_GENES, N_LABELS = 8, 20, 3
FORMS = {
    "softplus": {},
    "softplus-batches": {"n_batch": 2, "encode_covariates": True},
    "no-labels": {"n_labels": 0},
    "softmax": {"generative": "softmax", "n_batch": 1},
    "softmax-batches": {"generative": "softmax", "n_batch": 2, "encode_covariates": True},
    "mog": {"generative": "softmax", "n_batch": 2, "prior": "mog"},
}
TOLERANCE = {torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def make(form: str, dtype: torch.dtype) -> VAEC:
    torch.manual_seed(0)
    return VAEC(N_GENES, **{"n_labels": N_LABELS, **FORMS[form]}, dropout_rate=0.0).to(dtype)


def tensors() -> dict[str, Tensor]:
    x = torch.from_numpy(np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES)))
    column = torch.arange(N_CELLS)[:, None]
    return {"X": x, "labels": column % N_LABELS, "batch": column % 2}


def given(form: str) -> dict[str, Tensor]:
    cells = tensors()
    return cells if FORMS[form].get("n_batch") == 2 else {**cells, "batch": cells["batch"] * 0}


def losses(module: VAEC, form: str, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of the dense and of the sparse methods, at different noise."""
    cells = given(form)
    x = cells["X"]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (x > 0).sum(1).cumsum(0)])
    csr = CsrCounts(indptr, x.nonzero()[:, 1].int(), x[x > 0].int(), N_GENES)
    torch.manual_seed(1)
    dense = module({**cells, "X": x.to(noise.dtype)})[2].loss
    sparse = module.minibatch_loss(csr, cells["labels"], cells["batch"], noise=noise).loss
    return dense, sparse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_computes_as_one_of_float32(form, dtype, default_dtype):
    exact = make(form, dtype).float()  # of the same weights, rounded to `dtype`
    module = make(form, dtype)
    noise = torch.randn(exact.n_noise, N_CELLS, 5, dtype=torch.float32)
    _, expected = losses(exact, form, noise)
    dense, found = losses(module, form, noise)
    expected.backward()
    found.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert dense.dtype == found.dtype == wide
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), own in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert parameter.dtype == dtype
        if own.grad is None:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype, name
        scale = own.grad.abs().max().item() + 1e-12
        difference = (parameter.grad.double() - own.grad.double()).abs().max().item()
        assert difference <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_trains_and_draws(form, dtype, default_dtype):
    module, cells = make(form, dtype), given(form)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    module({**cells, "X": cells["X"].to(dtype)})[2].loss.backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert any(changed)
    drawn = module.sample(cells, 2)
    assert drawn.shape == (N_CELLS, N_GENES, 2)
    assert drawn.dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_running_statistics_of_a_half_model_move():
    module = VAEC(N_GENES, N_LABELS, generative="softmax", n_batch=1, n_fine_labels=2).bfloat16()
    module.classify(torch.randn(N_CELLS, 5), torch.zeros(N_CELLS, 1))
    (norm,) = (part for part in module.modules() if isinstance(part, torch.nn.BatchNorm1d))
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.bfloat16
    assert norm.running_mean.abs().sum() > 0
    assert norm.num_batches_tracked == 1


def test_a_float64_default_makes_float64_models(default_dtype):
    module = VAEC(N_GENES, N_LABELS)
    assert {p.dtype for p in module.parameters()} == {default_dtype}
    assert module(tensors())[2].loss.dtype == default_dtype


@pytest.mark.parametrize(
    "whole", [np.int64, np.int32, np.uint8, torch.tensor], ids=lambda f: f.__name__
)
def test_sizes_may_be_of_any_whole_number_type(whole):
    sizes = {"n_labels": 3, "n_hidden": 16, "n_latent": 4, "n_layers": 1, "n_batch": 2}
    softmax = {"generative": "softmax", "n_fine_labels": 2, "num_classes_mog": 3}
    expected = VAECConfig(20, **sizes, **softmax)
    found = VAECConfig(
        **{name: whole(n) for name, n in {"n_input": 20, **sizes}.items()},
        **{**softmax, "n_fine_labels": whole(2), "num_classes_mog": whole(3)},
    )
    assert found == expected
    assert {type(value) for value in found.to_json().values()} <= {
        int,
        float,
        bool,
        str,
        type(None),
    }


def test_other_numbers_may_be_numpys():
    found = VAECConfig(
        20,
        3,
        dropout_rate=np.float32(0.5),
        log_variational=np.bool_(False),
        ct_weight=np.ones(3, np.float32),
    )
    assert found == VAECConfig(20, 3, dropout_rate=0.5, log_variational=False, ct_weight=(1, 1, 1))
    assert type(found.dropout_rate) is float
    assert type(found.log_variational) is bool


def test_none_stands_for_a_default():
    names = [name for name in VAECConfig(20).to_json() if name != "n_input"]
    assert VAECConfig(20, **dict.fromkeys(names)) == VAECConfig(20)
    assert VAEC(20, **dict.fromkeys(names)).config == VAECConfig(20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_variational": "no"}, "log_variational='no' does not fit; .*True or False"),
        ({"log_variational": 1}, "log_variational=1 does not fit"),
        ({"encode_covariates": "yes"}, "encode_covariates='yes' does not fit"),
        ({"dropout_rate": "0.1"}, "dropout_rate='0.1' does not fit; .*a number"),
        ({"dropout_rate": True}, "dropout_rate=True does not fit"),
        ({"dropout_rate": float("nan")}, "dropout_rate=nan is out of range"),
        ({"ct_weight": 3}, "ct_weight=3 does not fit; .*one number a label"),
        ({"n_labels": 1, "ct_weight": ["x"]}, r"ct_weight=\['x'\] does not fit"),
        ({"n_hidden": True}, "n_hidden=True is out of range"),
        ({"n_hidden": np.bool_(True)}, "n_hidden=.*True.* is out of range"),
        ({"n_hidden": 12.0}, "n_hidden=12.0 is out of range"),
        ({"n_hidden": "12"}, "n_hidden='12' is out of range"),
        ({"n_hidden": np.int64(0)}, "n_hidden=0 is out of range"),
        ({"n_input": None}, "n_input=None is out of range"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        VAECConfig(**{"n_input": 20, **arguments})
