from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import ControllerError

from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, StoreError
from rayvaec.model.saved import read_model
from rayvaec.training import run_dir as folder
from rayvaec.training.config import TrainConfig
from rayvaec.training.driver.failures import as_own_error
from rayvaec.training.driver.storage_retry import no_room
from rayvaec.training.driver.trainer import RunResult, _leave, train
from rayvaec.training.loop import TrainLoop
from rayvaec.training.records import read_attempts, read_epochs, read_records

# Ray Train makes a context of Ray Data, whose constructor warns of its own fields.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

SETTINGS = {"batch_size": 64, "n_hidden": 16, "max_epochs": 5, "checkpoint_steps": 64}


@pytest.fixture(scope="module")
def finished(
    ray_local: None, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """A training on two workers."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(store_path, out, TrainConfig.from_json({**SETTINGS, "num_workers": 2}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model(run / "last").module.state_dict()


@pytest.mark.ray
def test_two_workers_train(finished: RunResult, store_path: Path) -> None:
    run, store = finished.run, open_store(store_path)
    epochs = read_epochs(run)
    elbos = [record["val_elbo"] for record in epochs]
    assert elbos == sorted(elbos)
    assert [record["num_workers"] for record in epochs] == [2] * 5
    assert (finished.epochs, finished.best_epoch, finished.stopped) == (5, 5, "max_epochs")
    assert finished.best_elbo == elbos[-1]
    assert finished.startup_seconds > 0
    assert read_model(finished.model).provenance["store_hash"] == store.hash
    assert torch.equal(weights(run)["px_r"], read_model(finished.model).module.px_r)
    for model in (finished.model, finished.last):
        assert read_model(model).summary.cells.sum() == store.n_train
    given = TrainConfig.from_json({**SETTINGS, "num_workers": 2})
    assert TrainConfig.from_options(run / "config.json") == given.resolved(store.n_train)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    kept = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert kept[-1] == f"step_{epochs[-1]['step']:010d}"
    assert len(kept) == 2
    assert not (run / "progress.json").exists()


@pytest.mark.ray
def test_one_worker_comes_to_the_same_elbo(
    finished: RunResult, make_loop: Callable[..., TrainLoop], tmp_path: Path
) -> None:
    make_loop("alone", **{**SETTINGS, "log_steps": None}).run()
    alone, two = (
        [record["val_elbo"] for record in read_epochs(run)]
        for run in (tmp_path / "alone", finished.run)
    )
    assert len(alone) == 5
    assert two == pytest.approx(alone, rel=0.005)


@pytest.mark.ray
def test_a_finished_run_is_not_started_again(
    finished: RunResult, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray() -> None:
        raise AssertionError("Ray is not needed")

    monkeypatch.setattr("rayvaec.training.driver.trainer.ray_session", no_ray)
    again = train(store_path, finished.run, resume=True)
    assert (again.epochs, again.best_elbo, again.stopped) == (5, finished.best_elbo, "max_epochs")
    assert (again.model, again.startup_seconds) == (finished.model, 0.0)
    more = TrainConfig.from_json({**SETTINGS, "num_workers": 2, "max_epochs": 6})
    with pytest.raises(AssertionError, match="Ray is not needed"):
        train(store_path, finished.run, more, resume=True)


@pytest.mark.ray
def test_a_run_is_reproduced_by_its_config_though_a_worker_is_killed(
    finished: RunResult, store_path: Path, tmp_path: Path, descendants: Callable[..., Any]
) -> None:
    run, killed = tmp_path / "again", list[int]()

    def kill() -> None:
        while not (run / "progress.json").exists():
            time.sleep(0.002)
        workers = (pid for pid, name in descendants(os.getpid()) if b"RayTrainWorker" in name)
        killed.append(next(workers))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(store_path, run, TrainConfig.from_options(finished.run / "config.json"))
    killer.join()
    assert [attempt["num_workers"] for attempt in read_attempts(run)] == [2, 2], killed
    for name, value in weights(finished.run).items():
        assert torch.equal(weights(run)[name], value), name
    assert [(r["step"], r["train_loss"], r["val_elbo"]) for r in read_records(run)] == [
        (r["step"], r["train_loss"], r["val_elbo"]) for r in read_records(finished.run)
    ]


@pytest.mark.ray
def test_a_killed_run_is_resumed_to_the_same_bits(
    finished: RunResult, store_path: Path, tmp_path: Path
) -> None:
    # What a kill leaves: an older checkpoint, half of a newer one, and a broken record of Ray's.
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "last")
    older, newer = sorted((run / "checkpoints").glob("step_*"))
    (newer / "state.json").unlink()
    folder.note_end(run, "running")
    (run / "checkpoints" / "checkpoint_manager_snapshot.json").write_text('{"ray_ver')
    result = train(store_path, run, resume=True)
    assert result.epochs == 5
    for name, value in weights(finished.run).items():
        assert torch.equal(weights(run)[name], value), name
    assert [(r["epoch"], r["step"], r["val_elbo"]) for r in read_records(run)] == [
        (r["epoch"], r["step"], r["val_elbo"]) for r in read_records(finished.run)
    ]
    assert older.name < newer.name


def damaged(store_path: Path, tmp_path: Path) -> Path:
    """A copy of the store with bytes of its counts overwritten."""
    store = tmp_path / "damaged"
    shutil.copytree(store_path, store)
    files = (store / "dataset_0" / "X" / "data" / "c").rglob("*")
    shard = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = np.random.default_rng(0).bytes(len(data) // 2)
    shard.write_bytes(data)
    return store


@pytest.mark.ray
def test_an_error_in_a_worker_arrives_as_it_was_raised(
    ray_local: None, store_path: Path, tmp_path: Path
) -> None:
    store, run = damaged(store_path, tmp_path), tmp_path / "run"
    with pytest.raises(StoreError) as caught:
        train(store, run, TrainConfig.from_json({**SETTINGS, "num_workers": 2}))
    assert str(store) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not run.exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_workers": 3}, "3 workers need 3 CPUs and Ray has 2"),
        ({"num_workers": "3-4"}, "3 workers need 3 CPUs and Ray has 2"),
        ({"cpus_per_worker": 3}, "1 worker with 3 CPUs each needs 3 CPUs and Ray has 2"),
        ({"use_gpu": True}, "1 worker needs 1 GPU and Ray has 0"),
    ],
)
def test_what_ray_does_not_have_is_said_at_once(
    ray_local: None, store_path: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(store_path, tmp_path / "run", TrainConfig.from_json(settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_only_a_run_that_is_kept_can_be_resumed(
    store_path: Path, tmp_path: Path, kept: bool
) -> None:
    for number, error in enumerate((no_room("it"), as_own_error(ControllerError(OSError(5, "x"))))):
        assert "go on with `resume=True`" in error.fix
        run = tmp_path / f"run{number}"
        folder.create_run(run, open_store(store_path), TrainConfig(max_epochs=1))
        if kept:
            (run / "checkpoints" / "step_0000000001").mkdir()
        _leave(run, error)
        assert run.exists() == kept
        assert ("resume" in str(error)) == kept
        assert ("start the run again" in str(error)) != kept


def test_what_is_wrong_is_said_before_ray_starts(store_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        train(tmp_path / "none", tmp_path / "run")
    with pytest.raises(ConfigError, match="`resume=True` and `overwrite=True` exclude each other"):
        train(store_path, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(StoreError, match="there is no run at"):
        train(store_path, tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(StoreError, match="exists already"):
        train(store_path, tmp_path / "mine")
    assert not (tmp_path / "run").exists()
