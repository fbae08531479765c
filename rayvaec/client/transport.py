"""HTTP transports of the client, asynchronous and blocking.

What is asked and how is written once, as coroutines (`rayvaec.client.async_client`). Over a
`BlockingTransport` these never wait for an event loop, so that `finished` runs them through at
once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import httpx

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """An answer that has begun.

    Parameters
    ----------
    status : int
        HTTP status code.
    reason : str
        Its words.
    headers : mapping
        Names in any case.
    chunks : async iterator of bytes
        The body as it arrives.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]

    async def whole(self) -> bytes:
        """Return what is left of the body."""
        return b"".join([chunk async for chunk in self.chunks])


class Transport(Protocol):
    """Requests and waits."""

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, timeout: float | None = None
    ) -> AbstractAsyncContextManager[Reply]:
        """Send a request; the block may read the answer, and leaving it closes the answer.

        No wait for connection or bytes is longer than `timeout` seconds.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class AsyncTransport:
    """Waits on an event loop.

    Parameters
    ----------
    http : httpx.AsyncClient
        With address, headers and timeouts set.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[Reply]:
        """Send a request, as in `Transport`."""
        waits = _at_most(self._http.timeout, timeout)
        async with self._http.stream(method, path, content=body, timeout=waits) as response:
            yield _reply(response, response.aiter_bytes())

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


class BlockingTransport:
    """Blocks; its coroutines end without ever being suspended.

    Parameters
    ----------
    http : httpx.Client
        With address, headers and timeouts set.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, timeout: float | None = None
    ) -> AsyncIterator[Reply]:
        """Send a request, as in `Transport`."""
        waits = _at_most(self._http.timeout, timeout)
        with self._http.stream(method, path, content=body, timeout=waits) as response:
            yield _reply(response, _stepped(response.iter_bytes()))

    async def sleep(self, seconds: float) -> None:
        """Block."""
        time.sleep(seconds)

    async def close(self) -> None:
        """Close the connections."""
        self._http.close()


def finished(work: Awaitable[Result]) -> Result:
    """Run a coroutine over a `BlockingTransport` to its end.

    Parameters
    ----------
    work : awaitable
        What never waits for an event loop.

    Returns
    -------
    object
        Its result.
    """
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a blocking client's work waited for an event loop")


def stepped(parts: AsyncIterator[Result]) -> Iterator[Result]:
    """Iterate over what an asynchronous generator over a `BlockingTransport` yields."""
    try:
        while True:
            try:
                part = finished(anext(parts))
            except StopAsyncIteration:
                return
            yield part
    finally:
        finished(parts.aclose())  # type: ignore[attr-defined]


async def _stepped(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _at_most(timeouts: httpx.Timeout, seconds: float | None) -> httpx.Timeout:
    """Return timeouts none of which is longer than `seconds`."""
    if seconds is None:
        return timeouts
    return httpx.Timeout(
        **{
            name: seconds if given is None else min(given, seconds)
            for name, given in timeouts.as_dict().items()
        }
    )


def _reply(response: httpx.Response, chunks: AsyncIterator[bytes]) -> Reply:
    return Reply(response.status_code, response.reason_phrase, response.headers, chunks)
