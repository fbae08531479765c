"""Nodes that go and come, on a cluster of several nodes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayvaec.train.metrics import read_attempts, read_epochs, read_records

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs for work, and two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    from rayvaec.runtime import require_token

    require_token()
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run)), default=0)


def assert_same_minibatches(run: Path, reference: Path) -> None:
    """The records tell of the same steps, with losses that differ by rounding alone."""
    ours, theirs = read_records(run), read_records(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3), one["step"]
    best = [read_epochs(path)[-1]["val_elbo"] for path in (run, reference)]
    assert best[0] == pytest.approx(best[1], rel=0.002)


def assert_little_is_repeated(run: Path, seen: list[int]) -> None:
    """Each start went on from a checkpoint that was at most an interval behind what was seen."""
    starts = [attempt["step"] for attempt in read_attempts(run)][1:]
    for start, step in zip(starts, seen, strict=False):
        assert step - start <= 2 * 50, (starts, seen)


def test_a_run_shrinks_with_its_cluster_and_grows_again(
    cluster: Any, command: Callable[..., Any], undisturbed: Callable[..., Path]
) -> None:
    train = command("--num-workers", "1-2", "--set=max_epochs=90", address=cluster.address)
    run, seen = train.out, []
    train.until(lambda: last_step(run) > 300)
    seen.append(last_step(run))
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    train.until(lambda: len(read_attempts(run)) == 2, timeout=180)
    train.until(lambda: last_step(run) > seen[0] + 300)
    cluster.add_node(**NODE)
    train.until(lambda: len(read_attempts(run)) == 3, timeout=180)
    code, text = train.wait()
    assert code == 0, text
    assert [attempt["num_workers"] for attempt in read_attempts(run)] == [2, 1, 2]
    assert_little_is_repeated(run, seen)
    assert_same_minibatches(run, undisturbed(1, 90))
