"""Where inference computes: everything on the model's device, and results back by one way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from every_function import FORMS, Case, World, cases, outline
from torch import Tensor

from rayvaec.errors import ConfigError, ModelError
from rayvaec.inference import posterior

CASES = cases()


def run(case: Case, world: World) -> object:
    """Run a case, or return what the model's form refuses."""
    try:
        return case.run(world)
    except (ConfigError, ModelError) as error:
        return str(error)


def test_every_part_of_inference_is_found() -> None:
    names = {case.name.removeprefix("rayvaec.inference.") for case in CASES}
    assert {
        "posterior.draw",
        "analyses.marginal_likelihood.marginal_ll",
        "analyses.differential.Shares.of",
        "bulk.per_cell.Moments.values",
        "bulk.aggregates.VampPrior.part",
        "ppc.measure.measure",
        "trained_model.TrainedModel.sample",
        "trained_model.TrainedModel.predict",
        "trained_model.TrainedModel.get_feature_correlation_matrix",
    } <= names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.name.removeprefix("rayvaec.inference.")
)
def test_it_computes_on_the_models_device(case, form, tmp_path, values_on_meta):
    """On `meta` an operation on tensors of two devices raises, and so does a look at a value."""
    if case.name.endswith("learned_prior") and form != "mog":
        pytest.skip("is of models with a mixture prior alone")
    world = World(tmp_path, form)
    expected = outline(run(case, world))
    assert not values_on_meta  # the CPU's own results did not come through the stand-in
    world.module.to("meta")
    assert outline(run(case, world)) == expected


def test_results_that_are_tensors_stay_on_the_device(tmp_path, values_on_meta):
    world = World(tmp_path, "mog")
    world.module.to("meta")
    block = next(posterior.blocks(world.module, world.cells))
    tensors = [*block.x[:3], block.y, block.batch_index, block.qz.loc, block.qz.scale]
    tensors += posterior.encoded(world.module, world.cells)
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} == {"meta"}
    assert values_on_meta == []  # nothing went to the host for them


OPTIONS = {
    "get_latent_representation": {"give_mean": False},
    "get_normalized_expression": {
        "transform_batch": ["b0", "b1"],
        "gene_list": ["g3", "g1"],
        "library_size": "latent",
        "n_samples": 2,
        "return_mean": False,
    },
    "differential_expression": {"mode": "vanilla", "batch_correction": True},
    "get_feature_correlation_matrix": {"transform_batch": "b1", "correlation_type": "pearson"},
    "predict": {"soft": True, "use_posterior_mean": False},
    "sample": {"n_samples": 2, "sparse": True},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_so_do_the_methods_options(method, tmp_path, values_on_meta):
    world = World(tmp_path, "mog")
    world.module.to("meta")
    result = getattr(world.model, method)(world.adata, **OPTIONS[method])
    assert len(result)
    assert values_on_meta


def test_a_look_at_a_value_is_seen(values_on_meta):
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        torch.zeros(2, device="meta").cpu()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta"):
        torch.zeros(2, device="meta") + torch.zeros(2)
    assert np.isfinite(values_on_meta).all()
