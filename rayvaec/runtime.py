"""The Ray that work runs on: the one named by RAY_ADDRESS, or a local one of its own.

A job submitted to a cluster finds RAY_ADDRESS set and joins that cluster. Elsewhere a local Ray is
started and shut down again, under token authentication: Ray's ports listen on every address of the
machine, and whoever reaches an unauthenticated one can run code.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayvaec.errors import ConfigError


def usable_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require_token() -> None:
    """Put Ray under token authentication, with a fresh private token where none is set."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="rayvaec-"))  # created with mode 0700
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def start_ray(num_cpus: int | None = None) -> bool:
    """Join the Ray of this process or of RAY_ADDRESS; start a local one where there is neither.

    Parameters
    ----------
    num_cpus : int, optional
        CPUs that a local Ray may hand out; by default every usable core.

    Returns
    -------
    bool
        Whether this call connected, so that its caller must shut Ray down.

    Raises
    ------
    ConfigError
        If RAY_ADDRESS names a Ray that cannot be reached.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray answers at RAY_ADDRESS={address} ({error})",
                "start it, correct the address, or unset RAY_ADDRESS to work on this machine alone",
            ) from error
        return True
    require_token()
    ray.init(
        address="local",
        num_cpus=num_cpus or usable_cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return True


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Run a block with Ray connected; shut Ray down at the end if this call connected it."""
    import ray

    connected_here = start_ray(num_cpus)
    try:
        yield
    finally:
        if connected_here:
            ray.shutdown()


def check_cpus(wanted: float, what: str) -> None:
    """Refuse work that would wait for ever for CPUs that the cluster does not have.

    Parameters
    ----------
    wanted : float
        CPUs needed at the same time.
    what : str
        Who needs them, for the message.

    Raises
    ------
    ConfigError
        If the connected Ray has fewer CPUs.
    """
    import ray

    available = ray.cluster_resources().get("CPU", 0.0)
    if wanted > available:
        raise ConfigError(
            f"{what} need {wanted:g} CPUs and Ray has {available:g}",
            f"use --num-workers {max(int(available), 1)} or fewer, or a larger cluster",
        )
