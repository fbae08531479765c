"""Run pieces of work on Python threads, each single-threaded inside.

numba kernels here release the GIL and are started from these threads, because numba's own default
threading layer must not be entered from two Python threads at once, as a server does. torch's
products run in the same threads, each on one core: so no core waits at the end of every product for
the others, and no result depends on how many threads there are.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from numba import config

Result = TypeVar("Result")

LEAST_SHARED = 2**18
"""Elements from which on `threads_for` gives all threads."""

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_local = threading.local()


def thread_count() -> int:
    """Return how many threads a kernel uses: torch's number, at most NUMBA_NUM_THREADS.

    ``torch.set_num_threads``, ``OMP_NUM_THREADS`` and ``NUMBA_NUM_THREADS`` set it.
    """
    inside = getattr(_local, "count", None)
    return inside or max(1, min(torch.get_num_threads(), _core_count()))


def threads_for(n_elements: int) -> int:
    """Return how many threads are worth their waking for work on so many elements.

    Parameters
    ----------
    n_elements : int
        Cells times genes.

    Returns
    -------
    int
        1 or `thread_count()`. Waking an idle core takes 0.03 to 0.1 ms on virtual machines, several
        times a step: more than it saves at 64 cells of 2,886 genes.
    """
    return thread_count() if n_elements >= LEAST_SHARED else 1


def _core_count() -> int:
    return config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def spans(n_items: int, n_pieces: int) -> list[tuple[int, int]]:
    """Cut ``range(n_items)`` into at most `n_pieces` runs of nearly equal length.

    Parameters
    ----------
    n_items, n_pieces : int
        How much work there is, and into how many pieces it goes.

    Returns
    -------
    list of (int, int)
        First and one-past-last item of each piece that is not empty.
    """
    n_pieces = max(1, min(n_pieces, n_items))
    edges = [n_items * piece // n_pieces for piece in range(n_pieces + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def run_all(tasks: Sequence[Callable[[], Result]], n_threads: int | None = None) -> list[Result]:
    """Run every task, on up to `n_threads` threads of which the caller's is one.

    Parameters
    ----------
    tasks : sequence of callables
        Started in this order, each by whichever thread is free.
    n_threads : int, optional
        By default `thread_count()`.

    Returns
    -------
    list
        The tasks' results in the order of `tasks`.

    Raises
    ------
    Exception
        Whatever the first failing task (in the order of `tasks`) raised.
    """
    n_threads = min(thread_count() if n_threads is None else n_threads, len(tasks))
    with single_threaded_torch():
        if n_threads <= 1:
            return [task() for task in tasks]
        return _run_shared(tasks, n_threads)


def _run_shared(tasks: Sequence[Callable[[], Result]], n_threads: int) -> list[Result]:
    results: list[Result | None] = [None] * len(tasks)
    errors: dict[int, Exception] = {}
    numbered = iter(range(len(tasks)))
    lock = threading.Lock()

    def drain() -> None:
        for number in _shared(numbered, lock):
            try:
                results[number] = tasks[number]()
            except Exception as error:
                errors[number] = error

    pool = _executor()
    helpers = [pool.submit(drain) for _ in range(n_threads - 1)]
    drain()
    for helper in helpers:
        # One that has not started by now would find nothing left to do.
        if not helper.cancel():
            helper.result()
    if errors:
        raise errors[min(errors)]
    return results  # type: ignore[return-value]


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Let torch use one core for what this thread does meanwhile; `run_all` uses all the same.

    Otherwise torch's idle threads spin, on cores that `run_all` needs. Other threads, and torch's
    number for those that begin meanwhile, are left alone.

    Yields
    ------
    None
    """
    if getattr(_local, "count", None):
        yield
        return
    _local.count = thread_count()
    before = _set_own_threads((1, 1))
    try:
        yield
    finally:
        _set_own_threads(before)
        _local.count = None


def _set_own_threads(numbers: tuple[int, int]) -> tuple[int, int]:
    """Set OpenMP's and MKL's numbers of threads for this thread; return what they were.

    ``torch.set_num_threads`` would also set torch's global number, which every thread takes over
    when it first uses torch, and keeps.
    """
    openmp, mkl = numbers
    before = torch.get_num_threads()  # OpenMP's; torch gives a new thread its global number now
    _SET_OPENMP(openmp)
    return before, _SET_MKL(mkl)


def _function_of_torch(name: str) -> Callable[[int], int]:
    """Return a C function of the libraries that torch has loaded, or one that does nothing.

    torch has MKL on x86 alone, and no OpenMP where it has threads of its own. Calls keep the GIL:
    they are shorter than giving it away and waiting for it.
    """
    return getattr(ctypes.PyDLL(torch._C.__file__), name, lambda number: 0)


_SET_OPENMP = _function_of_torch("omp_set_num_threads")
_SET_MKL = _function_of_torch("MKL_Set_Num_Threads_Local")


def _shared(numbers: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    """Yield from an iterator that several threads take from."""
    while True:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        yield number


def _executor() -> ThreadPoolExecutor:
    """Return the pool, whose threads let torch use one core each."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(
                max(1, _core_count() - 1),
                "rayvaec-kernel",
                initializer=_set_own_threads,
                initargs=((1, 1),),
            )
        return _pool


def _forget_pool() -> None:
    """Drop the pool in a forked child, where its threads do not exist."""
    global _pool, _pool_lock
    _pool = None
    _pool_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
