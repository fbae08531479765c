"""Pool of Ray actors for bulk work: placement, calls, failure messages."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayvaec.errors import RayvaecError
from rayvaec.inference.bulk.run_state import RunState
from rayvaec.util.atomic import FULL_DISK
from rayvaec.util.progress import Progress

logger = logging.getLogger("rayvaec")

RESTARTS = 3


@contextmanager
def actors(worker: type, work: Any, num_workers: int, use_gpu: bool) -> Iterator[list[Any]]:
    """Start actors; one that dies is started again, and its task with it.

    Parameters
    ----------
    worker : type
        Class of the actors, whose `call` may be repeated.
    work : object
        The one argument of its constructor.
    num_workers : int
        Actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.

    Yields
    ------
    list of Ray actor handles
    """
    import ray

    remote: Any = ray.remote(worker).options(
        num_cpus=1, num_gpus=int(use_gpu), max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    workers: list[Any] = [remote.remote(work) for _ in range(num_workers)]
    try:
        yield workers
    finally:
        for started in workers:
            ray.kill(started)


@dataclass(frozen=True)
class Crew:
    """Workers, and the record of what they have finished.

    Parameters
    ----------
    workers : list of Ray actor handles
        From `actors`.
    state : RunState
        Where finished calls are recorded.
    """

    workers: list[Any]
    state: RunState

    def run(
        self,
        stage: str,
        calls: Mapping[int, tuple[Any, ...]],
        sizes: Mapping[int, int],
        unit: str,
    ) -> dict[int, Any]:
        """Have the workers make those of the calls that are not recorded; return all records.

        Parameters
        ----------
        stage : {"regions", "files"}
            What the calls make.
        calls : mapping of int to tuple
            Method of the task, and its arguments, of every call, by number.
        sizes : mapping of int to int
            How much work each call is, for the progress line.
        unit : str
            Of the sizes.

        Returns
        -------
        dict of int to JSON-able
            What the calls returned, by number.
        """
        records = self.state.finished(stage, calls)
        missing = {item: call for item, call in calls.items() if item not in records}
        if records:
            logger.info("going on: %d of %d %s are finished", len(records), len(calls), stage)
        task = {"regions": "computing", "files": "writing"}[stage]
        with Progress(sum(sizes[item] for item in missing), unit, task) as bar:
            for item, record in _results(self.workers, missing):
                self.state.finish(stage, item, record)
                records[item] = record
                bar.advance(sizes[item])
        return records


def _results(workers: list[Any], calls: Mapping[int, tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Yield items and results as they come; after an error, those under way and then the error."""
    import ray

    # A second call waits at every worker, which so need not wait for the record of its first.
    waiting, idle = list(calls.items())[::-1], [*workers, *workers]
    running: dict[Any, tuple[int, Any]] = {}
    failure: Exception | None = None
    while running or (waiting and failure is None):
        while idle and waiting and failure is None:
            (item, call), worker = waiting.pop(), idle.pop()
            running[worker.call.remote(*call)] = item, worker
        (done,), _ = ray.wait(list(running), num_returns=1)
        item, worker = running.pop(done)
        idle.append(worker)
        try:
            result = ray.get(done)
        except ray.exceptions.RayError as error:
            failure = failure or error
        else:
            yield item, result
    if failure is not None:
        raise failure


def explained(error: Exception, kept: Path) -> Exception:
    """Return what went wrong in a worker as the error that the user should see.

    Parameters
    ----------
    error : Exception
        What was raised around the calls.
    kept : Path
        Folder of the finished regions.

    Returns
    -------
    Exception
    """
    from ray.exceptions import RayActorError, RayTaskError

    again = f"finished regions are kept in {kept}: give the same command again to go on"
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayvaecError):
        return cause
    if isinstance(cause, RayActorError):
        return RayvaecError(f"a worker died more than {RESTARTS} times ({cause})", again)
    # numpy's own error of a short write has no number.
    short = re.search(r"\d+ requested and \d+ written", str(cause))
    if isinstance(cause, OSError) and (cause.errno in FULL_DISK or short):
        return RayvaecError(f"no space is left for the output ({cause})", f"free some; {again}")
    return RayvaecError(f"bulk work failed: {type(cause).__name__}: {cause}", again)
