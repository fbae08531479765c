"""The workflow of docs/cluster.md, on a head of its own: prepare, train, sample and serve."""

from __future__ import annotations

import json
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anndata
import httpx
import pytest
import yaml

from rayvaec.serving.middleware import load_shedding

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Head:
    """A running Ray head: where its dashboard is, and the environment that reaches it."""

    dashboard: str
    environment: dict[str, str]
    storage: Path

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def job(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        submit = ("ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".")
        return self.run(*submit, "--", "python", f"jobs/{script}.py", *arguments)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes_with(mark: str) -> list[int]:
    """Processes that were started with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def _wait_until_gone(mark: str, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := _processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head on loopback with ports, folder and token of its own; nothing of it stays."""
    storage = tmp_path_factory.mktemp("storage")
    token = storage / "ray-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as folder:
        environment = {
            **{name: v for name, v in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # it would wait for the replicas
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAYVAEC_STORAGE": str(storage),
            **load_shedding.environment(places=1),
        }
        names = ("port", "dashboard-port", "ray-client-server-port", "node-manager-port")
        names += ("object-manager-port", "dashboard-agent-listen-port", "metrics-export-port")
        names += ("dashboard-agent-grpc-port", "runtime-env-agent-port")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "2"]
        command += ["--dashboard-host", "127.0.0.1", "--object-store-memory", str(200 * 2**20)]
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]  # any that are free
        command += [word for name, port in ports.items() for word in (f"--{name}", str(port))]
        with (storage / "head.log").open("w") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
            _wait_for(dashboard, token.read_text(), process, storage / "head.log")
            yield Head(dashboard, environment, storage)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            left = _wait_until_gone(folder, 30)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            _wait_until_gone(folder, 10)
        assert not left, "the head left processes behind"


def _wait_for(dashboard: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            answer = httpx.get(
                f"{dashboard}/api/version", headers={"Authorization": f"Bearer {token}"}
            )
        except httpx.TransportError:
            time.sleep(0.5)
            continue
        if answer.status_code == 200:
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_the_workflow_from_h5ad_to_a_served_draw(head: Head, atlas_h5ad: Path) -> None:
    unauthorised = httpx.get(f"{head.dashboard}/api/jobs/")
    assert unauthorised.status_code in (401, 403)

    job = head.job(
        "prepare", str(atlas_h5ad), "--out", "$RAYVAEC_STORAGE/store", "--labels-key", "cell_type"
    )
    assert job.returncode == 0, job.stdout
    assert "1,200" in job.stdout
    assert (head.storage / "store" / "zarr.json").exists()

    job = head.job(
        "train",
        "$RAYVAEC_STORAGE/store",
        "--out",
        "$RAYVAEC_STORAGE/run",
        "--max-epochs",
        "1",
        "--batch-size",
        "256",
        "--num-workers",
        "1",
    )
    assert job.returncode == 0, job.stdout
    assert (head.storage / "run" / "model" / "model.safetensors").exists()
    metrics = (head.storage / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("val_elbo" in json.loads(line) for line in metrics)

    job = head.job(
        "sample",
        "$RAYVAEC_STORAGE/run/model",
        "$RAYVAEC_STORAGE/store",
        "--out",
        "$RAYVAEC_STORAGE/draws.zarr",
        "--n-samples",
        "2",
        "--num-workers",
        "2",
    )
    assert job.returncode == 0, job.stdout
    assert "\r" not in job.stdout  # log lines, no moving bars
    draws = anndata.read_zarr(head.storage / "draws.zarr")
    assert draws.shape == (1200, 120)
    assert set(draws.layers) == {"sample_0", "sample_1"}

    _serve(head)


def _serve(head: Head) -> None:
    """Deploy jobs/serve.yaml and then KubeRay's Serve section; ask for draws after each."""
    plain = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    manifest = yaml.safe_load((ROOT / "jobs" / "kuberay" / "service.yaml").read_text())
    (port,) = _free_ports(1)
    for config in (plain, yaml.safe_load(manifest["spec"]["serveConfigV2"])):
        token = head.storage / f"serve-token-{secrets.token_hex(4)}"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        (application,) = config["applications"]
        application["args"] |= {
            "model": str(head.storage / "run" / "model"),
            "token_file": str(token),
            "cpus_per_replica": 0.4,
        }
        (head.storage / "serve.yaml").write_text(yaml.safe_dump(config))
        deployed = head.run(
            "serve", "deploy", "--address", head.dashboard, str(head.storage / "serve.yaml")
        )
        assert deployed.returncode == 0, deployed.stdout
        url = f"http://127.0.0.1:{port}{application.get('route_prefix', '/').rstrip('/')}"
        _ask(url, token.read_text(), head)


def _ask(url: str, token: str, head: Head) -> None:
    """Wait until the deployed endpoint takes its token, and ask for draws without and with it."""
    _wait_until_ready(url, token, head)
    model = anndata.read_zarr(head.storage / "draws.zarr")
    request = {
        "cells": {"indptr": [0, 2], "indices": [0, 3], "counts": [5, 1]},
        "labels": [str(model.obs["cell_type"].iloc[0])],
        "n_samples": 2,
        "seed": 1,
    }
    refused = httpx.post(f"{url}/v1/sample", json=request, timeout=60)
    assert refused.status_code == 401
    with (
        httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=60) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        answer = client.post(f"{url}/v1/sample", json=request)
        assert answer.status_code == 200, answer.text
        # The replicas have places for all of these, the proxy for one.
        request |= {"n_samples": 20_000, "reduce": ["mean"]}
        several = pool.map(lambda _: client.post(f"{url}/v1/sample", json=request), range(8))
        assert {answer.status_code for answer in several} == {200, 429}


def _wait_until_ready(url: str, token: str, head: Head) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            authorization = {"Authorization": f"Bearer {token}"}
            described = httpx.get(f"{url}/v1/model", headers=authorization)
            if described.status_code == 200 and httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(head.run("serve", "status", "--address", head.dashboard).stdout)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("prepare", ("atlas.h5ad", "--out", "/there/store", "--labels-key", "cell_type")),
        ("train", ("/there/store", "--out", "run")),
        ("sample", ("/there/model", "/there/store", "--out", "out.zarr", "--n-samples", "1")),
    ],
)
def test_a_relative_path_in_a_job_is_a_mistake(
    script: str,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is relative, and a job runs in a copy of the working folder; give an absolute" in line
