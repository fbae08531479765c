"""The client against the endpoint's application under uvicorn, and against a server that fails."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rayvaec import protocol
from rayvaec.client import AsyncClient, Client, anndata_io, async_client, retry, transport
from rayvaec.client import chunking as portions_module
from rayvaec.client.chunking import GivenCells, chunk_requests
from rayvaec.errors import ConfigError, CountsError, RequestError
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.limits import Limits

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def trained(model_path: Path) -> TrainedModel:
    return load_model(model_path)


@pytest.fixture(scope="module")
def adata(atlas_h5ad: Path) -> anndata.AnnData:
    return anndata.read_h5ad(atlas_h5ad)[:30].copy()


@pytest.fixture(scope="module")
def service(trained: TrainedModel) -> Engine:
    return Engine(trained, Limits(max_cost=10**7))


@pytest.fixture(scope="module")
def url(service: Engine) -> Iterator[str]:
    """An endpoint that needs a token, on a port of its own."""
    config = uvicorn.Config(
        create_app({"model": service}, service.limits, digest(TOKEN)),
        port=0,
        log_level="critical",
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, token=TOKEN) as client:
        yield client


def test_samples_are_those_of_the_model(client, adata, trained):
    drawn = client.sample(adata, labels_key="cell_type", n_samples=4, seed=3)
    expected = trained.sample(adata, 4, 3)
    assert list(drawn.layers) == ["sample_0", "sample_1", "sample_2", "sample_3"]
    for sample in range(4):
        layer = drawn.layers[f"sample_{sample}"]
        assert sparse.issparse(layer)
        assert np.array_equal(layer.toarray(), expected[:, :, sample])
    assert drawn.obs.equals(adata.obs)
    assert drawn.var_names.tolist() == list(trained.registry.genes)
    assert drawn.uns["rayvaec"] == {"seed": 3, "model_hash": trained.hash, "n_samples": 4}


def test_other_forms_hold_the_same(client, adata, trained):
    expected = trained.sample(adata, 3, 3)
    array = client.sample(adata, n_samples=3, seed=3, as_="array")
    assert array.dtype == np.int32
    assert np.array_equal(array, expected)
    matrices = client.sample(adata, n_samples=3, seed=3, as_="csr")
    assert np.array_equal(np.stack([m.toarray() for m in matrices], 2), expected)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda a: a[:, ::-1].copy(),
        lambda a: anndata.AnnData(a.X.toarray().astype(np.float64), a.obs, a.var),
        lambda a: anndata.AnnData(sparse.csc_matrix(a.X.astype(np.uint16)), a.obs, a.var),
        lambda a: anndata.AnnData(None, a.obs, a.var, layers={"counts": a.X}),
        lambda a: a[::-1][::-1],
    ],
    ids=["genes reversed", "dense", "csc", "layer", "view"],
)
def test_the_matrix_may_stand_in_any_form(client, adata, trained, reshape):
    other = reshape(adata)
    layer = "counts" if "counts" in other.layers else None
    drawn = client.sample(other, n_samples=1, seed=3, as_="array", layer=layer)
    assert np.array_equal(drawn, trained.sample(adata, 1, 3))


def test_the_adata_is_left_as_it_is(client, adata):
    unsorted = sparse.csr_matrix(
        (np.array([1.0, 2.0]), np.array([5, 1]), np.array([0, 2])), shape=(1, adata.n_vars)
    )
    one = anndata.AnnData(unsorted.copy(), adata.obs[:1], adata.var)
    client.sample(one, n_samples=1, seed=0)
    assert one.X.indices.tolist() == [5, 1]


def test_moments_and_chosen_genes(client, adata, trained):
    genes = [trained.registry.genes[7], trained.registry.genes[2]]
    draws = trained.sample(adata, 20, 3)[:, [7, 2]]
    options = {"n_samples": 20, "seed": 3, "out_genes": genes}
    drawn = client.sample(adata, reduce=["mean", "var"], **options)
    assert drawn.var_names.tolist() == genes
    np.testing.assert_allclose(drawn.layers["mean"], draws.mean(2), rtol=1e-6)
    np.testing.assert_allclose(drawn.layers["var"], draws.var(2), rtol=1e-5, atol=1e-6)
    arrays = client.sample(adata, reduce=("zero_fraction",), as_="array", **options)
    np.testing.assert_allclose(arrays["zero_fraction"], (draws == 0).mean(2), atol=1e-6)
    assert np.array_equal(client.sample(adata, as_="array", **options), draws)


def test_quantiles(client, adata, trained):
    draws = trained.sample(adata, 20, 3)
    options = {"n_samples": 20, "seed": 3, "reduce": ["quantiles"], "quantiles": [0.05, 0.5]}
    drawn = client.sample(adata, **options)
    assert set(drawn.layers) == {"quantile_0.05", "quantile_0.5"}
    for q in (0.05, 0.5):
        expected = np.quantile(draws, q, axis=2)
        np.testing.assert_allclose(drawn.layers[f"quantile_{q}"], expected, rtol=1e-6)
    (part,) = client.iter_sample(adata, as_="array", **options)
    assert np.array_equal(part["quantile_0.5"], drawn.layers["quantile_0.5"])
    new = client.generate(
        trained.registry.labels[0],
        300,
        2,
        **{**options, "quantiles": [1.0]},
    )
    assert new.layers["quantile_1.0"].max() > 0
    with pytest.raises(RequestError, match="quantiles"):
        client.sample(adata, reduce=["quantiles"])


def test_new_cells(client, trained):
    label = trained.registry.labels[1]
    drawn = client.generate(label, 1000, 3, seed=2)
    assert drawn.shape == (3, 120)
    assert drawn.obs["label"].tolist() == [label] * 3
    names = ["a", "b", "c"]
    named = client.generate([label] * 3, [1000.0] * 3, seed=2, cell_ids=names, as_="array")
    again = client.generate([label] * 2, 1000, seed=2, cell_ids=names[1:], as_="array")
    assert np.array_equal(named[1:], again)


def test_latent_and_expression(client, adata, trained):
    mean, variance = client.latent(adata)
    expected = trained.latent(adata, return_dist=True)
    assert np.array_equal(mean, expected[0])
    assert np.array_equal(variance, expected[1])
    genes = [trained.registry.genes[7], trained.registry.genes[2]]
    shares = client.expression(adata, "cell_type", out_genes=genes)
    assert np.array_equal(shares, trained.expression(adata)[:, [7, 2]])


def test_missing_genes_are_counted_as_zero_if_allowed(client, adata):
    fewer = adata[:, :100].copy()
    with pytest.raises(RequestError, match="lacks 20 of 120 genes"):
        client.sample(fewer)
    assert client.sample(fewer, allow_missing=True).n_vars == 120


def test_the_model_and_readiness(client, trained):
    assert client.ready()
    assert client.model()["model_hash"] == trained.hash


def test_a_refusal_comes_with_the_servers_words(client, adata):
    wrong = adata.copy()
    wrong.obs["cell_type"] = ["type_9"] * 30
    with pytest.raises(RequestError) as caught:
        client.sample(wrong)
    error = caught.value
    assert (error.status, error.error) == (422, "unknown_label")
    assert "unknown label 'type_9'" in error.detail
    assert error.fix.startswith("valid ones are")
    assert len(error.request_id) > 10


def test_counts_that_are_none_are_named_before_they_are_sent(client, adata, bodies):
    wrong = adata.copy()
    wrong.X = wrong.X * 0.5
    with pytest.raises(CountsError, match=r"adata.X: 0.5 at cell .* is not a whole number; .*raw"):
        client.sample(wrong)
    assert not bodies


def test_what_cannot_be_cut_is_refused_by_the_server(client, adata):
    with pytest.raises(RequestError, match=r"above the largest allowed, 10,000,000") as caught:
        client.sample(adata[:1], n_samples=100_000)
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="where cell_ids are given"):
        client.generate(str(adata.obs["cell_type"].iloc[0]), 100, 100_001)


@pytest.fixture
def bodies(client, monkeypatch) -> list[int]:
    """The sizes of the requests that the client sends."""
    sizes: list[int] = []
    encode = portions_module.encode_cells
    monkeypatch.setattr(
        portions_module,
        "encode_cells",
        lambda *cells: sizes.append(len(body := encode(*cells))) or body,
    )
    return sizes


@pytest.mark.parametrize(
    ("limits", "n_requests"),
    [({"max_cells": 7}, 5), ({"max_cost": 4 * 120 * 3}, 10), ({"max_body_bytes": 12_000}, None)],
)
def test_a_request_over_the_limits_is_sent_as_several(
    client, adata, trained, bodies, limits, n_requests
):
    model = client.model()
    model["limits"] |= limits
    drawn = client.sample(adata, n_samples=4, seed=3, as_="array")
    assert np.array_equal(drawn, trained.sample(adata, 4, 3))
    assert n_requests in (None, len(bodies))
    assert 1 < len(bodies) < 30
    assert max(bodies) <= limits.get("max_body_bytes", np.inf)
    mean = client.sample(adata, n_samples=4, seed=3, reduce=["mean"], as_="array")["mean"]
    assert np.array_equal(mean, drawn.mean(2, dtype=np.float64).astype(np.float32))
    assert np.array_equal(client.latent(adata)[0], trained.latent(adata))
    assert np.array_equal(client.expression(adata), trained.expression(adata))


def test_new_cells_with_names_are_sent_as_several(client, trained):
    label, names = trained.registry.labels[1], [f"new {i}" for i in range(9)]
    whole = client.generate(label, 500, 9, seed=2, cell_ids=names, as_="array")
    client.model()["limits"]["max_cells"] = 4
    parts = client.generate(label, 500, 9, seed=2, cell_ids=names, as_="array")
    assert np.array_equal(parts, whole)


@settings(deadline=None)
@given(
    values=st.lists(st.integers(0, 50), max_size=30),
    max_cells=st.integers(1, 40),
    max_cost=st.integers(1, 200),
    room=st.integers(-50, 2000),
)
def test_portions_hold_every_cell_once_and_keep_the_limits(values, max_cells, max_cost, room):
    n = len(values)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    zeros = np.zeros(int(ends[-1]), np.int64)
    names = [f"cell {i}" for i in range(n)]
    cells = GivenCells(protocol.RawCells(["a"] * n, ends, zeros, zeros + 1, None, names))
    asked = {"n_samples": 3, "genes": ["g"] * 5}
    overhead = 4096 + len(json.dumps(asked))
    limits = {"max_cells": max_cells, "max_cost": max_cost, "max_body_bytes": overhead + room}
    cuts = chunk_requests(cells, {"genes": ["g"] * 5, "limits": limits}, asked)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == n
    assert all(before[1] == after[0] for before, after in pairwise(cuts))
    for start, stop in cuts:
        if stop - start > 1:
            assert stop - start <= max_cells
            assert (stop - start) * 15 <= max_cost
            assert len(cells.body(start, stop, asked)) <= overhead + room


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_one_name_are_told_apart_as_in_process(client, adata, trained, bodies, caplog):
    copies = adata[np.full(9, 3)].copy()
    copies.obs_names = ["c", "d", "c", "c-1", "d", "c", "e", "c", "c"]
    client.model()["limits"]["max_cells"] = 4
    drawn = client.sample(copies, n_samples=2, seed=3, as_="array")
    assert len(bodies) == 3
    assert "adata.obs_names: 5 of 9 cells have the name of an earlier one" in caplog.text
    assert np.array_equal(drawn, trained.sample(copies, 2, 3))
    assert len(np.unique(drawn.reshape(9, -1), axis=0)) == 9
    found = client.sample(copies, seed=3)
    assert list(found.obs_names) == list(copies.obs_names)


def test_new_cells_of_one_name_are_told_apart(client, trained, caplog):
    label, names = trained.registry.labels[1], ["c", "d", "c", "c"]
    client.model()["limits"]["max_cells"] = 2
    drawn = client.generate(label, 500, seed=2, n_cells=4, cell_ids=names, as_="array")
    assert "cell_ids: 2 of 4 cells have the name of an earlier one" in caplog.text
    expected = client.generate(label, 500, 4, seed=2, cell_ids=["c", "d", "c-1", "c-2"])
    assert np.array_equal(drawn[..., 0], expected.layers["sample_0"].toarray())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cell_ids": ["a", "b"]}, "cell_ids has 2 values for 3 cells"),
        ({"cell_ids": "abc"}, "cell_ids has 1 values for 3 cells"),
        ({"batches": ["a"]}, "batches has 1 values for 3 cells"),
        ({"library": [1, 2]}, "library has 2 values for 3 cells"),
        ({"n_cells": 4}, "labels has 3 values for 4 cells"),
        ({"n_cells": 0}, "n_cells=0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 1.5}, "n_samples=1.5"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(list(value)),
)
def test_new_cells_that_do_not_fit_together_are_refused(client, trained, bodies, arguments, words):
    labels = list(trained.registry.labels[:3])
    with pytest.raises(ConfigError, match=words):
        client.generate(labels, **{"library": 500.0, **arguments})


def test_numpys_numbers_and_single_names_are_taken(client, adata, trained):
    gene = trained.registry.genes[2]
    drawn = client.sample(
        adata, n_samples=np.int64(8), seed=np.int64(3), reduce="mean", out_genes=gene, as_="array"
    )
    expected = client.sample(
        adata, n_samples=8, seed=3, reduce=["mean"], out_genes=[gene], as_="array"
    )
    assert np.array_equal(drawn["mean"], expected["mean"])
    median = client.sample(
        adata, n_samples=8, seed=3, reduce="quantiles", quantiles=0.5, out_genes=gene
    )
    assert list(median.layers) == ["quantile_0.5"]
    assert list(median.var_names) == [gene]


def test_raw_is_a_layer(client, adata, trained):
    scaled = adata.copy()
    scaled.raw = adata.copy()
    scaled.X = scaled.X * 0.5
    scaled = scaled[:, 5:].copy()
    assert np.array_equal(client.latent(scaled, layer="raw")[0], trained.latent(adata))


def test_entries_stored_twice_are_added_up_in_full(client, adata, trained):
    parts = np.array([200, 200, 1], np.uint8), np.array([3, 3, 7]), np.array([0, 3])
    twice = anndata.AnnData(
        sparse.csr_matrix(parts, shape=(1, adata.n_vars)), adata.obs[:1].copy(), adata.var.copy()
    )
    plain = twice.copy()
    plain.X = sparse.csr_matrix(([400, 1], [3, 7], [0, 2]), shape=plain.shape)
    assert np.array_equal(client.latent(twice)[0], trained.latent(plain))


def test_draws_come_some_cells_at_a_time(client, adata, trained, monkeypatch):
    monkeypatch.setattr(async_client, "PART_BYTES", 1)
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    parts = list(client.iter_sample(adata, n_samples=100, seed=3))
    assert len(parts) > 5
    assert [name for part in parts for name in part.obs_names] == adata.obs_names.tolist()
    expected = trained.sample(adata, 100, 3)
    for sample in (0, 99):
        layers = [part.layers[f"sample_{sample}"].toarray() for part in parts]
        assert np.array_equal(np.concatenate(layers), expected[:, :, sample])
    assert np.array_equal(client.sample(adata, n_samples=100, seed=3, as_="array"), expected)


def test_progress_is_told_in_cells(url, adata, caplog):
    with Client(url, token=TOKEN, progress=True) as client, caplog.at_level("INFO", "rayvaec"):
        client.sample(adata)
    assert "sample: 30 of 30 cells" in caplog.text


def test_awaited_requests_give_the_same(url, adata, trained):
    async def go() -> tuple[Any, ...]:
        async with AsyncClient(url, token=TOKEN) as client:
            assert await client.ready()
            assert (await client.model())["model_hash"] == trained.hash
            sampled = (client.sample(adata, n_samples=3, seed=s, as_="array") for s in range(8))
            drawn = await asyncio.gather(*sampled)
            parts = [part async for part in client.iter_sample(adata, n_samples=3, seed=5)]
            new = await client.generate(trained.registry.labels[0], 300, 2, seed=1, as_="csr")
            return drawn, parts, new, await client.latent(adata), await client.expression(adata)

    drawn, parts, new, latent, expression = asyncio.run(go())
    for seed in range(8):
        assert np.array_equal(drawn[seed], trained.sample(adata, 3, seed))
    assert np.array_equal(parts[0].layers["sample_1"].toarray(), drawn[5][:, :, 1])
    assert new[0].shape == (2, 120)
    assert np.array_equal(latent[0], trained.latent(adata))
    assert np.array_equal(expression, trained.expression(adata))


class Cutting(httpx.HTTPTransport):
    """A network on which answers with draws break off, the first few times."""

    def __init__(self, times: int, after: int) -> None:
        super().__init__()
        self.times, self.after, self.asked = times, after, []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "POST":
            raw, _ = protocol.decode_cells(request.content, protocol.StreamLimits(max_bytes=2**30))
            self.asked.append(raw.cell_ids or [])
            if len(self.asked) <= self.times:
                response.stream = self.cut(response.stream)
        return response

    def cut(self, stream: Any) -> Any:
        left = self.after

        class Cut(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                nonlocal left
                for chunk in stream:
                    yield chunk[:left]
                    left -= len(chunk)
                    if left <= 0:
                        raise httpx.ReadError("connection reset")

            def close(self) -> None:
                stream.close()

        return Cut()


@pytest.mark.parametrize("times", [2, 7])
def test_only_cells_that_have_not_come_are_asked_for_again(url, adata, trained, monkeypatch, times):
    monkeypatch.setattr(async_client, "PART_BYTES", 1)
    monkeypatch.setattr(transport.time, "sleep", lambda _: None)
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    with Client(url, token=TOKEN, retries=2) as client:
        network = Cutting(times, after=100_000)
        client._client._transport._http = httpx.Client(
            base_url=url, headers=client._client._transport._http.headers, transport=network
        )
        drawn = client.sample(adata, n_samples=100, seed=3, as_="array")
        client.close()
    assert np.array_equal(drawn, trained.sample(adata, 100, 3))
    assert len(network.asked) == times + 1  # more than `retries`, but each got further
    assert all(len(after) < len(before) for before, after in pairwise(network.asked))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels_key": "celltype"}, "no column 'celltype'; the columns are cell_type"),
        ({"layer": "raw"}, "no layer 'raw'; there are no layers: leave out layer= to read X"),
    ],
)
def test_what_the_adata_lacks_is_named(client, adata, arguments, words):
    with pytest.raises(CountsError, match=words):
        client.sample(adata, **arguments)


def test_missing_labels_are_named(client, adata):
    holes = adata.copy()
    holes.obs["cell_type"] = holes.obs["cell_type"].where(np.arange(30) != 4)
    with pytest.raises(
        CountsError, match=f"no label for 1 of 30 cells, the first {adata.obs_names[4]}"
    ):
        client.sample(holes)


def test_a_wrong_token_is_refused(url, adata, monkeypatch):
    with Client(url, token="x" * 20) as client, pytest.raises(RequestError, match="wrong token"):
        client.model()
    monkeypatch.setenv("RAYVAEC_TOKEN", TOKEN)
    with Client(url) as client:
        assert client.model()["labels"]


def test_closing_an_answer_ends_its_work(url, service, adata, monkeypatch):
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    done: list[int] = []
    work = service._merger._work

    def counted(jobs: list[Any]) -> Any:
        done.append(len(jobs))
        time.sleep(0.01)
        return work(jobs)

    monkeypatch.setattr(service._merger, "_work", counted)
    cells, genes = anndata_io.cells_of(adata, "cell_type", None, None)
    body = protocol.encode_cells(cells, {"genes": genes, "n_samples": 2000})
    headers = {
        "Content-Type": protocol.ARROW,
        "Accept": protocol.ARROW,
        "Authorization": f"Bearer {TOKEN}",
    }
    n_jobs = 30 * 2000 // 64
    with httpx.stream("POST", f"{url}/v1/sample", content=body, headers=headers) as response:
        assert response.status_code == 200
        next(response.iter_raw())
    time.sleep(0.5)
    ended = len(done)
    time.sleep(0.3)
    assert len(done) == ended < n_jobs / 2


class Scripted:
    """A server that plays answers back, and notes what it was asked."""

    def __init__(self, *answers: Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers, self.paths = list(answers), []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        return self.answers.pop(0)(request)


MODEL = {
    "model_hash": "h",
    "labels_key": "cell_type",
    "batch_key": None,
    "genes": ["g"],
    "labels": ["a"],
}


def whole(
    rows: int = 1, promised: int = 1, model_hash: str = "h"
) -> Callable[[httpx.Request], httpx.Response]:
    facts = {"rows": promised, "n_cells": 1, "n_samples": promised, "seed": 1}
    facts |= {"model_hash": model_hash}
    schema = protocol.draws_schema(facts)
    number = np.arange(rows, dtype=np.int32)
    one = np.ones(rows, np.int32)
    drawn = protocol.DrawnRows(0 * number, number, np.arange(rows + 1), 0 * number, one)
    body = [
        protocol.stream_start(schema),
        *protocol.encode_draws(schema, drawn),
        protocol.END_OF_STREAM,
    ]
    return lambda _: httpx.Response(200, content=b"".join(body))


def refusal(status: int, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    said = {"error": "e", "detail": "d", "fix": "f", "request_id": "r"}
    return lambda _: httpx.Response(status, json=said, headers=headers)


def plain(status: int) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, text="Internal Server Error")


def breaks(_: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("peer closed connection")


def refused(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


def says_nothing(_: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("timed out")


def breaks_within(_: httpx.Request) -> httpx.Response:
    def body() -> Iterator[bytes]:
        yield protocol.stream_start(protocol.draws_schema({"rows": 1}))
        raise httpx.ReadError("connection reset")

    return httpx.Response(200, content=body())


@pytest.fixture
def scripted(monkeypatch) -> Callable[..., tuple[Client, Scripted, list[float]]]:
    def build(
        *answers: Any, retries: int = 3, model: str | None = None
    ) -> tuple[Client, Scripted, list[float]]:
        server, waits = Scripted(lambda _: httpx.Response(200, json=MODEL), *answers), []
        monkeypatch.setattr(transport.time, "sleep", waits.append)
        client = Client("http://server", retries=retries, model=model)
        http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(server))
        client._client._transport = transport.BlockingTransport(http)
        return client, server, waits

    return build


@pytest.fixture
def one_cell() -> anndata.AnnData:
    import pandas as pd

    obs, var = pd.DataFrame({"cell_type": ["a"]}, index=["c"]), pd.DataFrame(index=["g"])
    return anndata.AnnData(np.ones((1, 1), np.float32), obs, var)


@pytest.mark.parametrize(
    ("failure", "least_wait"),
    [
        (refusal(429, **{"Retry-After": "7"}), 7),
        (refusal(503, **{"Retry-After": "2"}), 2),
        (refusal(429, **{"Retry-After": "soon"}), 0.2),
        (refusal(429, **{"Retry-After": formatdate(time.time() + 86_400, usegmt=True)}), 60),
        (refusal(429, **{"Retry-After": "100000"}), 60),
        (plain(500), 0.2),
        (plain(502), 0.2),
        (refused, 0.2),
        (says_nothing, 0.2),
        (breaks, 0.2),
        (breaks_within, 0.2),
        (whole(rows=1, promised=2), 0.2),
    ],
)
def test_what_may_pass_is_tried_again(scripted, one_cell, failure, least_wait):
    client, server, waits = scripted(failure, failure, whole())
    drawn = client.sample(one_cell, as_="array")
    assert drawn.tolist() == [[[1]]]
    assert server.paths == ["/v1/model"] + ["/v1/sample"] * 3
    assert len(waits) == 2
    assert all(least_wait <= wait <= 60 for wait in waits)


def test_waits_grow_and_end(scripted, one_cell):
    client, server, waits = scripted(*[refusal(429)] * 4)
    with pytest.raises(RequestError, match="d; f") as caught:
        client.sample(one_cell)
    assert caught.value.status == 429
    assert len(server.paths) == 5
    assert waits == sorted(waits)
    assert len(waits) == 3


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_what_will_not_pass_is_raised_at_once(scripted, one_cell, status):
    client, server, waits = scripted(refusal(status))
    with pytest.raises(RequestError, match="d; f") as caught:
        client.sample(one_cell)
    assert (caught.value.status, caught.value.request_id) == (status, "r")
    assert (len(server.paths), waits) == (2, [])


def test_a_server_that_is_not_there_is_named():
    with Client("http://127.0.0.1:9", retries=0) as client:
        assert not client.ready()
        with pytest.raises(
            RequestError, match=r"no answer from http://127.0.0.1:9 .*rayvaec serve"
        ):
            client.model()


def test_another_model_than_before_is_noticed(scripted, one_cell):
    newer = {**MODEL, "model_hash": "h", "genes": ["renamed"]}
    client, server, _ = scripted(whole(), lambda _: httpx.Response(200, json=newer))
    client._client._model = {**MODEL, "model_hash": "older"}
    server.answers.pop(0)
    assert client.sample(one_cell).var_names.tolist() == ["renamed"]


def test_two_models_in_one_answer_are_noticed(scripted, one_cell):
    two = anndata.concat([one_cell, one_cell], index_unique="-")
    two.obs["cell_type"] = "a"
    client, *_ = scripted(whole(), whole(model_hash="other"))
    client.model()["limits"] = {"max_cells": 1}
    with pytest.raises(RequestError, match="model changed from h to other") as caught:
        client.sample(two)
    assert caught.value.error == "model_changed"


@pytest.mark.parametrize("failure", [refused, says_nothing])
def test_a_server_that_has_not_answered_yet_is_waited_for(scripted, one_cell, failure):
    client, server, waits = scripted(whole())
    server.answers[:0] = [failure, failure]
    assert client.sample(one_cell, as_="array").tolist() == [[[1]]]
    assert len(waits) == 2


def test_an_address_that_cannot_be_asked_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(transport.time, "sleep", None)
    with (
        Client("ftp://server") as client,
        pytest.raises(RequestError, match="no answer from ftp://server .*'ftp://'"),
    ):
        client.model()


def test_a_server_without_tls_is_refused_at_once(url, monkeypatch):
    monkeypatch.setattr(transport.time, "sleep", None)
    address = url.replace("http://", "https://")
    with Client(address) as client, pytest.raises(RequestError, match=f"no answer from {address}"):
        client.model()


def test_a_certificate_that_is_not_trusted_is_refused_at_once():
    error = httpx.ConnectError("certificate verify failed")
    error.__cause__ = OSError("below")
    error.__cause__.__context__ = ssl.SSLCertVerificationError("self-signed certificate")
    attempts = retry.RetryPolicy(retries=9, deadline=100.0).attempts()
    assert attempts.wait("https://server", httpx.ConnectError("refused")) > 0
    with pytest.raises(RequestError, match="no answer from https://server"):
        attempts.wait("https://server", error)


class Clock:
    """Time that passes in waits alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_call_ends_at_its_deadline(scripted, one_cell, monkeypatch):
    client, server, _ = scripted(*[refusal(429, **{"Retry-After": "30"})] * 9, retries=100)
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(transport, "time", clock)
    client._client._retry_policy = retry.RetryPolicy(retries=100, deadline=100.0)
    with pytest.raises(RequestError, match="d; f"):
        client.sample(one_cell)
    assert len(server.paths) == 1 + 4  # one every 30 s and a little more
    assert clock.now < 100


def test_no_attempt_outlasts_the_deadline():
    waits = transport._at_most(httpx.Timeout(300.0, connect=10.0), 20.0)
    assert (waits.connect, waits.read, waits.write, waits.pool) == (10.0, 20.0, 20.0, 20.0)
    assert transport._at_most(httpx.Timeout(None), 5.0) == httpx.Timeout(5.0)
    assert transport._at_most(httpx.Timeout(7.0), None) == httpx.Timeout(7.0)


def test_a_silent_server_is_given_up_at_the_deadline(one_cell):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(url, deadline=0.3) as client,
            pytest.raises(RequestError, match="no answer .*timed out"),
        ):
            client.sample(one_cell)


def test_one_of_several_models_is_asked_by_its_name(scripted, one_cell):
    client, server, _ = scripted(whole(), model="big atlas")
    client.sample(one_cell)
    assert server.paths == ["/v1/models/big atlas/model", "/v1/models/big atlas/sample"]


def test_an_awaiting_client_tries_again_too(one_cell, monkeypatch):
    away = refusal(429, **{"Retry-After": "7"})
    server = Scripted(lambda _: httpx.Response(200, json=MODEL), away, breaks, whole())
    waits: list[float] = []

    async def sleep(_: transport.AsyncTransport, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(transport.AsyncTransport, "sleep", sleep)

    async def go() -> Any:
        async with AsyncClient("http://server") as client:
            served = httpx.MockTransport(server)
            http = httpx.AsyncClient(base_url="http://server", transport=served)
            client._transport = transport.AsyncTransport(http)
            return await client.sample(one_cell, as_="array")

    assert asyncio.run(go()).tolist() == [[[1]]]
    assert len(waits) == 2
    assert 7.25 <= waits[0] <= 7.375
    assert 0.5 <= waits[1] <= 0.75


def test_the_client_needs_neither_torch_nor_ray():
    code = "import rayvaec.client, sys; print(sorted({'torch', 'ray', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
