"""Spin-then-block barrier for workers on one host, in shared memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from rayvaec.kernels.simd import address, intrinsic
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.util.numba_cache import compiled

BARRIER_WORDS = 24
"""Numbers that the barrier lies in: three, in cache lines of their own."""

PATIENCE_SECONDS = 0.01
"""How long a worker looks again and again, before it sleeps until gloo wakes it."""

_ARRIVED, _DECIDED = 0, (8, 16)
_LOOKS = 200  # some 0.1 ms

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


class SharedBarrier:
    """A barrier that nobody sleeps at whom the others do not keep waiting.

    gloo's sends messages over sockets and wakes threads by them, which takes 0.2 to 0.7 ms on two
    virtual cores. Here a worker adds one to a shared number, and looks whether all have, leaving
    its core to whoever else wants it: 0.01 to 0.03 ms where nobody is late. After
    `PATIENCE_SECONDS` all of them meet at gloo's barrier instead, which takes no core's time, and
    raises an error when a worker has died. Whether they do is decided once for all: by the last to
    arrive or the first to lose patience, whoever is first to say so.

    Parameters
    ----------
    words : NDArray[BARRIER_WORDS] of int64
        Memory of all workers; zeros.
    ranks : Ranks
        The workers.
    """

    def __init__(self, words: NDArray[np.int64], ranks: Ranks) -> None:
        self._words, self._ranks = words, ranks
        self._round, self._decisions = 0, [0, 0]

    def __call__(self) -> None:
        """Return when every worker has called.

        Raises
        ------
        RuntimeError
            gloo's, when a worker has died.
        """
        words = self._words
        self._round += 1
        # Every other round has the same place for its decision: one who lost patience in the next
        # round must not overwrite what a slow worker has not seen yet.
        turn = self._round % 2
        place, before = _DECIDED[turn], self._decisions[turn]
        if _arrive(words) == self._round * self._ranks.world_size:
            _decide(words, place, before, 2 * self._round)
        patient_until = time.monotonic() + PATIENCE_SECONDS
        while (decision := _watch(words, place, before, _LOOKS)) == before:
            if time.monotonic() > patient_until:
                _decide(words, place, before, 2 * self._round + 1)
        self._decisions[turn] = decision
        if decision % 2:
            self._ranks.wait()


@intrinsic
def _added(typing_context: Any, pointer: Any, number: Any) -> Any:
    """Add to the number at a pointer, for all threads at once; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", *arguments, "seq_cst")

    return types.int64(pointer, types.int64), generate


@intrinsic
def _exchanged(typing_context: Any, pointer: Any, expected: Any, number: Any) -> Any:
    """Replace the number at a pointer if it is the expected one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.cmpxchg(*arguments, "seq_cst", "seq_cst")
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), generate


@intrinsic
def _loaded(typing_context: Any, pointer: Any) -> Any:
    """Return the number at a pointer as it is now."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(arguments[0], "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(pointer), generate


@compiled
def _arrive(words: Any) -> int:
    """Return how many have arrived, oneself included, over all rounds."""
    return _added(address(words, _ARRIVED), 1) + 1


@compiled
def _decide(words: Any, place: int, before: int, decision: int) -> None:
    """Say how a round ends, unless another worker has said so."""
    _exchanged(address(words, place), before, decision)


@compiled
def _watch(words: Any, place: int, before: int, looks: int) -> int:
    """Look up to `looks` times whether a decision is another than before; return it."""
    for _ in range(looks):
        decision = _loaded(address(words, place))
        if decision != before:
            return decision
        _sched_yield()
    return before
