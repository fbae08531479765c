from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import InitializingState, RunningState

from rayvaec.errors import RayvaecError, StoreError
from rayvaec.training.driver.failures import (
    MaxFailuresCallback,
    PlacementTimeoutCallback,
    as_own_error,
    loss_text,
)
from rayvaec.training.driver.storage_retry import StorageLostError
from rayvaec.training.records import read_worker_failures

OURS = StoreError("the file x is damaged", "copy it again")


def wrapped(error: Exception) -> Exception:
    return pickle.loads(pickle.dumps(UserExceptionWithTraceback(error, "Traceback ...")))


def test_our_error_comes_back_as_it_was_raised() -> None:
    failures = {0: wrapped(RuntimeError("Connection closed by peer")), 1: wrapped(OURS)}
    for error in (WorkerGroupError("both failed", failures), ControllerError(OURS)):
        found = as_own_error(pickle.loads(pickle.dumps(error)))
        assert (type(found), str(found)) == (StoreError, str(OURS))
        assert found.exit_code == 2


def test_a_foreign_error_becomes_one_line() -> None:
    failures = {1: wrapped(OSError(28, "No space left on device"))}
    found = as_own_error(WorkerGroupError("failed", failures))
    assert type(found) is RayvaecError
    assert found.exit_code == 1
    assert str(found) == (
        "the training failed: worker 1: OSError: [Errno 28] No space left on device; "
        "go on with `resume=True`"
    )
    found = as_own_error(ControllerError(RuntimeError("no\nresources")))
    assert str(found).startswith("Ray could not run the training: RuntimeError: no resources; ")
    assert "\n" not in str(as_own_error(TrainingFailedError("a\nb" * 999)))


def test_our_error_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="x is damaged"):
        MaxFailuresCallback(-1, tmp_path).after_exception(
            None, {0: wrapped(KeyError("a")), 1: wrapped(OURS)}
        )


def test_losses_between_two_checkpoints_are_counted(tmp_path: Path) -> None:
    limit, lost = (
        MaxFailuresCallback(2, tmp_path),
        {1: wrapped(ConnectionError("Connection closed by peer"))},
    )
    for _ in range(5):
        limit.after_exception(None, lost)
        limit.after_exception(None, lost)
        limit.after_report(None, [], checkpoint=object())
    limit.after_exception(None, lost)
    limit.after_report(None, [], checkpoint=None)
    limit.after_exception(None, lost)
    taken_back = RayActorError(error_msg="its node was taken back", preempted=True)
    limit.after_exception(None, {0: WorkerHealthCheckFailedError("dead", taken_back), **lost})
    with pytest.raises(
        RayvaecError, match="failed 3 times without a new checkpoint: worker 1: Con"
    ):
        limit.after_exception(None, lost)
    for _ in range(9):
        MaxFailuresCallback(-1, tmp_path).after_exception(None, lost)
    survived = len(read_worker_failures(tmp_path))
    assert survived == 10 + 2 + 1 + 9
    with pytest.raises(
        RayvaecError, match=r"the training failed: worker 1: .*go on with `resume=True`"
    ):
        MaxFailuresCallback(0, tmp_path).after_exception(None, lost)
    assert len(read_worker_failures(tmp_path)) == survived


def test_a_loss_is_one_line_that_names_worker_place_and_cause() -> None:
    killed = RayActorError(
        error_msg="The actor died.\n\tpid: 7\n\tip: 10.0.0.7\nIts worker process has died."
    )
    failures = {
        0: wrapped(RuntimeError("Connection closed by peer")),
        1: WorkerHealthCheckFailedError("dead", killed),
    }
    assert loss_text(failures) == "lost worker 1 (its process ended, on 10.0.0.7)"
    gone = RayActorError(error_msg="The actor is dead because its node has died. Node Id: ab")
    failures[0] = WorkerHealthCheckFailedError("dead", gone)
    assert loss_text(failures).startswith("lost worker 0 (its node was lost), worker 1 (its")
    lonely = wrapped(RuntimeError("[/third_party/gloo/pair.cc:537] Read error: Connection reset"))
    assert loss_text({1: lonely}) == "worker 1 lost the connection to another worker"
    assert loss_text({2: wrapped(OSError(5, "no\nanswer"))}) == (
        "worker 2 failed (OSError: [Errno 5] no answer)"
    )


def test_waiting_for_room_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("rayvaec.training.driver.failures.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("rayvaec.training.driver.failures.time.sleep", lambda _: None)
    limit, running, waiting = (
        PlacementTimeoutCallback(60, "2 to 8 workers"),
        RunningState(),
        InitializingState(),
    )

    def wait_until(time: float) -> None:
        clock[0] = time
        limit.after_controller_state_update(waiting, waiting)

    wait_until(0.0)
    wait_until(50.0)
    limit.after_controller_state_update(waiting, running)
    wait_until(55.0)
    wait_until(114.0)
    with pytest.raises(RayvaecError, match="no room for 2 to 8 workers for 61 s; .*`resume=True`"):
        wait_until(116.0)


def test_storage_that_fails_under_the_controller_is_told_apart() -> None:
    lost = as_own_error(ControllerError(OSError(5, "Input/output error")))
    assert type(lost) is StorageLostError
    full = as_own_error(ControllerError(OSError("[Errno 28] Error writing. Detail: [errno 28]")))
    assert str(full).startswith("there is no room left for the record of checkpoints")
    assert type(full) is RayvaecError
