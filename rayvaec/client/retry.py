"""Retry policy of the client: how often, how long, with which backoff."""

from __future__ import annotations

import random
import ssl
import time
from dataclasses import dataclass

import httpx

from rayvaec.client.errors import RetryableError
from rayvaec.errors import RequestError, UnavailableError

LONGEST_WAIT_S = 60.0
_FIRST_WAIT_S = 0.25
_USELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
"""Failures to send a request that the next one would share."""


@dataclass(frozen=True)
class RetryPolicy:
    """What a call may take.

    Parameters
    ----------
    retries : int
        How often in a row it is sent again.
    deadline : float
        Seconds without a byte of an answer after which it ends.
    """

    retries: int
    deadline: float

    def attempts(self) -> Attempts:
        """Return the attempts of a call that begins now."""
        return Attempts(self)


class Attempts:
    """The attempts of one call.

    Parameters
    ----------
    retry_policy : RetryPolicy
        What they may take.
    """

    def __init__(self, retry_policy: RetryPolicy) -> None:
        self._retry_policy = retry_policy
        self.reset()

    @property
    def left(self) -> float:
        """Seconds that the next attempt may wait for an answer; never none at all."""
        return max(self._until - time.monotonic(), 1e-3)

    def record_progress(self) -> None:
        """Note that some of an answer has come."""
        self._until = time.monotonic() + self._retry_policy.deadline

    def reset(self) -> None:
        """Note that what an attempt has brought need not be asked for again, and is used."""
        self._failures = 0
        self.record_progress()

    def wait(self, url: str, error: Exception) -> float:
        """Return the seconds to wait until the next attempt.

        Parameters
        ----------
        url : str
            What was asked.
        error : Exception
            How the last attempt failed.

        Returns
        -------
        float
            Doubles each time; not the same for clients that were turned away together.

        Raises
        ------
        RequestError
            If another attempt is of no use, or there have been enough.
        """
        asked = 0.0
        if isinstance(error, RetryableError):
            failure, asked = error.failure, error.wait
        elif isinstance(error, httpx.TransportError):
            failure = _unreachable(url, error)
            if isinstance(error, _USELESS) or _is_no_tls(error):
                raise failure from error
        elif isinstance(error, RequestError) and error.error == "broken_answer":
            failure = error
        else:
            raise error
        own = _FIRST_WAIT_S * 2**self._failures * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
        wait = min(asked + own, LONGEST_WAIT_S)
        if self._failures >= self._retry_policy.retries or wait >= self.left:
            raise failure
        self._failures += 1
        return wait


def _unreachable(url: str, error: httpx.TransportError) -> RequestError:
    return UnavailableError(
        f"no answer from {url} ({error or type(error).__name__})",
        "check the address, and that the server runs: rayvaec serve MODEL",
        error="unreachable",
    )


def _is_no_tls(error: BaseException | None) -> bool:
    """Return whether a server speaks no TLS, or has a certificate that is not trusted."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            return True
        error = error.__cause__ or error.__context__
    return False
