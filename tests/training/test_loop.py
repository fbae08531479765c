from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rayvaec.data.store.open import open_store
from rayvaec.errors import RayvaecError
from rayvaec.model.saved import read_model
from rayvaec.training import loop as loop_module
from rayvaec.training.backends.cpu import HostSteps, NotFiniteError
from rayvaec.training.backends.host_to_device import StepNumbers
from rayvaec.training.loop import TrainLoop
from rayvaec.training.records import read_epochs, read_records

MakeLoop = Callable[..., TrainLoop]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model(run / "last").module.state_dict()


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs ended with the same bits and recorded the same."""
    for name, value in weights(first).items():
        assert torch.equal(weights(second)[name], value), name
    timing = ("time", "cells_per_second", "wait_share")
    one, two = (
        [{k: v for k, v in record.items() if k not in timing} for record in read_records(run)]
        for run in (first, second)
    )
    assert one == two


def test_a_run_learns_and_records(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop()
    result = loop.run()
    run, n_train = tmp_path / "run", loop.store.n_train
    epochs = read_epochs(run)
    steps = -(-n_train // 64)
    assert [(r["epoch"], r["step"]) for r in epochs] == [(e, e * steps) for e in (1, 2, 3)]
    assert [r["val_elbo"] for r in epochs] == sorted(r["val_elbo"] for r in epochs)
    assert epochs[-1]["val_elbo"] > epochs[0]["val_elbo"] + 1
    assert [r["train_loss"] for r in epochs] == sorted(r["train_loss"] for r in epochs)[::-1]
    assert all(r["best"] and r["cells_per_second"] > 0 for r in epochs)
    within = [r for r in read_records(run) if "val_elbo" not in r]
    assert [r["step"] for r in within] == [s for s in range(5, 3 * steps, 5) if s % steps]
    assert (result["stopped"], result["epoch"], result["best_epoch"]) == ("max_epochs", 3, 3)
    assert result["best_elbo"] == epochs[-1]["val_elbo"]


@pytest.mark.parametrize("prior", ["normal", "mog"])
def test_the_softmax_form_learns_too(make_loop: MakeLoop, tmp_path: Path, prior: str) -> None:
    make_loop(generative="softmax", prior=prior).run()
    elbo = [record["val_elbo"] for record in read_epochs(tmp_path / "run")]
    assert elbo[-1] > elbo[0] + 2
    config = read_model(tmp_path / "run" / "model").module.config
    assert (config.generative, config.prior) == ("softmax", prior)


def test_best_and_last_model_are_kept_with_their_origin(
    make_loop: MakeLoop, tmp_path: Path, store_path: Path
) -> None:
    make_loop(seed=5).run()
    run, store = tmp_path / "run", open_store(store_path)
    for name in ("model", "last"):
        saved = read_model(run / name)
        assert saved.registry == store.registry.to_json()
        assert saved.provenance["store_hash"] == store.hash
        assert saved.provenance["seed"] == 5
        assert saved.provenance["metrics"]["epoch"] == 3
        assert saved.provenance["training"]["n_hidden"] == 16
        assert saved.module.config.n_hidden == 16
    assert not (run / "model" / "model.pt").exists()


@pytest.mark.parametrize("dies_at", ["step_0000000007", "step_0000000017"])
def test_a_killed_run_ends_with_the_same_bits(
    make_loop: MakeLoop, tmp_path: Path, dies_at: str
) -> None:
    make_loop("straight").run()
    settings = {"checkpoint_steps": 7, "checkpoint_seconds": 1e-3}
    with pytest.raises(InterruptedError):
        make_loop("killed", dies_at, **settings).run()
    resumed = make_loop("killed", **settings)
    assert resumed.state.step == int(dies_at[5:])
    resumed.run()
    assert_same_end(tmp_path / "straight", tmp_path / "killed")


def test_without_a_checkpoint_a_killed_run_starts_anew(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loop("straight").run()
    loop = make_loop("killed")
    monkeypatch.setattr(loop, "_checkpoint", lambda: (_ for _ in ()).throw(InterruptedError))
    loop.config.__dict__["checkpoint_seconds"] = 1e-3
    with pytest.raises(InterruptedError):
        loop.run()
    assert read_records(tmp_path / "killed")
    make_loop("killed").run()
    assert_same_end(tmp_path / "straight", tmp_path / "killed")


def test_three_workers_resume_with_the_same_bits(
    run_ranks: Callable[..., None], make_loop: MakeLoop, tmp_path: Path
) -> None:
    # Three: with two, a sum has the same bits in any order.
    settings = {"checkpoint_steps": 7, "batch_size": 16 * 3, "max_epochs": 1}
    run_ranks(tmp_path / "straight", 3, **settings)
    run_ranks(tmp_path / "killed", 3, dies_at="step_0000000007", **settings)
    assert not (tmp_path / "killed" / "last").exists()
    run_ranks(tmp_path / "killed", 3, **settings)
    assert_same_end(tmp_path / "straight", tmp_path / "killed")
    make_loop("alone", **settings).run()
    alone, three = (read_epochs(tmp_path / run)[-1] for run in ("alone", "straight"))
    assert three["val_elbo"] == pytest.approx(alone["val_elbo"], rel=1e-4)
    assert three["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
    assert three["num_workers"] == 3


def test_early_stopping(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elbos = iter([-5.0, -3.0, -4.0, -3.5, -1.0])
    monkeypatch.setattr(loop_module, "validation_elbo", lambda *_: next(elbos))
    result = make_loop(patience=2, max_epochs=9).run()
    assert (result["stopped"], result["epoch"]) == ("patience", 4)
    assert (result["best_epoch"], result["best_elbo"]) == (2, -3.0)
    run = tmp_path / "run"
    assert [r["best"] for r in read_epochs(run)] == [True, True, False, False]
    assert read_model(run / "model").provenance["metrics"]["epoch"] == 2
    assert read_model(run / "last").provenance["metrics"]["epoch"] == 4


def test_a_finished_run_does_nothing_more_but_can_be_extended(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    make_loop(max_epochs=2).run()
    records = read_records(tmp_path / "run")
    assert make_loop(max_epochs=2).run()["stopped"] == "max_epochs"
    assert read_records(tmp_path / "run") == records
    assert make_loop(max_epochs=3).run()["epoch"] == 3


def test_a_store_without_validation_cells(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "validation_elbo", lambda *_: None)
    result = make_loop(patience=1).run()
    assert (result["epoch"], result["best_epoch"], result["best_elbo"]) == (3, 3, None)
    assert [r["val_elbo"] for r in read_epochs(tmp_path / "run")] == [None] * 3


def test_a_loss_that_is_not_finite_names_step_and_cells(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    assert isinstance(loop.steps, HostSteps)
    compute = loop.steps._loss
    poisoned: list[str] = []

    def poison(
        rows: Any, cells: NDArray[np.int64], n_global: int, numbers: StepNumbers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_cell = compute(rows, cells, n_global, numbers)
        if numbers.step == 20:
            per_cell[3] = math.nan
            poisoned.extend(loop.store.obs_names(cells[3], cells[3] + 1))
            loss = loss * math.nan
        return loss, per_cell

    monkeypatch.setattr(loop.steps, "_loss", poison)
    with pytest.raises(RayvaecError) as caught:
        loop.run()
    assert f"the loss of 1 cells ({poisoned[0]}) stopped being finite at step 21" in str(
        caught.value
    )
    assert "in epoch 2" in str(caught.value)
    assert caught.value.exit_code == 1
    for name in ("model", "last"):
        saved = read_model(tmp_path / "run" / name)
        assert all(value.isfinite().all() for value in saved.module.state_dict().values())
    assert read_model(tmp_path / "run" / "last").provenance["metrics"]["step"] == 20
    run = tmp_path / "run"
    assert f"; {run / 'model'} and {run / 'last'} hold a good model; try" in str(caught.value)


@pytest.mark.parametrize("last_is_good", [True, False])
def test_only_models_that_are_there_are_named(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_is_good: bool
) -> None:
    loop, run = make_loop(), tmp_path / "run"

    def fail(*_: Any) -> None:
        with torch.no_grad():
            loop.module.px_r.mul_(1 if last_is_good else math.nan)
        raise NotFiniteError(0, [])

    monkeypatch.setattr(loop.steps, "take", fail)
    with pytest.raises(RayvaecError, match="the gradient stopped being finite at step 1,") as error:
        loop.run()
    assert not (run / "model").exists()
    assert (run / "last").exists() == last_is_good
    named = f"{run / 'last'} holds a good model; " if last_is_good else ""
    assert error.value.fix.startswith(f"{named}try a lower `lr=...`")


def test_a_validation_elbo_that_is_not_finite_ends_the_run(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "validation_elbo", lambda *_: -math.inf)
    with pytest.raises(RayvaecError, match="validation ELBO became -inf after epoch 1; "):
        make_loop().run()
    assert read_epochs(tmp_path / "run") == []


def test_clipping_changes_the_path_and_a_high_limit_does_not(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    elbos = {}
    for run, clip in (("none", None), ("high", 1e9), ("low", 1e-3)):
        make_loop(run, gradient_clip=clip, max_epochs=1).run()
        elbos[run] = read_epochs(tmp_path / run)[0]["val_elbo"]
    assert elbos["high"] == elbos["none"] != elbos["low"]


def test_workers_clip_what_they_share_once(
    run_ranks: Callable[..., None], make_loop: MakeLoop, tmp_path: Path
) -> None:
    settings = {"max_epochs": 1, "gradient_clip": 0.1, "lr": 1e-4}
    make_loop("alone", **settings).run()
    run_ranks(tmp_path / "two", 2, **settings)
    alone, two = (weights(tmp_path / run) for run in ("alone", "two"))
    for name, value in alone.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_records_carry_the_schedules(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(kl_warmup_epochs=2.0, lr=1e-3)
    loop.run()
    epochs = read_epochs(tmp_path / "run")
    assert [r["kl_weight"] for r in epochs] == [0.5, 1.0, 1.0]
    assert epochs[0]["lr"] > epochs[1]["lr"] > epochs[2]["lr"] > 0
    json.dumps(epochs, allow_nan=False)
