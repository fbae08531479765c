"""FastAPI application: routes of the endpoint, for any ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import Metric
from starlette.exceptions import HTTPException
from starlette.routing import Route

import rayvaec
from rayvaec.errors import MethodNotAllowedError, RequestError, UnprocessableError
from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.decoding.bodies import Sent
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.engine.plans import ResponsePlan
from rayvaec.serving.engine.summary import SummaryAnswer, summary_answer
from rayvaec.serving.http import openapi
from rayvaec.serving.http.docs import add_docs
from rayvaec.serving.http.negotiation import accepted, content_type, is_gzipped
from rayvaec.serving.http.schemas import (
    ModelAnswer,
    ModelEntry,
    ModelsAnswer,
    Problem,
    StatusAnswer,
)
from rayvaec.serving.middleware.concurrency import ConcurrencyLimiter, Slot, read_body
from rayvaec.serving.middleware.endpoint import EndpointMiddleware, problem_response
from rayvaec.serving.middleware.hosts import AllowedHosts
from rayvaec.serving.middleware.limits import Limits
from rayvaec.serving.observability.logs import hide_values_of_tasks
from rayvaec.serving.observability.metrics import TEXT, Metrics, page
from rayvaec.serving.page import add_page

Replicas = Callable[[], Awaitable[Iterable[Sequence[Metric]]]]


def create_app(
    services: Mapping[str, Engine],
    limits: Limits,
    token_digest: str | None = None,
    *,
    allowed_hosts: Sequence[str] = (),
    behind_proxy: bool = False,
    replica: str = "only",
    replicas: Replicas | None = None,
) -> FastAPI:
    """Build the application: every model under /v1/models/NAME, a single one under /v1 as well.

    Parameters
    ----------
    services : mapping of Engine
        What answers, by the model's name; one or more.
    limits : Limits
        How many requests there may be at once, and how long an answer may take to begin.
    token_digest : str, optional
        SHA-256 of the token that requests need; see `rayvaec.serving.middleware.auth`.
    allowed_hosts : sequence of str
        Host names that requests may be sent to; see
        `rayvaec.serving.middleware.hosts.AllowedHosts`.
    behind_proxy : bool
        Whether a proxy in front puts X-Request-ID on the answers.
    replica : str
        What this process is called in /metrics.
    replicas : async callable, optional
        Collects the metrics of every replica; by default this is the only one.

    Returns
    -------
    FastAPI
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        hide_values_of_tasks(asyncio.get_running_loop())
        yield
        for service in services.values():
            service.close()

    app = FastAPI(
        title="rayvaec",
        version=rayvaec.__version__,
        summary="Posterior-predictive sampling of a label-conditional VAE for single-cell counts",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    limiter = ConcurrencyLimiter(limits.max_requests, limits.max_held_bytes)
    app.state.limiter, paths = limiter, set[str]()
    app.state.metrics = Metrics(
        replica=replica,
        in_work=lambda: limiter.inside,
        held_bytes=lambda: limiter.held_bytes,
        waiting_for_clients=lambda: limiter.waiting,
        jobs_waiting=lambda: sum(service.jobs_waiting for service in services.values()),
    )
    app.add_middleware(
        EndpointMiddleware,
        limiter=limiter,
        timeout_s=limits.timeout_s,
        metrics=app.state.metrics,
        paths=paths,
        token_digest=token_digest,
        hosts=AllowedHosts(allowed_hosts, token_digest is not None),
        behind_proxy=behind_proxy,
    )
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(RequestValidationError, _not_valid)
    add_docs(app)
    add_page(app)
    _add_status(app)
    _add_metrics(app, app.state.metrics, replicas)
    _add_list(app, services)
    for name, service in services.items():
        _add_all(app, service, f"/v1/models/{name}", tag=name, shown=len(services) > 1)
    if len(services) == 1:
        _add_all(app, service, "/v1", tag="the model", shown=True)
    paths.update(route.path for route in app.routes if isinstance(route, Route))
    app.openapi = lambda: openapi.document(app, token_digest is not None)  # type: ignore[method-assign]
    return app


def _add_status(app: FastAPI) -> None:
    @app.get("/healthz", summary="Whether the server lives", tags=["status"])
    async def healthz() -> StatusAnswer:
        return StatusAnswer(status="alive")

    @app.get("/readyz", summary="Whether the model is loaded and compiled", tags=["status"])
    async def readyz() -> StatusAnswer:
        # A replica gets requests only once its model is loaded, so who reads this is ready.
        return StatusAnswer(status="ready")


def _add_metrics(app: FastAPI, own: Metrics, replicas: Replicas | None) -> None:
    content = {"text/plain": {"schema": {"type": "string"}}}

    @app.get(
        "/metrics",
        summary="Counts of all replicas, for Prometheus",
        response_class=PlainTextResponse,
        responses={200: {"content": content}, **openapi.problems(401)},
        tags=["status"],
    )
    async def metrics() -> Response:
        every = [own.collect()] if replicas is None else await replicas()
        return Response(page(every), media_type=TEXT)


def _add_list(app: FastAPI, services: Mapping[str, Engine]) -> None:
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
        responses=openapi.problems(401),
        tags=["models"],
    )
    async def models() -> ModelsAnswer:
        return ModelsAnswer(models=listed)


def _add_all(app: FastAPI, service: Engine, prefix: str, tag: str, shown: bool) -> None:
    """Add the routes of one model; unless `shown`, /openapi.json does not hold them."""
    about: dict[str, Any] = {"tags": [tag], "include_in_schema": shown}
    _add_model(app, service, prefix, about)
    _add_summary(app, service, prefix, about)
    for route in openapi.routes(service.h5ad_uploads):
        _add_work(app, service, f"{prefix}/{route.name}", route, about)


def _add_model(app: FastAPI, service: Engine, prefix: str, about: dict[str, Any]) -> None:
    described = JSONResponse(service.describe())

    @app.get(
        f"{prefix}/model",
        summary="Genes, labels, configuration, hashes and limits",
        response_model=ModelAnswer,
        responses=openapi.problems(401),
        **about,
    )
    async def model() -> Response:
        return Response(
            described.body,
            media_type=JSON,
            headers={"X-Rayvaec-Model": service.model.hash},
        )


def _add_summary(app: FastAPI, service: Engine, prefix: str, about: dict[str, Any]) -> None:
    refusals = openapi.problems(401, 422)
    refusals[404] = {"model": Problem, "description": "The model has no summary"}

    @app.get(
        f"{prefix}/summary",
        summary="What the training data looks like: library sizes, and counts of some genes",
        responses=refusals,
        **about,
    )
    async def summary(
        response: Response,
        gene: Annotated[
            list[str], Query(description="A gene whose counts are told; may be repeated")
        ] = [],  # noqa: B006 - FastAPI copies it
        profile: Annotated[
            str | None, Query(description="A label of which every gene's mean is told")
        ] = None,
    ) -> SummaryAnswer:
        response.headers["X-Rayvaec-Model"] = service.model.hash
        return summary_answer(service.model, gene, profile)


def _add_work(
    app: FastAPI, service: Engine, path: str, route: openapi.Route, about: dict[str, Any]
) -> None:
    @app.post(
        path,
        name=route.name,
        summary=route.summary,
        responses=openapi.responses(route),
        openapi_extra=openapi.request_body(route, service.model.registry),
        **about,
    )
    async def work(request: Request) -> Response:
        kind = content_type(
            request.headers.get("content-type"), route.understood, service.h5ad_uploads
        )
        gzipped = is_gzipped(request.headers.get("content-encoding"))
        answer = accepted(request.headers.get("accept"))
        slot: Slot = request.scope["state"]["slot"]
        length, most = request.headers.get("content-length"), service.limits.body_bytes(kind)
        data = await read_body(request.stream(), length, most, slot)
        query = request.query_params.multi_items()
        task = await service.read(route.reader, Sent(data, kind, gzipped, query, answer), slot)
        del data
        return await _answer(service, task, answer, request.scope["state"])


async def _answer(
    service: Engine, task: ResponsePlan, kind: str, state: dict[str, Any]
) -> Response:
    headers = {"X-Rayvaec-Model": service.model.hash}
    if "seed" in task.facts:
        headers["X-Rayvaec-Seed"] = str(task.facts["seed"])
        state["draws"] = task.facts["n_cells"] * task.facts["n_samples"]
    slot: Slot = state["slot"]
    if kind == JSON:
        return Response(await service.json(task, slot), media_type=JSON, headers=headers)
    if kind == H5AD:
        return Response(await service.h5ad(task, slot), media_type=H5AD, headers=headers)
    pieces = service.arrow(task, slot)
    # The stream's start and the first rows come before the status: what fails, fails with one.
    first = [await anext(pieces), await anext(pieces)]

    async def stream() -> AsyncIterator[bytes]:
        yield b"".join(first)
        async for piece in pieces:
            yield piece

    return StreamingResponse(stream(), media_type=ARROW, headers=headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        if "GET" in allowed:
            allowed += ", HEAD"
        wrong_method = MethodNotAllowedError(
            f"{request.method} is not allowed on {request.url.path}", f"use {allowed}"
        )
        return problem_response(wrong_method, request.scope, Allow=allowed)
    names = list(request.app.state.services)
    fix = f"name a model: /v1/models/NAME/... of {', '.join(names)}" if names[1:] else "see /docs"
    problem = RequestError(
        f"there is nothing at {request.url.path[:200]}", fix, status=status, error="not_found"
    )
    return problem_response(problem, request.scope)


async def _not_valid(request: Request, error: Exception) -> Response:
    problem = UnprocessableError(f"{error}"[:200], "see /docs")
    return problem_response(problem, request.scope)
