"""The client against the endpoint's application under uvicorn, and against a server that fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pytest
import uvicorn
from scipy import sparse

from rayvaec import client as client_module
from rayvaec.client import Client
from rayvaec.errors import CountsError, RequestError
from rayvaec.infer.trained import TrainedModel, load_model
from rayvaec.serve import wire
from rayvaec.serve.auth import digest
from rayvaec.serve.limits import Limits
from rayvaec.serve.routes import create_app
from rayvaec.serve.service import Service

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def trained(model_path: Path) -> TrainedModel:
    return load_model(model_path)


@pytest.fixture(scope="module")
def adata(atlas_h5ad: Path) -> anndata.AnnData:
    return anndata.read_h5ad(atlas_h5ad)[:30].copy()


@pytest.fixture(scope="module")
def service(trained: TrainedModel) -> Service:
    return Service(trained, Limits(max_cost=10**7))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
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


def test_counts_that_are_none_are_named_by_the_server(client, adata):
    wrong = adata.copy()
    wrong.X = wrong.X * 0.5
    with pytest.raises(RequestError, match=r"0.5 at cell .* is not a whole number; .*raw counts"):
        client.sample(wrong)


def test_too_large_a_request_is_refused(client, adata):
    with pytest.raises(RequestError, match=r"above the largest allowed, 10,000,000") as caught:
        client.sample(adata, n_samples=10_000)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels_key": "celltype"}, "no column 'celltype'; the columns are cell_type"),
        ({"layer": "raw"}, "no layer 'raw'; it has none"),
    ],
)
def test_what_the_adata_lacks_is_named(client, adata, arguments, words):
    with pytest.raises(CountsError, match=words):
        client.sample(adata, **arguments)


def test_missing_labels_are_named(client, adata):
    holes = adata.copy()
    holes.obs["cell_type"] = holes.obs["cell_type"].where(np.arange(30) != 4)
    with pytest.raises(CountsError, match="no value for 1 of 30 cells, the first at position 4"):
        client.sample(holes)


def test_a_wrong_token_is_refused(url, adata, monkeypatch):
    with Client(url, token="x" * 20) as client, pytest.raises(RequestError, match="wrong token"):
        client.model()
    monkeypatch.setenv("RAYVAEC_TOKEN", TOKEN)
    with Client(url) as client:
        assert client.model()["labels"]


def test_closing_an_answer_ends_its_work(url, service, adata, monkeypatch):
    monkeypatch.setattr("rayvaec.serve.work.JOB_VALUES", 1)
    done: list[int] = []
    work = service._merger._work

    def counted(jobs: list[Any]) -> Any:
        done.append(len(jobs))
        time.sleep(0.01)
        return work(jobs)

    monkeypatch.setattr(service._merger, "_work", counted)
    cells, genes = wire.cells_of(adata, "cell_type", None, None)
    body = wire.encode_cells(cells, {"genes": genes, "n_samples": 2000})
    headers = {
        "Content-Type": wire.ARROW,
        "Accept": wire.ARROW,
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


def whole(rows: int = 1, promised: int = 1) -> Callable[[httpx.Request], httpx.Response]:
    facts = {"rows": promised, "n_cells": 1, "n_samples": promised, "seed": 1, "model_hash": "h"}
    schema = wire.draws_schema(facts)
    number = np.arange(rows, dtype=np.int32)
    one = np.ones(rows, np.int32)
    drawn = wire.DrawnRows(0 * number, number, np.arange(rows + 1), 0 * number, one)
    body = [wire.stream_start(schema), *wire.encode_draws(schema, drawn), wire.END_OF_STREAM]
    return lambda _: httpx.Response(200, content=iter(body))


def refusal(status: int, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    said = {"error": "e", "detail": "d", "fix": "f", "request_id": "r"}
    return lambda _: httpx.Response(status, json=said, headers=headers)


def plain(status: int) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, text="Internal Server Error")


def breaks(_: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("peer closed connection")


def breaks_within(_: httpx.Request) -> httpx.Response:
    def body() -> Iterator[bytes]:
        yield wire.stream_start(wire.draws_schema({"rows": 1}))
        raise httpx.ReadError("connection reset")

    return httpx.Response(200, content=body())


@pytest.fixture
def scripted(monkeypatch) -> Callable[..., tuple[Client, Scripted, list[float]]]:
    def build(*answers: Any, retries: int = 3) -> tuple[Client, Scripted, list[float]]:
        server, waits = Scripted(lambda _: httpx.Response(200, json=MODEL), *answers), []
        monkeypatch.setattr(client_module.time, "sleep", waits.append)
        client = Client("http://server", retries=retries)
        client._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(server))
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
        (refusal(429, **{"Retry-After": "100000"}), 60),
        (plain(500), 0.2),
        (plain(502), 0.2),
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
    with Client("http://127.0.0.1:9") as client:
        assert not client.ready()
        with pytest.raises(
            RequestError, match=r"no answer from http://127.0.0.1:9 .*rayvaec serve"
        ):
            client.model()


def test_another_model_than_before_is_noticed(scripted, one_cell):
    newer = {**MODEL, "model_hash": "h", "genes": ["renamed"]}
    client, server, _ = scripted(whole(), lambda _: httpx.Response(200, json=newer))
    client._model = {**MODEL, "model_hash": "older"}
    server.answers.pop(0)
    assert client.sample(one_cell).var_names.tolist() == ["renamed"]


def test_the_client_needs_neither_torch_nor_ray():
    code = "import rayvaec.client, sys; print(sorted({'torch', 'ray', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
