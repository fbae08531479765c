"""Slots and bytes: what requests may hold at once, in the limiter alone and in the application."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pytest

from rayvaec.errors import PayloadTooLargeError, RequestError, TooManyRequestsError
from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.engine import engine, plans
from rayvaec.serving.middleware.concurrency import ConcurrencyLimiter, declared_bytes, read_body
from rayvaec.serving.middleware.limits import Limits

ROOM = 100


def read(
    chunks: list[bytes], length: str | None = None, held: int = 0
) -> tuple[bytes | RequestError, int]:
    """Read a body of at most 10 bytes beside others that hold some; also tell the chunks taken."""
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    limiter = ConcurrencyLimiter(2, ROOM)
    with limiter.enter() as other, limiter.enter() as slot:
        other.resize(held)
        try:
            result: bytes | RequestError = asyncio.run(read_body(body(), length, 10, slot))
            assert limiter.held_bytes == held + len(result)
        except RequestError as error:
            result = error
    assert limiter.held_bytes == 0
    return result, taken


def test_a_body_at_the_limit_is_read():
    assert read([b"12345", b"", b"67890"], "10") == (b"1234567890", 3)
    assert read([b"12345"], "nonsense") == (b"12345", 1)
    assert read([b"12345"], "9") == (b"12345", 1)
    assert read([b"12345"] * 2, "7") == (b"1234512345", 2)


def test_a_body_is_given_up_as_soon_as_it_is_too_large():
    error, taken = read([b"12345"] * 1000)
    assert (error.status, taken) == (413, 3)
    assert "the largest allowed is 10" in error.detail


@pytest.mark.parametrize("length", ["11", "0011", "9" * 18, "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(length):
    error, taken = read([b"12345"], length)
    assert (error.status, taken) == (413, 0)


@pytest.mark.parametrize(
    ("length", "n"), [(None, 0), ("", 0), ("-1", 0), ("1.5", 0), ("\u0664", 0), ("007", 7)]
)
def test_only_a_number_is_taken_for_a_length(length, n):
    assert declared_bytes(length) == n


def test_a_declared_body_without_room_is_not_read():
    error, taken = read([b"12345"], "6", held=95)
    assert (error.status, error.error, taken) == (429, "memory_full", 0)
    assert "95 of the 100 bytes" in error.detail


def test_a_body_that_outgrows_the_room_is_given_up():
    error, taken = read([b"1"] * 10, None, held=95)
    assert (error.status, error.error, taken) == (429, "memory_full", 6)
    error, taken = read([b"1"] * 10, "2", held=95)
    assert (error.status, taken) == (429, 6)
    assert read([b"1"] * 5, None, held=95) == (b"11111", 5)


def test_a_body_of_many_small_chunks_takes_no_more_than_its_bytes():
    sizes: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        before = sys.getallocatedblocks()
        for _ in range(50_000):
            yield bytes(bytearray(b"ab"))
        sizes.append(sys.getallocatedblocks() - before)

    limiter = ConcurrencyLimiter(1, 10**6)
    with limiter.enter() as slot:
        assert len(asyncio.run(read_body(body(), None, 10**6, slot))) == 100_000
    assert sizes[0] < 1000


def test_no_more_requests_are_let_in_than_there_are_slots():
    limiter = ConcurrencyLimiter(2, ROOM)
    with limiter.enter():
        with limiter.enter():
            with (
                pytest.raises(TooManyRequestsError, match="2 requests are at work"),
                limiter.enter(),
            ):
                pass
            assert limiter.inside == 2
            assert 1 <= limiter.retry_after <= 60
        with limiter.enter():
            pass


def test_a_failed_request_gives_back_its_slot_and_its_bytes():
    limiter = ConcurrencyLimiter(1, ROOM)
    for _ in range(3):
        with limiter.enter() as slot:
            slot.hold(30)
            slot.resize(60)
            with pytest.raises(PayloadTooLargeError):
                slot.resize(101)
    assert (limiter.inside, limiter.held_bytes) == (0, 0)
    slot.hold(50)  # a job that ends after its request
    slot.release(50)
    slot.resize(10)
    assert limiter.held_bytes == 0


def test_bytes_are_shared_and_what_does_not_fit_changes_nothing():
    limiter = ConcurrencyLimiter(2, ROOM)
    with limiter.enter() as one, limiter.enter() as other:
        one.resize(60)
        with pytest.raises(TooManyRequestsError, match="60 of the 100 bytes"):
            other.resize(41)
        assert limiter.held_bytes == 60
        other.resize(40)
        assert one.has_room(0)
        assert not one.has_room(1)
        one.resize(10)
        assert one.has_room(50)
        assert not one.has_room(51)
        other.resize(90)
        one.hold(30)  # a result is there already: it is counted, not refused
        assert limiter.held_bytes == 130
        with pytest.raises(TooManyRequestsError):
            one.check()
        one.resize(5)  # less is always allowed
        one.release(30)
        one.check()
        with pytest.raises(PayloadTooLargeError, match="takes 101 bytes"):
            one.resize(101)
        one.hold(101)
        with pytest.raises(PayloadTooLargeError, match="more than the 100 bytes"):
            one.check()


NEW = {"label": "type_1", "library": 50, "n_cells": 20, "seed": 3}
CELLS = {
    "cells": {"indptr": list(range(0, 2001, 100)), "indices": list(range(100)) * 20},
    "labels": ["type_0"] * 20,
    "n_samples": 1,
}
CELLS["cells"]["counts"] = [1] * 2000  # type: ignore[index]


NO_COUNTS = {
    "cells": {"indptr": [0, 0], "indices": [], "counts": []},
    "labels": ["type_0"],
    "n_samples": 1,
}


def packed(body: bytes) -> dict[str, Any]:
    """Return a request whose body is compressed."""
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    return {"content": gzip.compress(body), "headers": headers}


def kept(http: Any) -> int:
    return int(http.app.state.limiter.held_bytes)


@pytest.mark.parametrize("second", ["plain", "gzipped", "blown up"])
def test_requests_that_hold_too_much_turn_others_away(serve_with, hold_sampler, second):
    # Twenty cells of a hundred counts take 18,000 bytes in arrays, and 14,000 as JSON.
    http = serve_with(max_body_bytes=24_000, max_held_bytes=26_000)
    body = json.dumps(CELLS).encode()
    assert len(body) > 12_000
    request = {"content": body, "headers": {"Content-Type": JSON}}
    other = {
        "plain": request,
        "gzipped": packed(body),
        "blown up": packed(json.dumps(NO_COUNTS).encode() + b" " * 20_000),
    }[second]
    held, late = hold_sampler(http), []

    async def meanwhile() -> None:
        await held.until_reached(1)
        async with http.client() as client:
            late.append(await client.post("/v1/sample", **other))
        held.go.set()

    (first,) = http.together(("POST", "/v1/sample", request), meanwhile=meanwhile)
    (refused,) = late
    assert first.status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"] == "memory_full"
    assert int(refused.headers["Retry-After"]) >= 1
    assert kept(http) == 0
    assert http.post("/v1/sample", **other).status_code == 200
    text = http.get("/metrics").text
    assert 'rayvaec_rejected_total{reason="memory_full",replica="only"} 1.0' in text


@pytest.mark.parametrize("accept", [JSON, H5AD])
def test_an_answer_that_is_kept_whole_is_counted(serve_with, accept, monkeypatch, hold_sampler):
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    roomy = serve_with(max_body_bytes=10_000, max_held_bytes=10_000_000)
    tight = serve_with(max_body_bytes=10_000, max_held_bytes=20_000)
    request = {"json": {**NEW, "n_samples": 200}, "headers": {"Accept": accept}}
    counted, given_up = hold_sampler(roomy), hold_sampler(tight)
    counted.go.set()
    given_up.go.set()
    assert roomy.post("/v1/generate", **request).status_code == 200
    answer = tight.post("/v1/generate", **request)
    assert answer.status_code == 413
    assert sum(given_up.calls) < sum(counted.calls) // 2
    assert "20,000 bytes" in answer.json()["detail"]
    assert tight.post("/v1/generate", json=NEW).status_code == 200
    request["headers"]["Accept"] = ARROW  # in pieces
    assert tight.post("/v1/generate", **request).status_code == 200
    assert kept(roomy) == kept(tight) == 0


def test_what_is_kept_of_draws_for_quantiles_is_counted(serve_with, monkeypatch):
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    asked = {**NEW, "library": 1e6, "n_samples": 1000, "reduce": ["quantiles"], "quantiles": [0.5]}
    roomy = serve_with(max_body_bytes=10_000, max_held_bytes=10_000_000)
    tight = serve_with(max_body_bytes=10_000, max_held_bytes=300_000)
    answer = roomy.post("/v1/generate", json=asked)
    assert answer.status_code == 200
    assert len(answer.content) < 100_000
    assert tight.post("/v1/generate", json=asked).status_code in (413, 429)
    assert kept(tight) == 0


def test_batches_are_bounded_in_rows_times_genes(trained, monkeypatch):
    n_genes = trained.registry.n_genes

    def rows(values: int) -> int:
        monkeypatch.setattr(engine, "MERGED_VALUES", values)
        one = engine.Engine(trained, Limits())
        one.close()
        return one._merger._max_rows

    assert rows(100 * n_genes) == 100
    assert rows(n_genes - 1) == 1
    assert rows(10**12) == engine.MERGED_ROWS


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/sample", {"n_samples": 50}),
        ("/v1/sample", {"n_samples": 50, "reduce": ["mean"]}),
        ("/v1/expression", {}),
    ],
)
def test_the_schema_of_an_answer_is_written_once(http, monkeypatch, path, asked):
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    schemas: list[pa.Schema] = []
    for name in ("draws_schema", "dense_schema"):
        for module in (plans, sys.modules["rayvaec.serving.engine.moments"]):
            make = getattr(module, name, None)
            if make is not None:
                monkeypatch.setattr(
                    module, name, lambda *a, make=make: schemas.append(make(*a)) or schemas[-1]
                )
    n = 150
    request = {
        "labels": ["type_0"] * n,
        "cells": {"indptr": [0] * (n + 1), "indices": [], "counts": []},
        **asked,
    }
    jobs: list[int] = []
    merger = http.app.state.services["model"]._merger
    work = merger._work
    monkeypatch.setattr(merger, "_work", lambda given: jobs.append(len(given)) or work(given))
    answer = http.post(path, json=request, headers={"Accept": ARROW})
    assert answer.status_code == 200
    assert sum(jobs) > 2
    assert len(schemas) == 1
    assert pa.ipc.open_stream(answer.content).read_all().num_rows == (
        n * 50 if asked == {"n_samples": 50} else n
    )
