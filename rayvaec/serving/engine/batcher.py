"""Dynamic batching: waiting requests are computed together.

`ray.serve.batch` forms its batches before the one in work is done: what arrives in the meantime
waits in many small batches. Here everything that waits when the worker becomes free is taken at
once, so batches grow with the load, and a lone request waits for nobody. The worker takes it
itself: it does not stand idle until the event loop comes round to giving it more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from threading import Lock
from typing import Any, Protocol, TypeAlias

from rayvaec.errors import RequestError, UnavailableError


class Sized(Protocol):
    """What can be merged: work of a known number of rows."""

    @property
    def n_rows(self) -> int:
        """Rows of the work."""
        ...


_Waiting: TypeAlias = "tuple[Sized, asyncio.Future[Any]]"


def stopping() -> RequestError:
    """Return what is said to those for whom no thread works any more."""
    return UnavailableError("the server is stopping", "ask again")


class DynamicBatcher:
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
        self._waiting: deque[_Waiting] = deque()
        self._lock, self._at_work = Lock(), False

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
        RequestError
            503 if the executor is shut down before the job is done.
        Exception
            What `work` returned for it, if that is an exception, or raised.
        """
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append((job, future))
            begin, self._at_work = not self._at_work, True
        if begin:
            self._go_on()
        return await future

    def _go_on(self) -> None:
        """Have the worker do what waits, behind what other mergers have for it."""
        try:
            self._executor.submit(self._step).add_done_callback(self._stepped)
        except RuntimeError:  # the executor is shut down
            self._give_up()

    def _stepped(self, step: Future[None]) -> None:
        if step.cancelled():  # as shutting down does with what is queued
            self._give_up()

    def _give_up(self) -> None:
        """Refuse everything that waits: nobody is left to do it."""
        with self._lock:
            batch, self._at_work = list(self._waiting), False
            self._waiting.clear()
        _tell(batch, [stopping()] * len(batch))

    def _step(self) -> None:
        """Do what waits, as much as fits; called in the worker's thread."""
        with self._lock:
            batch = self._take()
            self._at_work = bool(batch)
        if not batch:
            return
        _tell(batch, self._outcomes([job for job, _ in batch]))
        self._go_on()

    def _take(self) -> list[_Waiting]:
        """Return the jobs that run next, in the order of their arrival."""
        batch: list[_Waiting] = []
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

    def _outcomes(self, jobs: list[Any]) -> Sequence[Any]:
        """Return each job's result, or the exception that is to be raised for it."""
        try:
            return self._work(jobs)
        except Exception as error:
            return [error] * len(jobs)


def _tell(batch: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
    """Give requests their results from the worker's thread."""
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        with suppress(RuntimeError):  # its loop is closed: nobody waits for it any more
            future.get_loop().call_soon_threadsafe(_settle, future, outcome)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give a request its result, unless it was cancelled in the meantime."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
