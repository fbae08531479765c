"""A loaded model at work: reads requests, runs their jobs, gives answers. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import orjson

import rayvaec
from rayvaec.infer.cells import Cells
from rayvaec.infer.moments import MOMENTS, DrawMoments
from rayvaec.infer.trained import TrainedModel
from rayvaec.serve.bodies import Sent, unpack
from rayvaec.serve.h5ad.sandbox import Sandbox
from rayvaec.serve.h5ad.writing import check_writable, write_h5ad
from rayvaec.serve.limits import Limits
from rayvaec.serve.merge import Merger, stopping
from rayvaec.serve.requests import Reader
from rayvaec.serve.tasks import Task
from rayvaec.serve.wire import END_OF_STREAM, H5AD, stream_start
from rayvaec.serve.work import Job, run_jobs

MERGED_ROWS = 8192
"""Most rows (a cell's draw each) that are computed in one go."""

_T = TypeVar("_T")
_READERS = 2
_JOBS_AHEAD = 4
"""Jobs of a request that wait for the sampler or are at work: while an answer's pieces go out, the
event loop comes round late, and the sampler must not stand idle until then."""


class Threads:
    """Who works in a replica; its models share them, as they share its CPUs.

    Parameters
    ----------
    limits : Limits
        Bounds on requests.

    Attributes
    ----------
    sampler : ThreadPoolExecutor
        The one thread that computes.
    readers : ThreadPoolExecutor
        Decode requests and encode answers; few, since a body being decoded takes many times its
        size.
    sandbox : Sandbox
        The process that reads h5ad files.
    """

    def __init__(self, limits: Limits) -> None:
        self.sampler = ThreadPoolExecutor(1, thread_name_prefix="rayvaec-sampler")
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="rayvaec-reader")
        self.sandbox = Sandbox(limits.max_body_bytes)

    async def aside(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do something in a reader, off the event loop.

        Parameters
        ----------
        work : callable
            What to do.
        *arguments
            What it takes.

        Returns
        -------
        Any
            What it returned.

        Raises
        ------
        RequestError
            503 if the threads are closed before a reader has begun it.
        """
        try:
            done = self.readers.submit(work, *arguments)
        except RuntimeError as error:  # shut down
            raise stopping() from error
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise stopping() from None  # not the request was cancelled, but what waited for it

    def close(self) -> None:
        """End them once their present work is done."""
        self.sampler.shutdown(wait=False, cancel_futures=True)
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.sandbox.close()


class Service:
    """One model at work.

    Parameters
    ----------
    model : TrainedModel
        The model.
    limits : Limits
        Bounds on requests.
    threads : Threads, optional
        Those that work for it; by default threads of its own.
    h5ad_uploads : bool
        Whether it takes h5ad bodies.
    """

    def __init__(
        self,
        model: TrainedModel,
        limits: Limits,
        threads: Threads | None = None,
        *,
        h5ad_uploads: bool = False,
    ) -> None:
        self.model, self.limits, self.h5ad_uploads = model, limits, h5ad_uploads
        self._threads = threads or Threads(limits)
        work = partial(run_jobs, model.module)
        self._merger = Merger(work, MERGED_ROWS, self._threads.sampler)

    @property
    def jobs_waiting(self) -> int:
        """Parts of requests that wait for the sampler."""
        return self._merger.waiting

    async def read(self, reader: Reader, sent: Sent) -> Task:
        """Decode and check a request, off the event loop.

        Parameters
        ----------
        reader : callable
            One of `rayvaec.serve.requests`.
        sent : Sent
            What was sent.

        Returns
        -------
        Task

        Raises
        ------
        RequestError
            If the request is refused.
        """

        def read() -> Task:
            body = unpack(sent, self.model.registry, self.limits, self._threads.sandbox)
            task = reader(body, self.model, self.limits)
            if sent.answer == H5AD:
                check_writable(task.about)
            return task

        return await self._threads.aside(read)

    async def arrow(self, task: Task) -> AsyncIterator[bytes]:
        """Yield an Arrow answer in pieces, as its jobs are done.

        Parameters
        ----------
        task : Task
            The request's work.

        Yields
        ------
        bytes
            Parts of an IPC stream.
        """
        yield stream_start(task.schema())
        async with aclosing(self._results(task, task.encode)) as results:
            async for pieces in results:
                for piece in pieces:
                    yield piece
        yield END_OF_STREAM

    async def json(self, task: Task) -> bytes:
        """Return a JSON answer.

        Parameters
        ----------
        task : Task
            The request's work.

        Returns
        -------
        bytes
        """

        def encode(results: list[Any]) -> bytes:
            answer = {**task.facts, **task.as_json(results)}
            return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

        return await self._whole(task, encode)

    async def h5ad(self, task: Task) -> bytes:
        """Return an answer as an h5ad file.

        Parameters
        ----------
        task : Task
            The request's work.

        Returns
        -------
        bytes
        """

        def encode(results: list[Any]) -> bytes:
            matrices = task.as_matrices(results)
            return write_h5ad(task.about, self.model.registry, matrices.layers, matrices.obsm)

        return await self._whole(task, encode)

    async def _whole(self, task: Task, encode: Callable[[list[Any]], bytes]) -> bytes:
        """Return an answer that is encoded when all jobs are done, off the event loop."""
        results = [result async for result in self._results(task, _same)]
        return await self._threads.aside(encode, results)

    async def _results(self, task: Task, then: Callable[[Any], Any]) -> AsyncGenerator[Any, None]:
        """Yield the jobs' results in order; the next jobs wait at the merger meanwhile."""
        jobs = task.jobs(then)
        ahead = deque(self._submitted(job) for job in islice(jobs, _JOBS_AHEAD))
        try:
            while ahead:
                result = await ahead[0]
                ahead.popleft()
                ahead.extend(self._submitted(job) for job in islice(jobs, 1))
                yield result
        finally:
            for waiting in ahead:
                waiting.cancel()

    def _submitted(self, job: Job) -> asyncio.Task[Any]:
        return asyncio.create_task(self._merger.submit(job))

    def describe(self) -> dict[str, Any]:
        """Return what /v1/model tells.

        Returns
        -------
        dict
            As `rayvaec.serve.schemas.ModelAnswer`.
        """
        registry = self.model.registry
        return {
            "model_hash": self.model.hash,
            "registry_hash": registry.hash(),
            "version": rayvaec.__version__,
            **registry.to_json(),
            "config": self.model.module.config.to_json(),
            "limits": asdict(self.limits),
        }

    def warm_up(self) -> None:
        """Compute one cell of everything, so that no request waits for a compiler."""
        cells = Cells(
            indptr=np.array([0, 1], np.int64),
            indices=np.zeros(1, np.int32),
            counts=np.ones(1, np.int32),
            labels=np.zeros(1, np.int64),
            batches=None if self.model.registry.batch_key is None else np.zeros(1, np.int64),
            keys=np.zeros(1, np.uint64),
        )
        library = np.ones(1, np.float32)
        moments = DrawMoments(1, self.model.registry.n_genes, MOMENTS, ())
        for job in (
            Job("draw", cells, lambda draws: moments.add(draws, n_samples=1)),
            Job("generate", cells, _same, library=library),
            Job("latent", cells, _same),
            Job("expression", cells, _same),
        ):
            for outcome in run_jobs(self.model.module, [job]):
                if isinstance(outcome, Exception):
                    raise outcome

    def close(self) -> None:
        """End the threads once their present work is done."""
        self._threads.close()


def _same(result: Any) -> Any:
    return result
