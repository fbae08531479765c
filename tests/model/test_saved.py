from __future__ import annotations

import json

import pytest
import torch

from rayvaec.errors import ModelError, StoreError
from rayvaec.model.saved import read_model, save_model
from rayvaec.model.vaec import VAEC

REGISTRY = {"genes": ["a", "b", "c"], "labels": ["x", "y"]}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    module = VAEC(3, 2, n_hidden=8, ct_weight=[1.0, 2.0])
    save_model(tmp_path / "model", module, REGISTRY, {"seed": 0})
    return module, tmp_path / "model"


def test_a_model_comes_back_as_it_was(saved):
    module, path = saved
    model = read_model(path)
    assert model.registry == REGISTRY
    assert model.provenance == {"seed": 0}
    assert model.module.config == module.config
    assert not model.module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, model.module.state_dict()[name]), name


def test_the_hash_is_of_the_contents(saved, tmp_path):
    module, path = saved
    save_model(tmp_path / "copy", module, REGISTRY, {"seed": 1})
    assert read_model(tmp_path / "copy").hash == read_model(path).hash
    with torch.no_grad():
        module.px_r[0] += 1
    save_model(tmp_path / "other", module, REGISTRY, {"seed": 0})
    assert read_model(tmp_path / "other").hash != read_model(path).hash


def test_an_existing_model_is_kept_unless_overwritten(saved):
    module, path = saved
    with pytest.raises(StoreError, match="exists already"):
        save_model(path, module, REGISTRY, {"seed": 2})
    assert read_model(path).provenance == {"seed": 0}
    save_model(path, module, REGISTRY, {"seed": 2}, overwrite=True)
    assert read_model(path).provenance == {"seed": 2}
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_what_is_no_model_is_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(ModelError, match="no model folder at .*nowhere"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(
        ModelError, match=r"is not a model folder: it has no config.json.*give .*model"
    ):
        read_model(tmp_path)
    (path / "registry.json").unlink()
    with pytest.raises(ModelError, match="it has no registry.json"):
        read_model(path)


def test_damage_is_named(saved):
    _, path = saved
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ModelError, match=r"model.safetensors does not hold the weights"):
        read_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not JSON"):
        read_model(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"n_hidden": 9}, "does not hold the weights"),
        ({"generative": "softmax", "n_batch": 1}, "looks like the softplus form"),
        ({"n_latent": -1}, "n_latent=-1"),
        ({"colour": 1}, "no argument 'colour'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, change, word):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError) as error:
        read_model(path)
    assert word in str(error.value)
