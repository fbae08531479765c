"""The exception tree: everything rayvaec raises on purpose.

::

    RayvaecError            the work failed though the input was right (exit code 1)
    ├── ConfigError         an option or a configuration value           (exit code 2)
    ├── CountsError         the data matrix or its annotation            (exit code 2)
    ├── StoreError          a training store or another output folder    (exit code 2)
    ├── ModelError          a saved model, or data that does not fit it  (exit code 2)
    └── RequestError        an HTTP request, seen by server or client    (exit code 2)
"""

from __future__ import annotations


class RayvaecError(Exception):
    """Base class; raised itself when the work failed though the input was right.

    Parameters
    ----------
    detail : str
        What is wrong, the offending value, and where it stands; no full stop at the end.
    fix : str
        What the user can do about it; no full stop at the end.
    """

    exit_code = 1

    def __init__(self, detail: str, fix: str = "") -> None:
        super().__init__(detail, fix)
        self.detail = detail
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.detail}; {self.fix}" if self.fix else self.detail


class ConfigError(RayvaecError):
    """An option or a configuration value that cannot be used."""

    exit_code = 2


class CountsError(RayvaecError):
    """Counts, labels or genes that cannot be trained on or sampled from."""

    exit_code = 2


class StoreError(RayvaecError):
    """A store, run folder or output that is missing, unfinished, damaged or in the way."""

    exit_code = 2


class ModelError(RayvaecError):
    """A saved model that cannot be read, or data that does not fit the model."""

    exit_code = 2


class RequestError(RayvaecError):
    """An HTTP request that was refused.

    Parameters
    ----------
    detail, fix : str
        As in `RayvaecError`.
    status : int
        HTTP status code.
    error : str
        Short machine-readable name, such as ``"unknown_label"``.
    request_id : str
        The server's identifier of the request, empty where none was given.
    """

    exit_code = 2

    def __init__(
        self,
        detail: str,
        fix: str = "",
        status: int = 400,
        error: str = "bad_request",
        request_id: str = "",
    ) -> None:
        super().__init__(detail, fix)
        self.args = (detail, fix, status, error, request_id)
        self.status = status
        self.error = error
        self.request_id = request_id
