"""`/openapi.json`, with examples that the served model answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from rayvaec.data.registry import Registry
from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.decoding import parsing
from rayvaec.serving.http.schemas import (
    CellsParameters,
    DrawsAnswer,
    ExpressionAnswer,
    ExpressionParameters,
    ExpressionRequest,
    GenerateRequest,
    LatentAnswer,
    LatentRequest,
    Problem,
    SampleParameters,
    SampleRequest,
)


@dataclass(frozen=True)
class Route:
    """One kind of work.

    Parameters
    ----------
    name : str
        Last part of the route's address.
    reader : callable
        Reads its requests.
    request, answer : type
        Their JSON.
    parameters : type, optional
        What stands in the address beside an h5ad body, for routes that take one.
    summary : str
        For a reader of the documentation.
    """

    name: str
    reader: parsing.Reader
    request: type[BaseModel]
    answer: type[BaseModel]
    parameters: type[BaseModel] | None
    summary: str

    @property
    def understood(self) -> tuple[str, ...]:
        """Media types of bodies."""
        return (JSON, ARROW) if self.parameters is None else (JSON, ARROW, H5AD)


ROUTES = (
    Route(
        "sample",
        parsing.sample_task,
        SampleRequest,
        DrawsAnswer,
        SampleParameters,
        "Posterior-predictive draws p(x^ | x, y)",
    ),
    Route(
        "generate",
        parsing.generate_task,
        GenerateRequest,
        DrawsAnswer,
        None,
        "New cells: z from the prior, counts given z, label and library size",
    ),
    Route(
        "latent",
        parsing.latent_task,
        LatentRequest,
        LatentAnswer,
        CellsParameters,
        "Mean and variance of q(z | x, y)",
    ),
    Route(
        "expression",
        parsing.expression_task,
        ExpressionRequest,
        ExpressionAnswer,
        ExpressionParameters,
        "Denoised expression: each gene's share of the expected counts",
    ),
)


def routes(h5ad_uploads: bool) -> Iterable[Route]:
    """Yield every kind of work; without uploads, none takes an h5ad body or its parameters."""
    for route in ROUTES:
        yield route if h5ad_uploads else replace(route, parameters=None)


_STATUSES = {
    400: "The body cannot be decoded",
    401: "No token, or a wrong one",
    406: "No media type of Accept can be given",
    413: "Body or work too large; the largest that is allowed is named",
    415: "Content-Type or Content-Encoding is not understood",
    422: "Counts, labels, genes or parameters do not fit; value, place and fix are named",
    429: "Too many requests; Retry-After says when to try again",
    503: "Not available yet, or no more",
    504: "No answer within the time limit",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IN_H5AD = {
    "labels_key": "Column of obs with the labels; by default the model's own",
    "batch_key": "Column of obs with the batches, for models with batches; by default its own",
    "layer": "Layer with the counts; X by default",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe refusals; all that work can meet by default.

    Parameters
    ----------
    *statuses : int
        Which.

    Returns
    -------
    dict
        For FastAPI's ``responses``.
    """
    return {
        status: {"model": Problem, "description": _STATUSES[status]}
        for status in statuses or _STATUSES
    }


def responses(route: Route) -> dict[int | str, dict[str, Any]]:
    """Describe every answer of a route, for FastAPI's ``responses``."""
    told = {
        "X-Request-ID": "What to look for in the logs",
        "X-Rayvaec-Model": "The model's hash",
    }
    if route.answer is DrawsAnswer:
        told["X-Rayvaec-Seed"] = "The seed of the draws"
    headers = {
        name: {"description": words, "schema": {"type": "string"}} for name, words in told.items()
    }
    content = {ARROW: _BINARY, H5AD: _BINARY}
    return {200: {"model": route.answer, "content": content, "headers": headers}, **problems()}


def request_body(route: Route, registry: Registry) -> dict[str, Any]:
    """Describe what a route takes, for FastAPI's ``openapi_extra``.

    Parameters
    ----------
    route : Route
        Which.
    registry : Registry
        Of the model that answers, so that the examples are requests to it.

    Returns
    -------
    dict
    """
    reference = {"$ref": f"#/components/schemas/{route.request.__name__}"}
    content: dict[str, Any] = {
        JSON: {"schema": reference, "examples": _examples(route, registry)},
        ARROW: _BINARY,
    }
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if route.parameters is not None:
        content[H5AD] = _BINARY
        extra["parameters"] = list(_query(route.parameters))
    return extra


def _query(parameters: type[BaseModel]) -> Iterable[dict[str, Any]]:
    """Yield the parameters that an h5ad body has in the address."""
    schema = parameters.model_json_schema()
    for name, words in _IN_H5AD.items():
        yield _parameter(name, words, {"type": "string"})
    for name, value in schema["properties"].items():
        if name != "genes":  # an h5ad file names its own
            kinds = [kind for kind in value.get("anyOf", [value]) if kind.get("type") != "null"]
            kind = {key: part for key, part in kinds[0].items() if key not in ("title", "default")}
            yield _parameter(name, value.get("description", name), kind)


def _parameter(name: str, words: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    described = f"h5ad bodies only. {words}"
    return {"name": name, "in": "query", "description": described, "schema": dict(schema)}


def _examples(route: Route, registry: Registry) -> dict[str, Any]:
    """Return requests that the model answers."""
    labels = [registry.labels[0], registry.labels[-1]]
    if route.name == "generate":
        new = {"label": labels[0], "n_cells": 2, "library": 3000, "seed": 0}
        each = {"labels": labels, "library": [1000, 5000], "n_samples": 2, "seed": 0}
        if registry.batch_key is not None:
            new["batches"] = each["batches"] = [registry.batches[0]] * 2
        return _named({"of one label": new, "one label each": each})
    genes, last = registry.genes, registry.n_genes - 1
    cells: dict[str, Any] = {
        "cells": {"indptr": [0, 1, 2], "indices": [0, last], "counts": [5, 2]},
        "labels": labels,
        "cell_ids": ["AAACATAC-1", "AAACATTG-1"],
    }
    if registry.batch_key is not None:
        cells["batches"] = [registry.batches[0]] * 2
    named = {
        **cells,
        "cells": {"dense": [[5], [0]]},
        "genes": [genes[0]],
        "allow_missing": True,
    }
    if route.name != "sample":
        return _named({"sparse": cells, "genes by name": named})
    seed = {"n_samples": 10, "seed": 0}
    reduce = {"reduce": ["mean", "quantiles"], "quantiles": [0.05, 0.5, 0.95]}
    return _named(
        {
            "draws": {**cells, **seed},
            "moments": {**cells, **seed, **reduce, "out_genes": [genes[last]]},
            "genes by name": {**named, **seed},
        }
    )


def _named(examples: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"summary": name, "value": value} for name, value in examples.items()}


def document(app: FastAPI, token: bool) -> dict[str, Any]:
    """Return FastAPI's document with the schemas of the bodies, which no route declares.

    Parameters
    ----------
    app : FastAPI
        The application.
    token : bool
        Whether requests need one.

    Returns
    -------
    dict
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    schemas = found["components"]["schemas"]
    for route in ROUTES:
        schema = route.request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[route.request.__name__] = schema
    if token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
        for path in ("/healthz", "/readyz"):
            found["paths"][path]["get"]["security"] = []
    app.openapi_schema = found
    return found
