"""Inference engine of a replica: runs sampling plans, independent of HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
import orjson

import rayvaec
from rayvaec.inference.cells import Cells
from rayvaec.inference.moments import MOMENTS, DrawMoments
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.protocol import ARROW, END_OF_STREAM, H5AD
from rayvaec.serving.decoding.bodies import Sent, unpack
from rayvaec.serving.decoding.h5ad.sandbox import Sandbox
from rayvaec.serving.decoding.parsing import Reader
from rayvaec.serving.encoding.h5ad import Annotation, check_writable, write_h5ad
from rayvaec.serving.engine.batcher import DynamicBatcher, stopping
from rayvaec.serving.engine.jobs import JOB_VALUES, Job, run_jobs
from rayvaec.serving.engine.plans import Block, ResponsePlan
from rayvaec.serving.middleware.concurrency import Slot
from rayvaec.serving.middleware.limits import Limits

MERGED_ROWS, MERGED_VALUES = 8192, 16 * 2**20
"""Most rows (a cell's draw each), and most rows * genes, that are computed in one go."""

_T = TypeVar("_T")
_READERS = 2
_JOBS_AHEAD = 4
"""Jobs of a request that wait for the sampler or are at work: while an answer's pieces go out, the
event loop comes round late, and the sampler must not stand idle until then."""

_LARGEST_RESULT = 8 * JOB_VALUES
"""Bytes of a job's result in which no count is zero: a gene and a count for each value."""

_NAME_BYTES = 80
"""About what a name of a cell or gene takes as a Python string in a list."""


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


class Engine:
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
        most = min(MERGED_ROWS, max(MERGED_VALUES // model.registry.n_genes, 1))
        self._merger = DynamicBatcher(work, most, self._threads.sampler)

    @property
    def jobs_waiting(self) -> int:
        """Parts of requests that wait for the sampler."""
        return self._merger.waiting

    async def read(self, reader: Reader, sent: Sent, slot: Slot) -> ResponsePlan:
        """Decode and check a request, off the event loop.

        Parameters
        ----------
        reader : callable
            One of `rayvaec.serving.decoding.parsing`.
        sent : Sent
            What was sent.
        slot : Slot
            Where what it becomes is counted: decompressed, then as cells.

        Returns
        -------
        ResponsePlan

        Raises
        ------
        RequestError
            If the request is refused.
        """

        def read() -> ResponsePlan:
            body = unpack(sent, self.model.registry, self.limits, self._threads.sandbox)
            if body.data is not sent.data:
                slot.resize(len(sent.data) + len(body.data))
            task = reader(body, self.model, self.limits)
            if sent.answer == H5AD:
                check_writable(task.about)
            # The schema is written here: where it names many genes, the event loop has no time.
            start = len(task.start) if sent.answer == ARROW else 0
            slot.resize(_held_by(task.about) + start)
            return task

        return await self._threads.aside(read)

    async def arrow(self, task: ResponsePlan, slot: Slot) -> AsyncIterator[bytes]:
        """Yield an Arrow answer in pieces, as its jobs are done.

        Parameters
        ----------
        task : ResponsePlan
            The request's work.
        slot : Slot
            Where results are counted until they are taken.

        Yields
        ------
        bytes
            Parts of an IPC stream.
        """
        yield task.start
        async with aclosing(self._results(task, task.encode, slot)) as results:
            async for pieces in results:
                for piece in pieces:
                    yield piece
                slot.release(_size_of(pieces))
        yield END_OF_STREAM

    async def json(self, task: ResponsePlan, slot: Slot) -> bytes:
        """Return a JSON answer.

        Parameters
        ----------
        task : ResponsePlan
            The request's work.
        slot : Slot
            Where results, and then the answer, are counted.

        Returns
        -------
        bytes

        Raises
        ------
        TooManyRequestsError, PayloadTooLargeError
            If there is no room for them.
        """

        def encode(results: list[Any]) -> bytes:
            answer = {**task.facts, **task.as_json(results)}
            return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

        return await self._whole(task, encode, slot)

    async def h5ad(self, task: ResponsePlan, slot: Slot) -> bytes:
        """Return an answer as an h5ad file.

        Parameters
        ----------
        task : ResponsePlan
            The request's work.
        slot : Slot
            Where results, and then the answer, are counted.

        Returns
        -------
        bytes

        Raises
        ------
        TooManyRequestsError, PayloadTooLargeError
            If there is no room for them.
        """

        def encode(results: list[Any]) -> bytes:
            matrices = task.as_matrices(results)
            return write_h5ad(task.about, self.model.registry, matrices.layers, matrices.obsm)

        return await self._whole(task, encode, slot)

    async def _whole(
        self, task: ResponsePlan, encode: Callable[[list[Any]], bytes], slot: Slot
    ) -> bytes:
        """Return an answer that is encoded when all jobs are done, off the event loop."""
        results = []
        async with aclosing(self._results(task, _same, slot)) as found:
            async for result in found:
                slot.check()
                results.append(result)
        answer = await self._threads.aside(encode, results)
        slot.hold(len(answer) - sum(map(_size_of, results)))
        slot.check()
        return answer

    async def _results(
        self, task: ResponsePlan, then: Callable[[Any], Any], slot: Slot
    ) -> AsyncGenerator[Any, None]:
        """Yield the jobs' results in order, each held by the slot; the next jobs wait meanwhile."""
        jobs = task.jobs(then)
        ahead: deque[asyncio.Task[Any]] = deque()

        largest = _LARGEST_RESULT

        def submit() -> None:
            # Where too much waits for clients, an answer has no more than one job ahead.
            while len(ahead) < _JOBS_AHEAD:
                if ahead and not slot.has_room(largest * (len(ahead) + 1)):
                    return
                job = next(jobs, None)
                if job is None:
                    return
                ahead.append(asyncio.create_task(self._held(job, slot)))

        tally, seen = 0, 0
        try:
            submit()
            while ahead:
                result = await ahead[0]
                ahead.popleft()
                largest = seen = max(seen, _size_of(result))
                if task.tally_bytes != tally:
                    slot.hold(task.tally_bytes - tally)
                    tally = task.tally_bytes
                    slot.check()
                submit()
                yield result
        finally:
            for waiting in ahead:
                waiting.cancel()  # or, where it has failed, keep asyncio from logging why

    async def _held(self, job: Job, slot: Slot) -> Any:
        result = await self._merger.submit(job)
        slot.hold(_size_of(result))
        return result

    def describe(self) -> dict[str, Any]:
        """Return what /v1/model tells.

        Returns
        -------
        dict
            As `rayvaec.serving.http.schemas.ModelAnswer`.
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


def _size_of(result: Any) -> int:
    """Return the bytes of a job's result: encoded pieces, or arrays."""
    if result is None:
        return 0
    if isinstance(result, list):
        return sum(map(len, result))
    parts = result.columns if isinstance(result, Block) else vars(result)
    return sum(part.nbytes for part in parts.values())


def _held_by(about: Annotation) -> int:
    """Return the bytes of a request's cells and names, roughly."""
    arrays = (value for value in vars(about.cells).values() if isinstance(value, np.ndarray))
    lists = [fact for fact in about.facts.values() if isinstance(fact, list)]
    names = sum(map(len, lists)) + len(about.names or ())
    return sum(array.nbytes for array in arrays) + _NAME_BYTES * names
