"""Sandboxed process that reads untrusted HDF5 files.

HDF5 is C code that trusts its files. It runs in a process of its own, which holds no model and no
token, may take so much memory and no more, and can open no file: a file that breaks it costs the
sender an error and nobody else anything.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, BinaryIO, cast

from rayvaec.errors import (
    PayloadTooLargeError,
    RequestError,
    UndecodableError,
    UnprocessableError,
)
from rayvaec.serving.decoding.h5ad.reader import Columns

_LENGTHS = struct.Struct("<QQ")
_LONGEST_READ_S = 60.0
_MAX_HEADER, MAX_WORDS = 2**16, 2000
_REFUSALS = {400: UndecodableError, 413: PayloadTooLargeError, 422: UnprocessableError}


def send(target: BinaryIO, header: dict[str, Any], body: bytes) -> None:
    """Write a message: a JSON header and bytes.

    Parameters
    ----------
    target : binary file
        A pipe.
    header : dict
        JSON-able.
    body : bytes
        Anything.
    """
    words = json.dumps(header).encode()
    target.write(_LENGTHS.pack(len(words), len(body)))
    target.write(words)
    target.write(body)
    target.flush()


def receive(
    source: BinaryIO, max_header: int | None = None, max_body: int | None = None
) -> tuple[dict[str, Any], bytes] | None:
    """Read a message of `send`.

    Parameters
    ----------
    source : binary file
        A pipe.
    max_header, max_body : int, optional
        The most bytes of either that are read.

    Returns
    -------
    tuple of dict and bytes, or None
        None at the end, in the middle of a message as well.

    Raises
    ------
    ValueError
        If it is longer, or its header is not a JSON object.
    """
    lengths = source.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    for n, most in zip(_LENGTHS.unpack(lengths), (max_header, max_body), strict=True):
        if most is not None and n > most:
            raise ValueError(f"a message of {n} bytes, above {most}")
    n_header, n_body = _LENGTHS.unpack(lengths)
    words, body = source.read(n_header), source.read(n_body)
    if len(body) < n_body:
        return None
    header = json.loads(words)
    if not isinstance(header, dict):
        raise ValueError("a message without a header")
    return header, body


class Sandbox:
    """Starts the process with the first file, and again after one that broke it.

    Parameters
    ----------
    max_bytes : int
        Most memory that what is read of a file may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, body: bytes, columns: Columns, parameters: Mapping[str, Any]) -> bytes:
        """Turn an h5ad file into an Arrow stream of its cells, one file at a time.

        Parameters
        ----------
        body : bytes
            The file.
        columns : Columns
            Where the cells stand.
        parameters : mapping
            The request's other fields, JSON-able.

        Returns
        -------
        bytes
            As `rayvaec.protocol.encode_cells` writes it, `parameters` and ``genes`` with it.

        Raises
        ------
        RequestError
            As `rayvaec.serving.decoding.h5ad.reader.read_cells`; 400 as well for files that break
            HDF5.
        """
        with self._lock:
            answer = self._ask({"columns": asdict(columns), "parameters": dict(parameters)}, body)
        if answer is None:
            raise UndecodableError(
                "the body cannot be read as an HDF5 file: reading it failed",
                "write it again with anndata, or send fewer cells",
            )
        header, stream = answer
        if "refused" in header:
            raise _refusal(header["refused"])
        return stream

    def _ask(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Return the process's answer, None if it died over the file or took too long."""
        process = self._process = self._process or self._started()
        timer = threading.Timer(_LONGEST_READ_S, process.kill)
        timer.start()
        answer = None
        try:
            send(cast(BinaryIO, process.stdin), request, body)
            # The process may be in a stranger's hands: it does not say how much is read of it.
            answer = receive(cast(BinaryIO, process.stdout), _MAX_HEADER, self._max_bytes)
        except (OSError, ValueError):
            answer = None
        finally:
            timer.cancel()
            if answer is None:
                self._stop()
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        # No tokens: what is in the environment of a replica is not for those who break HDF5.
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return subprocess.Popen(  # noqa: S603
            [
                sys.executable,
                "-m",
                "rayvaec.serving.decoding.h5ad.sandbox_worker",
                str(self._max_bytes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()


def _refusal(said: Any) -> RequestError:
    """Return the refusal that the process gave, as far as it is one."""
    match said:
        case [str(detail), str(fix), int(status), str(error)] if status in _REFUSALS:
            return _REFUSALS[status](detail[:MAX_WORDS], fix[:MAX_WORDS], error=error[:60])
    return UndecodableError(
        "the body cannot be read as an HDF5 file", "write it again with anndata"
    )
