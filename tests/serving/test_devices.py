"""The endpoint with a model on another device: torch's `meta`, which stands in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import anndata
import pytest

from rayvaec.inference.moments import DrawMoments
from rayvaec.inference.trained_model import load_model
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.engine.jobs import Job
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.limits import Limits

REST: dict[str, dict[str, Any]] = {
    "sample": {"n_samples": 2},
    "latent": {},
    "expression": {},
    "generate": {"n_samples": 2, "library": 100},
}
"""What requests of each kind take beside cells and labels."""


@pytest.fixture
def on_meta(model_path: Path, values_on_meta: list[tuple[int, ...]]) -> Iterator[Engine]:
    model = load_model(model_path)
    model.module.to("meta")
    service = Engine(model, Limits())
    yield service
    service.close()


def test_every_kind_of_job_is_warmed_up(on_meta: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    run_jobs = Engine.warm_up.__globals__["run_jobs"]

    def seen(module: Any, jobs: list[Job]) -> list[Any]:
        kinds.extend(job.kind for job in jobs)
        return run_jobs(module, jobs)

    monkeypatch.setitem(Engine.warm_up.__globals__, "run_jobs", seen)
    on_meta.warm_up()
    assert set(kinds) == set(get_args(get_type_hints(Job)["kind"]))


def test_sums_over_draws_are_warmed_up(on_meta: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    monkeypatch.setattr(DrawMoments, "add", lambda _, draws, n_samples: added.append(n_samples))
    on_meta.warm_up()
    assert added == [1]


def test_every_route_computes_where_the_model_is(
    on_meta: Engine, http: Any, adata: anndata.AnnData, values_on_meta: list[tuple[int, ...]]
) -> None:
    http = replace(http, app=create_app({"model": on_meta}, Limits()))
    genes = list(on_meta.model.registry.genes)
    cells = {"dense": adata[:3, genes].X.toarray().tolist()}
    labels = {"labels": adata.obs["cell_type"][:3].tolist()}
    routes = http.get("/openapi.json").json()["paths"]
    posted = {path.rpartition("/")[2] for path, verbs in routes.items() if "post" in verbs}
    assert posted == set(REST)
    for kind, rest in REST.items():
        rest = {**rest, **labels, **({} if kind == "generate" else {"cells": cells})}
        before = len(values_on_meta)
        answer = http.post(f"/v1/{kind}", json=rest)
        assert answer.status_code == 200, answer.text
        assert len(values_on_meta) > before
