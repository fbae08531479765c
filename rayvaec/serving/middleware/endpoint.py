"""Endpoint middleware: request ID, authentication, concurrency limit, time limit, errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayvaec.errors import (
    BrokenAnswerError,
    CountsError,
    ModelError,
    RayvaecError,
    RequestError,
    TimedOutError,
    UnauthorizedError,
)
from rayvaec.serving.http.flow_control import EXTENSION, PIECE_BYTES, SendWindow
from rayvaec.serving.middleware.auth import TOKEN_VARIABLE, arrived_on_loopback, authorized
from rayvaec.serving.middleware.concurrency import ConcurrencyLimiter
from rayvaec.serving.middleware.hosts import AllowedHosts
from rayvaec.serving.observability.logs import access, log_failure, logger
from rayvaec.serving.observability.metrics import OTHER, Metrics
from rayvaec.serving.page import PATHS as PAGE_PATHS

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", *PAGE_PATHS})
"""Paths that need no token, as those below /docs do not: they tell nothing about the models."""

QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that are asked for every few seconds."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that logs name; a client may make up others."""

CUT_OFF = 499
"""Status in logs and metrics of what was not answered whole: the client went, or a failure."""

_REQUEST_ID = "X-Request-ID"
_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


def problem_response(error: RayvaecError, scope: Scope, **headers: str) -> Response:
    """Return the answer to a request that is refused.

    Parameters
    ----------
    error : RayvaecError
        Why.
    scope : Scope
        Of the request; why it was refused is noted in its state.
    **headers : str
        Headers to add.

    Returns
    -------
    Response
        With the body ``{error, detail, fix, request_id}``.
    """
    status, name = status_and_name(error)
    scope["state"]["refused"] = name
    request_id = scope["state"]["request_id"]
    body = {"error": name, "detail": error.detail, "fix": error.fix, "request_id": request_id}
    return JSONResponse(body, status_code=status, headers=headers)


def status_and_name(error: RayvaecError) -> tuple[int, str]:
    """Return the HTTP status of an error, and its name in answers, metrics and logs."""
    if isinstance(error, RequestError):
        return error.status, error.error
    if isinstance(error, CountsError | ModelError):
        return 422, "bad_counts"
    return 500, "internal"


class EndpointMiddleware:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    limiter : ConcurrencyLimiter
        How many requests there may be at once, and what they may hold.
    timeout_s : float
        How long an answer may take to begin, and a client to take some of it.
    metrics : Metrics
        What counts the requests.
    paths : collection of str
        Addresses of the routes; metrics and logs tell no others apart.
    token_digest : str, optional
        SHA-256 of the token; without one, only connections to a loopback address are answered.
    hosts : AllowedHosts
        Which Host headers are answered.
    behind_proxy : bool
        Whether a proxy in front, such as Ray Serve's, puts X-Request-ID on the answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        limiter: ConcurrencyLimiter,
        timeout_s: float,
        metrics: Metrics,
        paths: Collection[str],
        token_digest: str | None,
        hosts: AllowedHosts,
        behind_proxy: bool,
    ) -> None:
        self._app, self._token_digest, self._hosts = app, token_digest, hosts
        self._limiter, self._timeout_s, self._behind_proxy = limiter, timeout_s, behind_proxy
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":  # there is no websocket here: the application closes them
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        window = SendWindow(receive) if EXTENSION in scope.get("extensions", ()) else None
        answer = _Answer(send, identify(scope), window, self._limiter, self._timeout_s)
        answer.add_id, answer.without_body = not self._behind_proxy, is_head
        scope.setdefault("state", {})["request_id"] = answer.request_id
        started = time.monotonic()
        try:
            # Whatever answers GET answers HEAD, with the same headers.
            asked = {**scope, "method": "GET"} if is_head else scope
            await self._answer(asked, window.receive if window else receive, answer)
        finally:
            if window is not None:
                window.close()
            self._note(scope, answer, time.monotonic() - started)

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        """Count a request and write its line to the log; neither holds what a client made up."""
        route = scope["path"] if scope["path"] in self._paths else OTHER
        state, status = scope["state"], answer.status if answer.finished else CUT_OFF
        self._metrics.count(
            route=route,
            status=status,
            seconds=seconds,
            draws=state.get("draws", 0) if answer.finished else 0,
            reason=state.get("refused", ""),
        )
        level = logging.DEBUG if route in QUIET_PATHS else logging.INFO
        method = scope["method"] if scope["method"] in METHODS else OTHER
        line = (answer.request_id, method, route, status, 1000 * seconds)
        access.log(level, "%s %s %s %d %.1f ms", *line)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        error: RayvaecError
        try:
            self._authorize(scope)
            self._hosts.check(scope["path"], Headers(scope=scope))
            with self._slot(scope):
                await self._within_time(scope, receive, answer)
            return
        except RayvaecError as refused:
            error = refused
        except ClientDisconnect:
            return
        except Exception as failed:
            log_failure(f"{answer.request_id} failed", failed)
            error = RayvaecError("the server failed", "report it with the request_id")
        if not answer.started:
            await self._refuse(error, scope, receive, answer)
            return
        # Too late for a status: break the stream, so that nobody takes it as whole. The server
        # logs what is raised: it says nothing, and no other exception hangs on it.
        _, name = status_and_name(error)
        logger.warning("%s broke off after its answer had begun: %s", answer.request_id, name)
        raise BrokenAnswerError("an answer broke off after it had begun", "see the line before")

    def _authorize(self, scope: Scope) -> None:
        if scope["path"] in OPEN_PATHS or scope["path"].startswith("/docs/"):
            return
        if self._token_digest is None:
            if not arrived_on_loopback(scope.get("server")):
                raise UnauthorizedError(
                    "this endpoint has no token and answers connections to a loopback address only",
                    f"set {TOKEN_VARIABLE} on the server",
                )
            return
        header = Headers(scope=scope).get("authorization")
        if not authorized(header, self._token_digest):
            problem = "no token" if header is None else "a wrong token"
            raise UnauthorizedError(
                f"the request has {problem}",
                "send the header Authorization: Bearer TOKEN",
            )

    @contextmanager
    def _slot(self, scope: Scope) -> Iterator[None]:
        """Hold a slot for what takes work; routes find it in the request's state."""
        if scope["method"] != "POST":
            yield
            return
        with self._limiter.enter() as slot:
            scope["state"]["slot"] = slot
            yield

    async def _within_time(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            async with asyncio.timeout(self._timeout_s) as clock:
                answer.clock = clock
                await self._app(scope, receive, answer)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise TimedOutError(
                f"no answer after {self._timeout_s:g} s",
                "ask for less a request, or again when the server is less busy",
            ) from error
        finally:
            answer.clock = None

    async def _refuse(
        self, error: RayvaecError, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        headers = {}
        if isinstance(error, RequestError) and error.status == 429:
            headers["Retry-After"] = str(self._limiter.retry_after)
        if isinstance(error, RequestError) and error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await problem_response(error, scope, **headers)(scope, receive, answer)


class _Answer:
    """ASGI's send, that notes when the answer begins, adds its id, and waits for the client."""

    add_id = without_body = False

    def __init__(
        self,
        send: Send,
        request_id: str,
        window: SendWindow | None,
        limiter: ConcurrencyLimiter,
        timeout_s: float,
    ) -> None:
        self._send, self.request_id = send, request_id
        self._window, self._limiter, self._timeout_s = window, limiter, timeout_s
        self.started, self.finished, self.status = False, False, CUT_OFF
        self.clock: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self.add_id:
                MutableHeaders(scope=message)[_REQUEST_ID] = self.request_id
            if self.clock is not None and not self.clock.expired():
                # An answer that has begun may take as long as it takes: its work is bounded.
                self.clock.reschedule(None)
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        if self.without_body:
            message = {**message, "body": b""}
        for part in self._parts(message):
            await self._send_part(part)
        self.finished = not message.get("more_body", False)

    def _parts(self, message: Message) -> Iterator[Message]:
        """Cut a large piece, such as an answer that is held whole, for the window."""
        body = message.get("body", b"")
        if self._window is None or len(body) <= PIECE_BYTES:
            yield message
            return
        for start in range(0, len(body), PIECE_BYTES):
            more = message.get("more_body", False) or start + PIECE_BYTES < len(body)
            part = bytes(memoryview(body)[start : start + PIECE_BYTES])
            yield {**message, "body": part, "more_body": more}

    async def _send_part(self, message: Message) -> None:
        """Send a piece when the client has taken enough of those before."""
        if self._window is None:
            await self._in_time(self._send(message))
            return
        if self._window.is_full:
            with self._limiter.waiting_for_client():
                await self._in_time(self._window.wait())
        await self._send(message)
        self._window.sent(len(message.get("body", b"")))

    async def _in_time(self, waits_for_client: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s) as clock:
                await waits_for_client
        except TimeoutError:
            if not clock.expired():
                raise
            raise TimedOutError(
                f"the client took too little of the answer in {self._timeout_s:g} s",
                "read it faster, or ask for less a request",
            ) from None


def identify(scope: Scope) -> str:
    """Return the client's or the proxy's request id if it is fit to be repeated, else a new one."""
    given: Any = Headers(scope=scope).get(_REQUEST_ID)
    return given if given and _ID_PATTERN.fullmatch(given) else str(uuid.uuid4())
