from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from rayvaec.training.monitor.curves import draw_curves
from rayvaec.training.records import append_attempt, append_record


def write(run: Path, n_epochs: int, validated: bool = True, log_steps: bool = False) -> None:
    for epoch in range(1, n_epochs + 1):
        record: dict[str, Any] = {"epoch": epoch, "train_loss": 200 + 100 / epoch, "lr": 1 / epoch}
        if log_steps:
            append_record(run, {**record, "step": 10 * epoch - 5, "time": epoch - 0.5})
        elbo = -190 - 100 / epoch if validated else None
        closing = {"val_elbo": elbo, "cells_per_second": 1e4, "num_workers": 1 + epoch % 2}
        append_record(run, {**record, **closing, "step": 10 * epoch, "time": epoch})


@pytest.mark.parametrize(
    ("n_epochs", "validated", "log_steps"),
    [(1, True, False), (1, False, True), (5, True, True), (30, True, True), (30, False, False)],
)
def test_a_run_becomes_a_picture(
    tmp_path: Path, n_epochs: int, validated: bool, log_steps: bool
) -> None:
    append_attempt(tmp_path, 0, 2)
    append_attempt(tmp_path, 5, 1)
    write(tmp_path, n_epochs, validated, log_steps)
    drawn = draw_curves(tmp_path)
    assert drawn == tmp_path / "curves.png"
    assert draw_curves(tmp_path) == drawn  # over the one before
    pixels = image.imread(drawn)
    assert pixels.shape[0] > 600
    assert pixels.std() > 0.05


def test_there_is_no_picture_before_the_first_epoch(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    append_record(tmp_path, {"epoch": 1, "step": 5, "train_loss": 1.0, "lr": 0.1})
    assert draw_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()
