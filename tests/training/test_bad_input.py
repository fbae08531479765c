"""What cannot be trained on or with is one line, at once, before anything is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayvaec.cli import main
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_store
from rayvaec.datasets import simulate
from rayvaec.training import run_dir as folder
from rayvaec.training.config import TrainConfig

Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    store_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Give options to `rayvaec train`; returns the one line in which they are refused."""

    def run(*options: Any, store: Path = store_path) -> str:
        out = tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        started = time.monotonic()
        code = main(["train", str(store), "--out", str(out), *map(str, options)])
        assert time.monotonic() - started < 30
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2, line
        assert line.startswith("rayvaec: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.fixture
def other_store(tmp_path: Path) -> Path:
    """A store of another gene set."""
    simulate(n_cells=300, n_genes=50, n_labels=3, seed=1).write_h5ad(tmp_path / "other.h5ad")
    prepare([tmp_path / "other.h5ad"], tmp_path / "other", PrepareConfig(labels_key="cell_type"))
    return tmp_path / "other"


def test_a_key_that_does_not_exist(refuse: Refuse, tmp_path: Path) -> None:
    assert "unknown setting 'drop_rate': did you mean 'dropout_rate'?" in refuse(
        "--set", "drop_rate=0.1"
    )
    (tmp_path / "mine.yaml").write_text("{lr: 0.001, epochs: 5}")
    assert "unknown setting 'epochs': did you mean 'max_epochs'?" in refuse(
        "--config", tmp_path / "mine.yaml"
    )


def test_values_out_of_range_are_all_named_at_once(refuse: Refuse) -> None:
    line = refuse("--set", "lr=7", "--set", "dropout_rate=x", "--num-workers", "2..8")
    for part in ("3 problems", "lr=7", "dropout_rate='x'", "num_workers='2..8'"):
        assert part in line


def test_a_store_of_another_gene_set_on_resume(
    refuse: Refuse, other_store: Path, store_path: Path, tmp_path: Path
) -> None:
    folder.create_run(tmp_path / "run", open_store(store_path), TrainConfig(max_epochs=5))
    line = refuse("--resume", store=other_store)
    assert f"was trained on {store_path}, which is not the same as {other_store}" in line


def test_a_batch_size_that_the_lanes_do_not_divide(refuse: Refuse) -> None:
    assert "the nearest that is, is 96" in refuse("--batch-size", 100)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_gpu_where_there_is_none(refuse: Refuse) -> None:
    line = refuse("--use-gpu")
    assert "1 worker needs 1 GPU and Ray has 0; use a larger cluster, or leave out" in line


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_too_few_cpus(refuse: Refuse) -> None:
    assert "3 workers need 3 CPUs and Ray has 2" in refuse("--num-workers", 3)
    assert "3 workers need 3 CPUs and Ray has 2" in refuse("--num-workers", "3-8")


def test_too_few_cpus_are_seen_before_ray_starts(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is not needed for that"))
    cpus = len(os.sched_getaffinity(0))
    line = refuse("--num-workers", 1, "--set", f"cpus_per_worker={cpus + 1}")
    assert f"and this machine has {cpus}; use" in line


def test_an_address_where_no_ray_is(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "no Ray answers at RAY_ADDRESS=127.0.0.1:1" in refuse()
