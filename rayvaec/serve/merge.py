"""Requests that wait together are worked on together.

`ray.serve.batch` forms its batches before the one in work is done: what arrives in the meantime
waits in many small batches. Here everything that waits when the worker becomes free is taken at
once, so batches grow with the load, and a lone request waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol


class Sized(Protocol):
    """What can be merged: work of a known number of rows."""

    @property
    def n_rows(self) -> int:
        """Rows of the work."""
        ...


class Merger:
    """Runs work in a thread, off the event loop, as much at a time as waits and fits.

    Parameters
    ----------
    work : callable
        Takes a list of jobs, returns their results in the same order; an exception among them
        is raised to the request whose job it is.
    max_rows : int
        Most rows of one call to `work`; a larger job runs alone.
    executor : Executor
        The thread, which other mergers may use as well: their calls take turns.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        max_rows: int,
        executor: Executor,
    ) -> None:
        self._work, self._max_rows, self._executor = work, max_rows, executor
        self._waiting: deque[tuple[Sized, asyncio.Future[Any]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Jobs that are not yet at work."""
        return len(self._waiting)

    async def submit(self, job: Sized) -> Any:
        """Run a job, perhaps together with others.

        Parameters
        ----------
        job : Sized
            What `work` understands.

        Returns
        -------
        Any
            What `work` returned for it.

        Raises
        ------
        Exception
            What `work` returned for it, if that is an exception, or raised.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._take():
                jobs = [job for job, _ in batch]
                for (_, future), outcome in zip(batch, await self._outcomes(jobs), strict=True):
                    if future.done():  # its request was cancelled in the meantime
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._runner = None

    def _take(self) -> list[tuple[Sized, asyncio.Future[Any]]]:
        """Return the jobs that run next, in the order of their arrival."""
        batch: list[tuple[Sized, asyncio.Future[Any]]] = []
        rows = 0
        while self._waiting:
            job, future = self._waiting[0]
            if not future.cancelled():
                if batch and rows + job.n_rows > self._max_rows:
                    break
                batch.append((job, future))
                rows += job.n_rows
            self._waiting.popleft()
        return batch

    async def _outcomes(self, jobs: list[Any]) -> Sequence[Any]:
        """Return each job's result, or the exception that is to be raised for it."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._work, jobs)
        except Exception as error:
            return [error] * len(jobs)
