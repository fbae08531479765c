from __future__ import annotations

import pickle

import pytest
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from rayvaec.errors import RayvaecError, StoreError
from rayvaec.train.verdict import StopOnOwnError, as_own_error

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
        "--resume goes on from the last checkpoint"
    )
    found = as_own_error(ControllerError(RuntimeError("no\nresources")))
    assert str(found).startswith("Ray could not run the training: RuntimeError: no resources; ")
    assert "\n" not in str(as_own_error(TrainingFailedError("a\nb" * 999)))


def test_our_error_ends_the_run_and_a_lost_worker_does_not() -> None:
    callback = StopOnOwnError()
    with pytest.raises(StoreError, match="x is damaged"):
        callback.after_exception(None, {0: wrapped(KeyError("a")), 1: wrapped(OURS)})
    callback.after_exception(None, {0: wrapped(KeyError("a"))})
