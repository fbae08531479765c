"""What stands in Ray Serve's proxy: it turns away the requests that no replica has a place for.

The replicas have gates of their own, but passing a request on and its refusal back costs as much
as drawing a small one does, so that the more are turned away, the fewer are answered. Here it costs
far less: the body is not read, and no replica hears of it.

It also sees to it that answers leave memory once they are sent.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from ray.util.metrics import Counter
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayvaec.errors import ConfigError, RequestError
from rayvaec.serve.guard import identify, problem_response
from rayvaec.serve.limits import Gate

_PLACES = "RAYVAEC_PROXY_PLACES"
_FREED_AT_ONCE = 10
"""Objects that Ray frees together. Answers reach the proxy through Ray's object store, which keeps
those that are sent until there are so many, 100 by default, or for a second."""


def environment(places: int) -> dict[str, str]:
    """Return the environment of a Ray whose proxies have a `Front` before themselves.

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
        If the environment does not say how many places there are.
    """
    places = os.environ.get(_PLACES, "")
    if not places.isdecimal() or int(places) < 1:
        raise ConfigError(
            f"{_PLACES}={places!r} is no number of places",
            "set it to replicas * max_requests where Ray is started",
        )
    return [Middleware(Front, places=int(places))]


class Front:
    """ASGI middleware around a proxy.

    Parameters
    ----------
    app : ASGI application
        The proxy's own.
    places : int
        Requests with a body that are passed on at the same time.
    """

    def __init__(self, app: ASGIApp, places: int) -> None:
        self._app, self._gate = app, Gate(places)
        # Ray's metrics, since no replica's /metrics knows of what a proxy does.
        self._turned_away = Counter("rayvaec_turned_away", "Requests refused by the proxy")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _emptying(send)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        place = ExitStack()

        async def passed_on(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                place.close()  # who has the whole answer may ask the next thing
            await send(message)

        try:
            with place:
                place.enter_context(self._gate.enter())
                await self._app(scope, receive, passed_on)
        except RequestError as error:
            self._turned_away.inc()
            request_id = identify(scope)
            scope.setdefault("state", {})["request_id"] = request_id
            headers = {"Retry-After": str(self._gate.retry_after), "X-Request-ID": request_id}
            await problem_response(error, scope, **headers)(scope, receive, send)


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
