"""Flow control between replica and proxy: an answer waits for its client.

Ray Serve's proxy takes at once whatever a replica sends, and keeps what its client has not read.
So the proxy's part, `Acknowledger`, tells the replica how much the client has taken, in messages
among those that ASGI's `receive` gives. The replica's part, `SendWindow`, does not send more than
`WINDOW_BYTES` beyond that.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

EXTENSION = "rayvaec.acknowledge"
"""Name in ASGI's extensions by which the proxy says that it acknowledges what the client takes."""

WINDOW_BYTES = 8 * 2**20
"""Most bytes of an answer that are on their way between a replica and the client's socket."""

ACKNOWLEDGED_BYTES = WINDOW_BYTES // 4
"""Bytes that the client takes between two acknowledgements: each costs a call between processes."""

PIECE_BYTES = 2**20
"""Largest piece that is sent at once of an answer that is held whole."""

_TAKEN = "rayvaec.taken"


class Acknowledger:
    """The proxy's part, for one request.

    Parameters
    ----------
    receive : ASGI receive
        The server's own.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._taken, self._told = 0, 0
        self._body_ended = False
        self._next: asyncio.Task[Message] | None = None
        self._due: asyncio.Future[None] | None = None

    @staticmethod
    def announced(scope: Scope) -> Scope:
        """Return the scope with a word to the replica that its answer is acknowledged."""
        return {**scope, "extensions": {**scope.get("extensions", {}), EXTENSION: {}}}

    async def receive(self) -> Message:
        """Return what the client sends next or, once its body is whole, how much it has taken."""
        if not self._body_ended:
            message = await self._receive()
            self._body_ended = not message.get("more_body", False)
            return message
        self._next = self._next or asyncio.ensure_future(_message(self._receive))
        if not self._is_due:
            self._due = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait((self._next, self._due), return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self._next.cancel()
                raise
        if self._next.done():
            done, self._next = self._next, None
            return done.result()
        self._told = self._taken
        return {"type": _TAKEN, "bytes": self._taken}

    @property
    def _is_due(self) -> bool:
        return self._taken - self._told >= ACKNOWLEDGED_BYTES

    def took(self, n_bytes: int) -> None:
        """Note that the client has taken some of the answer."""
        self._taken += n_bytes
        if self._is_due and self._due is not None and not self._due.done():
            self._due.set_result(None)


class SendWindow:
    """The replica's part, for one request.

    Parameters
    ----------
    receive : ASGI receive
        Serve's own; `receive` of this object takes its place.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._sent, self._taken = 0, 0
        self._body_ended = self._gone = False
        self._inbox: deque[Message] = deque()
        self._next: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether the client has to take some before more is sent."""
        return self._sent - self._taken >= WINDOW_BYTES

    async def receive(self) -> Message:
        """Return the client's next message."""
        if not self._body_ended and not self._sent:  # nobody else receives
            message = await self._receive()
            self._body_ended = not message.get("more_body", False)
            self._gone = message["type"] == "http.disconnect"
            return message
        while not self._inbox:
            await self._pull()
        return self._inbox.popleft()

    async def wait(self) -> None:
        """Return once there is room for more of the answer.

        Raises
        ------
        ClientDisconnect
            If the client is gone.
        """
        while self.is_full and not self._gone:
            await self._pull()
        if self._gone:
            raise ClientDisconnect

    def sent(self, n_bytes: int) -> None:
        """Note that some of the answer is on its way."""
        self._sent += n_bytes

    def close(self) -> None:
        """Stop receiving."""
        if self._next is not None:
            self._next.cancel()

    async def _pull(self) -> None:
        """Take in one more message; the application and `wait` may both wait for it."""
        self._next = self._next or asyncio.ensure_future(self._take_in())
        await asyncio.shield(self._next)

    async def _take_in(self) -> None:
        try:
            message = await self._receive()
        finally:
            self._next = None
        if message["type"] == _TAKEN:
            self._taken = message["bytes"]
            return
        self._gone = message["type"] == "http.disconnect"
        self._inbox.append(message)


async def _message(receive: Receive) -> Message:
    return await receive()
