"""Storage that fails for a while: waited for within limits, and told from storage that is full."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from rayvaec.errors import RayvaecError, StoreError

logger = logging.getLogger("rayvaec")
T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""How long storage that cannot be reached is waited for."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
UNREACHABLE = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENODEV, errno.EAGAIN),
    }
)
"""What network filesystems answer while their server does not."""


class StorageLostError(RayvaecError):
    """Storage could not be reached; what was on it is still good."""


def patiently(what: str, action: Callable[[], T]) -> T:
    """Do something on storage, and again while the storage cannot be reached.

    Parameters
    ----------
    what : str
        What is written or read, for messages.
    action : callable
        Does it; may be called again after it has failed half way.

    Returns
    -------
    Any
        What `action` returned.

    Raises
    ------
    RayvaecError
        At once if there is no room left.
    StorageLostError
        If the storage has not come back within `PATIENCE_SECONDS`.
    """
    started, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            number = error_number(error)
            if number is None:
                raise
            if number in FULL:
                raise no_room(what) from error
            waited = time.monotonic() - started
            if waited + pause > PATIENCE_SECONDS:
                raise StorageLostError(
                    f"{what} could not be reached for {waited:.0f} s ({os.strerror(number)})",
                    "go on with --resume when the storage is back",
                ) from error
            if pause == FIRST_PAUSE:
                logger.warning("%s cannot be reached (%s): waiting", what, os.strerror(number))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def no_room(what: str) -> RayvaecError:
    """Return the error for storage that is full."""
    return RayvaecError(
        f"there is no room left for {what} ({os.strerror(errno.ENOSPC)})",
        "free some space, then go on with --resume: the last good checkpoint is kept",
    )


def error_number(error: BaseException) -> int | None:
    """Return the operating system's number of an error, None where it is no error of storage.

    safetensors and Arrow have errors of their own, with the number in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        found = re.search(r"(?:os error |code: |errno )(\d+)", str(error), re.IGNORECASE)
        return int(found[1]) if found else None
    return None


def is_outage(error: BaseException, root: object) -> bool:
    """Return whether a store could not be read because its storage cannot be reached.

    Parameters
    ----------
    error : BaseException
        What reading the store raised.
    root : Path or any other address
        Where the store lies.

    Returns
    -------
    bool
        False for a store that is there and damaged.
    """
    if any(error_number(cause) in UNREACHABLE for cause in _causes(error)):
        return True
    if not isinstance(root, Path) or not isinstance(error, OSError | StoreError):
        return False
    try:
        os.listdir(root)
    except OSError:
        return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
