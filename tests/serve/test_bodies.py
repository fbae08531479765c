"""Bodies under Content-Encoding: gzip."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from typing import Any

import pytest

from rayvaec.serve.wire import JSON

NEW = json.dumps({"label": "type_1", "n_cells": 2, "library": 50, "seed": 3}).encode()
HEADERS = {"Content-Type": JSON, "Content-Encoding": "gzip"}


def test_a_compressed_body_is_the_same_request(http):
    plain = http.post("/v1/generate", content=NEW, headers={"Content-Type": JSON})
    packed = http.post("/v1/generate", content=gzip.compress(NEW), headers=HEADERS)
    assert packed.status_code == 200
    assert packed.content == plain.content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "breaks off"),
        (NEW, "is no gzip stream"),
        (gzip.compress(NEW)[:-9], "breaks off"),
        (gzip.compress(NEW)[:-4] + b"abcd", "is no gzip stream"),
        (gzip.compress(NEW) + b"more", "goes on after the end"),
        (gzip.compress(NEW) * 2, "goes on after the end"),
        (gzip.compress(gzip.compress(NEW)), "the body is no JSON"),
    ],
)
def test_what_is_not_one_gzip_stream_is_undecodable(http, content, words):
    response = http.post("/v1/generate", content=content, headers=HEADERS)
    assert response.status_code == 400
    assert response.json()["error"] == "undecodable"
    assert words in response.json()["detail"]


def test_a_bomb_is_given_up_at_the_limit(serve_with: Any):
    http = serve_with(max_body_bytes=2**20)
    bomb = gzip.compress(bytes(100 * 2**20))
    tracemalloc.start()
    response = http.post("/v1/generate", content=bomb, headers=HEADERS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 413
    assert response.json()["error"] == "body_too_large"
    assert peak < 20 * 2**20


def test_no_compressed_garbage_breaks_the_server(http):
    noise = random.Random(0)
    whole = gzip.compress(NEW)
    bodies = [noise.randbytes(noise.randrange(200)) for _ in range(30)]
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[noise.randrange(len(whole))] ^= 1 << noise.randrange(8)
        bodies.append(bytes(damaged))
    asked = [("POST", "/v1/generate", {"content": body, "headers": HEADERS}) for body in bodies]
    statuses = {response.status_code for part in asked for response in http.together(part)}
    assert 400 in statuses
    assert statuses <= {200, 400, 413, 422}
