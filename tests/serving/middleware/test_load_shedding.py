"""What stands in Ray Serve's proxy, around an application that answers when it is told to."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from rayvaec.errors import ConfigError
from rayvaec.serving.middleware import load_shedding
from rayvaec.serving.middleware.load_shedding import LoadSheddingMiddleware

PLACES, MAX_BYTES = 2, 1000


class Proxy:
    """Answers in two steps, and does something else after each."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer, self.end = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        await self.end.wait()


async def ask(
    app: LoadSheddingMiddleware, method: str = "POST", length: int = 0
) -> list[dict[str, Any]]:
    """Send one request; return the answer's messages. The body is not to be read."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        raise AssertionError("the body was read")

    headers = [(b"x-request-id", b"mine"), (b"content-length", str(length).encode())]
    scope = {"type": "http", "method": method, "path": "/v1/sample", "headers": headers}
    await app(scope, receive, send)
    return sent


def test_who_finds_no_place_is_told_without_being_passed_on():
    async def go() -> None:
        proxy = Proxy()
        app = LoadSheddingMiddleware(proxy, PLACES, MAX_BYTES)
        waiting = [asyncio.create_task(ask(app)) for _ in range(PLACES)]
        await asyncio.sleep(0)
        start, body = await ask(app)
        headers = dict(start["headers"])
        assert start["status"] == 429
        assert int(headers[b"retry-after"]) >= 1
        assert headers[b"x-request-id"] == b"mine"
        said = json.loads(body["body"])
        assert set(said) == {"error", "detail", "fix", "request_id"}
        assert (said["error"], said["request_id"]) == ("queue_full", "mine")
        assert proxy.asked == PLACES
        health = asyncio.create_task(ask(app, "GET"))
        await asyncio.sleep(0)
        assert proxy.asked == PLACES + 1
        proxy.end.set()
        proxy.answer.set()
        for answer in (*waiting, health):
            assert (await answer)[0]["status"] == 200

    asyncio.run(go())


def test_a_place_is_free_once_the_whole_answer_is_sent():
    async def go() -> None:
        proxy = Proxy()
        app = LoadSheddingMiddleware(proxy, 1, MAX_BYTES)
        proxy.answer.set()
        first = asyncio.create_task(ask(app))
        await asyncio.sleep(0)
        assert not first.done()
        second = asyncio.create_task(ask(app))
        await asyncio.sleep(0)
        assert proxy.asked == 2
        proxy.end.set()
        assert [(await each)[0]["status"] for each in (first, second)] == [200, 200]

    asyncio.run(go())


def test_a_place_is_free_after_a_failure():
    async def fails(*_: Any) -> None:
        raise ConnectionError

    async def go() -> None:
        app = LoadSheddingMiddleware(fails, 1, MAX_BYTES)
        for _ in range(3):
            with pytest.raises(ConnectionError):
                await ask(app)

    asyncio.run(go())


class Body(bytes):
    """Part of an answer that says when it is gone."""

    gone = 0

    def __del__(self) -> None:
        Body.gone += 1


async def lingers(scope: Any, receive: Any, send: Any) -> None:
    """Answer, and leave a cycle that holds the answer's messages, as Ray Serve's proxy does."""
    messages = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": Body(b"a"), "more_body": True},
        {"type": "http.response.body", "body": Body(b"b")},
    ]
    for message in messages:
        await send(message)
    try:
        raise StopAsyncIteration
    except StopAsyncIteration as error:
        kept = error  # whose traceback holds this frame, which holds it
        assert kept.__traceback__


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_leaves_memory_without_waiting_for_the_collector(method, monkeypatch):
    async def passed(scope: Any, receive: Any, send: Any) -> None:
        async def whole(message: Any) -> None:
            parts.append(bytes(message.get("body", b"")))

        await LoadSheddingMiddleware(lingers, 1, MAX_BYTES)(scope, receive, whole)

    monkeypatch.setattr(Body, "gone", 0)
    parts: list[bytes] = []
    gc.collect()
    gc.disable()
    try:
        asyncio.run(passed({"type": "http", "method": method, "headers": []}, None, None))
        assert parts == [b"", b"a", b"b"]
        assert Body.gone == 2
    finally:
        gc.enable()
        gc.collect()


class Reads:
    """Reads bodies as Serve's proxy does, at once, until the client is gone; then answers."""

    def __init__(self) -> None:
        self.read: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            self.read.append(message["body"])
            if not message["more_body"]:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"whole"})
                return
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b"the client left"})


def send_body(
    app: LoadSheddingMiddleware, chunks: list[bytes], length: int | None
) -> list[dict[str, Any]]:
    """Send a request with a body in chunks; return the answer's messages."""
    coming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    coming[-1]["more_body"] = False
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        return coming.pop(0)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/sample", "headers": headers}
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_body_that_says_it_is_too_large_is_not_read():
    reads = Reads()
    start, body = send_body(LoadSheddingMiddleware(reads, 1, 100), [b"1"] * 101, 101)
    assert (start["status"], reads.read) == (413, [])
    assert json.loads(body["body"])["error"] == "body_too_large"


@pytest.mark.parametrize("length", [None, 5])
def test_a_body_that_is_larger_than_it_said_is_given_up(length):
    reads = Reads()
    start, body = send_body(LoadSheddingMiddleware(reads, 1, 100), [b"1"] * 1000, length)
    assert start["status"] == 413
    assert json.loads(body["body"])["error"] == "body_too_large"
    assert sum(map(len, reads.read)) == 100
    assert (
        send_body(LoadSheddingMiddleware(reads, 1, 100), [b"1"] * 100, length)[0]["status"] == 200
    )


def test_bodies_share_the_room_and_who_finds_none_is_told_when_to_come_back():
    async def go() -> None:
        proxy = Proxy()
        app = LoadSheddingMiddleware(proxy, PLACES, 100)
        first = asyncio.create_task(ask(app, length=60))
        await asyncio.sleep(0)
        start, body = await ask(app, length=41)
        assert start["status"] == 429
        assert int(dict(start["headers"])[b"retry-after"]) >= 1
        assert json.loads(body["body"])["error"] == "memory_full"
        assert proxy.asked == 1
        proxy.end.set()
        proxy.answer.set()
        assert (await first)[0]["status"] == 200
        assert (await ask(app, length=100))[0]["status"] == 200

    asyncio.run(go())


def test_the_environment_says_how_many_places_there_are(monkeypatch):
    for name, value in load_shedding.environment(7).items():
        monkeypatch.setenv(name, value)
    (found,) = load_shedding.middlewares()
    assert found.cls is LoadSheddingMiddleware
    assert found.kwargs == {"places": 7, "max_bytes": 2**30}
    monkeypatch.setenv("RAYVAEC_PROXY_PLACES", "128")
    assert load_shedding.middlewares()[0].kwargs == {"places": 128, "max_bytes": 2**31}
    monkeypatch.setenv("RAYVAEC_PROXY_BYTES", "123")
    assert load_shedding.middlewares()[0].kwargs == {"places": 128, "max_bytes": 123}
    for name in ("RAYVAEC_PROXY_PLACES", "RAYVAEC_PROXY_BYTES"):
        for wrong in ("", "0", "-1", "many"):
            monkeypatch.setenv(name, wrong)
            with pytest.raises(ConfigError, match=f"{name}='{wrong}' is not a number above 0"):
                load_shedding.middlewares()
        monkeypatch.setenv(name, "7")
