from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayvaec.data.store.open import Store, open_store
from rayvaec.errors import ConfigError, RayvaecError, StoreError
from rayvaec.training import run_dir as folder
from rayvaec.training.config import TrainConfig, read_config
from rayvaec.util.atomic import write_json


@pytest.fixture
def store(store_path: Path) -> Store:
    return open_store(store_path)


@pytest.fixture
def begun(tmp_path: Path, store: Store) -> Path:
    out = tmp_path / "run"
    folder.create_run(out, store, TrainConfig(max_epochs=5, seed=3))
    return out


def test_a_run_says_what_it_is(begun: Path, store: Store) -> None:
    info = folder.read_run(begun)
    assert (info.store, info.store_hash) == (str(store.path), store.hash)
    assert info.status == "running"
    assert read_config(begun) == TrainConfig(max_epochs=5, seed=3)
    folder.end_run(begun, "finished", {"epoch": 5})
    assert folder.read_run(begun).status == "finished"
    assert folder.read_run(begun).result == {"epoch": 5}
    assert folder.read_run(begun).created == info.created


def test_what_is_in_the_way_is_refused(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="exists already: a run; .*go on with `resume=True`, or"):
        folder.check_new(begun, overwrite=False)
    folder.check_new(begun, overwrite=True)
    folder.check_new(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    folder.check_new(tmp_path / "empty", overwrite=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="exists already"):
        folder.check_new(tmp_path / "mine", overwrite=False)
    with pytest.raises(StoreError, match="mine is not a run folder and is not overwritten"):
        folder.check_new(tmp_path / "mine", overwrite=True)


def test_overwriting_leaves_nothing_of_the_old_run(begun: Path, store: Store) -> None:
    (begun / "metrics.jsonl").touch()
    folder.create_run(begun, store, TrainConfig())
    assert not (begun / "metrics.jsonl").exists()


def test_resuming_takes_the_runs_own_settings(begun: Path, store: Store) -> None:
    saved = TrainConfig(max_epochs=5, seed=3)
    assert folder.check_resumable(begun, store, None) == saved
    assert folder.check_resumable(begun, store, TrainConfig(seed=3)) == saved
    more = folder.check_resumable(begun, store, TrainConfig(seed=3, max_epochs=9, num_workers=2))
    assert (more.max_epochs, more.num_workers) == (9, 2)


def test_resuming_with_other_settings_is_refused(begun: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"lr=0.1 \(the run has 0.005\), seed=4 \(the run has 3"):
        folder.check_resumable(begun, store, TrainConfig(lr=0.1, seed=4))


def test_resuming_nothing_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreError, match="there is no run at .*none to resume"):
        folder.check_resumable(tmp_path / "none", store, None)
    (tmp_path / "other").mkdir()
    with pytest.raises(StoreError, match="other is not a run folder"):
        folder.check_resumable(tmp_path / "other", store, None)


def change(begun: Path, **values: object) -> None:
    info = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps({**info, **values}))


def test_resuming_on_another_store_is_refused(begun: Path, store: Store) -> None:
    change(begun, store_hash="0" * 64, store="/data/elsewhere")
    with pytest.raises(StoreError, match="was trained on /data/elsewhere, which is not the same"):
        folder.check_resumable(begun, store, None)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"format_version": 99}, "upgrade rayvaec"), ({"color": "red"}, "is damaged")],
)
def test_a_run_that_cannot_be_read_is_refused(
    begun: Path, values: dict[str, object], said: str
) -> None:
    change(begun, **values)
    with pytest.raises(StoreError, match=said):
        folder.read_run(begun)


def test_beginning_again_clears_what_ray_left(begun: Path) -> None:
    checkpoints = begun / "checkpoints"
    (checkpoints / "step_0000000009").mkdir()
    (checkpoints / "checkpoint_manager_snapshot.json").write_text("{")
    folder.end_run(begun, "failed")
    (begun / ".run.json.ab12.partial").touch()  # the driver was killed at the end
    assert folder.resume_run(begun, TrainConfig(seed=3, max_epochs=6)) is None
    assert list(checkpoints.iterdir()) == []
    assert list(begun.glob(".*")) == []
    assert folder.read_run(begun).status == "running"
    assert read_config(begun).max_epochs == 6


def test_what_a_killed_worker_was_writing_is_swept(begun: Path) -> None:
    kept = sorted(begun.rglob("*"))
    for name in (".model.7.partial", ".last.7.partial", "checkpoints/.step_0000000009.partial"):
        (begun / name).mkdir()
        (begun / name / "config.json").touch()
    (begun / ".metrics.jsonl.ab12.partial").touch()
    (begun / ".progress.json.ab12.partial").touch()
    others = [begun / ".run.json.ab12.partial", begun / "checkpoints" / ".validate_storage_marker"]
    for path in others:  # the driver and Ray may be writing
        path.touch()
    folder.sweep(begun)
    assert sorted(begun.rglob("*")) == sorted([*kept, *others])


def test_errors_are_ours(begun: Path) -> None:
    (begun / "run.json").write_text("{")
    with pytest.raises(RayvaecError):
        folder.read_run(begun)


EARLY = {"stopped": "patience", "epoch": 9, "best_epoch": 7, "best_elbo": -3.0, "seconds": 1.0}


@pytest.mark.parametrize(
    ("settings", "stopped"),
    [
        ({}, "patience"),
        ({"max_epochs": 400}, "patience"),
        ({"patience": 1}, "patience"),
        ({"patience": 3}, ""),
        ({"patience": 0}, ""),
        ({"patience": 3, "max_epochs": 9}, "max_epochs"),
        ({"patience": 0, "max_epochs": 5}, "max_epochs"),
    ],
    ids=str,
)
def test_a_run_that_stopped_early_goes_on_with_more_patience(
    begun: Path, store: Store, settings: dict[str, Any], stopped: str
) -> None:
    before = {"max_epochs": 20, "patience": 2}
    write_json(begun / "config.json", TrainConfig.from_json(before).to_json())
    folder.end_run(begun, "finished", EARLY)
    asked = TrainConfig.from_json(before | settings)
    config = folder.check_resumable(begun, store, asked)
    done = folder.finished(begun, config)
    assert (done and done["stopped"]) == (stopped or None)
    if done:
        assert {**done, "stopped": "patience"} == EARLY
