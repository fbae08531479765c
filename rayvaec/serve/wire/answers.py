"""Answers: draws and dense values as Arrow IPC streams, written in pieces, read as they come."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.errors import RequestError
from rayvaec.serve.wire.common import METADATA_KEY, first_line

PIECE_BYTES = 256 * 1024

_DRAWS = pa.schema(
    [
        pa.field("cell", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("gene", pa.list_(pa.int32()), nullable=False),
        pa.field("count", pa.list_(pa.int32()), nullable=False),
    ]
)
_BYTES_PER_ROW, _BYTES_PER_COUNT = 16, 8


@dataclass(frozen=True)
class DrawnRows:
    """Draws as they came over the wire.

    Parameters
    ----------
    cells, samples : arrays[n_rows] of int32
        Position of the cell in the request, number of the draw.
    indptr, indices, counts : arrays of int64, int32, int32
        CSR, [n_rows, n_genes of the answer].
    """

    cells: NDArray[np.int32]
    samples: NDArray[np.int32]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    counts: NDArray[np.int32]


def draws_schema(parameters: Mapping[str, Any]) -> pa.Schema:
    """Return the schema of an answer with draws, `parameters` in its metadata."""
    return _DRAWS.with_metadata({METADATA_KEY: json.dumps(dict(parameters)).encode()})


def dense_schema(columns: Mapping[str, int], parameters: Mapping[str, Any]) -> pa.Schema:
    """Return the schema of a dense answer.

    Parameters
    ----------
    columns : mapping
        Name and width of each column.
    parameters : mapping
        For the metadata, JSON-able.

    Returns
    -------
    Schema
    """
    fields = [pa.field("cell", pa.int32(), nullable=False)]
    for name, width in columns.items():
        fields.append(pa.field(name, pa.list_(pa.float32(), width), nullable=False))
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(dict(parameters)).encode()})


def encode_draws(schema: pa.Schema, rows: DrawnRows) -> list[bytes]:
    """Write drawn rows as record batches of about `PIECE_BYTES` each.

    Parameters
    ----------
    schema : Schema
        From `draws_schema`.
    rows : DrawnRows
        Any number of rows.

    Returns
    -------
    list of bytes
        Parts of an IPC stream, to be sent in this order.
    """
    # The bytes that stand before each row; a piece ends with the row that fills it.
    before = rows.indptr * _BYTES_PER_COUNT + np.arange(len(rows.indptr)) * _BYTES_PER_ROW
    pieces, start = [], 0
    while start < len(rows.cells):
        stop = int(np.searchsorted(before, before[start] + PIECE_BYTES, side="left"))
        stop = min(max(stop, start + 1), len(rows.cells))
        first, last = int(rows.indptr[start]), int(rows.indptr[stop])
        offsets = pa.array((rows.indptr[start : stop + 1] - first).astype(np.int32))
        columns = [
            pa.array(rows.cells[start:stop]),
            pa.array(rows.samples[start:stop]),
            pa.ListArray.from_arrays(offsets, pa.array(rows.indices[first:last])),
            pa.ListArray.from_arrays(offsets, pa.array(rows.counts[first:last])),
        ]
        pieces.append(bytes(pa.RecordBatch.from_arrays(columns, schema=schema).serialize()))
        start = stop
    return pieces


def encode_dense(
    schema: pa.Schema, first_cell: int, columns: Mapping[str, NDArray[Any]]
) -> list[bytes]:
    """Write dense rows as record batches of about `PIECE_BYTES` each.

    Parameters
    ----------
    schema : Schema
        From `dense_schema`.
    first_cell : int
        Position in the request of the first row's cell.
    columns : mapping of arrays[n_rows, width]
        In the schema's order; all of the same length.

    Returns
    -------
    list of bytes
        Parts of an IPC stream, to be sent in this order.
    """
    n_rows = len(next(iter(columns.values())))
    row_bytes = 4 + 4 * sum(values.shape[1] for values in columns.values())
    step = max(PIECE_BYTES // row_bytes, 1)
    pieces = []
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        arrays = [pa.array(np.arange(first_cell + start, first_cell + stop, dtype=np.int32))]
        for name, values in columns.items():
            flat = pa.array(np.ascontiguousarray(values[start:stop], np.float32).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type))
        pieces.append(bytes(pa.RecordBatch.from_arrays(arrays, schema=schema).serialize()))
    return pieces


class AnswerStream:
    """An answer's IPC stream, read as it arrives.

    Parameters
    ----------
    chunks : iterable of bytes
        The body as it comes from the network.

    Attributes
    ----------
    parameters : dict
        What the schema's metadata says.

    Raises
    ------
    RequestError
        If the beginning is no IPC stream.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        try:
            source = io.BufferedReader(_Chunks(chunks), PIECE_BYTES)
            self._reader = pa.ipc.open_stream(source)
            self.parameters = json.loads((self._reader.schema.metadata or {})[METADATA_KEY])
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise _broken(f"is no readable Arrow stream ({first_line(error)})") from error

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the record batches.

        Yields
        ------
        RecordBatch

        Raises
        ------
        RequestError
            If the stream ends before the number of rows that it promised, or cannot be read.
        """
        seen, expected = 0, self.parameters.get("rows")
        try:
            for batch in self._reader:
                seen += batch.num_rows
                yield batch
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _broken(f"broke off after {seen} of {expected} rows") from error
        if seen != expected:
            raise _broken(f"ended after {seen} of {expected} rows")

    def draws(self) -> DrawnRows:
        """Read all drawn rows.

        Returns
        -------
        DrawnRows

        Raises
        ------
        RequestError
            As `batches`.
        """
        batches = list(self.batches())
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
        """Read all rows of a dense answer.

        Returns
        -------
        dict of arrays[n_cells, width]
            By column name.

        Raises
        ------
        RequestError
            As `batches`.
        """
        batches = list(self.batches())
        columns = {}
        for field in list(self._reader.schema)[1:]:
            parts = [batch.column(field.name).flatten().to_numpy() for batch in batches]
            flat = np.concatenate([np.zeros(0, np.float32), *parts])
            columns[field.name] = flat.reshape(-1, field.type.list_size)
        return columns


class _Chunks(io.RawIOBase):
    """An iterable of bytes as a file, so that no more than a piece is held."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` from the next chunk, as far as that goes."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _broken(what: str) -> RequestError:
    return RequestError(f"the answer {what}", "send the request again", 502, "broken_answer")
