"""A small store, the command as a process, clusters of nodes, and what runs leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rayvaec.model.saved import read_model
from rayvaec.training.checkpoint import newest_checkpoint
from rayvaec.training.records import read_attempts, read_epochs, read_records

SETTINGS = {
    "max_epochs": 10,
    "batch_size": 128,
    "n_hidden": 384,
    "checkpoint_steps": 100,
    "log_steps": 10,
    "resize_seconds": 2,
    "cpus_per_worker": 1,
    "patience": 0,
}
"""Some ten seconds of training on one core: time enough to be disturbed."""
GLOO_WORKER = Path(__file__).parents[1] / "training" / "gloo_worker.py"
TIMING = ("time", "cells_per_second", "wait_share")
FORMER_WORKERS_SECONDS = "15"
"""How long Ray tries to place as many workers as before, after it has lost one."""
MEMORY = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="session")
def chaos_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 20,000 cells and 200 genes: 141 steps an epoch."""
    from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
    from rayvaec.datasets import simulate

    folder = tmp_path_factory.mktemp("chaos")
    simulate(n_cells=20_000, n_genes=200, n_labels=4, seed=0).write_h5ad(folder / "atlas.h5ad")
    prepare([folder / "atlas.h5ad"], folder / "store", PrepareConfig(labels_key="cell_type"))
    return folder / "store"


class Run:
    """A run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in read_records(self.path)), default=0)

    @property
    def status(self) -> str:
        return json.loads((self.path / "run.json").read_text())["status"]

    @property
    def starts(self) -> list[int]:
        """The step from which workers started, each time."""
        return [attempt["step"] for attempt in read_attempts(self.path)]

    @property
    def workers(self) -> list[int]:
        """How many workers they were, each time."""
        return [attempt["num_workers"] for attempt in read_attempts(self.path)]

    @property
    def kept_step(self) -> int:
        """The step of the newest whole checkpoint."""
        newest = newest_checkpoint(self.path / "checkpoints")
        return 0 if newest is None else int(newest.name.removeprefix("step_"))

    def assert_same_bits(self, reference: Run) -> None:
        """The weights and everything recorded, but for times, are the same."""
        for name, value in reference.weights().items():
            assert torch.equal(self.weights()[name], value), name
        assert self.records() == reference.records()

    def assert_same_minibatches(self, reference: Run) -> None:
        """The same steps; with a tiny learning rate their losses differ by rounding alone."""
        ours, theirs = self.records(), reference.records()
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5), one["step"]

    def assert_same_quality(self, reference: Run) -> None:
        """The final ELBO agrees within 0.2 %."""
        ours, theirs = (read_epochs(run.path)[-1]["val_elbo"] for run in (self, reference))
        assert ours == pytest.approx(theirs, rel=0.002)

    def assert_whole(self) -> None:
        """Nothing is left of what was under way when something died."""
        assert self.status == "finished"
        hidden = {path.name for path in self.path.rglob(".*")}
        assert hidden <= {".validate_storage_marker"}, "Ray's own"

    def weights(self) -> dict[str, torch.Tensor]:
        return read_model(self.path / "last").module.state_dict()

    def records(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in record.items() if name not in TIMING}
            for record in read_records(self.path)
        ]


def with_settings(*options: str, **changes: Any) -> list[str]:
    """Return options of `rayvaec train`: `SETTINGS`, with changes."""
    return [*(f"--set={name}={value}" for name, value in {**SETTINGS, **changes}.items()), *options]


class Command(Run):
    """`rayvaec train` in a process of its own, which a test may kill."""

    def __init__(self, store: Path, out: Path, options: Sequence[str], environment: dict[str, str]):
        super().__init__(out)
        words = [store, "--out", out, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayvaec", "train", *words],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout: float = 200) -> tuple[int, str]:
        """Return the exit code and what was printed."""
        text, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, text

    def finish(self) -> None:
        """Wait for the end; it is a good one."""
        code, text = self.wait()
        assert code == 0, text
        self.assert_whole()

    def until(self, what: Callable[[], bool], timeout: float = 200, pause: float = 0.1) -> None:
        """Wait for something to happen while the command runs."""
        end = time.monotonic() + timeout
        while not what():
            if self.process.poll() is not None:
                pytest.fail(f"the command has ended:\n{self.process.communicate()[0]}")
            if time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"nothing for {timeout} s:\n{self.process.communicate()[0]}")
            time.sleep(pause)

    def until_step(self, step: int) -> None:
        """Wait until steps have been taken."""
        self.until(lambda: self.step >= step)


@pytest.fixture(scope="session")
def arguments() -> Callable[..., list[str]]:
    return with_settings


@pytest.fixture(scope="session")
def run_at() -> type[Run]:
    return Run


@pytest.fixture(scope="session")
def launch(chaos_store: Path) -> Iterator[Callable[..., Command]]:
    """Start `rayvaec train` into a folder; on a Ray of its own, or on the one at `address`."""
    started: list[Command] = []

    def start(
        out: Path,
        num_workers: int | str,
        *options: str,
        address: str = "",
        store: Path = chaos_store,
        **changes: Any,
    ) -> Command:
        environment = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": FORMER_WORKERS_SECONDS}
        if address:
            environment["RAY_ADDRESS"] = address
        settings = with_settings(*options, num_workers=num_workers, **changes)
        started.append(Command(store, out, settings, environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture
def command(launch: Callable[..., Command], tmp_path: Path) -> Callable[..., Command]:
    """As `launch`, into a folder of the test's own."""

    def start(*options: int | str, out: Path = tmp_path / "run", **given: Any) -> Command:
        return launch(out, *options, **given)

    return start


@pytest.fixture(scope="session")
def undisturbed(chaos_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train in peace, without Ray, once a session for the same settings; returns the run."""
    runs: dict[str, Run] = {}
    folder = tmp_path_factory.mktemp("undisturbed")

    def train(num_workers: int, **changes: Any) -> Run:
        settings = {**SETTINGS, "num_workers": num_workers, **changes}
        key = json.dumps(settings)
        if key not in runs:
            out = folder / f"run_{len(runs)}"
            (out / "checkpoints").mkdir(parents=True)
            given = {"store": str(chaos_store), "run": str(out), "settings": settings}
            ranks = [
                subprocess.Popen([sys.executable, GLOO_WORKER], stdin=subprocess.PIPE, text=True)
                for _ in range(num_workers)
            ]
            for i, rank in enumerate(ranks):
                assert rank.stdin is not None
                with rank.stdin as jobs:
                    jobs.write(json.dumps({**given, "rank": i, "world_size": num_workers}))
            assert [rank.wait(200) for rank in ranks] == [0] * num_workers
            runs[key] = Run(out)
        return runs[key]

    return train


@pytest.fixture
def workers(descendants: Callable[[int], Iterator[tuple[int, bytes]]]) -> Callable[[], list[int]]:
    """Find the processes of the workers of all runs that were started from here."""

    def find() -> list[int]:
        family = descendants(os.getpid())
        return sorted({pid for pid, name in family if b"RayTrainWorker" in name})

    return find


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def nodes() -> Callable[..., Any]:
    """Start a cluster: a head, and nodes of one CPU."""

    @contextmanager
    def start(number: int, head_cpus: int = 0, job_server: bool = False) -> Iterator[Any]:
        from ray.cluster_utils import Cluster

        from rayvaec.cluster import require_token

        require_token()
        head = {"num_cpus": head_cpus, "include_dashboard": job_server, **MEMORY}
        if job_server:
            head |= {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(number):
                cluster.add_node(num_cpus=1, **MEMORY)
            yield cluster
        finally:
            cluster.shutdown()

    return start
