"""A client that does not read, against `rayvaec serve` itself: nobody holds its answer."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayvaec.protocol import ARROW, JSON

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

HELD_MIB = 64
"""Most that proxy and replica may hold of an answer several times as large."""

REQUEST = {"label": "type_0", "library": 100_000, "n_cells": 1000, "n_samples": 300, "seed": 1}


@pytest.fixture(scope="module")
def server(serve_command: Callable[..., Any], model_path: Path) -> Iterator[Any]:
    """One replica, and a proxy that takes few bytes of bodies at a time."""
    with serve_command(str(model_path), RAYVAEC_PROXY_BYTES=str(2**20)) as server:
        yield server


def memory(server: Any) -> float:
    """Return the MiB that proxy and replica hold, with what they see of Ray's object store."""
    total = 0
    for name in ("ray::ProxyActor", "ray::ServeReplica"):
        (pid,) = server.named(name)
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(status.partition("VmRSS:")[2].split()[0])
    return total / 2**10


def unread(server: Any) -> float:
    """Return the number of answers that wait for their clients."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    (line,) = (line for line in lines if line.startswith("rayvaec_answers_unread{"))
    return float(line.rpartition(" ")[2])


def asked(server: Any, **headers: str) -> socket.socket:
    """Send the request; return the connection, nothing of the answer being read."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(REQUEST).encode()
    lines = ["POST /v1/generate HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)
    return connection


def read_on(connection: socket.socket) -> int:
    """Read an answer to its end; return its size."""
    size = 0
    while data := connection.recv(2**20):
        size += len(data)
    return size


def test_an_answer_that_is_not_read_is_not_held(server: Any) -> None:
    headers = {"Content-Type": JSON, "Accept": ARROW}
    with asked(server, **headers) as connection:
        whole = read_on(connection)
    before = memory(server)
    assert whole > 3 * HELD_MIB * 2**20
    with asked(server, **headers) as connection:
        while not unread(server):
            assert memory(server) < before + HELD_MIB
            time.sleep(0.1)
        assert memory(server) < before + HELD_MIB
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
        assert read_on(connection) == whole
    assert unread(server) == 0
    with asked(server, **headers):  # a client that leaves frees its place
        while not unread(server):
            time.sleep(0.1)
    while unread(server):
        time.sleep(0.1)


def test_a_body_beyond_what_the_proxy_takes_is_refused(server: Any) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**16

    headers = {"Content-Type": JSON}
    for content in (b" " * (2**20 + 1), chunks()):
        url = f"{server.url}/v1/generate"
        answer = httpx.post(url, content=content, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["error"] == "body_too_large"
    fits = httpx.post(f"{server.url}/v1/generate", json={**REQUEST, "n_cells": 1, "n_samples": 1})
    assert fits.status_code == 200


def test_head_and_hosts_through_the_proxy(server: Any) -> None:
    for path in ("/", "/healthz", "/readyz", "/v1/model"):
        got, head = (httpx.request(method, f"{server.url}{path}") for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    named = {"Host": "evil.example"}
    assert httpx.get(f"{server.url}/v1/model", headers=named).status_code == 421
    assert httpx.get(f"{server.url}/readyz", headers={"Host": "10.0.0.7:8000"}).status_code == 200
