"""Bodies as they come over HTTP: whole, compressed, cut off, damaged, or of something else."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anndata
import h5py
import httpx
import pyarrow as pa
import pytest

from rayvaec.inference.trained_model import TrainedModel
from rayvaec.protocol import ARROW, H5AD, JSON, RawCells, encode_cells
from rayvaec.serving.decoding.bodies import unpack

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
        (NEW, "is not a gzip stream"),
        (gzip.compress(NEW)[:-9], "breaks off"),
        (gzip.compress(NEW)[:-4] + b"abcd", "is not a gzip stream"),
        (gzip.compress(NEW) + b"more", "goes on after the end"),
        (gzip.compress(NEW) * 2, "goes on after the end"),
        (gzip.compress(gzip.compress(NEW)), "the body is not valid JSON"),
    ],
    ids=["empty", "plain", "cut", "wrong sum", "more", "two", "twice"],
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


@dataclass(frozen=True)
class Sent:
    """A body and what says how to read it."""

    body: bytes
    headers: dict[str, str]
    query: dict[str, Any]

    def to(self, http: Any, route: str, body: bytes | None = None) -> httpx.Response:
        """Send it, or another body in its place."""
        content = self.body if body is None else body
        return http.post(f"/v1/{route}", content=content, headers=self.headers, params=self.query)


KINDS = ("json", "gzip", "arrow", "h5ad")


@pytest.fixture(scope="module")
def whole(adata: anndata.AnnData, trained: TrainedModel) -> dict[str, Sent]:
    """Five cells in every kind of body."""
    cells = trained.registry.align(adata[:5].copy())
    labels = adata.obs["cell_type"][:5].tolist()
    arrays = cells.indptr, cells.indices, cells.counts
    names = ("indptr", "indices", "counts")
    fields = {"cells": {n: a.tolist() for n, a in zip(names, arrays, strict=True)}}
    plain = json.dumps({**fields, "labels": labels}).encode()
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        anndata.io.write_elem(h5, "/", adata[:5].copy())
    return {
        "json": Sent(plain, {"Content-Type": JSON}, {}),
        "gzip": Sent(gzip.compress(plain), HEADERS, {}),
        "arrow": Sent(encode_cells(RawCells(labels, *arrays), {}), {"Content-Type": ARROW}, {}),
        "h5ad": Sent(file.getvalue(), {"Content-Type": H5AD}, {"labels_key": "cell_type"}),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_cut_off_in_the_middle_is_undecodable(http, whole, kind):
    sent = whole[kind]
    for route in ("latent", "expression"):
        assert sent.to(http, route).status_code == 200
        for length in (len(sent.body) // 2, len(sent.body) - 1):
            response = sent.to(http, route, sent.body[:length])
            assert response.status_code == 400, response.text
            assert response.json()["error"] == "undecodable"


def test_another_hdf5_is_undecodable(http, whole):
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        h5["matrix"] = [1.0, 2.0]
    for route in ("sample", "latent", "expression"):
        response = whole["h5ad"].to(http, route, file.getvalue())
        assert response.status_code == 400
        assert response.json()["error"] == "undecodable"


def test_names_that_an_h5ad_cannot_hold_are_refused_in_one(http, trained):
    new = {**json.loads(NEW), "cell_ids": ["a", "b\0c"]}
    cells = {"indptr": [0, 1], "indices": [0], "counts": [1]}
    genes = [*trained.registry.genes, "b\0c"]  # reported as one that the model lacks
    given = {"cells": cells, "labels": ["type_0"], "genes": genes}
    for route, request in (("generate", new), ("latent", given)):
        assert http.post(f"/v1/{route}", json=request).status_code == 200
        response = http.post(f"/v1/{route}", json=request, headers={"Accept": H5AD})
        assert response.status_code == 422
        assert r"the name 'b\x00c' has a NUL in it" in response.json()["detail"]


def test_arrow_columns_of_other_types_are_named(http):
    cells = {"label": ["type_0"], "gene": [[0]], "count": [["4"]]}
    new = {"label": ["type_0"], "library": ["50"]}
    for route, columns, name in (
        ("sample", cells, "count"),
        ("latent", cells, "count"),
        ("expression", cells, "count"),
        ("generate", new, "library"),
    ):
        table, sink = pa.table(columns), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        response = http.post(f"/v1/{route}", content=body, headers={"Content-Type": ARROW})
        assert response.status_code == 422
        assert f"column '{name}' is of type " in response.json()["detail"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_body_breaks_the_server(http, whole, kind):
    noise, sent, statuses = random.Random(1), whole[kind], set()
    for _ in range(40):
        body = bytearray(sent.body)
        for _ in range(noise.choice((1, 2, 20))):
            body[noise.randrange(len(body))] ^= 1 << noise.randrange(8)
        statuses.add(sent.to(http, "expression", bytes(body)).status_code)
    assert statuses & {400, 422}
    assert statuses <= {200, 400, 413, 422}


def test_a_client_that_goes_away_within_its_body_leaves_its_place(serve_with: Callable[..., Any]):
    http = serve_with(max_requests=1)
    coming = [
        {"type": "http.request", "body": NEW[:9], "more_body": True},
        {"type": "http.disconnect"},
    ]
    said: list[Any] = []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(NEW))]
    headers.append((b"host", b"localhost"))
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers}
    scope |= {"http_version": "1.1", "query_string": b"", "server": ("127.0.0.1", 8000)}
    asyncio.run(http.app(scope, receive, send))
    assert said == []
    again = http.post("/v1/generate", content=NEW, headers={"Content-Type": JSON})
    assert again.status_code == 200


def test_what_comes_while_the_server_stops_is_refused(
    serve_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    http = serve_with()
    model = http.app.state.services["model"]
    began, go_on = threading.Semaphore(0), threading.Event()

    def late(*given: Any) -> Any:
        began.release()
        assert go_on.wait(30)
        return unpack(*given)

    monkeypatch.setattr("rayvaec.serving.engine.engine.unpack", late)

    def close() -> None:
        for _ in range(2):
            assert began.acquire(timeout=30)
        while model._threads.readers._work_queue.qsize() < 2:
            time.sleep(0.01)
        model.close()
        go_on.set()

    closing = threading.Thread(target=close)
    closing.start()
    # Two are being read, and two wait for that.
    work = ("POST", "/v1/generate", {"content": NEW, "headers": {"Content-Type": JSON}})
    answers = http.together(work, work, work, work)
    closing.join()
    for response in (*answers, *http.together(work)):
        assert response.status_code == 503
        assert response.json()["error"] == "stopping"
