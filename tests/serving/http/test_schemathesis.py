"""schemathesis tries what /openapi.json says the routes take, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.limits import Limits

LIMITS = Limits(max_cost=200_000)
TOKEN = "0123456789abcdef0123"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TAKES_NOTHING = ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/model")
WORK = ("/v1/sample", "/v1/generate", "/v1/latent", "/v1/expression")
CASES = [(path, GenerationMode.POSITIVE) for path in TAKES_NOTHING] + [
    (path, mode) for path in ("/v1/summary", *WORK) for mode in GenerationMode
]
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
"""Not whether data that fit the schema are taken: it cannot say that labels are the model's."""


class Lasting(Engine):
    """Outlives its application, which schemathesis starts and stops for every request."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def api(trained: Any) -> Iterator[Any]:
    service = Lasting(trained, LIMITS)
    app = create_app({"model": service}, LIMITS, digest(TOKEN))
    yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    Engine.close(service)


def test_no_route_is_left_out(api):
    assert {result.ok().path for result in api.get_all_operations()} == {path for path, _ in CASES}


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_the_endpoint_does_as_it_says(api, path, mode):
    operation = api[path]["POST" if path in WORK else "GET"]

    @settings(
        max_examples=2 if path in TAKES_NOTHING else 25,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers=HEADERS)

    holds()
