"""The endpoint on Ray Serve while things happen to it: requests go on, and none comes out wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pytest

from rayvaec.client import Client
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.serving.deployment import NAME, ServeArgs, build, check_port
from rayvaec.serving.middleware.limits import Limits

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PLACES = 8


@dataclass
class Endpoint:
    """Two replicas of the model, and how to put others in their place."""

    url: str
    model: Path

    def deploy(self, timeout_s: float = 20.0) -> None:
        from ray import serve

        limits = Limits(max_requests=PLACES, timeout_s=timeout_s)
        args = ServeArgs(model=str(self.model), num_replicas=2, cpus_per_replica=0.4, limits=limits)
        serve.run(build(args), name=NAME, route_prefix="/")


@pytest.fixture(scope="module")
def endpoint(ray_local: None, model_path: Path) -> Iterator[Endpoint]:
    from ray import serve

    port = check_port("127.0.0.1", 0)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    endpoint = Endpoint(f"http://127.0.0.1:{port}", model_path)
    endpoint.deploy()
    yield endpoint
    serve.shutdown()


@contextmanager
def load(
    endpoint: Endpoint, adata: anndata.AnnData, expected: np.ndarray, retries: int
) -> Iterator[list[bool]]:
    """Ask for the same draws from three threads; give whether each answer was right."""
    right: list[bool] = []
    done = threading.Event()

    def ask() -> None:
        with Client(endpoint.url, retries=retries, timeout=60) as client:
            while not done.is_set():
                drawn = client.sample(adata, n_samples=20, seed=3, as_="array")
                right.append(np.array_equal(drawn, expected))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            wait_for(lambda: len(right) > 6)
            yield right
        finally:
            done.set()
        for each in asking:
            each.result()  # raises what a client could not get over


def wait_for(true: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_killed_replica_costs_no_client_an_answer(
    endpoint: Endpoint, adata: anndata.AnnData, trained: TrainedModel, descendants: Any
) -> None:
    def replicas() -> list[int]:
        every = descendants(os.getpid())
        return [pid for pid, command in every if command.startswith(b"ray::ServeReplica")]

    with load(endpoint, adata, trained.sample(adata, 20, 3), retries=8) as right:
        before = replicas()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        seen = len(right)
        wait_for(lambda: len(right) > seen + 30)
        # Serve puts another in its place; requests go to both then.
        wait_for(lambda: len(set(replicas()) - {before[0]}) == 2)
        seen = len(right)
        wait_for(lambda: len(right) > seen + 30)
    assert all(right)


def test_a_redeployment_under_load_fails_no_request(
    endpoint: Endpoint, adata: anndata.AnnData, trained: TrainedModel
) -> None:
    def ask_for_much(_: int) -> np.ndarray:
        with Client(endpoint.url, retries=0, timeout=60) as client:
            return client.sample(adata, n_samples=10_000, seed=1, reduce=["mean"]).layers["mean"]

    wait_until_healthy()
    with (
        load(endpoint, adata, trained.sample(adata, 20, 3), retries=0) as right,
        ThreadPoolExecutor(4) as pool,
    ):
        # Work of a second, which no replica has done when it is told to go.
        much = pool.map(ask_for_much, range(4))
        time.sleep(0.3)
        endpoint.deploy(timeout_s=21.0)
        with Client(endpoint.url) as client:
            wait_for(lambda: client.model()["limits"]["timeout_s"] == 21.0)
        first, *others = much
        assert all(np.array_equal(first, other) for other in others)
        seen = len(right)
        wait_for(lambda: len(right) > seen + 30)
    assert all(right)


def test_ten_times_too_many_requests_are_all_answered(
    endpoint: Endpoint, adata: anndata.AnnData, trained: TrainedModel
) -> None:
    wait_until_healthy()
    n_requests = 2 * PLACES * 10
    body = {
        "label": trained.registry.labels[0],
        "n_cells": 20,
        "library": 500.0,
        "n_samples": 2000,
        "seed": 1,
        "reduce": ["mean"],
    }
    done = threading.Event()

    def health() -> set[int]:
        found = set()
        while not done.wait(0.05):
            found.add(httpx.get(f"{endpoint.url}/healthz", timeout=60).status_code)
        return found

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{endpoint.url}/v1/generate", json=body, timeout=120)

    with ThreadPoolExecutor(n_requests + 1) as pool:
        watched = pool.submit(health)
        answers = list(pool.map(ask, range(n_requests)))
        done.set()
    assert watched.result() == {200}
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(accepted) + len(refused) == n_requests
    assert len(accepted) >= 2 * PLACES
    assert refused
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert len({answer.text for answer in accepted}) == 1


def wait_until_healthy() -> None:
    """Wait until Serve has put a killed replica's successor in its place."""
    from ray import serve

    wait_for(lambda: serve.status().applications[NAME].status == "RUNNING")
    deployments = serve.status().applications[NAME].deployments
    wait_for(lambda: deployments["Endpoint"].status == "HEALTHY")
