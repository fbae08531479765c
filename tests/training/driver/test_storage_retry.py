from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from rayvaec.data.store.open import open_store
from rayvaec.errors import RayvaecError, StoreError
from rayvaec.training import checkpoint as checkpoint_module
from rayvaec.training import records
from rayvaec.training.checkpoint import newest_checkpoint, store_checkpoint
from rayvaec.training.driver import storage_retry
from rayvaec.training.driver.storage_retry import (
    StorageLostError,
    error_number,
    is_outage,
    retry_io,
)
from rayvaec.training.loop import TrainLoop
from rayvaec.training.records import append_record, read_epochs, read_records

MakeLoop = Callable[..., TrainLoop]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage_retry, "LONGEST_PAUSE", 0.05)


def failing(times: int, number: int) -> Callable[[], str]:
    left = [times]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return "done"

    return action


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.EBUSY])
def test_storage_that_comes_back_is_waited_for(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert retry_io("the run", failing(5, number)) == "done"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"the run cannot be reached ({os.strerror(number)}): waiting"]


def test_storage_that_stays_away_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retry, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(StorageLostError, match=r"the run could not be reached for 0 s \(Stale"):
        retry_io("the run", failing(10**9, errno.ESTALE))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_storage_that_is_full_is_not_waited_for(number: int) -> None:
    action = failing(1, number)
    with pytest.raises(RayvaecError, match="no room left for the run .*; free some space, then"):
        retry_io("the run", action)


LASTING = [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT]


@pytest.mark.parametrize("number", LASTING)
@pytest.mark.parametrize("given", [True, False])
def test_what_waiting_does_not_mend_is_said_at_once(
    number: int, given: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise OSError(number, os.strerror(number), str(tmp_path / "run/metrics.jsonl"))

    with pytest.raises(RayvaecError) as caught:
        retry_io("the run", action, tmp_path if given else None)
    assert not isinstance(caught.value, StorageLostError)
    problem = f"the run cannot be written or read ({os.strerror(number)}: {tmp_path}/run/metrics"
    assert caught.value.detail.startswith(problem)
    assert caught.value.fix.endswith("then go on with `resume=True`")
    # A missing file is looked for once more: its folder may have come back meanwhile.
    assert len(calls) == (2 if given and number == errno.ENOENT else 1)


def test_a_folder_that_is_away_is_waited_for(tmp_path: Path) -> None:
    folder, calls = tmp_path / "mounted", []

    def action() -> str:
        calls.append(1)
        if len(calls) == 4:
            folder.mkdir()  # after the action has missed it, and before anybody looks
        if len(calls) < 5:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return "done"

    assert retry_io("the run", action, folder) == "done"


def test_what_is_no_failure_of_storage_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        retry_io("the run", lambda: 1 // 0)


def test_numbers_are_read_from_foreign_errors() -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert error_number(SafetensorError(text)) == errno.ENOSPC
    assert error_number(OSError("[Errno 5] Error reading. Detail: [errno 5]")) == errno.EIO
    assert error_number(OSError("of another kind")) is None
    assert error_number(ValueError("os error 28")) is None


def test_a_store_that_is_away_is_told_from_one_that_is_damaged(
    store_path: Path, tmp_path: Path
) -> None:
    damaged = StoreError("the file x is cut short")
    assert not is_outage(damaged, store_path)
    assert is_outage(damaged, tmp_path / "unmounted")
    unread = StoreError("the file x cannot be read")
    unread.__cause__ = OSError(errno.EIO, "Input/output error")
    assert is_outage(unread, store_path)
    assert not is_outage(ValueError("nan"), tmp_path / "unmounted")
    assert not is_outage(damaged, "s3://bucket/store")
    (tmp_path / "file").touch()
    assert not is_outage(damaged, tmp_path / "file")
    assert not is_outage(damaged, tmp_path / "file" / "store")


def test_a_record_that_was_half_written_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(tmp_path, {"step": 1})
    sync, calls = os.fsync, []

    def fail_twice(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) <= 2:
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(records.os, "fsync", fail_twice)
    append_record(tmp_path, {"step": 2})
    append_record(tmp_path, {"step": 3})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]


def test_what_a_kill_left_of_a_line_is_written_over(tmp_path: Path) -> None:
    append_record(tmp_path, {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "val')
    append_record(tmp_path, {"step": 2})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


def test_a_run_whose_folder_is_away_waits_and_goes_on(
    make_loop: MakeLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_loop("straight").run()
    loop, run, away = make_loop("disturbed"), tmp_path / "disturbed", tmp_path / "away"

    def disturb() -> None:
        while not read_epochs(run):
            time.sleep(0.002)
        run.rename(away)
        time.sleep(0.5)
        assert not run.exists(), "something was written in the place of the folder"
        away.rename(run)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    loop.run()
    disturber.join()
    assert "cannot be reached (No such file or directory): waiting" in caplog.text
    straight, disturbed = (
        [(r["step"], r["train_loss"]) for r in read_records(path)]
        for path in (tmp_path / "straight", run)
    )
    assert disturbed == straight


def whole_checkpoint(make_loop: MakeLoop, tmp_path: Path) -> Path:
    """Train, and return a checkpoint on this machine."""
    make_loop(max_epochs=1).run()
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    return newest


def test_a_checkpoint_without_room_leaves_the_last_good_one(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = whole_checkpoint(make_loop, tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    store_checkpoint(good, kept, "step_0000000001")
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> Any:
        copy(source, target)
        with target.open("r+b") as file:
            file.truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.shutil, "copyfile", full)
    with pytest.raises(RayvaecError, match=r"no room left for the checkpoint .*step_0000000002"):
        store_checkpoint(good, kept, "step_0000000002")
    assert [path.name for path in kept.iterdir()] == ["step_0000000001"]
    assert newest_checkpoint(kept) == kept / "step_0000000001"


def test_a_checkpoint_is_tried_again_from_the_start(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = whole_checkpoint(make_loop, tmp_path)
    copy, calls = shutil.copyfile, []

    def fail_twice(source: Path, target: Path) -> Any:
        calls.append(target)
        if len(calls) <= 2:
            target.write_bytes(b"half")
            raise OSError(errno.EIO, "Input/output error")
        return copy(source, target)

    monkeypatch.setattr(checkpoint_module.shutil, "copyfile", fail_twice)
    kept = tmp_path / "kept"
    (kept / "step_0000000003").mkdir(parents=True)  # nobody was told of it
    assert store_checkpoint(good, kept, "step_0000000003") == newest_checkpoint(kept)
    assert [path.name for path in kept.iterdir()] == ["step_0000000003"]


def test_a_run_without_room_for_a_checkpoint_stops_and_can_be_resumed(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loop("straight").run()
    settings = {"checkpoint_steps": 7, "checkpoint_seconds": 1e-3}
    save, calls = checkpoint_module.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(
        RayvaecError, match=r"no room left for the checkpoint .*then go on with `resume=True`"
    ):
        make_loop("full", **settings).run()
    assert not calls[2].parent.exists()
    resumed = make_loop("full", **settings)
    assert resumed.state.step == 14
    resumed.run()
    ours, theirs = (read_epochs(tmp_path / name)[-1]["val_elbo"] for name in ("full", "straight"))
    assert ours == theirs


def test_a_read_that_fails_is_no_reason_to_forget_a_checkpoint(
    make_loop: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = whole_checkpoint(make_loop, tmp_path)

    def unreadable(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_module, "_digest", unreadable)
    with pytest.raises(OSError, match="Input/output"):
        newest_checkpoint(newest.parent)


def test_the_worker_waits_for_its_store(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayvaec.training.driver.train_fn import _wait_for_store

    path = tmp_path / "mounted" / "store"

    def mount() -> None:
        time.sleep(0.2)
        path.parent.mkdir()
        path.symlink_to(store_path)

    mounting = threading.Thread(target=mount)
    mounting.start()
    _wait_for_store(path, path)
    mounting.join()
    assert open_store(path).n_train
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError):
        _wait_for_store(tmp_path / "empty", tmp_path / "empty")
    monkeypatch.setattr(storage_retry, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(StorageLostError, match="the store .*none could not be reached"):
        _wait_for_store(tmp_path / "none", tmp_path / "none")
