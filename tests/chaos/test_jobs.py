"""A training that is a job of a cluster, one of whose nodes goes."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
JOB = Path(__file__).parents[2] / "jobs" / "train.py"


def test_a_job_goes_on_with_the_nodes_that_are_left(
    nodes: Callable[..., Any],
    chaos_store: Path,
    arguments: Callable[..., list[str]],
    run_at: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    from ray.job_submission import JobSubmissionClient

    run = run_at(tmp_path / "run")
    words = [sys.executable, JOB, chaos_store, "--out", run.path]
    words += arguments(num_workers="1-2", resize_seconds=600)
    with nodes(2, job_server=True) as cluster:
        client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
        short = {"env_vars": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}}
        jobs = []

        def submit() -> bool:
            with suppress(RuntimeError):  # the agent that starts jobs takes a while to be there
                entrypoint = shlex.join(map(str, words))
                jobs.append(client.submit_job(entrypoint=entrypoint, runtime_env=short))
            return bool(jobs)

        wait_until(submit, timeout=60)
        (job,) = jobs
        wait_until(lambda: run.step > 300)
        kept = run.kept_step
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        wait_until(lambda: client.get_job_status(job).is_terminal())
        log = client.get_job_logs(job)
        assert client.get_job_info(job).driver_exit_code == 0, log
    run.assert_whole()
    assert run.workers == [2, 1]
    assert run.starts[1] >= kept > 0
    assert f"went on from step {run.starts[1]} with 1 worker" in log
    assert "Traceback" not in log
    print(log)


def wait_until(what: Callable[[], bool], timeout: float = 200) -> None:
    end = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)
