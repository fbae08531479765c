"""Retry of storage operations that can succeed later; full or forbidden storage fails at once."""

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
GO_ON = "go on with --resume"
"""Advice of errors after which a run can be resumed; `train` replaces it where nothing was kept."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
UNREACHABLE = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENODEV, errno.EAGAIN),
        *(errno.ENETRESET, errno.ESHUTDOWN, errno.ENOLINK, errno.ENXIO, errno.EPIPE, errno.EBUSY),
        *(errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EINTR),
    }
)
"""What filesystems answer while their server does not, or while something is short."""


class StorageLostError(RayvaecError):
    """Storage could not be reached; what was on it is still good."""


def retry_io(what: str, action: Callable[[], T], folder: Path | None = None) -> T:
    """Do something on storage, and again while the storage cannot be reached.

    Parameters
    ----------
    what : str
        What is written or read, for messages.
    action : callable
        Does it; may be called again after it has failed half way.
    folder : Path, optional
        Where it happens. While this folder is not there, as that of a filesystem that is not
        mounted, it is waited for; other files that are missing are not.

    Returns
    -------
    Any
        What `action` returned.

    Raises
    ------
    RayvaecError
        At once if there is no room left, or for what waiting does not mend, such as a missing
        right to write.
    StorageLostError
        If the storage has not come back within `PATIENCE_SECONDS`.
    """
    started, pause = time.monotonic(), FIRST_PAUSE
    was_there = folder is None
    while True:
        try:
            return action()
        except Exception as error:
            number = error_number(error)
            if number is None:
                raise
            # Seen twice, as the folder may have come back just after the action missed it.
            is_there = not is_away(folder)
            is_missing = number == errno.ENOENT and not (is_there and was_there)
            if number not in UNREACHABLE and not is_missing:
                raise lasting_failure(what, error) from error
            was_there = is_there
            waited = time.monotonic() - started
            if waited + pause > PATIENCE_SECONDS:
                raise StorageLostError(
                    f"{what} could not be reached for {waited:.0f} s ({os.strerror(number)})",
                    f"{GO_ON} when the storage is back",
                ) from error
            if pause == FIRST_PAUSE:
                logger.warning("%s cannot be reached (%s): waiting", what, os.strerror(number))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_away(folder: Path | None) -> bool:
    """Return whether a folder that was there is not; one that may not be looked at is there."""
    if folder is None:
        return False
    try:
        folder.stat()
    except OSError as error:
        return error.errno == errno.ENOENT or error.errno in UNREACHABLE
    return False


def lasting_failure(what: str, error: BaseException) -> RayvaecError:
    """Return the error for what would fail again.

    Parameters
    ----------
    what : str
        What was written or read.
    error : BaseException
        How it failed; with a number that `error_number` finds.

    Returns
    -------
    RayvaecError
    """
    number = error_number(error) or 0
    if number in FULL:
        return no_room(what)
    file = getattr(error, "filename", None)
    place = f": {file}" if file and str(file) not in what else ""
    return RayvaecError(
        f"{what} cannot be written or read ({os.strerror(number)}{place})",
        f"{_REMEDIES.get(number, 'mend that')}, then {GO_ON}",
    )


_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give the user of the run the right to it"),
    errno.EROFS: "mount that filesystem for writing",
    errno.ENOENT: "put back what is missing",
    errno.ENOTDIR: "put a folder in the place of the file",
    errno.EISDIR: "remove the folder in the place of the file",
}


def no_room(what: str) -> RayvaecError:
    """Return the error for storage that is full."""
    return RayvaecError(
        f"there is no room left for {what} ({os.strerror(errno.ENOSPC)})",
        f"free some space, then {GO_ON}",
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
    return isinstance(root, Path) and isinstance(error, OSError | StoreError) and is_away(root)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
