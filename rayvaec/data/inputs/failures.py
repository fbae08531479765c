"""Errors of reading a file, sorted by cause: filter, lock, permission, damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayvaec.errors import CountsError, FormatError, RayvaecError
from rayvaec.util.atomic import FULL_DISK


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what h5py, zarr and the system raise into an error that names the file and the cause.

    Parameters
    ----------
    path : Path or str
        The file, folder or store that is read.

    Raises
    ------
    CountsError
        Instead of any such error, but for a full disk: that is no fault of the input.
    """
    try:
        yield
    except RayvaecError:
        raise
    except MemoryError as error:
        raise CountsError(
            f"{path} does not fit into memory ({error})", "use a smaller --memory, or more memory"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise  # a CSC matrix is transposed on disk
        raise cause_of(error, path) from error


def cause_of(error: Exception, path: Path | str) -> CountsError:
    """Return the error that says what is wrong with a file.

    Parameters
    ----------
    error : Exception
        What reading it raised.
    path : Path or str
        The file.

    Returns
    -------
    CountsError
        A `FormatError` where nothing else than damage explains it.
    """
    words = " ".join(str(error).split())
    number = _number_of(error, words)
    if isinstance(error, UnicodeDecodeError):
        return FormatError(f"{path} has names that are not UTF-8 ({words})", "write it in UTF-8")
    if "codec not available" in words or "UnknownCodec" in type(error).__name__:
        return CountsError(
            f"{path} is compressed by a codec that is not installed ({words})",
            "install it, or write the file with zstd or blosc",
        )
    if "unable to lock file" in words or "already open for write" in words:
        return CountsError(
            f"{path} is open for writing in another process",
            "close it there, or wait until it is written; after a crash, `h5clear -s FILE`",
        )
    if number in _CAUSES:
        problem, fix = _CAUSES[number]
        return CountsError(f"{path} {problem}", fix)
    if number is not None:
        return CountsError(
            f"{path} cannot be read ({os.strerror(number)})", "check the disk or the network"
        )
    return FormatError(
        f"{path} is damaged or cut short ({words})", "copy or download it again, or leave it out"
    )


_CAUSES = {
    errno.EACCES: ("may not be read: permission denied", "ask its owner, or chmod +r"),
    errno.EPERM: ("may not be read: permission denied", "ask its owner, or chmod +r"),
    errno.ENOENT: ("has disappeared, or a part of it has", "put it back, or copy it again"),
    errno.EMFILE: ("cannot be opened: too many files are open", "raise the limit: ulimit -n 65536"),
    errno.ENFILE: ("cannot be opened: too many files are open", "close some on this machine"),
}


def _number_of(error: Exception, words: str) -> int | None:
    """Return the system's number of an error; HDF5 gives it in its message alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    _, found, rest = words.partition("errno = ")
    digits = rest.partition(",")[0]
    return int(digits) if found and digits.isdigit() else None


def missing_file(path: Path) -> CountsError:
    """Return the error for a path where there is nothing.

    Parameters
    ----------
    path : Path
        What was asked for.

    Returns
    -------
    CountsError
    """
    if path.is_symlink():
        return CountsError(
            f"{path} is a link to {os.readlink(path)}, which does not exist",
            "put back what it points to, or correct the link",
        )
    return CountsError(f"there is no file {path}", "check the path of the input")
