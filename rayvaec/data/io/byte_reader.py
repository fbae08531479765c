"""Byte ranges of a store's files: the interface between array readers and storage."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import StoreError
from rayvaec.util.checksums import file_checksum

if TYPE_CHECKING:
    import zarr

MAX_OPEN_FILES = 128

ByteRange = tuple[str, int, int]
"""A file, and the first and one past the last of some of its bytes."""


class ByteReader(Protocol):
    """Read access to the files below one root."""

    @property
    def is_local(self) -> bool:
        """Whether reading takes no longer than asking `fetch` for it would."""

    def locate(self, key: str) -> str:
        """Return the full path or address of a file, for messages."""

    def text(self, key: str) -> str | None:
        """Return a small file's text, None where there is no such file."""

    def whole(self, key: str) -> bytes | None:
        """Return a small file's bytes, None where there is no such file."""

    def size(self, key: str) -> int | None:
        """Return a file's size in bytes, None where there is no such file."""

    def read(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of a file, from `start` on.

        Raises
        ------
        StoreError
            If the file is missing, ends before, or cannot be read; the message names it.
        """

    def fetch(self, ranges: Iterable[ByteRange]) -> None:
        """Read many ranges at once where that is faster than one after the other.

        The calling thread's reads find them in memory until it fetches again.

        Raises
        ------
        StoreError
            As `read`.
        """

    def checksum(self, key: str) -> str | None:
        """Return ``sha256:`` and a file's SHA-256, None where there is no such file."""

    def zarr_store(self) -> Any:
        """Return what zarr opens these files by."""

    def zarr_array(self, path: str) -> zarr.Array[Any]:
        """Open an array with zarr itself."""


class OpenFile:
    """A file descriptor that lives as long as somebody holds this object."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalByteReader:
    """Files below a folder of this machine; safe to use from several threads.

    Parameters
    ----------
    root : Path
        The folder.
    """

    is_local = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenFile] = OrderedDict()

    def locate(self, key: str) -> str:
        """Return the full path of a file, for messages."""
        return str(self._root / key)

    def text(self, key: str) -> str | None:
        """Return a small file's text, None where there is no such file."""
        content = self.whole(key)
        return None if content is None else content.decode("utf-8", errors="replace")

    def whole(self, key: str) -> bytes | None:
        """Return a small file's bytes, None where there is no such file."""
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def size(self, key: str) -> int | None:
        """Return a file's size in bytes, None where there is no such file."""
        try:
            return os.fstat(self.file(key).descriptor).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def read(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of a file, from `start` on; see `ByteReader.read`."""
        room, done = out.data, 0
        try:
            file = self.file(key)
            while done < len(room):
                step = os.preadv(file.descriptor, [room[done:]], start + done)
                if step == 0:
                    break
                done += step
        except OSError as error:
            raise self._unreadable(key, error) from error
        if done < len(room):
            raise StoreError(
                f"the file {self.locate(key)} is cut short: it ends at byte {start + done} "
                f"and {start + len(room)} are needed",
                "copy it again, or write the store again with `rayvaec prepare ... --overwrite`",
            )

    def fetch(self, ranges: Iterable[ByteRange]) -> None:
        """Do nothing: reading is as fast."""

    def checksum(self, key: str) -> str | None:
        """Return ``sha256:`` and a file's SHA-256, None where there is no such file."""
        path = self._root / key
        try:
            return file_checksum(path) if path.is_file() else None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def zarr_store(self) -> Path:
        """Return what zarr opens these files by."""
        return self._root

    def zarr_array(self, path: str) -> zarr.Array[Any]:
        """Open an array with zarr itself."""
        import zarr

        return zarr.open_array(self._root / path, mode="r")

    def file(self, key: str) -> OpenFile:
        """Return an open file, closing the one that has not been used for longest.

        Raises
        ------
        OSError
            If it cannot be opened.
        """
        with self._lock:
            file = self._open.pop(key, None)
            if file is None:
                file = OpenFile(self.locate(key))
                while len(self._open) >= MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            self._open[key] = file
            return file

    def _unreadable(self, key: str, error: OSError) -> StoreError:
        return StoreError(
            f"the file {self.locate(key)} cannot be read ({error.strerror or error})",
            "check that it exists and that you may read it",
        )
