from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from rayvaec.errors import ConfigError, CountsError, ModelError
from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.rng import position_keys
from rayvaec.model.draws import KeyedRows, draw_decoded_blocks, draw_fused
from rayvaec.model.losses import kl_to_standard_normal
from rayvaec.model.vaec import VAEC, LossOutput, LossRecorder

WITH_LOSS = (
    "softplus",
    "softplus_1layer_nolog",
    "softplus_one_label",
    "softplus_batch",
    "softplus_batch_encode",
    "softmax",
    "softmax_batch_encode",
)
RANDOM_LOSS = ("softmax_mog", "softmax_fine")
RELATIVE = 1e-4


class Parity:
    """One reference file, its model, and the reference's inputs."""

    def __init__(self, path):
        self.file = np.load(path)
        kwargs = json.loads(str(self.file["kwargs"]))
        kwargs["generative"] = "softmax" if kwargs.pop("scvi_version") == "1.4.2" else "softplus"
        self.module = VAEC(**kwargs, ct_weight=self.file["ct_weight"]).eval()
        self.module.load_state_dict(
            {name[6:]: self.tensor(name) for name in self.file if name.startswith("state/")}
        )
        self.x, self.y, self.batch = (self.tensor(name) for name in ("x", "y", "batch"))
        self.tensors = {"X": self.x, "labels": self.y, "batch": self.batch}

    def tensor(self, name):
        return torch.from_numpy(self.file[name])

    def csr(self):
        x = self.file["x"].astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum((x > 0).sum(1))])
        return CsrCounts(
            torch.from_numpy(indptr),
            torch.from_numpy(np.nonzero(x)[1].astype(np.int32)),
            torch.from_numpy(x[x > 0].astype(np.int32)),
            x.shape[1],
        )

    def at_mean(self):
        """Outputs with z set to the posterior's mean, a constant, as in the reference."""
        inferred = self.module.inference(self.x, self.y, batch_index=self.batch)
        inferred["z"] = inferred["qz"].loc.detach()
        generated = self.module.generative(
            inferred["z"], inferred["library"], self.y, batch_index=self.batch
        )
        return inferred, generated


@pytest.fixture(params=WITH_LOSS)
def parity(request, shared):
    return Parity(shared / "parity" / f"{request.param}.npz")


@pytest.fixture(params=WITH_LOSS + RANDOM_LOSS)
def parity_of_outputs(request, shared):
    return Parity(shared / "parity" / f"{request.param}.npz")


def assert_close(ours, reference):
    reference = torch.as_tensor(reference)
    floor = 0.1 * RELATIVE * float(reference.abs().max())
    torch.testing.assert_close(ours, reference, rtol=RELATIVE, atol=floor)


def small_model(**kwargs):
    torch.manual_seed(0)
    return VAEC(30, **{"n_labels": 3, "n_hidden": 16, **kwargs}).eval()


def small_tensors(n_cells=8, n_labels=3):
    torch.manual_seed(1)
    return {
        "X": torch.poisson(torch.full((n_cells, 30), 0.7)),
        "labels": torch.arange(n_cells)[:, None] % max(n_labels, 1),
    }


def test_the_signature_is_the_one_that_scvi_users_know():
    signature = inspect.signature(VAEC.__init__)
    assert list(signature.parameters)[1:] == [
        "n_input",
        "n_labels",
        "n_hidden",
        "n_latent",
        "n_layers",
        "log_variational",
        "ct_weight",
        "dropout_rate",
        "module_kwargs",
    ]
    defaults = [p.default for p in signature.parameters.values()][2:-1]
    assert defaults == [0, 128, 5, 2, True, None, 0.05]
    assert list(inspect.signature(VAEC.sample).parameters) == ["self", "tensors", "n_samples"]
    assert LossRecorder is LossOutput


def test_outputs_equal_scvi_tools(parity_of_outputs):
    parity = parity_of_outputs
    inferred, generated = parity.at_mean()
    assert_close(inferred["qz"].loc, parity.file["qz_loc"])
    assert_close(inferred["qz"].scale, parity.file["qz_scale"])
    assert_close(inferred["library"], parity.file["library"])
    assert_close(generated["px"].mean, parity.file["px_mean"])
    theta, mu = parity.file["px_theta"], parity.file["px_mu"]
    assert_close(generated["px"].total_count.expand(theta.shape), theta)
    assert_close(generated["px_rate"], theta if parity.module.is_softplus else mu)
    if "reconstruction_loss" in parity.file:
        assert_close(
            -generated["px"].log_prob(parity.x).sum(-1), parity.file["reconstruction_loss"]
        )


def test_loss_and_every_gradient_equal_scvi_tools(parity):
    inferred, generated = parity.at_mean()
    kl_weight = float(parity.file["kl_weight"])
    output = parity.module.loss(parity.tensors, inferred, generated, kl_weight=kl_weight)
    assert_close(output.loss, parity.file["loss"])
    assert_close(output.reconstruction_loss, parity.file["reconstruction_loss"])
    assert_close(output.kl_local, parity.file["kl_local"])
    output.loss.backward()
    names = {name[5:] for name in parity.file if name.startswith("grad/")}
    assert names == {name for name, _ in parity.module.named_parameters()}
    for name, parameter in parity.module.named_parameters():
        assert_close(parameter.grad, parity.file[f"grad/{name}"])


def test_the_sparse_path_equals_the_dense_one(parity, monkeypatch):
    # Without noise, both are at z = mean, and minibatch_loss lets gradients through z.
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    module, kl_weight = parity.module, float(parity.file["kl_weight"])
    output = module.minibatch_loss(parity.csr(), parity.y, parity.batch, kl_weight=kl_weight)
    assert_close(output.loss, parity.file["loss"])
    assert_close(output.reconstruction_loss, parity.file["reconstruction_loss"])
    assert_close(output.kl_local, parity.file["kl_local"])
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    inferred, _ = parity.at_mean()
    inferred["z"] = inferred["qz"].loc
    generated = module.generative(
        inferred["z"], inferred["library"], parity.y, batch_index=parity.batch
    )
    module.loss(parity.tensors, inferred, generated, kl_weight=kl_weight).loss.backward()
    for name, parameter in module.named_parameters():
        assert_close(ours[name], parameter.grad)


def test_the_noise_given_takes_z_along_its_posterior():
    module, tensors = small_model(ct_weight=[0.5, 2.0, 1.0]), small_tensors()
    x, y, noise = tensors["X"].long(), tensors["labels"], torch.randn(1, 8, 5)
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), (x > 0).sum(1).cumsum(0)])
    csr = CsrCounts(indptr, x.nonzero()[:, 1], x[x > 0], 30)
    output = module.minibatch_loss(csr, y, kl_weight=0.3, noise=noise)
    inferred = module.inference(tensors["X"], y)
    z = inferred["qz"].loc + inferred["qz"].scale * noise[0]
    generated = module.generative(z, inferred["library"], y)
    expected = module.loss(tensors, inferred, generated, kl_weight=0.3)
    gradients = [
        torch.autograd.grad(loss.loss, tuple(module.parameters())) for loss in (output, expected)
    ]
    assert_close(output.loss.detach(), expected.loss.detach())
    assert_close(output.kl_local, expected.kl_local.detach())
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_the_mixture_prior_is_a_mixture():
    # With one component N(0, 1), the estimate agrees with the closed form.
    module = small_model(generative="softmax", n_batch=1, prior="mog", num_classes_mog=1)
    with torch.no_grad():
        module.prior_means.zero_()
        module.prior_log_std.zero_()
    qz = Normal(torch.linspace(-1, 1, 40).view(8, 5), torch.full((8, 5), 0.7))
    y = torch.arange(8)[:, None] % 3
    noise = torch.randn(20_000, 8, 5, generator=torch.Generator().manual_seed(0))
    exact = kl_to_standard_normal(qz)
    torch.testing.assert_close(module.kl(qz, y, noise).detach(), exact, rtol=0.02, atol=0.03)
    with torch.no_grad():
        module.prior_means[0] += 1
    moved = (module.kl(qz, y, noise).detach() - exact).abs() > 0.1
    assert torch.equal(moved, y[:, 0] == 0)


def test_fine_labels_are_classified_and_weigh_in_the_loss():
    module = small_model(generative="softmax", n_batch=1, n_fine_labels=6)
    tensors = small_tensors()
    tensors["fine_labels"] = torch.arange(8)[:, None] % 7  # 6 stands for "not known"
    inferred, generated, with_fine = module(tensors)
    logits = module.classify(inferred["qz"].loc, tensors["labels"])
    assert logits.shape == (8, 6)
    known = tensors["fine_labels"][:, 0] < 6
    entropy = -torch.log_softmax(logits, 1)[known, tensors["fine_labels"][known, 0]].mean()
    torch.testing.assert_close(with_fine.classification_loss, 5 * entropy)
    plain = (with_fine.reconstruction_loss + with_fine.kl_local).mean()
    torch.testing.assert_close(with_fine.loss, plain + 5 * entropy)
    double = module.loss(tensors, inferred, generated, classification_ratio=10.0)
    torch.testing.assert_close(double.loss, plain + 10 * entropy)
    tensors["fine_labels"][:] = 6
    torch.testing.assert_close(module.loss(tensors, inferred, generated).loss, plain)


def test_a_model_without_fine_labels_does_not_classify():
    with pytest.raises(ModelError, match="no fine labels"):
        small_model().classify(torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.long))


def test_the_log_library_is_the_logarithm_and_its_decoder_has_no_dropout():
    module = small_model(library="log", dropout_rate=0.9)
    tensors = small_tensors()
    inferred, generated = module(tensors, compute_loss=False)
    torch.testing.assert_close(inferred["library"], tensors["X"].sum(1, keepdim=True).log())
    torch.testing.assert_close(generated["px_rate"], generated["px_scale"] * inferred["library"])
    module.train()
    decode = {name: inferred[name] for name in ("z", "library")} | {"y": tensors["labels"]}
    once, again = (module.generative(**decode)["px_rate"] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("form", [{"n_batch": 2}, {"prior": "mog"}, {"encode_covariates": True}])
def test_the_softmax_form_draws_and_decodes_in_another_batch(form):
    module = small_model(**{"generative": "softmax", "n_batch": 1, **form})
    tensors = small_tensors() | {"batch": torch.zeros(8, 1, dtype=torch.long)}
    counts = module.sample(tensors, 3)
    assert counts.shape == (8, 30, 3)
    assert counts.sum() > 0
    if module.config.n_batch == 2:
        inferred = module.inference(tensors["X"], tensors["labels"], batch_index=tensors["batch"])
        decode = {name: inferred[name] for name in ("z", "library")} | {"y": tensors["labels"]}
        same, other = (
            module.generative(**decode, batch_index=tensors["batch"], transform_batch=batch)
            for batch in (0, 1)
        )
        assert not torch.equal(same["px_rate"], other["px_rate"])


def test_ct_weight_weighs_the_cells_of_a_label():
    tensors = small_tensors()
    plain, weighted = small_model(), small_model(ct_weight=[0.0, 2.0, 1.0])
    inferred, generated, one = plain(tensors)
    ours = weighted.loss(tensors, inferred, generated)
    per_cell = one.reconstruction_loss + one.kl_local
    expected = (torch.tensor([0.0, 2.0, 1.0])[tensors["labels"][:, 0]] * per_cell).mean()
    torch.testing.assert_close(ours.loss, expected)


def test_divisor_makes_shares_add_up():
    parts = []
    module = small_model()
    full = small_tensors(8)
    for cells in (slice(0, 5), slice(5, 8), slice(0, 8)):
        x = full["X"][cells].long()
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), (x > 0).sum(1).cumsum(0)])
        csr = CsrCounts(indptr, x.nonzero()[:, 1], x[x > 0], 30)
        qz = module.encode(csr, full["labels"][cells])
        assert qz.loc.shape == (len(x), 5)
        with torch.no_grad():
            torch.manual_seed(3)
            output = module.minibatch_loss(csr, full["labels"][cells], divisor=8.0, kl_weight=1e9)
        parts.append(output.loss / 1e9)
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_labels", [0, 1, 3])
@pytest.mark.parametrize("n_samples", [1, 4])
def test_sample_draws_whole_counts_of_the_promised_shape(n_labels, n_samples):
    module = small_model(n_labels=n_labels)
    counts = module.sample(small_tensors(8, n_labels), n_samples)
    assert counts.shape == (8, 30, n_samples)
    assert counts.device.type == "cpu"
    assert bool((counts >= 0).all())
    assert torch.equal(counts, counts.round())
    assert counts.sum() > 0


def test_sample_follows_the_predictive_mean():
    module = small_model()
    with torch.no_grad():
        module.px_r.fill_(0.3)
        module.z_encoder.var_encoder.bias.fill_(-12.0)  # a narrow posterior: z is its mean
        tensors = small_tensors(4)
        qz = module.inference(tensors["X"], tensors["labels"])["qz"]
        library = tensors["X"].sum(1, keepdim=True)
        px = module.generative(qz.loc, library, tensors["labels"])["px"]
        expected, variance = px.mean, px.variance
    n = 4000
    mean = module.sample(tensors, n).mean(-1)
    error = (mean - expected) / (variance / n).sqrt()
    assert float(error.abs().max()) < 6


@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_draws_on_a_device_are_those_of_the_fused_kernel(generative):
    module = small_model(generative=generative, n_batch=1)
    n_rows = 150
    z = torch.randn(n_rows, 5, generator=torch.Generator().manual_seed(0))
    library = torch.full((n_rows, 1), 40.0)
    y = torch.arange(n_rows)[:, None] % 3
    keys, samples = position_keys(0, n_rows), np.zeros(n_rows, np.uint64)
    rows = KeyedRows(library, y, None, 1, keys, samples)
    dense = []
    for draw in (draw_fused, draw_decoded_blocks):
        draws = draw(module, z, rows)
        row = np.repeat(np.arange(n_rows), np.diff(draws.indptr))
        counts = np.zeros((n_rows, 30), np.int64)
        counts[row, draws.indices] = draws.counts
        dense.append(counts)
    # The two round rates differently, which may move a draw here and there.
    assert np.mean((dense[0] == dense[1]).all(1)) > 0.95
    assert dense[0].sum() > 0


def test_sample_is_governed_by_the_global_generator():
    module, tensors = small_model(), small_tensors()
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(module.sample(tensors, 2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_more_samples_add_a_leading_dimension():
    module, tensors = small_model(), small_tensors()
    inferred, generated = module(tensors, inference_kwargs={"n_samples": 3}, compute_loss=False)
    assert inferred["z"].shape == (3, 8, 5)
    assert inferred["library"].shape == (3, 8, 1)
    assert isinstance(inferred["qz"], Normal)
    assert generated["px_rate"].shape == (3, 8, 30)
    assert generated["px"].sample().shape == (3, 8, 30)


def test_transform_batch_decodes_in_another_batch():
    module = small_model(n_batch=2)
    tensors = small_tensors()
    zero = torch.zeros(8, 1, dtype=torch.long)
    inferred = module.inference(tensors["X"], tensors["labels"], batch_index=zero)
    decode = {"z": inferred["z"], "library": inferred["library"], "y": tensors["labels"]}
    as_one = module.generative(**decode, batch_index=zero, transform_batch=1)["px_rate"]
    assert torch.equal(as_one, module.generative(**decode, batch_index=zero + 1)["px_rate"])
    assert not torch.equal(as_one, module.generative(**decode, batch_index=zero)["px_rate"])


def test_start_values_put_px_scale_at_the_mean_fraction():
    module = small_model()
    fraction = torch.rand(30)
    fraction[3] = 0
    fraction /= fraction.sum()
    module.init_from_counts(fraction)
    start = torch.nn.functional.softplus(module.px_decoder[0].bias)
    torch.testing.assert_close(start, fraction.clamp_min(1e-8), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"n_hiden": 12}, "'n_hidden'"),
        ({"n_latent": 0}, "n_latent=0"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"encode_covariates": True}, "n_batch=0"),
        ({"generative": "sofmax"}, "softplus, softmax"),
        ({"generative": "softmax"}, "n_batch=0"),
        ({"prior": "mog"}, "use generative='softmax'"),
        ({"library": "log", "generative": "softmax", "n_batch": 1}, "use generative='softplus'"),
        ({"n_fine_labels": 4}, "use generative='softmax'"),
        ({"ct_weight": [1.0]}, "1 values for n_labels=3"),
        ({"ct_weight": [1.0, -1.0, 1.0]}, "ct_weight[1]=-1.0"),
    ],
)
def test_arguments_are_refused_by_name(kwargs, word):
    with pytest.raises(ConfigError) as error:
        small_model(**kwargs)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t["X"].__setitem__((2, 4), -1.0), "X[2, 4] = -1"),
        (lambda t: t["X"].__setitem__((2, 4), 0.5), "X[2, 4] = 0.5"),
        (lambda t: t["X"].__setitem__((2, 4), float("nan")), "X[2, 4] = nan"),
        (lambda t: t.__setitem__("X", t["X"][:, :29]), "(8, 29)"),
        (lambda t: t["labels"].__setitem__((1, 0), 3), "the code 3"),
        (lambda t: t.__setitem__("labels", t["labels"][:3]), "3 codes for 8 cells"),
    ],
)
def test_tensors_are_refused_with_value_and_place(change, word):
    tensors = small_tensors()
    change(tensors)
    with pytest.raises(CountsError) as error:
        small_model().sample(tensors)
    assert word in str(error.value)


def test_a_missing_batch_is_refused():
    tensors = small_tensors()
    with pytest.raises(CountsError, match="2 categories of batch"):
        small_model(n_batch=2).inference(tensors["X"], tensors["labels"])


def test_no_draws_are_refused():
    with pytest.raises(CountsError, match="n_samples=0"):
        small_model().sample(small_tensors(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_methods_keep_the_tensors_that_they_are_given(generative, dtype):
    module = VAEC(12, 3, n_hidden=8, generative=generative, n_batch=2, encode_covariates=True)
    counts = torch.from_numpy(np.random.default_rng(0).poisson(20, (9, 12))).to(dtype)
    tensors = {
        "X": counts,
        "labels": torch.arange(9)[:, None] % 3,
        "batch": torch.arange(9)[:, None] % 2,
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    inferred, generated, losses = module(tensors)
    z, library = inferred["z"].clone(), inferred["library"].clone()
    losses.loss.backward()
    module.generative(inferred["z"], inferred["library"], tensors["labels"], transform_batch=1)
    module.loss(tensors, inferred, generated)
    module.sample(tensors, 2)
    fraction = counts.double().sum(0) / counts.double().sum()
    kept = fraction.clone()
    module.init_from_counts(fraction)
    assert torch.equal(fraction, kept)
    assert torch.equal(inferred["z"], z)
    assert torch.equal(inferred["library"], library)
    for name, tensor in tensors.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
