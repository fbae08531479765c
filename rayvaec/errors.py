"""The exception tree: everything rayvaec raises on purpose.

::

    RayvaecError            the work failed though the input was right (exit code 1)
    ├── ConfigError         an option or a configuration value           (exit code 2)
    ├── CountsError         the data matrix or its annotation            (exit code 2)
    │   └── FormatError     a file that is not an AnnData, or damaged    (exit code 2)
    ├── StoreError          a training store or another output folder    (exit code 2)
    ├── ModelError          a saved model, or data that does not fit it  (exit code 2)
    └── RequestError        an HTTP request, seen by server or client    (exit code 2)
        ├── UndecodableError            400, the body cannot be decoded
        ├── UnauthorizedError           401, no token, or a wrong one
        ├── NotFoundError               404, nothing at this address
        ├── MethodNotAllowedError       405, another method is needed
        ├── NotAcceptableError          406, no media type of Accept can be given
        ├── ConflictError               409, what is asked about has changed meanwhile
        ├── PayloadTooLargeError        413, body, work or answer above a limit
        ├── UnsupportedMediaTypeError   415, Content-Type or Content-Encoding
        ├── UnprocessableError          422, values that do not fit the model or each other
        ├── TooManyRequestsError        429, no place for another request
        ├── BrokenAnswerError           502, an answer that is not whole
        ├── UnavailableError            503, the server is stopping
        └── TimedOutError               504, no answer within the time limit
"""

from __future__ import annotations

from rayvaec.option_names import addressed


class RayvaecError(Exception):
    """Base class; raised itself when the work failed though the input was right.

    Parameters
    ----------
    detail : str
        What is wrong, the offending value, and where it stands; no full stop at the end. Options
        are named by their flags, see `rayvaec.option_names`.
    fix : str
        What the user can do about it; likewise.
    """

    exit_code = 1

    def __init__(self, detail: str, fix: str = "") -> None:
        super().__init__(detail, fix)

    @property
    def detail(self) -> str:
        """What is wrong, with options named as the reader gives them."""
        return addressed(self.args[0])

    @property
    def fix(self) -> str:
        """What the user can do about it, likewise."""
        return addressed(self.args[1])

    def __str__(self) -> str:
        return f"{self.detail}; {self.fix}" if self.fix else self.detail


class ConfigError(RayvaecError):
    """An option or a configuration value that cannot be used."""

    exit_code = 2


class CountsError(RayvaecError):
    """Counts, labels or genes that cannot be trained on or sampled from."""

    exit_code = 2


class FormatError(CountsError):
    """A file that is not an AnnData, contradicts itself or is damaged."""


class StoreError(RayvaecError):
    """A store, run folder or output that is missing, unfinished, damaged or in the way."""

    exit_code = 2


class ModelError(RayvaecError):
    """A saved model that cannot be read, or data that does not fit the model."""

    exit_code = 2


class RequestError(RayvaecError):
    """An HTTP request that was refused; its subclasses carry the usual status and name.

    Parameters
    ----------
    detail, fix : str
        As in `RayvaecError`.
    status : int, optional
        HTTP status code; the class's own by default.
    error : str, optional
        Short machine-readable name, such as ``"unknown_label"``; the class's own by default.
    request_id : str
        The server's identifier of the request, empty where none was given.
    """

    exit_code = 2
    status = 400
    error = "bad_request"

    def __init__(
        self,
        detail: str,
        fix: str = "",
        status: int | None = None,
        error: str | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(detail, fix)
        self.status = type(self).status if status is None else status
        self.error = type(self).error if error is None else error
        self.request_id = request_id
        self.args = (detail, fix, self.status, self.error, request_id)


class UndecodableError(RequestError):
    """A body that cannot be decoded."""

    error = "undecodable"


class UnauthorizedError(RequestError):
    """A request without the token that is needed."""

    status, error = 401, "unauthorized"


class NotFoundError(RequestError):
    """A request for what does not exist."""

    status, error = 404, "not_found"


class MethodNotAllowedError(RequestError):
    """A request with a method that its address does not take."""

    status, error = 405, "method_not_allowed"


class NotAcceptableError(RequestError):
    """A request for an answer of a media type that cannot be given."""

    status, error = 406, "not_acceptable"


class ConflictError(RequestError):
    """A request about a model that is not the one it began with."""

    status, error = 409, "model_changed"


class PayloadTooLargeError(RequestError):
    """A body, work or an answer above a limit, which the message names."""

    status, error = 413, "too_large"


class UnsupportedMediaTypeError(RequestError):
    """A body of a media type or encoding that is not understood."""

    status, error = 415, "unsupported_media_type"


class UnprocessableError(RequestError):
    """Counts, labels, genes or parameters that do not fit the model or each other."""

    status, error = 422, "invalid_request"


class TooManyRequestsError(RequestError):
    """A request for which there is no place at the moment."""

    status, error = 429, "queue_full"


class BrokenAnswerError(RequestError):
    """An answer that is not whole, or not what its request asked for."""

    status, error = 502, "broken_answer"


class UnavailableError(RequestError):
    """A request that came while the server was stopping."""

    status, error = 503, "stopping"


class TimedOutError(RequestError):
    """A request whose answer did not begin within the time limit."""

    status, error = 504, "timeout"
