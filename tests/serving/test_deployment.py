from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from rayvaec.client import Client
from rayvaec.errors import ConfigError, ModelError, RayvaecError
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.serving import deployment as app
from rayvaec.serving.deployment import ServeArgs, build, check_port, run
from rayvaec.serving.middleware.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123"
PLACES = 8


def test_the_arguments_of_a_config_file_are_checked():
    args = ServeArgs.model_validate({"model": "m", "limits": {"max_cells": 5}})
    assert args.limits == Limits(max_cells=5)
    assert args.named_models == {"model": "m"}
    several = {"atlas": "a", "lung": "b"}
    assert ServeArgs.model_validate({"models": several}).named_models == several
    for wrong in (
        {},
        {"models": {}},
        {"model": "m", "models": several},
        {"models": ["a", "b"]},
        {"model": "m", "modle": "m"},
        {"model": "m", "token_sha256": TOKEN},
        {"model": "m", "limits": {"max_sells": 5}},
    ):
        with pytest.raises(ValidationError):
            ServeArgs.model_validate(wrong)
    with pytest.raises(ConfigError, match="'a/b' cannot be the name of a model"):
        ServeArgs.model_validate({"models": {"a/b": "m"}})
    for wrong in ("four", "2-1", "0-2", -1):
        with pytest.raises(ConfigError, match=rf"`num_replicas[`= ]+{wrong}"):
            ServeArgs.model_validate({"model": "m", "num_replicas": wrong})
    with pytest.raises(ConfigError, match="limit max_cells is 0"):
        ServeArgs.model_validate({"model": "m", "limits": {"max_cells": 0}})


def test_the_deployment_refuses_before_serves_queue_does():
    args = ServeArgs(model="m", num_replicas=3, cpus_per_replica=2, use_gpu=True)
    deployment = build(args)._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 2
    assert deployment.ray_actor_options["num_gpus"] == 1
    assert deployment.max_ongoing_requests > args.limits.max_requests
    assert deployment.backpressure_config.status_code == 429
    assert deployment._deployment_config.graceful_shutdown_timeout_s > args.limits.timeout_s


def test_a_range_of_replicas_follows_the_load():
    deployment = build(ServeArgs(model="m", num_replicas="2-5"))._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert 2 < scaling.target_ongoing_requests < Limits().max_requests
    assert build(ServeArgs(model="m", num_replicas="3"))._bound_deployment.num_replicas == 3


def test_the_config_file_fits_serves_schema_and_the_builder():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    # Serve's schema lets unknown keys pass.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["http_options"]) <= set(type(schema.http_options).model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    assert application.import_path == "rayvaec.serving.deployment:build"
    args = ServeArgs.model_validate(application.args)
    assert args.token_file
    assert args.limits == Limits()
    assert build(args)._bound_deployment.num_replicas == args.num_replicas


def test_a_taken_port_is_refused_and_a_free_one_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use; .*`port`"):
            check_port("127.0.0.1", port)
    assert check_port("127.0.0.1", port) == port
    assert check_port("127.0.0.1", 0) > 1023


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 65536, "`port=65536` is not a port"),
        ("127.0.0.1", -1, "`port=-1` is not a port"),
        ("192.0.2.1", 8000, "cannot listen on 192.0.2.1 port 8000"),
        ("no such host", 8000, "cannot listen on no such host"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_refused(host, port, words):
    with pytest.raises(ConfigError, match=words):
        check_port(host, port)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"model": "nowhere"}, ModelError, "nowhere"),
        ({"model": "."}, ModelError, "model"),
        ({"host": "0.0.0.0"}, ConfigError, "no token is set"),
        ({"token_file": "nowhere"}, ConfigError, "cannot read the token file nowhere"),
        ({"port": 99999}, ConfigError, "not a port"),
        ({"num_replicas": 0}, ConfigError, "is below 1; give at least 1"),
        ({"num_replicas": "1-10000"}, ConfigError, "`num_replicas=10000` needs as many CPUs"),
        ({"num_replicas": 10_000}, ConfigError, "`num_replicas=10000` needs as many CPUs"),
        ({"use_gpu": True, "num_replicas": 1}, ConfigError, "`use_gpu=True` .* needs as many GPUs"),
    ],
)
def test_what_cannot_be_served_is_refused_before_ray_starts(
    model_path, monkeypatch, tmp_path, arguments, kind, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYVAEC_TOKEN", raising=False)
    monkeypatch.setattr(app, "ray_session", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=words) as caught:
        run({"model": arguments.pop("model", model_path)}, **{"port": 0, **arguments})
    assert isinstance(caught.value, RayvaecError)
    assert caught.value.exit_code == 2
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture
def server(model_path: Path, serve_command: Callable[..., Any]) -> Iterator[Any]:
    """An endpoint of two replicas that needs a token."""
    environment = {"RAYVAEC_TOKEN": TOKEN, "RAYVAEC_PROXY_PLACES": str(PLACES)}
    with serve_command(f"atlas={model_path}", "--num-replicas", "2", **environment) as server:
        yield server


@pytest.mark.ray
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a CPU for each replica")
def test_the_command_serves_and_stops_without_a_trace(
    server: Any, adata: anndata.AnnData, trained: TrainedModel
):
    expected = trained.sample(adata, 5, 3)
    with Client(server.url, token=TOKEN) as client:
        assert client.ready()
        assert np.array_equal(client.sample(adata, n_samples=5, seed=3, as_="array"), expected)
        same_from_both_replicas(client, adata, expected)
    keeps_few_answers_that_are_sent(server, trained)
    refuses_more_than_there_are_places_for(server, trained)
    refused = httpx.get(f"{server.url}/v1/models/atlas/model", timeout=30)
    assert refused.status_code == 401
    assert refused.headers.get_list("X-Request-ID") == [refused.json()["request_id"]]
    assert server.url in "".join(server.said)
    assert TOKEN not in "".join(server.said)
    finishes_what_is_in_work(server, adata)
    assert server.process.wait(60) == 0
    until = time.monotonic() + 20
    while server.alive() and time.monotonic() < until:
        time.sleep(0.2)
    assert server.alive() == []
    assert check_port("127.0.0.1", int(server.url.rpartition(":")[2]))


def same_from_both_replicas(client: Client, adata: anndata.AnnData, expected: np.ndarray) -> None:
    """Ask many times at once: replicas and merging change nothing."""
    results: list[np.ndarray] = []

    def ask() -> None:
        with Client(client.url, token=TOKEN) as other:
            results.extend(other.sample(adata, n_samples=5, seed=3, as_="array") for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 30
    assert all(np.array_equal(result, expected) for result in results)


def keeps_few_answers_that_are_sent(server: Any, trained: TrainedModel) -> None:
    """Ask for far more than Ray's object store may hold of it afterwards."""
    body = {"label": trained.registry.labels[0], "n_cells": 20, "library": 500, "n_samples": 50}
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/vnd.apache.arrow.stream"}
    sizes: list[int] = []

    async def client(http: httpx.AsyncClient) -> None:
        for _ in range(30):
            answer = await http.post(f"{server.url}/v1/models/atlas/generate", json=body)
            assert answer.status_code == 200
            sizes.append(len(answer.content))

    async def ask() -> None:
        async with httpx.AsyncClient(headers=headers, timeout=60) as http:
            await asyncio.gather(*(client(http) for _ in range(PLACES)))

    asyncio.run(ask())
    assert sum(sizes) > 60 * 2**20
    (proxy,) = server.named("ray::ProxyActor")
    status = Path(f"/proc/{proxy}/status").read_text()
    assert int(status.partition("RssShmem:")[2].split()[0]) < 15 * 2**10


def refuses_more_than_there_are_places_for(server: Any, trained: TrainedModel) -> None:
    """Ask for more at once than the proxy passes on, and less than the replicas would take."""
    label = trained.registry.labels[0]
    body = {"label": label, "n_cells": 20, "library": 500, "n_samples": 2000, "reduce": ["mean"]}

    async def ask() -> list[httpx.Response]:
        headers, limits = {"Authorization": f"Bearer {TOKEN}"}, httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=60) as http:
            url = f"{server.url}/v1/models/atlas/generate"
            return await asyncio.gather(*(http.post(url, json=body) for _ in range(4 * PLACES)))

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert sum(answer.status_code == 200 for answer in answers) == len(answers) - len(refused)
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert {answer.json()["error"] for answer in refused} == {"queue_full"}


def requests_in_work(server: Any) -> float:
    """Ask all replicas how many requests they have."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    lines = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text.splitlines()
    counts = [line for line in lines if line.startswith("rayvaec_requests_in_work{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts)


def finishes_what_is_in_work(server: Any, adata: anndata.AnnData) -> None:
    """Stop the server while a long answer is under way; the answer comes whole."""
    answers: list[anndata.AnnData] = []

    def ask() -> None:
        with Client(server.url, token=TOKEN, retries=0) as client:
            answers.append(client.sample(adata, n_samples=20_000, seed=1, reduce=["mean"]))

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() and not requests_in_work(server):
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    thread.join(90)
    assert len(answers) == 1
    assert answers[0].layers["mean"].shape == adata.shape
