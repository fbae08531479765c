"""Incremental reader of responses: bytes in as they arrive, complete rows out.

pyarrow reads a stream from a file, and waits there for more. Here the bytes are handed in instead,
so that a client which waits on an event loop and one which blocks read answers alike.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.errors import BrokenAnswerError
from rayvaec.protocol.flatbuffer import FlatTable
from rayvaec.protocol.media_types import METADATA_KEY, first_line
from rayvaec.protocol.responses import DrawnRows

_MARK = b"\xff\xff\xff\xff"
_BODY_LENGTH = 3  # its field in Arrow's Message.fbs


class AnswerStream:
    """An answer's IPC stream, taken in as it arrives.

    Parameters
    ----------
    chunks : iterable of bytes
        What has arrived so far; the rest comes through `feed`.

    Attributes
    ----------
    n_waiting : int
        Bytes of the rows that have come and were not taken yet.

    Raises
    ------
    BrokenAnswerError
        As `feed`.
    """

    def __init__(self, chunks: Iterable[bytes] = ()) -> None:
        self.n_waiting = 0
        self._rest, self._ended = bytearray(), False
        self._schema: pa.Schema | None = None
        self._parameters: dict[str, Any] = {}
        self._batches: list[pa.RecordBatch] = []
        self._seen = 0
        for chunk in chunks:
            self.feed(chunk)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the schema's metadata says; empty until it has come."""
        return self._parameters

    def feed(self, chunk: bytes) -> None:
        """Take in the next bytes.

        Parameters
        ----------
        chunk : bytes
            Any number of them.

        Raises
        ------
        BrokenAnswerError
            If they are no IPC stream.
        """
        self._rest += chunk
        try:
            while not self._ended and (size := self._message_size()) is not None:
                message = pa.py_buffer(bytes(memoryview(self._rest)[:size]))
                del self._rest[:size]
                self._take_in(message)
        except (pa.ArrowException, OSError, ValueError, KeyError, struct.error) as error:
            raise self._broken_off(error) from error

    def _message_size(self) -> int | None:
        """Return the size of the message that comes next, None where it is not yet whole."""
        if len(self._rest) < 8:
            return None
        if self._rest[:4] != _MARK:
            raise ValueError(f"it goes on with {bytes(self._rest[:8])!r}")
        (n_metadata,) = struct.unpack_from("<i", self._rest, 4)
        if n_metadata == 0:
            self._ended = True
            return None
        if len(self._rest) < 8 + n_metadata:
            return None
        with memoryview(self._rest) as view, view[8 : 8 + n_metadata] as metadata:
            at = FlatTable(metadata).at(_BODY_LENGTH)
            n_body = struct.unpack_from("<q", metadata, at)[0] if at is not None else 0
        if n_metadata < 0 or n_body < 0:
            raise ValueError("a message has a negative size")
        size = 8 + n_metadata + n_body
        return size if len(self._rest) >= size else None

    def _take_in(self, message: pa.Buffer) -> None:
        if self._schema is None:
            schema = pa.ipc.read_schema(message)
            self._parameters = json.loads((schema.metadata or {})[METADATA_KEY])
            self._schema = schema
            return
        batch = pa.ipc.read_record_batch(message, self._schema)
        batch.validate()
        self._batches.append(batch)
        self._seen += batch.num_rows
        self.n_waiting += message.size

    def finish(self) -> None:
        """Check that the answer was whole; call it after the last bytes.

        Raises
        ------
        BrokenAnswerError
            If the stream ended before the number of rows that it promised.
        """
        if self._schema is None or (self._rest and not self._ended):
            raise self._broken_off(EOFError("it ends too early"))
        expected = self._parameters.get("rows")
        if self._seen != expected:
            raise _broken(f"ended after {self._seen} of {expected} rows")

    def draws(self) -> DrawnRows:
        """Take the drawn rows that have come since the last call.

        Returns
        -------
        DrawnRows
        """
        batches = self._taken()
        lengths = [np.diff(batch.column("gene").offsets.to_numpy()) for batch in batches]
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]), dtype=np.int64)
        return DrawnRows(
            cells=_joined([batch.column("cell").to_numpy() for batch in batches]),
            samples=_joined([batch.column("sample").to_numpy() for batch in batches]),
            indptr=ends,
            indices=_joined([batch.column("gene").flatten().to_numpy() for batch in batches]),
            counts=_joined([batch.column("count").flatten().to_numpy() for batch in batches]),
        )

    def dense(self) -> dict[str, NDArray[np.float32]]:
        """Take the dense rows that have come since the last call.

        Returns
        -------
        dict of arrays[n_rows, width]
            By column name.
        """
        batches, columns = self._taken(), {}
        for field in list(self._schema or ())[1:]:
            parts = [batch.column(field.name).flatten().to_numpy() for batch in batches]
            flat = np.concatenate([np.zeros(0, np.float32), *parts])
            columns[field.name] = flat.reshape(-1, field.type.list_size)
        return columns

    def _taken(self) -> list[pa.RecordBatch]:
        batches, self._batches, self.n_waiting = self._batches, [], 0
        return batches

    def _broken_off(self, error: Exception) -> BrokenAnswerError:
        if self._schema is None:
            return _broken(f"is no readable Arrow stream ({first_line(error)})")
        return _broken(f"broke off after {self._seen} of {self._parameters.get('rows')} rows")


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _broken(what: str) -> BrokenAnswerError:
    return BrokenAnswerError(f"the answer {what}", "send the request again")
