"""SIGINT and SIGTERM of `rayvaec serve`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedEarly(BaseException):
    """A signal came before the endpoint was ready."""


class Stop:
    """Signal handler that ends `wait`, or raises `StoppedEarly` in what comes before `wait`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        first = not self._event.is_set()
        self._event.set()
        if first and not self._waiting:
            raise StoppedEarly

    def take_signals(self) -> None:
        """Handle SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def wait(self) -> None:
        """Return once a signal has come."""
        self._waiting = True
        self._event.wait()


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Give an object that waits for SIGINT or SIGTERM; put the former handlers back at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopped = Stop()
    stopped.take_signals()
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
