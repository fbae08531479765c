from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # small_cells


class _Host:
    """Holds one worker after another, in a process that has imported everything."""

    def start(self, worker: type, work: Any) -> None:
        self._worker = worker(work)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)


class _Hosted:
    """Looks like the handle of an actor of the worker's own class."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: self._host.call.remote(method, *given))


@pytest.fixture(scope="session")
def lasting_actors(ray_local: None) -> Iterator[Callable[..., AbstractContextManager[list[Any]]]]:
    """What stands for `rayvaec.inference.bulk.actors.actors` where no worker dies.

    A new process would import torch first, which takes longer than its work.
    """
    import ray

    hosts: list[Any] = []

    @contextmanager
    def actors(worker: type, work: Any, num_workers: int, use_gpu: bool) -> Iterator[list[Any]]:
        assert not use_gpu
        while len(hosts) < num_workers:
            hosts.append(ray.remote(_Host).options(num_cpus=0).remote())
        ray.get([host.start.remote(worker, work) for host in hosts[:num_workers]])
        yield [_Hosted(host) for host in hosts[:num_workers]]

    yield actors
    for host in hosts:
        ray.kill(host)
