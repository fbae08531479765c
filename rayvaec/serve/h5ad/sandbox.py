"""A process that reads strangers' HDF5 files.

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

from rayvaec.errors import RequestError
from rayvaec.serve.h5ad.reading import Columns

_LENGTHS = struct.Struct("<QQ")
_LONGEST_READ_S = 60.0


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


def receive(source: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read a message of `send`.

    Parameters
    ----------
    source : binary file
        A pipe.

    Returns
    -------
    tuple of dict and bytes, or None
        None at the end, in the middle of a message as well.
    """
    lengths = source.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    n_header, n_body = _LENGTHS.unpack(lengths)
    words, body = source.read(n_header), source.read(n_body)
    return (json.loads(words), body) if len(body) == n_body else None


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
            As `rayvaec.serve.wire.encode_cells` writes it, `parameters` and ``genes`` with it.

        Raises
        ------
        RequestError
            As `rayvaec.serve.h5ad.reading.read_cells`; 400 as well for files that break HDF5.
        """
        with self._lock:
            answer = self._ask({"columns": asdict(columns), "parameters": dict(parameters)}, body)
        if answer is None:
            raise RequestError(
                "the body cannot be read as an HDF5 file: reading it failed",
                "write it again with anndata, or send fewer cells",
                *(400, "undecodable"),
            )
        header, stream = answer
        if "refused" in header:
            raise RequestError(*header["refused"])
        if len(stream) > self._max_bytes:
            raise RequestError(
                f"the cells take {len(stream):,} bytes as Arrow, above {self._max_bytes:,}",
                "send fewer cells a request",
                *(413, "body_too_large"),
            )
        return stream

    def _ask(self, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Return the process's answer, None if it died over the file or took too long."""
        process = self._process = self._process or self._started()
        timer = threading.Timer(_LONGEST_READ_S, process.kill)
        timer.start()
        answer = None
        try:
            send(cast(BinaryIO, process.stdin), request, body)
            answer = receive(cast(BinaryIO, process.stdout))
        except OSError:
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
            [sys.executable, "-m", "rayvaec.serve.h5ad.worker", str(self._max_bytes)],
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
