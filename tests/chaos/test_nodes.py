"""Nodes that go and come, on a cluster of several nodes on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
SLOW = {"lr": 1e-6, "max_epochs": 20}
"""Learning nothing, so that rounding does not grow and the losses tell of the minibatches."""


def remove_a_node(cluster: Any) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def add_a_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


def test_a_run_of_a_fixed_number_waits_for_another_node(
    command: Callable[..., Any], undisturbed: Callable[..., Any], nodes: Callable[..., Any]
) -> None:
    with nodes(2) as cluster:
        train = command(2, address=cluster.address)
        train.until_step(500)
        kept = train.kept_step
        remove_a_node(cluster)
        add_a_node(cluster)
        train.finish()
    assert train.workers == [2, 2]
    assert train.starts[1] >= kept > 0
    train.assert_same_bits(undisturbed(2))


def test_a_run_shrinks_with_its_cluster_and_grows_again(
    command: Callable[..., Any], undisturbed: Callable[..., Any], nodes: Callable[..., Any]
) -> None:
    with nodes(2) as cluster:
        train = command("1-2", address=cluster.address, **SLOW)
        train.until_step(300)
        kept = train.kept_step
        remove_a_node(cluster)
        train.until(lambda: len(train.starts) == 2)
        train.until_step(train.starts[1] + 300)
        add_a_node(cluster)
        train.until(lambda: len(train.starts) == 3)
        train.finish()
    assert train.workers == [2, 1, 2]
    assert train.starts[1] >= kept > 0
    assert train.starts[2] > train.starts[1]
    train.assert_same_minibatches(undisturbed(1, **SLOW))


def test_a_kill_while_a_run_grows(
    command: Callable[..., Any],
    undisturbed: Callable[..., Any],
    nodes: Callable[..., Any],
    workers: Callable[[], list[int]],
) -> None:
    with nodes(2) as cluster:
        train = command("2-8", address=cluster.address, max_epochs=20)
        train.until_step(300)
        before, kept = set(workers()), train.kept_step
        add_a_node(cluster)
        train.until(lambda: len(set(workers()) - before) == 3)
        os.kill(max(set(workers()) - before), signal.SIGKILL)
        train.finish()
    assert train.workers[0] == 2
    assert train.workers[-1] == 3
    assert train.starts[1] >= kept > 0
    train.assert_same_quality(undisturbed(2, max_epochs=20))
