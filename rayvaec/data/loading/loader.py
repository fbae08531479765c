"""Resumable minibatch loader, identical for every number of workers, with prefetching."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from rayvaec.data.loading.lane_reader import LaneReader
from rayvaec.data.loading.sampler import LanePlan
from rayvaec.data.loading.shuffle_buffer import Minibatch, ReusableBuffers
from rayvaec.data.store.open import Store
from rayvaec.errors import ConfigError

REMOTE_AHEAD = 8
"""Minibatches ahead, and threads, at least, where those wait for a network and not for a core."""


T = TypeVar("T")


class Loader:
    """Minibatches of a store.

    Every epoch visits every row of the split once. Shuffled minibatches are a pure function of
    (seed, epoch, step): the number of workers decides who gets which part of one and nothing
    else, and put together in the order of the lanes the parts are the same for every number.

    Parameters
    ----------
    store : Store
        Where the cells come from.
    batch_size : int
        Cells of a global minibatch, over all ranks; a multiple of `lanes`.
    seed : int
        Decides the order, at least 0.
    rank, world_size : int
        Which worker this is, and of how many.
    lanes : int
        Parts that a minibatch is put together from; the largest possible number of workers.
    split : {"train", "validation", "all"}
        Which rows.
    block_rows : int
        Consecutive rows that are read together.
    buffer_rows : int
        Rows held decoded, over all lanes; what is shuffled together.
    prefetch : int
        Minibatches that are prepared ahead, in a thread of their own; 8 or more of a remote store.
    threads : int
        Further threads, which read and decode what the minibatches are gathered from; 8 or more
        of a remote store.
    shuffle : bool
        Whether the order is drawn; without, minibatches are consecutive rows and each rank gets
        a consecutive part.

    Raises
    ------
    ConfigError
        If these do not fit together; the message says what would.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int = 1024,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 16,
        split: str = "train",
        block_rows: int = 256,
        buffer_rows: int = 16384,
        prefetch: int = 2,
        threads: int = 2,
        shuffle: bool = True,
    ) -> None:
        for name, value in (
            *(("batch_size", batch_size), ("lanes", lanes), ("block_rows", block_rows)),
            *(("prefetch", prefetch), ("threads", threads), ("world_size", world_size)),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}", "give a number above 0")
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank is {rank} of {world_size} workers", f"ranks go from 0 to {world_size - 1}"
            )
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed}", "give a number from 0 to 2**64 - 1")
        if shuffle:
            _check_lanes(batch_size, world_size, lanes)
            _check_buffer(buffer_rows, block_rows, lanes)
        if not store.is_local:
            prefetch, threads = max(prefetch, REMOTE_AHEAD), max(threads, REMOTE_AHEAD)
        self._store, self._seed, self._shuffle = store, seed, shuffle
        self._rank, self._world_size, self._prefetch = rank, world_size, prefetch
        self._rows, self._threads = store.rows(split), threads
        self._batch_size, self._lanes, self._block_rows = batch_size, lanes, block_rows
        self._free: list[ReusableBuffers] = []
        self._window_blocks = buffer_rows // (lanes * block_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch, the same for every rank; only the last may be short."""
        return -(-len(self._rows) // self._batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Minibatch]:
        """Give this rank's minibatches of an epoch.

        Reading starts with the first `next` and goes on in threads, which end with the
        iterator: when it is used up, closed or dropped.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start_step : int
            First step to give; the steps before are neither read nor replayed.

        Returns
        -------
        iterator of Minibatch
            One for each step, on every rank; a rank's part of the last one may be empty.

        Raises
        ------
        ConfigError
            If there is no such epoch or step.
        StoreError
            From the iterator: a file is missing, cut short or damaged; the message names it.
        """
        return self.prepared(epoch, _as_it_is, start_step)

    def prepared(
        self, epoch: int, prepare: Callable[[Minibatch], T], start_step: int = 0
    ) -> Iterator[T]:
        """Give what is made of this rank's minibatches of an epoch.

        Parameters
        ----------
        epoch, start_step : int
            As in `epoch`.
        prepare : callable
            Makes something of a minibatch, in the thread that reads ahead, in the order of the
            steps.

        Returns
        -------
        iterator
            What it made, one for each step.

        Raises
        ------
        ConfigError, StoreError
            As `epoch` does.
        """
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}", "epochs count from 0")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ConfigError(
                f"start_step is {start_step}", f"an epoch has {self.steps_per_epoch} steps"
            )
        steps = range(start_step, self.steps_per_epoch)
        if self._shuffle:
            return self._shuffled(epoch, steps, prepare)
        return prefetched(lambda step: prepare(self._in_order(step)), steps, self._prefetch)

    def _shuffled(self, epoch: int, steps: range, prepare: Callable[[Minibatch], T]) -> Iterator[T]:
        plan = LanePlan(
            start=self._rows.start,
            stop=self._rows.stop,
            batch_size=self._batch_size,
            lanes=self._lanes,
            block_rows=self._block_rows,
            window_blocks=self._window_blocks,
            seed=self._seed,
            epoch=epoch,
        )
        lanes = range(self._rank, self._lanes, self._world_size)
        decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="rayvaec-decode")
        reader = LaneReader(
            store=self._store,
            plan=plan,
            lanes=lanes,
            first_step=steps.start,
            decoders=decoders,
            ahead=self._prefetch,
            free=self._free,
        )
        try:
            yield from prefetched(lambda step: prepare(reader.read(step)), steps, self._prefetch)
        finally:
            reader.close()
            decoders.shutdown(cancel_futures=True)

    def _in_order(self, step: int) -> Minibatch:
        start = self._rows.start + step * self._batch_size
        n_global = min(self._batch_size, self._rows.stop - start)
        begin = start + self._rank * n_global // self._world_size
        end = start + (self._rank + 1) * n_global // self._world_size
        rows = self._store.read(begin, end)
        return Minibatch(
            indptr=rows.indptr,
            indices=rows.indices,
            counts=rows.counts,
            labels=rows.labels,
            batches=rows.batches,
            cells=np.arange(begin, end),
            n_genes=self._store.n_genes,
            n_global=n_global,
            step=step,
        )


def prefetched(produce: Callable[[int], T], steps: range, depth: int) -> Iterator[T]:
    """Yield ``produce(step)`` for every step, computed in order and ahead in one thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="rayvaec-loader") as thread:
        coming = deque(thread.submit(produce, step) for step in steps[:depth])
        try:
            for step in range(steps.start + depth, steps.stop + depth):
                minibatch = coming.popleft().result()
                if step < steps.stop:
                    coming.append(thread.submit(produce, step))
                yield minibatch
        finally:
            for future in coming:
                future.cancel()


def _as_it_is(minibatch: Minibatch) -> Minibatch:
    return minibatch


def _check_lanes(batch_size: int, world_size: int, lanes: int) -> None:
    if batch_size % lanes:
        nearest = [n for n in (batch_size // lanes * lanes, -(-batch_size // lanes) * lanes) if n]
        raise ConfigError(
            f"batch_size is {batch_size} and must be a multiple of the {lanes} lanes",
            f"use {' or '.join(map(str, nearest))}",
        )
    if world_size > lanes:
        raise ConfigError(
            f"there are {world_size} workers and {lanes} lanes to share among them",
            f"use at most {lanes} workers, or more lanes",
        )


def _check_buffer(buffer_rows: int, block_rows: int, lanes: int) -> None:
    least = lanes * block_rows
    if buffer_rows < least:
        raise ConfigError(
            f"buffer_rows is {buffer_rows}, less than a block of {block_rows} rows for each of "
            f"{lanes} lanes",
            f"use at least {least}, or a smaller block_rows",
        )
