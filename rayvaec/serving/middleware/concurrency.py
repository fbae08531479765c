"""Limits of concurrent requests and of the bytes they hold."""

from __future__ import annotations

import io
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from threading import Lock

from rayvaec.errors import PayloadTooLargeError, TooManyRequestsError


class ConcurrencyLimiter:
    """Bounds the requests at work and the bytes that they hold; refuses what is beyond at once.

    Parameters
    ----------
    max_requests : int
        Most requests at the same time.
    max_bytes : int
        Most bytes that they hold together: bodies, the cells read of them, and results that are
        not sent yet.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self._inside, self._held, self._waiting = 0, 0, 0
        self._mean_seconds = 1.0
        self._lock = Lock()  # results are counted by the sampler's and the readers' threads

    @contextmanager
    def enter(self) -> Iterator[Slot]:
        """Give a request its slot while the block runs.

        Raises
        ------
        TooManyRequestsError
            Where all slots are taken.
        """
        if self._inside >= self.max_requests:
            raise TooManyRequestsError(
                f"{self._inside} requests are at work or waiting, the most that are accepted",
                f"send it again in {self.retry_after} s",
            )
        self._inside += 1
        slot, started = Slot(self), time.monotonic()
        try:
            yield slot
        finally:
            slot.close()
            self._inside -= 1
            self._mean_seconds += 0.1 * (time.monotonic() - started - self._mean_seconds)

    @contextmanager
    def waiting_for_client(self) -> Iterator[None]:
        """Count an answer as one whose client has yet to read, while the block runs."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def change(self, n_bytes: int) -> int:
        """Count `n_bytes` more, or fewer, as held; return how many are held now."""
        with self._lock:
            self._held += n_bytes
            return self._held

    @property
    def inside(self) -> int:
        """Requests that hold a slot."""
        return self._inside

    @property
    def held_bytes(self) -> int:
        """Bytes that they hold."""
        return self._held

    @property
    def waiting(self) -> int:
        """Answers whose clients have yet to read what was sent."""
        return self._waiting

    @property
    def retry_after(self) -> int:
        """Seconds after which a slot should be free: what a request has lately taken."""
        return min(max(math.ceil(self._mean_seconds), 1), 60)


class Slot:
    """What one request holds of a limiter's bytes.

    Parameters
    ----------
    limiter : ConcurrencyLimiter
        Whose.
    """

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self._limiter = limiter
        self._request, self._answer = 0, 0
        self._closed = False

    @property
    def request_bytes(self) -> int:
        """Bytes of the request itself: its body, or the cells that were read of it."""
        return self._request

    def has_room(self, n_bytes: int) -> bool:
        """Return whether all requests together may hold so many bytes more."""
        return self._limiter.held_bytes + n_bytes <= self._limiter.max_bytes

    def resize(self, n_bytes: int) -> None:
        """Set the bytes of the request itself.

        Parameters
        ----------
        n_bytes : int
            In place of those before.

        Raises
        ------
        PayloadTooLargeError
            If they are more than all requests may hold.
        TooManyRequestsError
            If there is no room for them beside what other requests hold.
        """
        if n_bytes > self._request and n_bytes > self._limiter.max_bytes:
            raise PayloadTooLargeError(
                f"the request takes {n_bytes:,} bytes, all together may hold "
                f"{self._limiter.max_bytes:,}",
                "send fewer cells a request",
                error="body_too_large",
            )
        grown = n_bytes - self._request
        if self._change(grown) > self._limiter.max_bytes and grown > 0:
            self._change(-grown)
            raise self._memory_full()
        self._request = n_bytes

    def hold(self, n_bytes: int) -> None:
        """Count a result that is not sent yet; `release` follows."""
        self._change(n_bytes)
        self._answer += n_bytes

    def release(self, n_bytes: int) -> None:
        """Count a result as sent or dropped."""
        self._change(-n_bytes)
        self._answer -= n_bytes

    def check(self) -> None:
        """Refuse to go on with an answer that is kept whole, where too much is held.

        Raises
        ------
        PayloadTooLargeError
            If this answer alone is more than all may hold.
        TooManyRequestsError
            If it is too much beside what other requests hold.
        """
        if self._limiter.held_bytes <= self._limiter.max_bytes:
            return
        if self._answer > self._limiter.max_bytes:
            raise PayloadTooLargeError(
                f"the answer takes more than the {self._limiter.max_bytes:,} bytes that all "
                "requests may hold together",
                "accept application/vnd.apache.arrow.stream, which is sent in pieces, or ask for "
                "less a request",
            )
        raise self._memory_full()

    def close(self) -> None:
        """Give everything back; what is counted later is ignored."""
        self._change(-self._request - self._answer)
        self._closed = True

    def _change(self, n_bytes: int) -> int:
        return 0 if self._closed else self._limiter.change(n_bytes)

    def _memory_full(self) -> TooManyRequestsError:
        return TooManyRequestsError(
            f"the requests at work hold {self._limiter.held_bytes:,} of the "
            f"{self._limiter.max_bytes:,} bytes that they may, too many for this one beside them",
            f"send it again in {self._limiter.retry_after} s, or smaller",
            error="memory_full",
        )


async def read_body(
    chunks: AsyncIterator[bytes], length: str | None, max_bytes: int, slot: Slot
) -> bytes:
    """Read a body, giving up as soon as it is too large.

    Parameters
    ----------
    chunks : async iterator of bytes
        The body as it arrives.
    length : str or None
        Value of the Content-Length header.
    max_bytes : int
        Largest body.
    slot : Slot
        Where the body is counted: what it says it has, then what it has.

    Returns
    -------
    bytes

    Raises
    ------
    PayloadTooLargeError
        If the body is, or says it is, larger.
    TooManyRequestsError
        If there is no room for it beside what other requests hold.
    """
    declared = declared_bytes(length)
    if declared > max_bytes:
        raise _body_too_large(f"{declared:,} bytes", max_bytes)
    slot.resize(declared)
    # Not a list of chunks: there may be millions, of a byte each.
    body = io.BytesIO()
    async for chunk in chunks:
        size = body.tell() + len(chunk)
        if size > max_bytes:
            raise _body_too_large(f"more than {max_bytes:,} bytes", max_bytes)
        if size > slot.request_bytes:
            slot.resize(size)
        body.write(chunk)
    slot.resize(body.tell())
    return body.getvalue()


def declared_bytes(length: str | None) -> int:
    """Return what a Content-Length header says; 0 where there is none, or no number."""
    if length is None or not (length.isascii() and length.isdecimal()):
        return 0
    return int(length[-18:]) if len(length.lstrip("0")) <= 18 else 2**63


def _body_too_large(size: str, max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"the body has {size}, the largest allowed is {max_bytes:,}",
        "send fewer cells a request, or the same as an Arrow stream, which is smaller than JSON",
        error="body_too_large",
    )
