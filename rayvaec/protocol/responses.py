"""Responses as Arrow IPC streams, encoded in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.protocol.media_types import METADATA_KEY

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
