"""Log records of a replica: request IDs and kinds of failures, no request data.

Messages of exceptions and warnings may hold counts, labels and names, whoever raised them.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
import warnings
from typing import Any

logger = logging.getLogger("rayvaec")
access = logging.getLogger("rayvaec.access")


def log_with_serve() -> None:
    """Send rayvaec's log lines, those of requests among them, where Ray Serve sends its own."""
    logger.handlers = logging.getLogger("ray.serve").handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_failure(what: str, error: BaseException | None) -> None:
    """Log an exception by its type and where it was raised.

    Parameters
    ----------
    what : str
        What failed, without values of a request.
    error : BaseException or None
        The exception; its message is left out.
    """
    frames = "".join(traceback.format_tb(error.__traceback__)) if error is not None else ""
    logger.error("%s: %s\n%s", what, type(error).__name__, frames)


def hide_values() -> None:
    """Log warnings, and failures that nobody handles, by kind and place for the whole process."""
    warnings.showwarning = _warned
    threading.excepthook = lambda failed: log_failure("a thread failed", failed.exc_value)
    sys.unraisablehook = lambda failed: log_failure("ignored", failed.exc_value)


def hide_values_of_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Log what fails in an event loop unhandled, such as in a task, by kind and place."""
    loop.set_exception_handler(
        lambda _, context: log_failure("the event loop met a failure", context.get("exception"))
    )


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    *_: Any,
    **__: Any,
) -> None:
    logger.warning("%s at %s:%d", category.__name__, filename, lineno)
