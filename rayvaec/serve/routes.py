"""The HTTP application: routes, media types, OpenAPI. Runs under any ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

import rayvaec
from rayvaec.errors import RequestError
from rayvaec.serve import requests
from rayvaec.serve.guard import Guard, problem_response, request_id_of
from rayvaec.serve.limits import Limits, read_body
from rayvaec.serve.schemas import (
    DrawsAnswer,
    ExpressionAnswer,
    ExpressionRequest,
    GenerateRequest,
    LatentAnswer,
    LatentRequest,
    ModelAnswer,
    ModelEntry,
    ModelsAnswer,
    Problem,
    SampleRequest,
    StatusAnswer,
)
from rayvaec.serve.service import Service
from rayvaec.serve.tasks import Task
from rayvaec.serve.wire import ARROW, JSON

_ROUTES = (
    (
        "sample",
        requests.sample_task,
        SampleRequest,
        DrawsAnswer,
        "Posterior-predictive draws p(x^ | x, y)",
    ),
    (
        "generate",
        requests.generate_task,
        GenerateRequest,
        DrawsAnswer,
        "New cells: z from the prior, counts given z, label and library size",
    ),
    (
        "latent",
        requests.latent_task,
        LatentRequest,
        LatentAnswer,
        "Mean and variance of q(z | x, y)",
    ),
    (
        "expression",
        requests.expression_task,
        ExpressionRequest,
        ExpressionAnswer,
        "Denoised expression: each gene's share of the expected counts",
    ),
)

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
_ARROW_BODY = {"schema": {"type": "string", "format": "binary"}}


def create_app(
    services: Mapping[str, Service],
    limits: Limits,
    token_digest: str | None = None,
    *,
    behind_proxy: bool = False,
) -> FastAPI:
    """Build the application: every model under /v1/models/NAME, a single one under /v1 as well.

    Parameters
    ----------
    services : mapping of Service
        What answers, by the model's name; one or more.
    limits : Limits
        How many requests there may be at once, and how long an answer may take to begin.
    token_digest : str, optional
        SHA-256 of the token that requests need; see `rayvaec.serve.auth`.
    behind_proxy : bool
        Whether a proxy in front puts X-Request-ID on the answers.

    Returns
    -------
    FastAPI
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for service in services.values():
            service.close()

    app = FastAPI(
        title="rayvaec",
        version=rayvaec.__version__,
        summary="Posterior-predictive sampling of a label-conditional VAE for single-cell counts",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.services = services
    app.add_middleware(Guard, limits=limits, token_digest=token_digest, behind_proxy=behind_proxy)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(RequestValidationError, _not_valid)
    _add_status(app)
    _add_list(app, services)
    for name, service in services.items():
        _add_all(app, service, f"/v1/models/{name}", tag=name, shown=len(services) > 1)
    if len(services) == 1:
        _add_all(app, service, "/v1", tag="the model", shown=True)
    app.openapi = lambda: _openapi(app, token_digest is not None)  # type: ignore[method-assign]
    return app


def _add_status(app: FastAPI) -> None:
    @app.get("/healthz", summary="Whether the server lives", tags=["status"])
    async def healthz() -> StatusAnswer:
        return StatusAnswer(status="alive")

    @app.get("/readyz", summary="Whether the model is loaded and compiled", tags=["status"])
    async def readyz() -> StatusAnswer:
        # A replica gets requests only once its model is loaded, so who reads this is ready.
        return StatusAnswer(status="ready")


def _add_list(app: FastAPI, services: Mapping[str, Service]) -> None:
    listed = [
        ModelEntry(
            name=name,
            path=f"/v1/models/{name}",
            model_hash=service.model.hash,
            n_genes=service.model.registry.n_genes,
            n_labels=service.model.registry.n_labels,
        )
        for name, service in services.items()
    ]

    @app.get(
        "/v1/models",
        summary="The models that are served, and where",
        responses=_problems(401),
        tags=["models"],
    )
    async def models() -> ModelsAnswer:
        return ModelsAnswer(models=listed)


def _add_all(app: FastAPI, service: Service, prefix: str, tag: str, shown: bool) -> None:
    """Add the routes of one model; unless `shown`, /openapi.json does not hold them."""
    router = APIRouter(prefix=prefix, tags=[tag], include_in_schema=shown)
    _add_model(router, service)
    for name, reader, request_schema, answer_schema, summary in _ROUTES:
        _add_work(router, service, name, reader, request_schema, answer_schema, summary)
    app.include_router(router)


def _add_model(router: APIRouter, service: Service) -> None:
    described = JSONResponse(service.describe())

    @router.get(
        "/model",
        summary="Genes, labels, configuration, hashes and limits",
        response_model=ModelAnswer,
        responses=_problems(401),
    )
    async def model() -> Response:
        return Response(
            described.body,
            media_type=JSON,
            headers={"X-Rayvaec-Model": service.model.hash},
        )


def _add_work(
    router: APIRouter,
    service: Service,
    name: str,
    reader: requests.Reader,
    request_schema: type,
    answer_schema: type,
    summary: str,
) -> None:
    body = {JSON: {"schema": {"$ref": f"#/components/schemas/{request_schema.__name__}"}}}

    @router.post(
        f"/{name}",
        name=name,
        summary=summary,
        responses={
            200: {"model": answer_schema, "content": {ARROW: _ARROW_BODY}},
            **_problems(*_STATUSES),
        },
        openapi_extra={"requestBody": {"required": True, "content": {**body, ARROW: _ARROW_BODY}}},
    )
    async def work(request: Request) -> Response:
        arrow = _content_type(request) == ARROW
        json_answer = _accepted(request.headers.get("accept", "")) == JSON
        length = request.headers.get("content-length")
        data = await read_body(request.stream(), length, service.limits.max_body_bytes)
        task = await service.read(reader, requests.Body(data, arrow, json_answer))
        del data
        return await _answer(service, task, json_answer)


async def _answer(service: Service, task: Task, json_answer: bool) -> Response:
    headers = {"X-Rayvaec-Model": service.model.hash}
    if "seed" in task.facts:
        headers["X-Rayvaec-Seed"] = str(task.facts["seed"])
    if json_answer:
        return Response(await service.json(task), media_type=JSON, headers=headers)
    pieces = service.arrow(task)
    # The stream's start and the first rows come before the status: what fails, fails with one.
    first = [await anext(pieces), await anext(pieces)]

    async def stream() -> AsyncIterator[bytes]:
        yield b"".join(first)
        async for piece in pieces:
            yield piece

    return StreamingResponse(stream(), media_type=ARROW, headers=headers)


def _content_type(request: Request) -> str:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            f"Content-Encoding {encoding[:60]!r} is not understood",
            "send the body as it is; Arrow streams may compress their buffers",
            *(415, "unsupported_media_type"),
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, ARROW):
        raise RequestError(
            f"Content-Type {kind[:60]!r} is not understood",
            f"send {JSON} or {ARROW}",
            *(415, "unsupported_media_type"),
        )
    return kind


def _accepted(header: str) -> str:
    """Return the media type of the answer: the one that Accept weighs most, JSON in doubt."""
    best, best_weight = "", 0.0
    for entry in header.split(",") if header.strip() else ["*/*"]:
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        weight = _weight(parameters)
        if kind in ("*/*", "application/*"):
            kind = JSON
        if kind in (JSON, ARROW) and weight > best_weight:
            best, best_weight = kind, weight
    if not best:
        raise RequestError(
            f"Accept {header[:60]!r} names nothing that can be given",
            f"accept {JSON} or {ARROW}",
            *(406, "not_acceptable"),
        )
    return best


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        problem = RequestError(
            f"{request.method} is not allowed on {request.url.path}",
            f"use {allowed}",
            *(405, "method_not_allowed"),
        )
        return problem_response(problem, request_id_of(request.scope), Allow=allowed)
    names = list(request.app.state.services)
    fix = f"name a model: /v1/models/NAME/... of {', '.join(names)}" if names[1:] else "see /docs"
    problem = RequestError(
        f"there is nothing at {request.url.path[:200]}", fix, status, "not_found"
    )
    return problem_response(problem, request_id_of(request.scope))


async def _not_valid(request: Request, error: Exception) -> Response:
    problem = RequestError(f"{error}"[:200], "see /docs", 422, "invalid_request")
    return problem_response(problem, request_id_of(request.scope))


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": _STATUSES[status]} for status in statuses}


def _openapi(app: FastAPI, token: bool) -> dict[str, Any]:
    """Return FastAPI's document with the schemas of the bodies, which no route declares."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for _, _, model, _, _ in _ROUTES:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    if token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    app.openapi_schema = document
    return document
