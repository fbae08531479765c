"""Load shedding in Ray Serve's proxy: refuse requests that no replica has a slot for.

The replicas have gates of their own, but passing a request on and its refusal back costs as much
as drawing a small one does, so that the more are turned away, the fewer are answered. Here it costs
far less: the body is not read, and no replica hears of it.

It also sees to it that answers leave memory once they are sent, and tells replicas how much of an
answer its client has taken (`rayvaec.serving.http.flow_control`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from ray.util.metrics import Counter
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayvaec.errors import ConfigError, RequestError
from rayvaec.serving.http.flow_control import Acknowledger
from rayvaec.serving.middleware.concurrency import ConcurrencyLimiter, Slot, declared_bytes
from rayvaec.serving.middleware.endpoint import identify, problem_response
from rayvaec.serving.middleware.limits import Limits

_PLACES = "RAYVAEC_PROXY_PLACES"
_BYTES = "RAYVAEC_PROXY_BYTES"
_FREED_AT_ONCE = 10
"""Objects that Ray frees together. Answers reach the proxy through Ray's object store, which keeps
those that are sent until there are so many, 100 by default, or for a second."""


def environment(places: int) -> dict[str, str]:
    """Return the environment variables that put `LoadSheddingMiddleware` into Ray Serve's proxies.

    Parameters
    ----------
    places : int
        Requests that all replicas together have places for.

    Returns
    -------
    dict
        Variables, to be set where Ray is started.
    """
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
        _PLACES: str(places),
        "RAY_free_objects_batch_size": str(_FREED_AT_ONCE),
    }


def middlewares() -> list[Middleware]:
    """Return what goes around a proxy's application; Ray Serve calls this in the proxy.

    Raises
    ------
    ConfigError
        If the environment does not say how many places there are, or bytes that are no number.
    """
    places = _number(_PLACES, "", "replicas * max_requests")
    per_place = Limits().max_held_bytes // Limits().max_requests
    most = max(places * per_place, Limits().max_held_bytes)
    n_bytes = _number(_BYTES, str(most), "replicas * max_held_bytes")
    return [Middleware(LoadSheddingMiddleware, places=places, max_bytes=n_bytes)]


def _number(name: str, default: str, advice: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{name}={text!r} is not a number above 0", f"set it to {advice} where Ray is started"
        )
    return int(text)


class LoadSheddingMiddleware:
    """ASGI middleware around a proxy.

    Parameters
    ----------
    app : ASGI application
        The proxy's own.
    places : int
        Requests with a body that are passed on at the same time.
    max_bytes : int
        Most bytes that the bodies of these have together.
    """

    def __init__(self, app: ASGIApp, places: int, max_bytes: int) -> None:
        self._app, self._limiter = app, ConcurrencyLimiter(places, max_bytes)
        # Ray's metrics, since no replica's /metrics knows of what a proxy does.
        self._turned_away = Counter("rayvaec_turned_away", "Requests refused by the proxy")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passed = _Passed(receive, send)
        if scope["method"] != "POST":
            await self._app(Acknowledger.announced(scope), passed.receive, passed.send)
            return
        try:
            with passed.slot:
                slot = passed.slot.enter_context(self._limiter.enter())
                slot.resize(declared_bytes(Headers(scope=scope).get("content-length")))
                passed.counted = slot
                await self._app(Acknowledger.announced(scope), passed.receive, passed.send)
        except RequestError as error:
            await self._refuse(error, scope, receive, send)
            return
        if passed.refused is not None and not passed.started:
            await self._refuse(passed.refused, scope, receive, send)

    async def _refuse(
        self, error: RequestError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._turned_away.inc()
        request_id = identify(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        headers = {"X-Request-ID": request_id}
        if error.status == 429:
            headers["Retry-After"] = str(self._limiter.retry_after)
        await problem_response(error, scope, **headers)(scope, receive, send)


class _Passed:
    """The client's messages to the proxy, and the answer's to the client."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._acknowledger = Acknowledger(receive)
        self._send = _emptying(send)
        self._received = 0
        self.slot = ExitStack()
        self.counted: Slot | None = None
        self.started = False
        self.refused: RequestError | None = None

    async def receive(self) -> Message:
        """Return the client's next message; without room for its body, say that it left."""
        message = await self._acknowledger.receive()
        if self.counted is not None and message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            try:
                if self._received > self.counted.request_bytes:
                    self.counted.resize(self._received)
            except RequestError as error:
                self.refused = error
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer; return once the client has taken it, but for some KiB."""
        if self.refused is not None and not self.started:
            return  # the proxy's words about a client that left
        self.started = True
        n_bytes = len(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.slot.close()  # who has the whole answer may ask the next thing
        await self._send(message)
        self._acknowledger.took(n_bytes)


def _emptying(send: Send) -> Send:
    """Return a `send` that takes the body out of every message once it is sent.

    Each request leaves a cycle behind in Ray Serve's proxy: the exception that ends an answer holds
    the frames that it went through, and those hold the answer's last messages. Python's collector
    reaches most of them after some hundred requests; until then their bodies would stay.
    """

    async def emptying(message: Message) -> None:
        await send(message)
        if "body" in message:
            message["body"] = b""

    return emptying
