"""One loaded model and its application, in process, for every test of the endpoint."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import httpx
import pytest
from fastapi import FastAPI

from rayvaec.data.store.open import open_store
from rayvaec.data.store.summarize import summarize
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.model.training_summary import TrainingSummary
from rayvaec.serving.deployment import check_port
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.limits import Limits


@dataclass
class Http:
    """Sends requests to an application without a network, as one that listens on loopback."""

    app: FastAPI
    base_url: str = "http://127.0.0.1:8000"
    headers: dict[str, str] = field(default_factory=dict)

    def client(self) -> httpx.AsyncClient:
        """Return a client of the application."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(
            transport=transport, base_url=self.base_url, headers=self.headers, timeout=60
        )

    def together(
        self,
        *requests: tuple[str, str, dict[str, Any]],
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> list[httpx.Response]:
        """Send requests at the same time; each is (method, path, arguments of httpx).

        `meanwhile` is run beside them.
        """

        async def send() -> list[httpx.Response]:
            async with self.client() as client:
                asked = [client.request(method, path, **rest) for method, path, rest in requests]
                if meanwhile is not None:
                    *answers, _ = await asyncio.gather(*asked, meanwhile())
                    return answers
                return await asyncio.gather(*asked)

        return asyncio.run(send())

    def get(self, path: str, **rest: Any) -> httpx.Response:
        """Send one GET."""
        return self.together(("GET", path, rest))[0]

    def post(self, path: str, **rest: Any) -> httpx.Response:
        """Send one POST."""
        return self.together(("POST", path, rest))[0]


@pytest.fixture(scope="session")
def trained(model_path: Path) -> TrainedModel:
    """The model that the tests' server holds."""
    return load_model(model_path)


@pytest.fixture(scope="session")
def summary(store_path: Path) -> TrainingSummary:
    """What the training data of the tests' model looks like."""
    return summarize(open_store(store_path))


@pytest.fixture(scope="session")
def summarised(
    model_path: Path, summary: TrainingSummary, tmp_path_factory: pytest.TempPathFactory
) -> TrainedModel:
    """The same model with that summary."""
    path = tmp_path_factory.mktemp("summarised") / "model"
    shutil.copytree(model_path, path)
    summary.save(path)
    return load_model(path)


@pytest.fixture(scope="session")
def adata(atlas_h5ad: Path) -> anndata.AnnData:
    """Forty cells with counts and labels."""
    return anndata.read_h5ad(atlas_h5ad)[:40].copy()


@pytest.fixture(scope="session")
def serve_with(trained: TrainedModel) -> Iterator[Callable[..., Http]]:
    """Build an application with limits, token and the like of its own."""
    built: list[Engine] = []

    def build(
        token_digest: str | None = None,
        allowed_hosts: Sequence[str] = (),
        h5ad_uploads: bool = True,
        **limits: Any,
    ) -> Http:
        bounds = Limits(**limits)
        built.append(Engine(trained, bounds, h5ad_uploads=h5ad_uploads))
        services = {"model": built[-1]}
        return Http(create_app(services, bounds, token_digest, allowed_hosts=allowed_hosts))

    yield build
    for service in built:
        service.close()


@pytest.fixture(scope="session")
def http(serve_with: Callable[..., Http]) -> Http:
    """The application with default limits and h5ad uploads, without a token."""
    return serve_with()


@dataclass
class Server:
    """`rayvaec serve` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    mark: str
    said: list[str]

    def alive(self) -> list[int]:
        """Processes that the command started, directly or not, itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if self.mark.encode() in environment:
                    found.append(int(entry.name))
        return found

    def named(self, name: str) -> list[int]:
        """Those of them whose title begins with a name, such as ``ray::ProxyActor``."""
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.alive()}
        return [pid for pid, title in titles.items() if title.startswith(name.encode())]


class HeldSampler:
    """Keeps an application's sampler from working until it is let go."""

    def __init__(self, http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.calls = threading.Event(), list[int]()
        self._merger = http.app.state.services["model"]._merger
        self._work = self._merger._work
        monkeypatch.setattr(self._merger, "_work", self)

    def __call__(self, jobs: list[Any]) -> Any:
        self.calls.append(len(jobs))
        assert self.go.wait(60)
        return self._work(jobs)

    async def until_reached(self, n_jobs: int) -> None:
        """Return once so many jobs are in the sampler's hands, or wait for it."""
        while not self.calls or sum(self.calls) + self._merger.waiting < n_jobs:
            await asyncio.sleep(0.001)


@pytest.fixture
def hold_sampler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Http], HeldSampler]:
    """Hold the sampler of an application."""
    return lambda http: HeldSampler(http, monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what sets the clock of the running event loop ahead, and with it its timeouts."""
    ahead = [0.0]
    real = asyncio.BaseEventLoop.time
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: real(loop) + ahead[0])

    def set_ahead(seconds: float) -> None:
        ahead[0] += seconds

    return set_ahead


@pytest.fixture(scope="session")
def serve_command() -> Callable[..., Any]:
    """Return a context manager that runs `rayvaec serve` with arguments and environment."""

    @contextmanager
    def serving(*arguments: str, **environment: str) -> Iterator[Server]:
        mark = f"RAYVAEC_TEST_{uuid.uuid4().hex}"
        port = check_port("127.0.0.1", 0)
        process = subprocess.Popen(
            [sys.executable, "-m", "rayvaec", "serve", *arguments, "--port", str(port)],
            env={**os.environ, mark: "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stdout or []), daemon=True)
        reader.start()
        until = time.monotonic() + 150
        try:
            while not any(line.startswith("ready:") for line in said):
                assert process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.2)
            yield Server(process, f"http://127.0.0.1:{port}", mark, said)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
            reader.join(5)
            if process.stdout:
                process.stdout.close()

    return serving
