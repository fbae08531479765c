"""A store that takes a second an epoch, the command as a process, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "max_epochs": 40,
    "batch_size": 128,
    "checkpoint_steps": 50,
    "log_steps": 10,
    "resize_seconds": 5,
    "cpus_per_worker": 1,
    "patience": 0,
}
"""About a minute of training on one core: time enough to be disturbed."""


@pytest.fixture(scope="session")
def chaos_settings() -> dict[str, int]:
    return dict(SETTINGS)


@pytest.fixture(scope="session")
def chaos_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 20,000 cells and 400 genes."""
    from rayvaec.data.build import PrepareConfig, prepare
    from rayvaec.data.simulate import simulate

    folder = tmp_path_factory.mktemp("chaos")
    simulate(n_cells=20_000, n_genes=400, n_labels=4, seed=0).write_h5ad(folder / "atlas.h5ad")
    prepare([folder / "atlas.h5ad"], folder / "store", PrepareConfig(labels_key="cell_type"))
    return folder / "store"


class Command:
    """`rayvaec train` in a process of its own, which a test may kill."""

    def __init__(self, store: Path, out: Path, options: list[str], environment: dict[str, str]):
        given = {option.split("=")[1] for option in options if option.startswith("--set=")}
        settings = [f"--set={k}={v}" for k, v in SETTINGS.items() if k not in given]
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayvaec", "train", store, "--out", out, *settings, *options],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout: float = 400) -> tuple[int, str]:
        """Return the exit code and what was printed."""
        text, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, text

    def until(self, what: Callable[[], bool], timeout: float = 300) -> None:
        """Wait for something to happen while the command runs."""
        end = time.monotonic() + timeout
        while not what():
            if self.process.poll() is not None:
                pytest.fail(f"the command has ended:\n{self.process.communicate()[0]}")
            if time.monotonic() > end:
                self.process.kill()
                pytest.fail(f"nothing for {timeout} s:\n{self.process.communicate()[0]}")
            time.sleep(0.1)


@pytest.fixture
def command(chaos_store: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start `rayvaec train`; on a Ray of its own, or on the one at `address`."""
    started: list[Command] = []

    def start(*options: str, address: str = "", out: Path = tmp_path / "run") -> Command:
        environment = {"RAY_ADDRESS": address} if address else {}
        started.append(Command(chaos_store, out, list(options), environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture(scope="session")
def undisturbed(chaos_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train in peace with so many workers, once a session; returns the run."""
    runs: dict[tuple[Any, ...], Path] = {}
    folder = tmp_path_factory.mktemp("undisturbed")

    def train(num_workers: int, max_epochs: int = SETTINGS["max_epochs"]) -> Path:
        key = (num_workers, max_epochs)
        if key not in runs:
            out = folder / "{}_workers_{}_epochs".format(*key)
            options = ["--num-workers", str(num_workers), f"--set=max_epochs={max_epochs}"]
            code, text = Command(chaos_store, out, options, {}).wait()
            assert code == 0, text
            runs[key] = out
        return runs[key]

    return train
