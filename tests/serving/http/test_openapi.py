from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.http.openapi import ROUTES
from rayvaec.serving.middleware.auth import digest

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def document(http: Any) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def test_references_resolve(document):
    known = document["components"]["schemas"]
    text = json.dumps(document)
    references = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(known)
    assert "$defs" not in text


def test_every_route_tells_what_it_takes_and_gives(document):
    for route in ROUTES:
        operation = document["paths"][f"/v1/{route.name}"]["post"]
        assert set(operation["requestBody"]["content"]) == set(route.understood)
        assert set(operation["responses"]["200"]["content"]) == {JSON, ARROW, H5AD}
        assert "X-Request-ID" in operation["responses"]["200"]["headers"]
        expected = {"400", "401", "406", "413", "415", "422", "429", "503", "504"}
        assert expected <= set(operation["responses"])
    names = [p["name"] for p in document["paths"]["/v1/sample"]["post"]["parameters"]]
    assert names[:3] == ["labels_key", "batch_key", "layer"]
    assert {"allow_missing", "n_samples", "seed", "reduce", "quantiles", "out_genes"} <= set(names)


def test_every_example_is_answered(http, document):
    sent = 0
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody", {"content": {JSON: {}}})
        for example in body["content"][JSON].get("examples", {}).values():
            response = http.post(path, json=example["value"])
            assert response.status_code == 200, (path, example, response.text)
            sent += 1
    assert sent == 9


def test_the_description_of_models_needs_the_token(serve_with):
    http = serve_with(digest(TOKEN))
    assert http.get("/openapi.json").status_code == 401
    right = {"Authorization": f"Bearer {TOKEN}"}
    document = http.get("/openapi.json", headers=right).json()
    assert document["security"] == [{"token": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_the_page_needs_no_other_server_and_no_token(serve_with):
    http = serve_with(digest(TOKEN))
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    files = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
    assert len(files) == 3
    assert "//" not in page.text
    for file in files:
        response = http.get(f"/{file}")
        assert response.status_code == 200
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert http.get("/docs/nothing").status_code == 404
