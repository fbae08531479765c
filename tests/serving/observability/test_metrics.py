from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayvaec.protocol import ARROW
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.endpoint import CUT_OFF
from rayvaec.serving.observability.metrics import Metrics, page

TOKEN = "0123456789abcdef0123"
NEW = {"label": "type_1", "n_cells": 2, "library": 50, "n_samples": 3, "seed": 3}


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Read a page as Prometheus does; the replica is left out of the labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: v for name, v in sample.labels.items() if name != "replica"}
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_requests_draws_and_refusals_are_counted(serve_with):
    http = serve_with(max_requests=1)
    for accept in ("*/*", ARROW):
        assert http.post("/v1/generate", json=NEW, headers={"Accept": accept}).status_code == 200
    http.post("/v1/generate", json={**NEW, "label": "nobody"})
    http.get("/nowhere/a")
    http.get("/nowhere/b")
    work = ("POST", "/v1/generate", {"json": NEW})
    assert sorted(r.status_code for r in http.together(work, work, work)) == [200, 429, 429]
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    got = values(response.text)
    route = "/v1/generate"
    assert got[key("rayvaec_requests_total", route=route, status="200")] == 3
    assert got[key("rayvaec_requests_total", route=route, status="422")] == 1
    assert got[key("rayvaec_requests_total", route=route, status="429")] == 2
    assert got[key("rayvaec_requests_total", route="other", status="404")] == 2
    assert got[key("rayvaec_draws_total", route=route)] == 3 * 2 * 3
    assert got[key("rayvaec_rejected_total", reason="unknown_label")] == 1
    assert got[key("rayvaec_rejected_total", reason="queue_full")] == 2
    assert got[key("rayvaec_rejected_total", reason="not_found")] == 2
    assert got[key("rayvaec_request_seconds_count", route=route)] == 6
    assert got[key("rayvaec_request_seconds_bucket", route=route, le="+Inf")] == 6
    assert got[key("rayvaec_requests_in_work")] == 0
    for name in ("jobs_waiting", "held_bytes", "answers_unread"):
        assert got[key(f"rayvaec_{name}")] == 0
    assert got[key("process_resident_memory_bytes")] > 1e6


def test_metrics_need_the_token(serve_with):
    http = serve_with(digest(TOKEN))
    assert http.get("/metrics").status_code == 401
    answer = http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert values(answer.text)[key("rayvaec_rejected_total", reason="unauthorized")] == 1


def test_all_replicas_stand_on_one_page():
    names = ("held_bytes", "waiting_for_clients", "jobs_waiting")
    counts = {"in_work": lambda: 4, **dict.fromkeys(names, lambda: 0)}
    replicas = [Metrics(replica=name, **counts) for name in ("a", "b")]
    replicas[1].count("/v1/sample", 200, 0.2, 10, "")
    text = page(replica.collect() for replica in replicas).decode()
    assert text.count("# TYPE rayvaec_requests_total counter") == 1
    assert 'rayvaec_requests_in_work{replica="a"} 4.0' in text
    assert 'rayvaec_requests_in_work{replica="b"} 4.0' in text
    assert 'rayvaec_draws_total{replica="b",route="/v1/sample"} 10.0' in text


def test_every_request_has_a_line(http, caplog):
    with caplog.at_level(logging.INFO, "rayvaec.access"):
        answers = [
            http.post("/v1/generate", json=NEW, headers={"X-Request-ID": "one"}),
            http.get("/no%0Awhere?token=secret"),
            http.get("/healthz"),
        ]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.fullmatch(r"one POST /v1/generate 200 \d+\.\d ms", lines[0])
    identity = answers[1].headers["X-Request-ID"]
    assert re.fullmatch(rf"{identity} GET other 404 \d+\.\d ms", lines[1])


def test_an_answer_that_breaks_off_is_counted_as_such(
    serve_with: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    http = serve_with()
    merger = http.app.state.services["model"]._merger
    work, calls = merger._work, []

    def fails_later(jobs: list[Any]) -> Any:
        calls.append(jobs)
        if len(calls) > 2:
            raise ZeroDivisionError
        return work(jobs)

    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    monkeypatch.setattr(merger, "_work", fails_later)
    request = {**NEW, "n_samples": 500}
    http.post("/v1/generate", json=request, headers={"Accept": ARROW})
    got = values(http.get("/metrics").text)
    assert got[key("rayvaec_requests_total", route="/v1/generate", status=str(CUT_OFF))] == 1
    assert key("rayvaec_draws_total", route="/v1/generate") not in got
