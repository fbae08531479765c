"""Main function of the sandboxed process.

Takes files on standard input and gives back Arrow streams or refusals on standard output.
"""

from __future__ import annotations

import ctypes
import encodings.ascii
import encodings.latin_1  # noqa: F401 - both are opened when first used, which is too late here
import io
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from rayvaec.data.inputs.failures import cause_of
from rayvaec.errors import PayloadTooLargeError, RequestError, UndecodableError
from rayvaec.protocol import encode_cells
from rayvaec.serving.decoding.h5ad.reader import FILE, Columns, read_cells
from rayvaec.serving.decoding.h5ad.sandbox import MAX_WORDS, receive, send

_MEMORY_FACTOR = 8
"""Of what a file may take decompressed: the body, what is read, and its copies as Arrow."""

_NO_NEW_PRIVILEGES, _CAPABILITY_VERSION = 38, 0x20080522
"""PR_SET_NO_NEW_PRIVS of prctl(2), and version 3 of capset(2)."""

_SECONDS, _BYTES_PER_SECOND = 2, 2**24
"""What a file may take of a CPU, and the slowest that reading is."""


def main() -> None:
    """Answer requests until standard input ends."""
    max_bytes = int(sys.argv[1])
    # Whatever else is written to standard output does not belong between the answers.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    request = {"columns": {"labels_key": "label"}, "parameters": {}}
    _answer(request, _smallest_file(), max_bytes)  # imports what reading imports
    _confine(max_bytes)
    serve(source, target, max_bytes)


def serve(source: BinaryIO, target: BinaryIO, max_bytes: int) -> None:
    """Answer one request after the other.

    Parameters
    ----------
    source, target : binary files
        Where requests come from and answers go.
    max_bytes : int
        Most memory that what is read of a file may take.
    """
    while (request := receive(source)) is not None:  # from the server, which bounds its lengths
        _allow_seconds(_SECONDS + max_bytes / _BYTES_PER_SECOND)
        send(target, *_answer(*request, max_bytes))


def _allow_seconds(seconds: float) -> None:
    """End this process after so much more work: a damaged file can lead HDF5 in circles."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _answer(request: dict[str, Any], body: bytes, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    try:
        cells, genes = read_cells(body, Columns(**request["columns"]), max_bytes)
        stream = encode_cells(cells, {**request["parameters"], "genes": genes})
    except RequestError as error:
        refused = error
    except MemoryError:
        refused = _too_large(max_bytes)
    except Exception as error:  # a stranger's file may break anything within h5py
        memory = "alloc" in str(error)
        refused = _too_large(max_bytes) if memory else _damaged(error)
    else:
        if len(stream) <= max_bytes:
            return {}, stream
        refused = _too_large(max_bytes)
    words = (refused.detail[:MAX_WORDS], refused.fix[:MAX_WORDS])
    return {"refused": (*words, refused.status, refused.error)}, b""


def _too_large(max_bytes: int) -> RequestError:
    return PayloadTooLargeError(
        f"{FILE} takes more memory than {max_bytes:,} bytes decompressed",
        "send fewer cells a request",
        error="body_too_large",
    )


def _damaged(error: Exception) -> RequestError:
    return UndecodableError(cause_of(error, FILE).detail, "send an h5ad file as anndata writes it")


def _smallest_file() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        for frame in ("obs", "var"):
            h5.create_group(frame).attrs["_index"] = "_index"
            h5[frame]["_index"] = ["a"]
        h5["obs"]["label"] = ["x"]
        h5["X"] = np.ones((1, 1), np.int32)
    return file.getvalue()


def _confine(max_bytes: int) -> None:
    """Give up memory beyond what is needed, and every way to open or write a file."""
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    most = used + _MEMORY_FACTOR * max_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Open files stay open and no other can be: whatever HDF5 knows of pointing elsewhere, ends.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    _drop_privileges()


def _drop_privileges() -> None:
    """Give up what root could use to raise these limits again, and gain nothing by any program.

    Without files there are no sockets either: no network.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "privileges cannot be given up")


if __name__ == "__main__":
    main()
