from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rayvaec.training.distributed import barrier
from rayvaec.training.distributed.barrier import BARRIER_WORDS, SharedBarrier
from rayvaec.training.distributed.process_group import Ranks

WORKERS, ROUNDS = 3, 300


@pytest.mark.parametrize("patience", [0.0, 2e-4, 60.0], ids=["none", "little", "much"])
def test_nobody_leaves_before_all_have_come(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads for workers; the barrier for gloo's breaks unless all of them go there."""
    at_gloo: list[None] = []
    gloo = threading.Barrier(WORKERS, action=lambda: at_gloo.append(None), timeout=10)
    monkeypatch.setattr(Ranks, "wait", lambda _: gloo.wait())
    monkeypatch.setattr(barrier, "PATIENCE_SECONDS", patience)
    watch, dawdle = barrier._watch, random.Random(0)

    def watch_late(*round_: int) -> int:
        if dawdle.random() < 0.1:
            time.sleep(1e-3)  # the others are a round ahead by then, and out of patience
        return watch(*round_)

    monkeypatch.setattr(barrier, "_watch", watch_late)
    words, arrived = np.zeros(BARRIER_WORDS, np.int64), np.zeros(WORKERS, np.int64)

    def work(worker: int) -> None:
        meet, draw = SharedBarrier(words, Ranks(worker, WORKERS)), random.Random(worker)
        for number in range(1, ROUNDS + 1):
            if draw.random() < 0.2:
                time.sleep(draw.uniform(0, 5e-4))
            arrived[worker] = number
            meet()
            assert arrived.min() >= number

    with ThreadPoolExecutor(WORKERS) as threads:
        for future in [threads.submit(work, worker) for worker in range(WORKERS)]:
            future.result(timeout=60)
    assert (len(at_gloo) > 0) == (patience < 1)
