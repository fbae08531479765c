"""Ray Serve deployment of the endpoint, its builder for config files, and `run`."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import Metric
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from rayvaec.cluster import ray_session, usable_cpus
from rayvaec.data.registry import Registry
from rayvaec.errors import ConfigError, RayvaecError
from rayvaec.inference.trained_model import load_model
from rayvaec.serving.autoscaling import cpus_per_replica, replica_range, scaling
from rayvaec.serving.engine.engine import Engine, Threads
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware import load_shedding
from rayvaec.serving.middleware.auth import TOKEN_VARIABLE, check_bind, token_digest
from rayvaec.serving.middleware.hosts import AllowedHosts
from rayvaec.serving.middleware.limits import Limits
from rayvaec.serving.model_names import ONLY_NAME, check_names
from rayvaec.serving.observability.logs import hide_values, log_with_serve
from rayvaec.serving.observability.metrics import Metrics
from rayvaec.serving.signals import StoppedEarly, stopped_by_signals

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "rayvaec"
_METRICS_TIMEOUT_S = 5.0
HEALTH_PLACES = 64
"""Requests that reach a replica beyond those its gate lets in: health checks, and refusals."""


class ServeArgs(BaseModel):
    """What `build` needs; the `args` of an application in a Serve config file.

    Parameters
    ----------
    model : str, optional
        Folder of the saved model, as every node sees it.
    models : dict, optional
        In place of `model`: folders of several models, by the name that each is served under.
    token_file : str, optional
        File with the token, as every node sees it; by default RAYVAEC_TOKEN of the replicas.
    token_sha256 : str, optional
        SHA-256 of the token, in place of the token itself.
    allowed_hosts : list of str
        Host names that requests may be sent to, beside loopback; with a token, any by default.
    num_replicas : int or str
        Processes that hold the models and answer requests; ``"1-4"``: as many as the load asks for.
    cpus_per_replica : float
        CPUs that Ray sets aside for each; a replica draws on so many threads.
    use_gpu : bool
        Whether each takes a GPU.
    enable_h5ad_uploads : bool
        Whether requests may be h5ad files.
    limits : Limits
        Bounds on requests, per replica.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    models: dict[str, str] = {}
    token_file: str | None = None
    token_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    allowed_hosts: list[str] = []
    num_replicas: int | str = 1
    cpus_per_replica: float = Field(1.0, gt=0)
    use_gpu: bool = False
    enable_h5ad_uploads: bool = False
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.model is None) == (not self.models):
            raise ValueError("needs model: FOLDER or models: {NAME: FOLDER, ...}, one of the two")
        check_names(self.named_models)
        AllowedHosts(self.allowed_hosts, has_token=False)
        replica_range(self.num_replicas)
        return self

    @property
    def named_models(self) -> dict[str, str]:
        """Folders of all models, by name."""
        return self.models if self.model is None else {ONLY_NAME: self.model}


@serve.ingress()
class Endpoint:
    """A replica: it is routed to once its models are loaded and their kernels are compiled.

    Parameters
    ----------
    args : ServeArgs
        Where the models are and how to serve them.
    """

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(max(int(args.cpus_per_replica), 1))
        self._token_digest = args.token_sha256 or token_digest(args.token_file)
        self._allowed_hosts = args.allowed_hosts
        self._limits, threads = args.limits, Threads(args.limits)
        self._services: dict[str, Engine] = {}
        for name, folder in args.named_models.items():
            model = load_model(folder, "cuda" if args.use_gpu else "cpu")
            self._services[name] = Engine(
                model, args.limits, threads, h5ad_uploads=args.enable_h5ad_uploads
            )
            self._services[name].warm_up()
        self._metrics: Metrics | None = None
        log_with_serve()
        hide_values()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve calls this once the models are loaded."""
        # The proxy in front adds X-Request-ID to every answer.
        app = create_app(
            self._services,
            self._limits,
            self._token_digest,
            allowed_hosts=self._allowed_hosts,
            behind_proxy=True,
            replica=serve.get_replica_context().replica_id.unique_id,
            replicas=self._replicas,
        )
        self._metrics = app.state.metrics
        return app

    async def metrics(self) -> list[Metric]:
        """Return this replica's counts; the one that is asked for /metrics asks all for theirs."""
        return [] if self._metrics is None else self._metrics.collect()

    async def _replicas(self) -> list[list[Metric]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        answers = handle.broadcast("metrics").results_async(
            timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True
        )
        return [each for each in await answers if not isinstance(each, BaseException)]


def build(args: ServeArgs) -> serve.Application:
    """Build the Serve application: ``import_path: rayvaec.serving.deployment:build`` in a config.

    Parameters
    ----------
    args : ServeArgs
        Where the models are and how to serve them.

    Returns
    -------
    serve.Application
    """
    # From a config file Serve passes a plain dict: it does not resolve the annotation, a string.
    args = ServeArgs.model_validate(args)
    actor: dict[str, Any] = {
        "num_cpus": args.cpus_per_replica,
        # OpenMP's threads spin where they wait, which on busy CPUs (a server's are: there is the
        # proxy) keeps the thread that they wait for from running; draws take 3 to 10 times as long.
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
    }
    if args.use_gpu:
        actor["num_gpus"] = 1
    return serve.deployment(
        name="Endpoint",
        ray_actor_options=actor,
        **scaling(args.num_replicas),
        # The gate within refuses with a reason; Serve's own queue is the wall behind it.
        max_ongoing_requests=args.limits.max_requests + HEALTH_PLACES,
        max_queued_requests=16 * args.limits.max_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.limits.timeout_s + 60.0,
        max_constructor_retry_count=3,
        # The endpoint writes a line for each request itself; it knows why one was refused.
        logging_config={"enable_access_log": False},
    )(Endpoint).bind(args)


def run(
    models: Mapping[str, str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int | str = 1,
    use_gpu: bool = False,
    enable_h5ad_uploads: bool = False,
    token_file: str | Path | None = None,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve models until SIGINT or SIGTERM; requests in work are finished before it returns.

    Parameters
    ----------
    models : mapping of str or Path
        Folders of the saved models, by the names that they are served under.
    host : str
        Address to listen on; any but a loopback address needs a token.
    port : int
        Port to listen on, 0 for any that is free.
    num_replicas : int or str
        As in `ServeArgs`.
    use_gpu : bool
        Whether each replica takes a GPU.
    enable_h5ad_uploads : bool
        Whether requests may be h5ad files, which are the largest attack surface.
    token_file : str or Path, optional
        File with the token that requests need; by default RAYVAEC_TOKEN, if it is set.
    allowed_hosts : sequence of str
        Host names that requests may be sent to, beside loopback; with a token, any by default.

    Raises
    ------
    ConfigError
        If the address may not or cannot be listened on, or Ray has too few CPUs or GPUs.
    ModelError
        If there is no model in one of the folders.
    RayvaecError
        If the replicas do not start.
    """
    check_names(models)
    AllowedHosts(allowed_hosts, has_token=False)
    paths = {name: Path(folder).resolve() for name, folder in models.items()}
    registries = {name: load_model(path).registry for name, path in paths.items()}
    digest = token_digest(token_file)
    check_bind(host, digest is not None)
    _, most = replica_range(num_replicas)
    joined = "RAY_ADDRESS" in os.environ
    if not joined:
        port = check_port(host, port)
        cpus = cpus_per_replica(most, use_gpu, *_own_resources())
        os.environ.update({**load_shedding.environment(most * Limits().max_requests), **os.environ})
    with stopped_by_signals() as stopped:
        folders = ", ".join(map(str, paths.values()))
        print(f"loading {folders} on {num_replicas} replica(s)", flush=True)
        try:
            with ray_session():
                stopped.take_signals()  # Ray puts its own handler for SIGTERM
                if joined:
                    cpus = cpus_per_replica(most, use_gpu, *_cluster_resources())
                args = ServeArgs(
                    models={name: str(path) for name, path in paths.items()},
                    token_sha256=digest,
                    allowed_hosts=list(allowed_hosts),
                    num_replicas=num_replicas,
                    cpus_per_replica=1.0 if joined else cpus,
                    use_gpu=use_gpu,
                    enable_h5ad_uploads=enable_h5ad_uploads,
                )
                with _deployed(args, host, port):
                    _announce(registries, host, port, digest is not None)
                    stopped.wait()
                    print("stopping: finishing the requests in work", flush=True)
        except StoppedEarly:
            print("stopped before the endpoint was ready", flush=True)


def check_port(host: str, port: int) -> int:
    """Refuse an address that cannot be listened on, before anything is started.

    Parameters
    ----------
    host : str
        Address to listen on.
    port : int
        Port to listen on, 0 for any that is free.

    Returns
    -------
    int
        The port, a free one for 0.

    Raises
    ------
    ConfigError
        If the port is taken, may not be used, or the address is not this machine's.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port={port} is not a port", "give a number from 0 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                fix = "stop what listens there, or choose another --port"
                raise ConfigError(f"port {port} on {host} is in use", fix) from error
            raise ConfigError(
                f"cannot listen on {host} port {port} ({error.strerror})",
                "give an address of this machine and a port above 1023",
            ) from error
        return probe.getsockname()[1]


def _own_resources() -> tuple[float, float]:
    """Return the CPUs and GPUs of this machine."""
    import torch

    return float(usable_cpus()), float(torch.cuda.device_count())


def _cluster_resources() -> tuple[float, float]:
    """Return the CPUs and GPUs of the cluster that this process has joined."""
    import ray

    have = ray.cluster_resources()
    return have.get("CPU", 0.0), have.get("GPU", 0.0)


@contextmanager
def _deployed(args: ServeArgs, host: str, port: int) -> Iterator[None]:
    """Run a block with the endpoint up; take it down afterwards, requests in work first."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="EveryNode" if "RAY_ADDRESS" in os.environ else "HeadOnly",
        http_options={"host": host, "port": port},
    )
    try:
        try:
            serve.run(build(args), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise RayvaecError(
                f"the replicas did not start: {_last_line(error)}",
                "see the Serve logs of Ray's session",
            ) from error
        yield
    finally:
        # Serve itself ends with the Ray that was started for it; that of a cluster stays.
        try:
            serve.delete(NAME)
        except TimeoutError:
            print("requests were still in work after 60 s and are cut", flush=True)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _announce(registries: Mapping[str, Registry], host: str, port: int, token: bool) -> None:
    """Say where the endpoint is and show a request that works."""
    address = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)  # noqa: S104
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    name, first = next(iter(registries.items()))
    route = f"/v1/models/{name}/generate" if len(registries) > 1 else "/v1/generate"
    label = (first.labels or ("",))[0]
    body = f'{{"label": {_json_string(label)}, "n_cells": 1, "library": 1000, "seed": 0}}'
    header = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if token else ""
    sizes = [f"{r.n_genes} genes, {r.n_labels} labels" for r in registries.values()]
    if len(registries) > 1:
        sizes = [f"{each}: {size}" for each, size in zip(registries, sizes, strict=True)]
    print(
        f"ready: {url} ({'; '.join(sizes)})\n"
        f"page:  {url}/\n"
        f"docs:  {url}/docs\n"
        f"try:   curl -s {url}{route}{header} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}",
        flush=True,
    )


def _json_string(text: str) -> str:
    import json

    return json.dumps(text)
