"""One writer at a time: a lock file beside an output.

On one machine, and on shared file systems that know locks, the kernel's own lock (`flock`) decides;
it goes away with its process, however that ends. Where a file system does not carry locks from one
machine to another, the file tells: it names the machine and is touched while its writer lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from rayvaec.errors import StoreError

BEAT_S = 10.0
SILENT_S = 120.0
"""For how long a writer on another machine may not touch its file before it counts as dead."""


class WriteLock:
    """The right to write to `out`; a context manager.

    Parameters
    ----------
    out : Path
        The output. Its folder must exist; the lock file is ``.<name>.lock`` in it.

    Raises
    ------
    StoreError
        On entering, if another process writes there; the message names it.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out.with_name(f".{out.name}.lock")
        self._descriptor = -1
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="rayvaec-lock", daemon=True)

    def __enter__(self) -> Self:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._take(descriptor)
                # Whoever held the lock may have removed the file between our two steps.
                if self._is_current(descriptor):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._descriptor = descriptor
        self._heart.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._heart.join()
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _take(self, descriptor: int) -> None:
        """Take the lock of an open file and write who has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            raise self._refusal(_holder(descriptor)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
            locked = False
        holder = _holder(descriptor)
        if holder and self._is_alive(holder, descriptor, locked):
            raise self._refusal(holder)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
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
        return now - touched < SILENT_S

    def _refusal(self, holder: dict[str, Any] | None) -> StoreError:
        if holder is None:
            who = "another process"
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            who = f"process {holder['pid']} on {holder['host']} (since {since})"
        return StoreError(
            f"{who} is writing {self._out}",
            "wait until it has ended, or choose another --out",
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
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
