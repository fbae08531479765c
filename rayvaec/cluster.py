"""The Ray that work runs on: the one named by RAY_ADDRESS, or a local one of its own.

A job submitted to a cluster finds RAY_ADDRESS set and joins that cluster. Elsewhere a local Ray is
started and shut down again, under token authentication: Ray's ports listen on every address of the
machine, and whoever reaches an unauthenticated one can run code.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rayvaec.errors import ConfigError
from rayvaec.util.location import Location, Url, location

CONNECT_TIMEOUT_S = 10
"""How long a Ray may take to accept a connection."""
TRUSTED_ADVICE = "name the cluster's own by RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"


def usable_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require_token() -> None:
    """Put Ray under token authentication, with a fresh private token where none is set."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not (
        "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    ):
        folder = Path(tempfile.mkdtemp(prefix="rayvaec-"))  # created with mode 0700
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if "ray" in sys.modules:
        # Ray read these variables when it was imported; this is how its own code reads them again.
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


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
            _check_answering(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except ray.exceptions.AuthenticationError as error:
            raise ConfigError(
                f"the Ray at RAY_ADDRESS={address} wants a token and there is none", TRUSTED_ADVICE
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray answers at RAY_ADDRESS={address} ({error})",
                "start it, correct the address, or unset RAY_ADDRESS to work on this machine alone",
            ) from error
        return True
    require_token()
    # Inherited by the workers. Their products are small and many; threads that wait for the next
    # one in a busy loop take the cores from those that have one to compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ray.init(
        address="local",
        num_cpus=num_cpus or usable_cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return True


def _check_answering(address: str) -> None:
    """Raise OSError where no Ray answers: Ray itself would try for half a minute and more."""
    if address == "auto":
        from ray._private.services import get_ray_address_from_environment

        address = get_ray_address_from_environment("auto", None) or ""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return  # Ray says at once what is wrong with it
    socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    if "://" not in address:
        _ask_for_cluster(address)


def _ask_for_cluster(address: str) -> None:
    """Ask the head of a cluster for its name, as Ray does first of all."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with init_grpc_channel(address) as channel:
        try:
            ask = NodeInfoGcsServiceStub(channel).GetClusterId
            ask(GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(
                    f"the Ray at RAY_ADDRESS={address} does not accept this token", TRUSTED_ADVICE
                ) from error
            raise ConnectionError(f"what listens is no Ray: {error.code().name}") from error


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

    A cluster that starts nodes on demand says by RAYVAEC_MAX_CPUS how many it can come to.

    Parameters
    ----------
    wanted : float
        CPUs needed at the same time.
    what : str
        Who needs them, for the message.

    Raises
    ------
    ConfigError
        If the Ray that is connected, or this machine where a local one would be started, has
        fewer CPUs and cannot come to as many.
    """
    available = _available("CPU")
    if wanted > available:
        raise ConfigError(
            f"{_needs(what, wanted, 'CPU')} and {_who_has()} {available:g}",
            f"use --num-workers {max(int(available), 1)} or fewer, or a larger cluster",
        )


def check_gpus(wanted: float, what: str) -> None:
    """Refuse work that would wait for ever for GPUs; as `check_cpus`, with RAYVAEC_MAX_GPUS.

    Parameters
    ----------
    wanted : float
        GPUs needed at the same time.
    what : str
        Who needs them, for the message.

    Raises
    ------
    ConfigError
        If there are fewer GPUs and cannot come to be as many.
    """
    available = _available("GPU")
    if wanted > available:
        fewer = f"use --num-workers {int(available)} or fewer, or" if available >= 1 else "use"
        raise ConfigError(
            f"{_needs(what, wanted, 'GPU')} and {_who_has()} {available:g}",
            f"{fewer} a larger cluster, or leave out --use-gpu",
        )


def _needs(what: str, wanted: float, kind: str) -> str:
    verb = "needs" if what.startswith("1 worker ") or what == "1 worker" else "need"
    return f"{what} {verb} {wanted:g} {kind}{'s' if wanted != 1 else ''}"


def _who_has() -> str:
    return "this machine has" if starts_ray() else "Ray has"


def _available(kind: str) -> float:
    now = sum(getattr(node, kind) for node in ray_nodes())
    return max(now, float(os.environ.get(f"RAYVAEC_MAX_{kind}S", "0")))


class Node(NamedTuple):
    """What a node has for workers."""

    CPU: float
    GPU: float


def starts_ray() -> bool:
    """Return whether `start_ray` would start a local Ray."""
    import ray

    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def ray_nodes() -> list[Node]:
    """Return the nodes of the Ray that is connected, or of the local one that would be started."""
    if starts_ray():
        import torch

        return [Node(usable_cpus(), torch.cuda.device_count())]
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in resources]


_HOW_TO_COPY = {
    "s3": "`aws s3 cp --recursive`",
    "gs": "`gcloud storage cp --recursive`",
    "https": "`curl -O`",
    "http": "`curl -O`",
}


def check_job_paths(paths: Iterable[Path], stores: Iterable[Location] = ()) -> None:
    """Refuse URLs, and relative paths in a submitted job.

    The working folder of a job is a copy that goes away.

    Parameters
    ----------
    paths : iterable of Path
        What the command reads and writes, and what must be a path.
    stores : iterable of Path or Url
        What it reads and what may be a URL.

    Raises
    ------
    ConfigError
        If one of `paths` is a URL, or a path is relative and this process is a job.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # what Ray's job server sets
    local = []
    for path in paths:
        where = location(path)
        if isinstance(where, Url):
            raise ConfigError(
                f"{where} is a URL, and only the store that train, sample and their kin read may "
                "be one",
                "give a path of this machine, and copy inputs here or outputs away with "
                f"{_HOW_TO_COPY[where.scheme]}",
            )
        local.append(where)
    for path in [*local, *(where for where in stores if isinstance(where, Path))]:
        if in_job and not path.is_absolute():
            raise ConfigError(
                f"the path {path} is relative, and a job runs in a copy of the working folder",
                "give an absolute path on storage that every node sees",
            )


def check_seen(inputs: Sequence[Location] = (), outputs: Sequence[Path] = ()) -> None:
    """Refuse paths that one of the cluster's nodes does not see; call it with Ray connected.

    Parameters
    ----------
    inputs : sequence of Path or Url
        What is read; exists. URLs are not looked for: whoever opens one says what is wrong.
    outputs : sequence of Path
        What will be written.

    Raises
    ------
    ConfigError
        If a node does not see a path: it is then named, and what to do.
    """
    import ray

    nodes = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) > 1:
        paths = [path.absolute() for path in inputs if isinstance(path, Path)]
        _look_everywhere(nodes, paths, [path.absolute() for path in outputs])


def _look_everywhere(nodes: dict[str, str], inputs: list[Path], outputs: list[Path]) -> None:
    """Have every node look for the inputs, and for a file laid beside each output."""
    probes: dict[str, Path] = {str(path): path for path in inputs}
    laid = []
    try:
        for path in outputs:
            folder = next(parent for parent in path.parents if parent.is_dir())
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=".rayvaec-seen-")
            os.close(descriptor)
            laid.append(name)
            probes[name] = path
        for node, missing in _missing_on(nodes, list(probes)).items():
            for name in missing:
                raise ConfigError(
                    f"node {nodes[node]} of the cluster does not see {probes[name]}",
                    "put it on a filesystem that all nodes share",
                )
    finally:
        for name in laid:
            os.unlink(name)


def _missing_on(nodes: dict[str, str], names: list[str]) -> dict[str, list[str]]:
    """Return which of `names` each node does not see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(names: list[str]) -> list[str]:
        return [name for name in names if not os.path.exists(name)]

    remote = ray.remote(num_cpus=0)(look)
    answers = {
        node: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(names)
        for node in nodes
    }
    return {node: ray.get(answer, timeout=120) for node, answer in answers.items()}
