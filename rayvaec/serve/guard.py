"""What stands around every request: its id, the token, the gate, the time limit, its errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayvaec.errors import CountsError, ModelError, RayvaecError, RequestError
from rayvaec.serve.auth import TOKEN_VARIABLE, arrived_on_loopback, authorized
from rayvaec.serve.hosts import AllowedHosts
from rayvaec.serve.limits import Gate
from rayvaec.serve.metrics import OTHER, Metrics
from rayvaec.serve.page import PATHS as PAGE_PATHS

logger = logging.getLogger("rayvaec")
access = logging.getLogger("rayvaec.access")

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", *PAGE_PATHS})
"""Paths that need no token, as those below /docs do not: they tell nothing about the models."""

QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that are asked for every few seconds."""

CUT_OFF = 499
"""Status in logs and metrics of what was not answered whole: the client went, or a failure."""

_REQUEST_ID = "X-Request-ID"
_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


def log_with_serve() -> None:
    """Send rayvaec's log lines, those of requests among them, where Ray Serve sends its own."""
    logger.handlers = logging.getLogger("ray.serve").handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
    if isinstance(error, RequestError):
        status, name = error.status, error.error
    elif isinstance(error, CountsError | ModelError):
        status, name = 422, "bad_counts"
    else:
        status, name = 500, "internal"
    scope["state"]["refused"] = name
    request_id = scope["state"]["request_id"]
    body = {"error": name, "detail": error.detail, "fix": error.fix, "request_id": request_id}
    return JSONResponse(body, status_code=status, headers=headers)


class Guard:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    gate : Gate
        How many requests there may be at once.
    timeout_s : float
        How long an answer may take to begin.
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
        gate: Gate,
        timeout_s: float,
        metrics: Metrics,
        paths: Collection[str],
        token_digest: str | None,
        hosts: AllowedHosts,
        behind_proxy: bool,
    ) -> None:
        self._app, self._token_digest, self._hosts = app, token_digest, hosts
        self._gate, self._timeout_s, self._behind_proxy = gate, timeout_s, behind_proxy
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":  # there is no websocket here: the application closes them
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        answer = _Answer(send, identify(scope), not self._behind_proxy, without_body=is_head)
        scope.setdefault("state", {})["request_id"] = answer.request_id
        started = time.monotonic()
        try:
            # Whatever answers GET answers HEAD, with the same headers.
            asked = {**scope, "method": "GET"} if is_head else scope
            await self._answer(asked, receive, answer)
        finally:
            self._note(scope, answer, time.monotonic() - started)

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        """Count a request and write its line to the log; neither holds what a client made up."""
        route = scope["path"] if scope["path"] in self._paths else OTHER
        state, status = scope["state"], answer.status if answer.finished else CUT_OFF
        self._metrics.count(
            *(route, status, seconds, state.get("draws", 0) if answer.finished else 0),
            state.get("refused", ""),
        )
        level = logging.DEBUG if route in QUIET_PATHS else logging.INFO
        line = (answer.request_id, scope["method"], route, status, 1000 * seconds)
        access.log(level, "%s %s %s %d %.1f ms", *line)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            self._authorize(scope)
            self._hosts.check(scope["path"], Headers(scope=scope))
            with self._place(scope):
                await self._within_time(scope, receive, answer)
        except RayvaecError as error:
            await self._refuse(error, scope, receive, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            # The message of an exception may hold counts; where it was raised does not.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s failed: %s\n%s", answer.request_id, type(error).__name__, frames)
            failed = RayvaecError("the server failed", "report it with the request_id")
            await self._refuse(failed, scope, receive, answer)

    def _authorize(self, scope: Scope) -> None:
        if scope["path"] in OPEN_PATHS or scope["path"].startswith("/docs/"):
            return
        if self._token_digest is None:
            if not arrived_on_loopback(scope.get("server")):
                raise RequestError(
                    "this endpoint has no token and answers connections to a loopback address only",
                    f"set {TOKEN_VARIABLE} on the server",
                    *(401, "unauthorized"),
                )
            return
        header = Headers(scope=scope).get("authorization")
        if not authorized(header, self._token_digest):
            problem = "no token" if header is None else "a wrong token"
            raise RequestError(
                f"the request has {problem}",
                "send the header Authorization: Bearer TOKEN",
                *(401, "unauthorized"),
            )

    def _place(self, scope: Scope) -> AbstractContextManager[None]:
        """Return a place at the gate for what takes work."""
        return self._gate.enter() if scope["method"] == "POST" else nullcontext()

    async def _within_time(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            async with asyncio.timeout(self._timeout_s) as clock:
                answer.clock = clock
                await self._app(scope, receive, answer)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise RequestError(
                f"no answer after {self._timeout_s:g} s",
                "ask for less a request, or again when the server is less busy",
                *(504, "timeout"),
            ) from error
        finally:
            answer.clock = None

    async def _refuse(
        self, error: RayvaecError, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        if answer.started:
            raise error  # too late for a status: break the stream, so that nobody takes it as whole
        headers = {}
        if isinstance(error, RequestError) and error.status == 429:
            headers["Retry-After"] = str(self._gate.retry_after)
        if isinstance(error, RequestError) and error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await problem_response(error, scope, **headers)(scope, receive, answer)


class _Answer:
    """ASGI's send, that notes when the answer begins and adds its id."""

    def __init__(self, send: Send, request_id: str, add_id: bool, without_body: bool) -> None:
        self._send, self.request_id, self._add_id = send, request_id, add_id
        self._without_body = without_body
        self.started, self.finished, self.status = False, False, CUT_OFF
        self.clock: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self._add_id:
                MutableHeaders(scope=message)[_REQUEST_ID] = self.request_id
            if self.clock is not None and not self.clock.expired():
                # An answer that has begun may take as long as it takes: its work is bounded.
                self.clock.reschedule(None)
        if self._without_body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True


def identify(scope: Scope) -> str:
    """Return the client's or the proxy's request id if it is fit to be repeated, else a new one."""
    given: Any = Headers(scope=scope).get(_REQUEST_ID)
    return given if given and _ID_PATTERN.fullmatch(given) else str(uuid.uuid4())
