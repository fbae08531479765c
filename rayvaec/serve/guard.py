"""What stands around every request: its id, the token, the gate, the time limit, its errors."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayvaec.errors import CountsError, ModelError, RayvaecError, RequestError
from rayvaec.serve.auth import TOKEN_VARIABLE, arrived_on_loopback, authorized
from rayvaec.serve.limits import Gate, Limits
from rayvaec.serve.page import PATHS as PAGE_PATHS

logger = logging.getLogger("rayvaec")

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", *PAGE_PATHS})
"""Paths that need no token, as those below /docs do not: they tell nothing about the models."""

_REQUEST_ID = "X-Request-ID"
_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


def problem_response(error: RayvaecError, request_id: str, **headers: str) -> Response:
    """Return the answer to a request that is refused.

    Parameters
    ----------
    error : RayvaecError
        Why.
    request_id : str
        The request's identifier.
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
    body = {"error": name, "detail": error.detail, "fix": error.fix, "request_id": request_id}
    return JSONResponse(body, status_code=status, headers=headers)


def request_id_of(scope: Scope) -> str:
    """Return the request's identifier, which `Guard` has put into its state."""
    return scope["state"]["request_id"]


class Guard:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    limits : Limits
        How many requests there may be at once, and how long an answer may take to begin.
    token_digest : str, optional
        SHA-256 of the token; without one, only connections to a loopback address are answered.
    behind_proxy : bool
        Whether a proxy in front, such as Ray Serve's, puts X-Request-ID on the answers.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, token_digest: str | None, behind_proxy: bool
    ) -> None:
        self._app, self._token_digest = app, token_digest
        self._timeout_s, self._behind_proxy = limits.timeout_s, behind_proxy
        self._gate = Gate(limits.max_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, identify(scope), add_id=not self._behind_proxy)
        scope.setdefault("state", {})["request_id"] = answer.request_id
        try:
            self._authorize(scope)
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
        await problem_response(error, answer.request_id, **headers)(scope, receive, answer)


class _Answer:
    """ASGI's send, that notes when the answer begins and adds its id."""

    def __init__(self, send: Send, request_id: str, add_id: bool) -> None:
        self._send, self.request_id, self._add_id = send, request_id, add_id
        self.started = False
        self.clock: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            if self._add_id:
                MutableHeaders(scope=message)[_REQUEST_ID] = self.request_id
            if self.clock is not None and not self.clock.expired():
                # An answer that has begun may take as long as it takes: its work is bounded.
                self.clock.reschedule(None)
        await self._send(message)


def identify(scope: Scope) -> str:
    """Return the client's or the proxy's request id if it is fit to be repeated, else a new one."""
    given: Any = Headers(scope=scope).get(_REQUEST_ID)
    return given if given and _ID_PATTERN.fullmatch(given) else str(uuid.uuid4())
