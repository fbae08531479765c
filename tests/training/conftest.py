from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gloo_worker import FolderSink

from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.loop import Task, TrainLoop

SMALL = {"batch_size": 64, "n_hidden": 16, "max_epochs": 3, "log_steps": 5}
"""Settings that make training on the small store take about a second."""


ALONE = Ranks()


@pytest.fixture(scope="session")
def small_settings() -> dict[str, Any]:
    return dict(SMALL)


@pytest.fixture
def make_loop(store_path: Path, tmp_path: Path) -> Callable[..., TrainLoop]:
    """Make a loop of one worker; other keyword arguments are settings."""

    def make(
        run: str = "run", dies_at: str = "", ranks: Ranks = ALONE, **settings: Any
    ) -> TrainLoop:
        folder = tmp_path / run
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = TrainConfig.from_json({**SMALL, **settings})
        task = Task(store_path, folder, config)
        return TrainLoop(task, ranks, FolderSink(folder / "checkpoints", dies_at))

    return make


@pytest.fixture(scope="session")
def run_ranks(store_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Train with several processes over gloo; they start once, which takes longer than to train.

    `faults` are arguments of `gloo_worker.train_rank`. Gives what each rank said.
    """
    script = str(Path(__file__).parent / "gloo_worker.py")
    workers: list[subprocess.Popen[str]] = []

    def run_all(
        run: Path,
        world_size: int,
        dies_at: str = "",
        store: Path = store_path,
        faults: dict[str, Any] | None = None,
        **settings: Any,
    ) -> list[str]:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "sync").unlink(missing_ok=True)
        arguments = {
            "world_size": world_size,
            "store": str(store),
            "run": str(run),
            "settings": {**SMALL, **settings},
            "dies_at": dies_at,
            **(faults or {}),
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        while len(workers) < world_size:
            workers.append(subprocess.Popen([sys.executable, script], **pipes))
        for rank, worker in enumerate(workers[:world_size]):
            print(json.dumps({"rank": rank, **arguments}), file=worker.stdin, flush=True)
        said = [cast(TextIO, worker.stdout).readline().strip() for worker in workers[:world_size]]
        if not all(said):
            end()
            pytest.fail(f"of the ranks, these failed: {[not each for each in said]}")
        if faults is None:
            assert said == ["done"] * world_size
        return said

    def end() -> None:
        while workers:
            worker = workers.pop()
            worker.kill()
            worker.communicate()

    yield run_all
    end()
