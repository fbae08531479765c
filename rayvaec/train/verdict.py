"""What a failure in a worker means: Ray's wrappers off, and no second try where it is pointless.

Ray's controller imports this module, which therefore imports little.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from rayvaec.errors import RayvaecError


class StopOnOwnError(UserCallback):
    """End the run at once when a worker raised an error of ours.

    A lost worker is worth another try; a damaged store or a loss that is not finite is not.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first `RayvaecError` among the workers' errors, in the controller."""
        own = own_error(worker_exceptions)
        if own is not None:
            raise own


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


def as_own_error(error: TrainingFailedError) -> RayvaecError:
    """Turn the failure of a run into one line.

    Parameters
    ----------
    error : TrainingFailedError
        What ``fit`` raised.

    Returns
    -------
    RayvaecError
        The one that a worker raised, or one that names the worker and its error.
    """
    if isinstance(error, ControllerError):
        cause: BaseException = error.controller_failure
        if isinstance(cause, RayvaecError):
            return cause
        return RayvaecError(
            f"Ray could not run the training: {_one_line(cause)}",
            "check that the cluster's CPUs and GPUs are free, then --resume",
        )
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    own = own_error(failures)
    if own is not None:
        return own
    what = "; ".join(
        f"worker {rank}: {_one_line(unwrapped(failures[rank]))}" for rank in sorted(failures)[:2]
    )
    return RayvaecError(
        f"the training failed: {what or _one_line(error)}",
        "--resume goes on from the last checkpoint",
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + '...'}"
