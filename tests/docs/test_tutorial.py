from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

import rayvaec.client
from rayvaec.inference.trained_model import load_model
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.limits import Limits

SHOWN_URL = "http://127.0.0.1:8000"


class Endpoint:
    """Serves a model as `rayvaec serve` does, on a port that is free."""

    def __init__(self) -> None:
        self.url = ""

    def serve(self, words: list[str]) -> None:
        """Take the words of the command, whose port may be another's."""
        verb, model, background = words
        assert (verb, background) == ("serve", "&")
        limits = Limits()
        self._service = Engine(load_model(model), limits)
        app = create_app({"model": self._service}, limits)
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        if self.url:
            self._server.should_exit = True
            self._thread.join(30)
            self._service.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    here = Endpoint()
    yield here
    here.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.ray
def test_the_tutorial_runs_as_it_stands(run_document, endpoint, monkeypatch):
    client = rayvaec.client.Client

    def at_the_endpoint(url: str) -> rayvaec.client.Client:
        assert url == SHOWN_URL
        return client(endpoint.url)

    monkeypatch.setattr(rayvaec.client, "Client", at_the_endpoint)
    names = run_document("tutorial.md", own={"serve": endpoint.serve})
    assert names["agreement"] > 0.99
    assert names["latent"].shape == (3000, 5)
    assert names["cells"].shape == (100, 400)
    files = ["run/curves.png", "run/model/summary.safetensors"]
    files += ["report/index.html", "condscvi/model.pt"]
    assert [path for path in files if not Path(path).is_file()] == []
