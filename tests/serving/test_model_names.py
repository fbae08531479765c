from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayvaec.errors import ConfigError
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC
from rayvaec.serving.engine.engine import Engine, Threads
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.limits import Limits
from rayvaec.serving.model_names import check_names, named_models

NEW = {"label": "type_1", "n_cells": 3, "library": 200, "seed": 4}


@pytest.fixture(scope="module")
def other(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A model of the same names with other weights."""
    torch.manual_seed(1)
    module = VAEC(trained.registry.n_genes, trained.registry.n_labels, n_hidden=16)
    path = tmp_path_factory.mktemp("other") / "model"
    save_model(path, module, trained.registry.to_json(), {})
    return load_model(path)


@pytest.fixture(scope="module")
def http_of(trained: TrainedModel, other: TrainedModel, http: Any) -> Callable[..., Any]:
    """Build an application of the two models, under the names given."""

    def build(*names: str) -> Any:
        limits, threads = Limits(max_requests=3), Threads(Limits())
        models = dict(zip(names, (trained, other), strict=False))
        services = {name: Engine(model, limits, threads) for name, model in models.items()}
        return type(http)(create_app(services, limits))

    return build


def test_a_command_line_names_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = Path("run=3")
    odd.mkdir()
    assert named_models(["run/model"]) == {"model": Path("run/model")}
    assert named_models(["run=3"]) == {"model": odd}
    assert named_models(["atlas=a", "lung=b=c"]) == {"atlas": Path("a"), "lung": Path("b=c")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b=c"], "a has no name, and 2 models are to be served; name each: .*NAME=a"),
        (["a=x", "a=y"], "two models are named 'a'"),
        (["a b=x"], "'a b' cannot be the name"),
        ([".hidden=x"], "'.hidden' cannot be"),
        (["=x"], "'' cannot be"),
    ],
)
def test_names_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        named_models(words)


def test_there_must_be_a_model():
    with pytest.raises(ConfigError, match="no model to serve"):
        check_names({})


def test_each_model_answers_under_its_name(http_of, trained, other):
    http = http_of("atlas", "lung")
    listed = http.get("/v1/models").json()["models"]
    assert [entry["name"] for entry in listed] == ["atlas", "lung"]
    hashes = {}
    for entry, model in zip(listed, (trained, other), strict=True):
        assert entry["model_hash"] == model.hash
        assert http.get(f"{entry['path']}/model").json()["model_hash"] == model.hash
        answer = http.post(f"{entry['path']}/generate", json=NEW)
        assert answer.headers["X-Rayvaec-Model"] == model.hash
        hashes[entry["name"]] = answer.json()["draws"]
    assert hashes["atlas"] != hashes["lung"]


def test_several_models_have_no_routes_without_a_name(http_of):
    http = http_of("atlas", "lung")
    for response in (http.post("/v1/generate", json=NEW), http.get("/v1/models/heart/model")):
        assert response.status_code == 404
        assert response.json()["fix"] == "name a model: /v1/models/NAME/... of atlas, lung"
    paths = http.get("/openapi.json").json()["paths"]
    assert "/v1/models/lung/sample" in paths
    assert "/v1/sample" not in paths


def test_a_single_model_answers_with_and_without_its_name(http_of):
    http = http_of("atlas")
    named, plain = (http.post(f"{p}/generate", json=NEW) for p in ("/v1/models/atlas", "/v1"))
    assert named.status_code == 200
    assert named.content == plain.content
    paths = http.get("/openapi.json").json()["paths"]
    assert "/v1/generate" in paths
    assert "/v1/models/atlas/generate" not in paths


def test_models_at_work_together_do_not_change_each_other(http_of):
    http = http_of("atlas", "lung")
    asked = [("POST", f"/v1/models/{name}/generate", {"json": NEW}) for name in ("atlas", "lung")]
    alone = [http.post(path, **rest).content for _, path, rest in asked]
    together = http.together(*asked)
    assert [answer.content for answer in together] == alone


def test_the_models_share_one_gate(http_of, monkeypatch):
    http = http_of("atlas", "lung")
    asked = [("POST", f"/v1/models/{name}/generate", {"json": NEW}) for name in ("atlas", "lung")]
    statuses = [answer.status_code for answer in http.together(*asked * 4)]
    assert np.unique(statuses).tolist() == [200, 429]
