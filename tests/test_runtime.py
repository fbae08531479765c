from __future__ import annotations

import os
import stat

import pytest

from rayvaec.errors import ConfigError
from rayvaec.runtime import check_cpus, ray_session, require_token, start_ray


def test_a_fresh_token_is_private(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    require_token()
    path = os.environ["RAY_AUTH_TOKEN_PATH"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(path) as file:
        assert len(file.read()) == 64
    require_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == path


@pytest.mark.ray
def test_a_ray_that_is_connected_is_joined_and_left_running(ray_local):
    import ray

    assert not start_ray()
    with ray_session():
        check_cpus(2, "two workers")
        with pytest.raises(
            ConfigError, match=r"3 workers need 3 CPUs and Ray has 2.*--num-workers 2"
        ):
            check_cpus(3, "3 workers")
    assert ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_ray_is_refused_at_once(address, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"no Ray answers at RAY_ADDRESS={address}"):
        start_ray()
