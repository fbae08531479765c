"""Answers wait for clients that read slowly: the flow control, and the application with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from rayvaec.protocol import ARROW, H5AD, JSON, AnswerStream
from rayvaec.serving.http import flow_control
from rayvaec.serving.http.flow_control import EXTENSION, Acknowledger, SendWindow
from rayvaec.serving.middleware.concurrency import ConcurrencyLimiter
from rayvaec.serving.middleware.load_shedding import LoadSheddingMiddleware

BODY = {"type": "http.request", "body": b"x", "more_body": False}
GONE = {"type": "http.disconnect"}


class Wire:
    """Messages from one side that the other waits for."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for message in messages:
            self.queue.put_nowait(message)

    async def __call__(self) -> Any:
        return await self.queue.get()

    def put(self, message: dict[str, Any]) -> None:
        self.queue.put_nowait(message)


def taken(n_bytes: int) -> dict[str, Any]:
    return {"type": "rayvaec.taken", "bytes": n_bytes}


def small(monkeypatch: pytest.MonkeyPatch, window: int = 8, acknowledged: int = 2) -> None:
    monkeypatch.setattr(flow_control, "WINDOW_BYTES", window)
    monkeypatch.setattr(flow_control, "ACKNOWLEDGED_BYTES", acknowledged)


def test_the_proxy_tells_what_the_client_has_taken(monkeypatch):
    small(monkeypatch)

    async def go() -> None:
        wire = Wire({**BODY, "more_body": True}, BODY)
        acknowledger = Acknowledger(wire)
        acknowledger.took(5)
        assert await acknowledger.receive() == {**BODY, "more_body": True}
        assert await acknowledger.receive() == BODY
        assert await acknowledger.receive() == taken(5)
        waiting = asyncio.create_task(acknowledger.receive())
        acknowledger.took(1)
        await asyncio.sleep(0)
        assert not waiting.done()
        acknowledger.took(1)
        assert await waiting == taken(7)
        wire.put(GONE)
        assert await acknowledger.receive() == GONE

    asyncio.run(go())


def test_a_cancelled_proxy_leaves_nothing_behind(monkeypatch):
    small(monkeypatch)

    async def go() -> None:
        acknowledger = Acknowledger(Wire(BODY))
        await acknowledger.receive()
        waiting = asyncio.create_task(acknowledger.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_a_replica_waits_when_its_window_is_full(monkeypatch):
    small(monkeypatch)

    async def go() -> None:
        wire = Wire()
        window = SendWindow(wire)
        window.sent(7)
        await window.wait()
        window.sent(1)
        assert window.is_full
        waiting = asyncio.create_task(window.wait())
        wire.put({"type": "http.request", "body": b"late", "more_body": False})
        while not wire.queue.empty():
            await asyncio.sleep(0)
        assert not waiting.done()
        wire.put(taken(1))
        await waiting
        assert not window.is_full
        assert (await window.receive())["body"] == b"late"
        window.close()

    asyncio.run(go())


def test_the_application_and_the_window_hear_of_a_client_that_leaves(monkeypatch):
    small(monkeypatch)

    async def go() -> None:
        wire = Wire()
        window = SendWindow(wire)
        window.sent(8)
        listens = asyncio.create_task(window.receive())
        waits = asyncio.create_task(window.wait())
        await asyncio.sleep(0)
        wire.put(taken(0))
        wire.put(GONE)
        assert await listens == GONE
        with pytest.raises(ClientDisconnect):
            await waits

    asyncio.run(go())


def test_a_failure_to_receive_reaches_all_who_wait():
    async def fails() -> Any:
        raise OSError("no more")

    async def go() -> None:
        window = SendWindow(fails)
        for _ in range(2):
            with pytest.raises(OSError, match="no more"):
                await window.receive()

    asyncio.run(go())


N_CELLS, N_SAMPLES = 400, 30
REQUEST = b'{"label": "type_1", "library": 5000, "n_cells": %d, "n_samples": %d, "seed": 3' % (
    N_CELLS,
    N_SAMPLES,
)
WHOLE = b"}"
REDUCED = b', "reduce": ["mean", "var", "zero_fraction"]}'


class Client:
    """Asks an application as Serve's proxy does, and takes of the answer only what it wants."""

    def __init__(self, http: Any, accept: str, rest: bytes, *, acknowledged: bool = True) -> None:
        self.http, self.acknowledged = http, acknowledged
        self.wire = Wire({"type": "http.request", "body": REQUEST + rest, "more_body": False})
        self.parts: list[bytes] = []
        self.status = self.n_taken = 0
        headers = {"host": "localhost", "content-type": JSON, "accept": accept}
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/generate",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "server": ("127.0.0.1", 8000),
            "extensions": {EXTENSION: {}} if acknowledged else {},
        }

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.parts.append(message.get("body", b""))

    @property
    def came(self) -> int:
        return sum(map(len, self.parts))

    async def until(self, true: Callable[[], Any]) -> None:
        while not true():
            await asyncio.sleep(0.001)

    async def waited_for(self) -> None:
        await self.until(lambda: self.http.app.state.limiter.waiting)

    async def take(self, asking: asyncio.Task[None], until: float = float("inf")) -> None:
        """Take what has come, again and again, until all has or so much is taken."""
        while not asking.done() and self.n_taken < until:
            assert self.came - self.n_taken < flow_control.WINDOW_BYTES + 3 * 4096
            if self.came - self.n_taken >= flow_control.ACKNOWLEDGED_BYTES:
                self.n_taken = self.came
                self.wire.put(taken(self.n_taken))
            await asyncio.sleep(0.001)

    async def ask(self) -> None:
        await self.http.app(self.scope, self.wire, self.send)


def run(http: Any, use: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        await use()

    asyncio.run(go())
    limiter: ConcurrencyLimiter = http.app.state.limiter
    assert (limiter.inside, limiter.held_bytes, limiter.waiting) == (0, 0, 0)


@pytest.fixture
def in_jobs(monkeypatch):
    """Jobs of 64 rows, as those of models with many genes are, and a window of eight of them."""
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    monkeypatch.setattr("rayvaec.protocol.responses.PIECE_BYTES", 4096)
    monkeypatch.setattr("rayvaec.serving.middleware.endpoint.PIECE_BYTES", 4096)
    small(monkeypatch, window=64 * 1024, acknowledged=16 * 1024)


@pytest.mark.parametrize(
    ("accept", "rest"), [(ARROW, WHOLE), (JSON, WHOLE), (H5AD, WHOLE), (ARROW, REDUCED)]
)
def test_a_client_that_reads_nothing_gets_no_more_than_the_window(
    serve_with, monkeypatch, in_jobs, accept, rest
):
    http = serve_with()
    jobs: list[int] = []
    merger = http.app.state.services["model"]._merger
    work = merger._work
    monkeypatch.setattr(merger, "_work", lambda given: jobs.append(len(given)) or work(given))
    whole = Client(http, accept, rest, acknowledged=False)
    run(http, whole.ask)
    assert whole.status == 200
    all_jobs = sum(jobs)
    assert whole.came > 5 * flow_control.WINDOW_BYTES
    jobs.clear()

    async def use() -> None:
        client = Client(http, accept, rest)
        asking = asyncio.create_task(client.ask())
        await client.waited_for()
        assert not asking.done()
        assert flow_control.WINDOW_BYTES <= client.came < flow_control.WINDOW_BYTES + 3 * 4096
        if accept == ARROW:
            await client.until(lambda: not merger.waiting)
            # The window's, one in hand, and those that are computed ahead.
            most = 1 + all_jobs * flow_control.WINDOW_BYTES // whole.came + 6
            assert sum(jobs) <= most < all_jobs // 2
        await client.take(asking)
        if accept != H5AD:
            assert b"".join(client.parts) == b"".join(whole.parts)
        assert client.came == whole.came
        assert sum(jobs) == all_jobs

    run(http, use)


def test_a_client_that_leaves_while_it_is_waited_for_costs_no_more_work(
    serve_with, monkeypatch, in_jobs
):
    http = serve_with(max_requests=1)

    async def use() -> None:
        client = Client(http, ARROW, WHOLE)
        asking = asyncio.create_task(client.ask())
        await client.waited_for()
        client.wire.put(GONE)
        await asking

    run(http, use)
    text = http.get("/metrics").text
    assert 'status="499"' in text


def test_a_client_that_takes_nothing_for_too_long_is_cut_off(
    serve_with, monkeypatch, in_jobs, caplog, clock
):
    http = serve_with(max_requests=1, timeout_s=60)

    async def use() -> None:
        client = Client(http, ARROW, WHOLE)
        asking = asyncio.create_task(client.ask())
        await client.waited_for()
        clock(61)
        with pytest.raises(Exception, match="broke off after it had begun"):
            await asking
        stream = AnswerStream([b"".join(client.parts)])
        assert stream.parameters["rows"] == N_CELLS * N_SAMPLES
        assert client.came < flow_control.WINDOW_BYTES + 3 * 4096

    with caplog.at_level("WARNING", "rayvaec"):
        run(http, use)
    assert "broke off after its answer had begun: timeout" in caplog.text
    assert http.post("/v1/generate", content=REQUEST + WHOLE, headers={"Content-Type": JSON})


def test_where_clients_keep_much_waiting_answers_have_one_job_ahead(serve_with, in_jobs):
    def at_rest(max_held_bytes: int) -> int:
        """Return the bytes that are held when the client stops reading in mid-answer."""
        http = serve_with(max_body_bytes=10_000, max_held_bytes=max_held_bytes)
        limiter: ConcurrencyLimiter = http.app.state.limiter
        held: list[int] = []

        async def use() -> None:
            client = Client(http, ARROW, WHOLE)
            asking = asyncio.create_task(client.ask())
            await client.take(asking, until=10 * flow_control.WINDOW_BYTES)
            await client.waited_for()
            await client.until(lambda: not http.app.state.services["model"]._merger._at_work)
            await asyncio.sleep(0.01)
            held.append(limiter.held_bytes)
            await client.take(asking)
            assert client.status == 200

        run(http, use)
        return held[0]

    # One job in hand in both, and beside it one or four.
    assert 2 * at_rest(60_000) < at_rest(2**30)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_proxy_announces_and_acknowledges_every_answer(monkeypatch, method):
    small(monkeypatch)
    heard: list[Any] = []

    async def replica(scope: Any, receive: Any, send: Any) -> None:
        assert EXTENSION in scope["extensions"]
        heard.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"abcd", "more_body": True})
            heard.append(await receive())
        await send({"type": "http.response.body", "body": b""})

    async def go() -> None:
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        scope = {"type": "http", "method": method, "path": "/", "headers": []}
        await LoadSheddingMiddleware(replica, 1, 1000)(scope, Wire(BODY), send)
        assert "extensions" not in scope
        assert b"".join(sent) == b"abcdabcd"

    asyncio.run(go())
    assert heard == [BODY, taken(4), taken(8)]
