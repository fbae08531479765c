from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import pytest

from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.engine.summary import MOST_GENES
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.limits import Limits


@pytest.fixture(scope="module")
def app_of(http):
    """Build the endpoint of one model."""
    services = []

    def build(model):
        services.append(Engine(model, Limits()))
        return type(http)(create_app({"model": services[-1]}, Limits()))

    yield build
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def told(app_of, summarised):
    """The endpoint of a model that knows what its training data looks like."""
    return app_of(summarised)


def test_a_few_genes_and_a_label_are_told(told, summary, trained):
    registry = trained.registry
    wanted = [registry.genes[7], registry.genes[0]]
    query = {"gene": wanted, "profile": registry.labels[2]}
    response = told.get("/v1/summary", params=query)
    assert response.status_code == 200
    assert response.headers["X-Rayvaec-Model"] == trained.hash
    said = response.json()
    assert said == told.get("/v1/models/model/summary", params=query).json()
    assert [entry["label"] for entry in said["labels"]] == list(registry.labels)
    assert [entry["n_cells"] for entry in said["labels"]] == summary.cells.tolist()
    np.testing.assert_allclose(said["labels"][1]["library"], summary.library[1], rtol=1e-4)
    assert [entry["gene"] for entry in said["genes"]] == wanted
    for entry, column in zip(said["genes"], (7, 0), strict=True):
        np.testing.assert_allclose(entry["mean"], summary.mean[column], rtol=1e-4)
        assert entry["histogram"] == summary.histogram[column].tolist()
        np.testing.assert_allclose(entry["zero_fraction"], summary.zero_fraction[column], rtol=1e-4)
    assert said["profile"]["label"] == registry.labels[2]
    np.testing.assert_allclose(said["profile"]["mean"], summary.mean[:, 2], rtol=1e-4)
    assert said["telling_genes"][0] == registry.genes[summary.telling_genes(1)[0]]


def test_without_genes_the_answer_is_small(told):
    said = told.get("/v1/summary")
    assert (said.json()["genes"], said.json()["profile"]) == ([], None)
    assert len(said.content) < 10_000


def test_a_label_without_training_cells_has_no_library(app_of, summarised, summary):
    model, cells = copy(summarised), summary.cells.copy()
    cells[3] = 0
    model.summary = replace(summary, cells=cells)
    assert app_of(model).get("/v1/summary").json()["labels"][3]["library"] is None


@pytest.mark.parametrize(
    ("query", "status", "error", "detail"),
    [
        ({"gene": ["gene_999"]}, 422, "unknown_gene", "the model has no gene 'gene_999'"),
        ({"profile": "type_9"}, 422, "unknown_label", "the model has no label 'type_9'"),
        ({"gene": ["gene_0000"] * (MOST_GENES + 1)}, 422, "invalid_request", "51 genes are above"),
    ],
)
def test_what_there_is_not_is_refused(told, query, status, error, detail):
    response = told.get("/v1/summary", params=query)
    assert (response.status_code, response.json()["error"]) == (status, error)
    assert detail in response.json()["detail"]


def test_a_model_without_a_summary_says_so(http):
    response = http.get("/v1/summary")
    assert (response.status_code, response.json()["error"]) == (404, "no_summary")
    assert "rayvaec train" in response.json()["fix"]


def test_the_summary_needs_the_token(serve_with):
    assert serve_with(token_digest="0" * 64).get("/v1/summary").status_code == 401
