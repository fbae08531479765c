from __future__ import annotations

import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from rayvaec.cluster import check_cpus, ray_session, require_token, start_ray
from rayvaec.errors import ConfigError


def test_a_fresh_token_is_private(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *work, **given: at_exit.append((work, given)))
    require_token()
    path = os.environ["RAY_AUTH_TOKEN_PATH"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(path) as file:
        assert len(file.read()) == 64
    require_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == path
    assert at_exit == [((shutil.rmtree, Path(path).parent), {"ignore_errors": True})]


@pytest.mark.ray
def test_a_ray_that_is_connected_is_joined_and_left_running(ray_local):
    import ray

    assert not start_ray()
    with ray_session():
        check_cpus(2, "two workers")
        with pytest.raises(
            ConfigError, match=r"3 workers need 3 CPUs and Ray has 2.*`num_workers=2`"
        ):
            check_cpus(3, "3 workers")
    assert ray.is_initialized()


@pytest.fixture
def answering():
    """Serve every call on a port with an error; gives a function from error to address."""
    servers = []

    def serve(code: grpc.StatusCode) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        refuse = grpc.unary_unary_rpc_method_handler(lambda _, call: call.abort(code, "no"))
        handler = type("Handler", (grpc.GenericRpcHandler,), {"service": lambda *_: refuse})
        server.add_generic_rpc_handlers([handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "what listens is no Ray: UNIMPLEMENTED"),
        (grpc.StatusCode.UNAUTHENTICATED, "does not accept this token; name the cluster's own"),
    ],
)
def test_what_listens_and_is_not_our_ray_is_refused_at_once(answering, monkeypatch, code, said):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for long"))
    monkeypatch.setenv("RAY_ADDRESS", answering(code))
    with pytest.raises(ConfigError, match=said):
        start_ray()


def test_a_missing_token_is_a_mistake(monkeypatch):
    import ray

    def init(**_):
        raise ray.exceptions.AuthenticationError("no token was found\nlook here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("rayvaec.cluster._check_answering", lambda _: None)
    with pytest.raises(ConfigError, match="RAY_ADDRESS=auto wants a token and there is none; name"):
        start_ray()


def test_what_this_machine_does_not_have_is_said_before_ray_starts(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus = len(os.sched_getaffinity(0))
    check_cpus(cpus, "workers")
    with pytest.raises(ConfigError, match=f"CPUs and this machine has {cpus}; use `num_workers="):
        check_cpus(cpus + 1, "workers")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_ray_is_refused_at_once(address, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"no Ray answers at RAY_ADDRESS={address}"):
        start_ray()
