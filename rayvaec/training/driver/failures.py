"""Classify failures: unwrap Ray's exceptions; retry only what can succeed.

Ray's controller imports this module, which therefore imports little.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.v2._internal.execution.callback import ControllerCallback

from rayvaec.errors import RayvaecError
from rayvaec.training.driver.storage_retry import (
    GO_ON,
    UNREACHABLE,
    StorageLostError,
    error_number,
    lasting_failure,
)
from rayvaec.training.records import record_worker_failure

POLL_SECONDS = 0.5


class MaxFailuresCallback(UserCallback):
    """Decide, in Ray's controller, which failures a run survives.

    An error of ours ends it at once: a damaged store or a loss that is not finite will be the same
    the next time. Lost workers are worth another try. Ray counts them over the whole run, which a
    week on spot nodes would use up; here the count starts anew with every checkpoint, so that only
    a run that does not get on is ended.

    Parameters
    ----------
    max_failures : int
        Failures survived between two checkpoints; -1: any number. Nodes that were taken back with
        a warning do not count.
    run : Path
        The run folder, in which losses are noted.
    """

    def __init__(self, max_failures: int, run: Path) -> None:
        self._max_failures, self._run = max_failures, run
        self._failures = 0

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Forgive what was before a checkpoint."""
        if checkpoint is not None:
            self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first `RayvaecError` among the workers' errors, or that there were too many."""
        own = own_error(worker_exceptions)
        if own is not None:
            raise own
        if not any(_was_preempted(error) for error in worker_exceptions.values()):
            self._failures += 1
            if 0 <= self._max_failures < self._failures:
                raise _failed(worker_exceptions, self._failures)
        record_worker_failure(self._run, loss_text(worker_exceptions))


class PlacementTimeoutCallback(ControllerCallback):
    """End a run that has waited too long for room for its workers.

    Parameters
    ----------
    max_wait : float
        Seconds.
    who : str
        Workers that are waited for, such as ``"2 to 8 workers"``.
    """

    def __init__(self, max_wait: float, who: str) -> None:
        self._max_wait, self._who = max_wait, who
        self._since: float | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Look at the clock whenever Ray's controller has looked for room in vain."""
        name = type(current_state).__name__
        if name not in (
            *("InitializingState", "SchedulingState", "ReschedulingState"),
            *("RestartingState", "ResizingState"),
        ):
            self._since = None
            return
        if self._since is None:
            self._since = time.monotonic()
        waited = time.monotonic() - self._since
        if waited > self._max_wait:
            raise RayvaecError(
                f"there was no room for {self._who} for {waited:.0f} s",
                f"free CPUs and GPUs or add nodes, then {GO_ON}; --set max_wait=... waits longer",
            )
        if previous_state is current_state:
            time.sleep(POLL_SECONDS)  # the controller itself would ask again without a pause


def own_error(failures: Mapping[int, BaseException]) -> RayvaecError | None:
    """Return the `RayvaecError` of the lowest rank that raised one, None where none did."""
    for rank in sorted(failures):
        error = unwrapped(failures[rank])
        if isinstance(error, RayvaecError):
            return error
    return None


def unwrapped(error: BaseException) -> BaseException:
    """Return what a worker raised, without the wrapper that carries its traceback."""
    return getattr(error, "_base_exc", error)


def loss_text(failures: Mapping[int, BaseException]) -> str:
    """Say in a line which workers were lost and how.

    Parameters
    ----------
    failures : Mapping
        By rank, what Ray knows. Where one worker dies, others complain that they lost it.

    Returns
    -------
    str
    """
    dead = {rank: _death(error) for rank, error in failures.items() if _death(error) is not None}
    if not dead:
        rank = min(failures)
        what = _one_line(unwrapped(failures[rank]))
        if re.search("gloo|NCCL", what):  # a page of advice on what is simply the loss of a peer
            return f"worker {rank} lost the connection to another worker"
        return f"worker {rank} failed ({what})"
    return "lost " + ", ".join(f"worker {rank} ({how})" for rank, how in sorted(dead.items()))


def _death(error: BaseException) -> str | None:
    """Say how a worker's process ended, None where it did not."""
    death = getattr(error, "health_check_failure", None)
    if death is None:
        return None
    text = str(death)
    place = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
    what = "its node was lost" if "its node has died" in text else "its process ended"
    return f"{what}, on {place[1]}" if place else what


def _was_preempted(error: BaseException) -> bool:
    """Return whether a worker went with a node that had been announced to go."""
    death = getattr(error, "health_check_failure", error)
    return getattr(death, "preempted", False)


def as_own_error(error: TrainingFailedError) -> RayvaecError:
    """Turn the failure of a run into one line.

    Parameters
    ----------
    error : TrainingFailedError
        What ``fit`` raised.

    Returns
    -------
    RayvaecError
        The one that a worker raised, or one that names the worker and its error; a
        `StorageLostError` where Ray's controller could not write to the run.
    """
    if isinstance(error, ControllerError):
        return _of_controller(error.controller_failure)
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    own = own_error(failures)
    if own is not None:
        return own
    return _failed(failures or {0: error}, 1)


def _of_controller(cause: BaseException) -> RayvaecError:
    if isinstance(cause, RayvaecError):
        return cause
    number = error_number(cause)
    if number in UNREACHABLE or number == errno.ENOENT:  # the folder may be away
        return StorageLostError(
            f"the run's checkpoints could not be kept: {_one_line(cause)}",
            f"{GO_ON} when the storage is back",
        )
    if number is not None:
        return lasting_failure("the record of checkpoints", cause)
    return RayvaecError(
        f"Ray could not run the training: {_one_line(cause)}",
        f"check that the cluster's CPUs and GPUs are free, then {GO_ON}",
    )


def _failed(failures: Mapping[int, BaseException], times: int) -> RayvaecError:
    what = "; ".join(
        f"worker {rank}: {_one_line(unwrapped(failures[rank]))}" for rank in sorted(failures)[:2]
    )
    often = f" {times} times without a new checkpoint" if times > 1 else ""
    return RayvaecError(f"the training failed{often}: {what}", GO_ON)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + '...'}"
