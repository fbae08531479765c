"""The arithmetic of the scaling model; nothing is measured."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
N_PARAMETERS = 750_000  # 3 MB


@pytest.fixture(scope="module")
def scaling() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


@pytest.fixture
def constants(scaling: dict[str, Any]) -> Any:
    return scaling["Constants"](
        n_parameters=N_PARAMETERS,
        step_seconds=2e-3,
        cell_seconds=2e-5,
        loader_seconds=1e-6,
        validation_seconds=1e-5,
        checkpoint_seconds=0.6,
        reduce_seconds=1e-3,
        socket_seconds=2e-3,
    )


def cluster(scaling: dict[str, Any], nodes: int, workers_per_node: int = 1) -> Any:
    return scaling["Cluster"](
        nodes, workers_per_node, gbit=10.0, latency_us=50.0, price_per_hour=0.5
    )


def test_all_reduce_sends_its_share_of_the_gradient_in_a_ring(
    scaling: dict[str, Any], constants: Any
) -> None:
    def seconds(*nodes: int) -> float:
        return scaling["all_reduce_seconds"](constants, cluster(scaling, *nodes))

    # Four workers: 3/2 of what sockets take two, six messages of 50 us, 2 * 3/4 of 3 MB at
    # 1.25 GB/s.
    assert seconds(4) == pytest.approx(3e-3 + 6 * 50e-6 + 4.5e6 / 1.25e9)
    assert seconds(1, 4) == pytest.approx(1.5e-3)
    assert seconds(1) == 0


@pytest.mark.parametrize(("workers", "cells"), [(1, 128), (2, 64), (3, 48), (16, 8), (12, 16)])
def test_the_busiest_worker_has_whole_lanes(
    scaling: dict[str, Any], workers: int, cells: int
) -> None:
    assert scaling["busiest_cells"](128, 16, workers) == cells


def test_an_epoch_adds_up(scaling: dict[str, Any], constants: Any) -> None:
    line = scaling["epoch"](
        constants,
        cluster(scaling, 2),
        batch_size=1000,
        lanes=10,
        n_cells=1_000_000,
        n_validation=20_000,
        checkpoint_interval=60.0,
    )
    # 1,000 steps of 2 ms + 500 cells of 20 us + 2 ms, 2 messages and 3 MB; half the validation.
    step = 2e-3 + 500 * 2e-5 + 2e-3 + 2 * 50e-6 + 3e6 / 1.25e9
    seconds = (1000 * step + 20_000 * 1e-5 / 2) * 1.01
    assert line["cells_per_second"] == round(1_000_000 / seconds)
    assert line["step_ms"] == {"fixed": 2.0, "cells": 10.0, "all_reduce": 4.5}
    assert line["sent_mb_per_step"] == 3.0
    assert line["cost_per_epoch"] == round(seconds / 3600 * 2 * 0.5, 2)
