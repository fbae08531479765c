"""Write lock of an output: one writer at a time, named in the error message.

On one machine, and on shared file systems that carry locks, the kernel's own lock (`flock`)
decides. It goes away with its process, however that ends, and stays with one that is only
suspended. Where a file system does not carry locks from one machine to another, the file tells: it
names the machine and is touched while its writer lives. Reading takes no lock.

filelock's `SoftFileLease` was considered and lacks three things: a suspended writer loses its lease
while it still runs, the file does not say since when it is held, and a contender that does not want
to wait can never tell that a machine is gone, because it watches the file on its own clock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rayvaec.errors import StoreError
from rayvaec.util.atomic import bring_back

HEARTBEAT_S = 10.0
EXPIRY_S = 120.0
"""For how long a writer on another machine may not touch its file before it counts as dead."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class WriteLock:
    """The right to write to `out`; a context manager.

    Entering makes the folder that `out` lies in, and brings back or removes what a killed writer
    left there. If the work fails, folders made for it are removed again if they are empty.

    Parameters
    ----------
    out : Path
        The output, which may exist. The lock file is ``.<name>.lock`` beside it, or beside what it
        is a link to.

    Raises
    ------
    StoreError
        On entering, if another process writes there (the message names process, machine and since
        when), or if the folder cannot be written to.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        real = out.resolve()
        self._path = real.with_name(f".{real.name}.lock")
        self._new_folders: list[Path] = []
        self._descriptor = -1
        self._me: dict[str, Any] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="rayvaec-lock", daemon=True)

    def __enter__(self) -> Self:
        self._new_folders = [folder for folder in self._path.parents if not folder.exists()]
        try:
            self._descriptor = self._acquire()
        except OSError as error:
            self._remove_new_folders()
            raise StoreError(
                f"{self._path.parent} cannot be written to ({error.strerror})",
                "choose another output, or mend that folder",
            ) from error
        except BaseException:
            self._remove_new_folders()
            raise
        self._heart.start()
        bring_back(self._out)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        with suppress(OSError):  # storage that is away now has nothing to tell us
            # Not the file of another machine that took us for dead.
            if _holder(self._descriptor) == self._me:
                self._path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self._descriptor)
        if kind is not None:
            self._remove_new_folders()

    def _remove_new_folders(self) -> None:
        with suppress(OSError):  # unfinished work, or what somebody else has put there
            for folder in self._new_folders:
                folder.rmdir()

    def _acquire(self) -> int:
        """Return the descriptor of the lock file, locked."""
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # somebody removed the folder just now
                continue
            try:
                self._take(descriptor)
                # Whoever held the lock may have removed the file between our two steps.
                if self._is_current(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        """Take the lock of an open file and write who has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except (BlockingIOError, PermissionError):  # some file systems answer with the latter
            raise self._refusal(_holder(descriptor)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            locked = False
        holder = _holder(descriptor)
        if holder and self._is_alive(holder, descriptor, locked):
            raise self._refusal(holder)
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(self._me).encode(), 0)
        os.fsync(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _is_alive(self, holder: dict[str, Any], descriptor: int, locked: bool) -> bool:
        """Return whether the writer that a file names still writes, as far as can be told."""
        if holder["host"] == socket.gethostname():
            # The kernel gave us the lock, so nobody here has it.
            return not locked and _is_running(holder["pid"])
        # Compared with the file system's own clock: those of two machines differ.
        touched = os.fstat(descriptor).st_mtime
        probe = self._path.with_name(f"{self._path.name}.{socket.gethostname()}.{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - touched < EXPIRY_S

    def _refusal(self, holder: dict[str, Any] | None) -> StoreError:
        if holder is None:
            who = "another process"
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            who = f"process {holder['pid']} on {holder['host']} (since {since})"
        return StoreError(
            f"{who} is writing {self._out}",
            "wait until it has ended, or choose another output",
        )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):  # storage that is away may come back
                os.utime(self._descriptor)


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Return who a lock file names; None for an empty or damaged one."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return {
            "host": str(holder["host"]),
            "pid": int(holder["pid"]),
            "since": float(holder["since"]),
        }
    except (ValueError, KeyError, TypeError):
        return None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
