"""Processes that are killed: a worker, the driver, the head of a cluster."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayvaec.model.saved import read_model
from rayvaec.train.metrics import read_attempts, read_records

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
TIMING = ("time", "cells_per_second", "wait_share")


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run)), default=0)


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def assert_same_bits(run: Path, reference: Path) -> None:
    ours, theirs = (read_model(path / "last").module.state_dict() for path in (run, reference))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    one, other = (
        [{k: v for k, v in record.items() if k not in TIMING} for record in read_records(path)]
        for path in (run, reference)
    )
    assert one == other


def assert_little_is_repeated(run: Path, seen: int) -> None:
    start = read_attempts(run)[-1]["step"]
    assert start > 0
    assert seen - start <= 2 * 50, "checkpoints are taken every 50 steps, the last may be lost"


def test_a_killed_worker_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Path], descendants: Callable[..., Any]
) -> None:
    train = command("--num-workers", "2")
    train.until(lambda: last_step(train.out) > 500)
    seen, family = last_step(train.out), descendants(train.process.pid)
    workers = [pid for pid, name in family if b"RayTrainWorker" in name]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, text = train.wait()
    assert code == 0, text
    assert len(read_attempts(train.out)) == 2
    assert_little_is_repeated(train.out, seen)
    assert_same_bits(train.out, undisturbed(2))


def test_a_killed_driver_is_resumed_to_the_same_bits(
    command: Callable[..., Any], undisturbed: Callable[..., Path], descendants: Callable[..., Any]
) -> None:
    train = command("--num-workers", "2")
    train.until(lambda: last_step(train.out) > 500)
    family = [pid for pid, _ in descendants(train.process.pid)]
    seen = last_step(train.out)
    train.process.kill()
    train.process.communicate()
    assert status(train.out) == "running"
    again = command("--num-workers", "2", "--resume")
    code, text = again.wait()
    assert code == 0, text
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()], "Ray outlived its driver"
    assert_little_is_repeated(train.out, seen)
    assert_same_bits(train.out, undisturbed(2))
    assert status(train.out) == "finished"


def test_a_run_whose_head_is_gone_ends_at_once_and_is_resumed(
    command: Callable[..., Any], undisturbed: Callable[..., Path]
) -> None:
    from ray.cluster_utils import Cluster

    from rayvaec.runtime import require_token

    require_token()
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    train = command("--num-workers", "2", address=cluster.address)
    train.until(lambda: last_step(train.out) > 500)
    seen = last_step(train.out)
    cluster.shutdown()
    code, text = train.wait(timeout=60)  # Ray itself ends the process
    assert code == 1, text
    assert "Traceback" not in text
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        code, text = command("--num-workers", "2", "--resume", address=cluster.address).wait()
    finally:
        cluster.shutdown()
    assert code == 0, text
    assert_little_is_repeated(train.out, seen)
    assert_same_bits(train.out, undisturbed(2))
