"""Processes that are killed: a worker, the driver, the head of a cluster."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
KILLS = 4


def test_a_killed_worker_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Any], workers: Callable[[], list[int]]
) -> None:
    train = command(2)
    train.until_step(500)
    kept, (first, _) = train.kept_step, workers()
    os.kill(first, signal.SIGKILL)
    train.finish()
    assert len(train.starts) == 2
    assert train.starts[1] >= kept > 0
    train.assert_same_bits(undisturbed(2))


def test_kills_in_the_midst_of_checkpoints_load_no_half_of_one(
    command: Callable[..., Any], undisturbed: Callable[..., Any], workers: Callable[[], list[int]]
) -> None:
    wide = {"n_hidden": 512, "max_epochs": 6, "checkpoint_steps": 25, "max_failures": -1}
    train = command(1, **wide)
    folder = train.path / "checkpoints"
    kept, halves, random_numbers = [0], 0, random.Random(0)
    for number in range(1, KILLS + 1):
        train.until(lambda n=number: len(train.starts) == n and train.kept_step > kept[-1])
        (worker,) = workers()
        train.until(lambda: any(folder.glob(".step_*.partial")), pause=0.001)
        time.sleep(random_numbers.uniform(0, 0.01))
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)
        kept.append(train.kept_step)
        halves += any(folder.glob(".step_*.partial"))
    train.finish()
    assert halves > 0, "no kill has left a half of a checkpoint"
    assert all(start >= step for start, step in zip(train.starts, kept, strict=True))
    train.assert_same_bits(undisturbed(1, **wide))


@pytest.fixture(scope="module")
def killed(
    launch: Callable[..., Any],
    descendants: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """A run on two workers whose driver was killed."""
    train = launch(tmp_path_factory.mktemp("killed") / "run", 2)
    train.until_step(500)
    # Ray's two agents follow a minute later; they do nothing.
    family = [pid for pid, name in descendants(train.process.pid) if b"Agent" not in name]
    train.process.kill()
    train.process.communicate()
    assert train.status == "running"
    end = time.monotonic() + 30
    while [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, "Ray outlives its driver"
        time.sleep(0.1)
    return train


def test_a_killed_driver_is_resumed_to_the_same_bits(
    killed: Any, command: Callable[..., Any], undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(killed.path, tmp_path / "run")
    train = command(2, "--resume")
    train.finish()
    assert train.starts[1:] == [killed.kept_step]
    train.assert_same_bits(undisturbed(2))


def test_a_killed_driver_is_resumed_by_fewer_workers(
    killed: Any, command: Callable[..., Any], undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(killed.path, tmp_path / "run")
    train = command(1, "--resume")
    train.finish()
    assert train.workers == [2, 1]
    assert train.starts[1:] == [killed.kept_step]
    train.assert_same_quality(undisturbed(2))


def test_a_run_whose_head_is_gone_ends_at_once_and_is_resumed(
    command: Callable[..., Any], undisturbed: Callable[..., Any], nodes: Callable[..., Any]
) -> None:
    with nodes(0, head_cpus=2) as cluster:
        train = command(2, address=cluster.address)
        train.until_step(500)
    code, text = train.wait(timeout=60)  # Ray itself ends the process
    assert code == 1, text
    assert "Traceback" not in text
    kept = train.kept_step
    with nodes(0, head_cpus=2) as cluster:
        again = command(2, "--resume", address=cluster.address)
        again.finish()
    assert again.starts[1:] == [kept]
    again.assert_same_bits(undisturbed(2))
