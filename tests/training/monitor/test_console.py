from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayvaec.data.store.open import open_store
from rayvaec.errors import StoreError
from rayvaec.training import run_dir as folder
from rayvaec.training.config import TrainConfig
from rayvaec.training.loop import TrainLoop
from rayvaec.training.monitor.console import Follower, describe_run, epoch_line
from rayvaec.training.records import (
    append_attempt,
    append_record,
    record_worker_failure,
    write_progress,
)

RECORD = {
    "epoch": 2,
    "step": 40,
    "time": 12.34,
    "train_loss": 801.239,
    "val_elbo": -790.126,
    "best": True,
    "cells_per_second": 21034.2,
    "num_workers": 2,
}


def test_an_epoch_is_one_line() -> None:
    assert epoch_line(RECORD, 50) == (
        "epoch 2 of 50: train loss 801.24, validation ELBO -790.13 (best), 21,034 cells/s, 12.3 s"
    )
    assert "ELBO" not in epoch_line({**RECORD, "val_elbo": None}, 50)
    assert "best" not in epoch_line({**RECORD, "best": False}, 50)


def test_a_run_is_followed_line_by_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayvaec.training.monitor.console.POLL_SECONDS", 0.01)
    append_record(tmp_path, {**RECORD, "epoch": 1, "step": 20})
    record_worker_failure(tmp_path, "lost worker 9")  # before this run was resumed
    append_attempt(tmp_path, 10, 2)
    with (
        caplog.at_level(logging.INFO, "rayvaec"),
        Follower(tmp_path, TrainConfig(max_epochs=3), 1000) as follower,
    ):
        write_progress(tmp_path, 2, 1000)
        while follower.started_at is None:
            time.sleep(0.01)
        write_progress(tmp_path, 2, 1500)
        append_record(tmp_path, RECORD)
        append_attempt(tmp_path, 20, 2)
        record_worker_failure(tmp_path, "lost worker 1")
        append_attempt(tmp_path, 30, 1)
        # A run that went back to a checkpoint cuts its records, and repeats some.
        (tmp_path / "metrics.jsonl").unlink()
        append_record(tmp_path, RECORD)
        append_record(tmp_path, {**RECORD, "epoch": 3, "step": 60, "best": False})
    lines = [record.getMessage() for record in caplog.records if "ELBO" in record.getMessage()]
    assert [line[:7] for line in lines if line.startswith("epoch")] == ["epoch 2", "epoch 3"]
    assert follower._progress._done == 2000
    assert "lost worker 9" not in caplog.text
    assert "lost worker 1: starting the workers again" in caplog.text
    assert "went on from step 30 with 1 worker" in caplog.text


def test_a_run_is_described(
    make_loop: Callable[..., TrainLoop], tmp_path: Path, store_path: Path
) -> None:
    run = tmp_path / "run"
    config = TrainConfig.from_json({"max_epochs": 2, "n_hidden": 16, "batch_size": 64})
    folder.create_run(run, open_store(store_path), config)
    text = describe_run(run)
    assert "running, or killed" in text
    assert "0 of 2" in text
    assert f"rayvaec train {store_path} --out {run} --resume" in text
    result = make_loop(max_epochs=2).run()
    folder.end_run(run, "finished", result)
    append_attempt(run, 0, 2)
    record_worker_failure(run, "lost worker 1 (its node was lost)")
    append_attempt(run, 30, 1)
    text = describe_run(run)
    for part in (
        "from step 30, 1 worker\n              after: lost worker 1 (its node was lost)",
        "finished, started 20",
        "2 of 2",
        "stopped     after max_epochs=2",
        f"{result['best_elbo']:.2f} nats a cell, in epoch 2",
        "2 x 16 hidden, 5 latent",
        "batch size 64, lr 0.00353553, seed 0",
        f"rayvaec serve {run / 'model'}",
    ):
        assert part in text
    assert "--resume" not in text
    early = {**result, "stopped": "patience", "epoch": 9, "best_epoch": 6}
    folder.end_run(run, "finished", early)
    why = "stopped     early: no better validation ELBO in 3 epochs (patience=20)"
    assert why in describe_run(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match="is not a run folder; give the folder that a training wrote"
    ):
        describe_run(tmp_path)
