"""Requests as Arrow IPC streams: encoded by the client, decoded defensively by the server."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayvaec.errors import PayloadTooLargeError, UndecodableError, UnprocessableError
from rayvaec.protocol.entries import MAX_NAME_LENGTH, BadEntryError, name_too_long, read_names
from rayvaec.protocol.ipc_limits import StreamLimits, check_batches, check_schema, messages
from rayvaec.protocol.json_body import decode_object
from rayvaec.protocol.media_types import END_OF_STREAM, METADATA_KEY, first_line, stream_start

_BYTES_PER_VALUE = 8
"""What a gene and its count take as 32-bit integers, in whatever types they are sent."""
_MAX_NAME_BYTES = 4 * MAX_NAME_LENGTH


@dataclass(frozen=True)
class RawCells:
    """Cells as a request states them, nothing about their values checked yet.

    Parameters
    ----------
    labels : list of str or None
        One per cell; None where the cell has none.
    indptr : array[n_cells + 1] of int64
        CSR row pointers.
    indices : array[n_values] of any integer type
        Columns, in the order of the request's genes.
    counts : array[n_values]
        Any integer or float type.
    batches, cell_ids : list of str or None, optional
        One per cell.
    """

    labels: list[str | None]
    indptr: NDArray[np.int64]
    indices: NDArray[np.integer]
    counts: NDArray[Any]
    batches: list[str | None] | None = None
    cell_ids: list[str | None] | None = None


def encode_cells(cells: RawCells, parameters: Mapping[str, Any]) -> bytes:
    """Write a request's cells as an IPC stream.

    Parameters
    ----------
    cells : RawCells
        Counts that are no whole numbers below 2**31 are sent as they are, for the server to name.
    parameters : mapping
        The request's other fields, JSON-able.

    Returns
    -------
    bytes
    """
    offsets, counts = cells.indptr.astype(np.int32), cells.counts
    with np.errstate(invalid="ignore"):  # NaN and infinity, which then differ
        whole = counts.astype(np.int32)
    columns: dict[str, Any] = {
        "label": pa.array(cells.labels, pa.string()),
        "gene": pa.ListArray.from_arrays(offsets, pa.array(cells.indices.astype(np.int32))),
        "count": pa.ListArray.from_arrays(
            offsets, pa.array(whole if np.array_equal(whole, counts) else counts)
        ),
    }
    return _stream(columns, cells.batches, cells.cell_ids, parameters)


def encode_new_cells(
    labels: Sequence[str],
    library: NDArray[np.float64],
    batches: Sequence[str | None] | None,
    cell_ids: Sequence[str | None] | None,
    parameters: Mapping[str, Any],
) -> bytes:
    """Write a request for new cells as an IPC stream.

    Parameters
    ----------
    labels : sequence of str
        One per cell.
    library : array[n_cells] of float64
        Expected total counts.
    batches, cell_ids : sequence of str, optional
        One per cell.
    parameters : mapping
        The request's other fields, JSON-able.

    Returns
    -------
    bytes
    """
    columns = {"label": pa.array(labels, pa.string()), "library": pa.array(library, pa.float64())}
    return _stream(columns, batches, cell_ids, parameters)


def _stream(
    columns: dict[str, Any],
    batches: Sequence[str | None] | None,
    cell_ids: Sequence[str | None] | None,
    parameters: Mapping[str, Any],
) -> bytes:
    if batches is not None:
        columns["batch"] = pa.array(batches, pa.string())
    if cell_ids is not None:
        columns["cell_id"] = pa.array(cell_ids, pa.string())
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({METADATA_KEY: json.dumps(dict(parameters)).encode()})
    return b"".join([stream_start(schema), bytes(batch.serialize()), END_OF_STREAM])


def decode_cells(body: bytes, limits: StreamLimits) -> tuple[RawCells, dict[str, Any]]:
    """Read what `encode_cells`, or any other Arrow writer, wrote.

    Parameters
    ----------
    body : bytes
        An Arrow IPC stream.
    limits : StreamLimits
        What it may take in memory, found out before it is read.

    Returns
    -------
    tuple of RawCells and dict
        The cells and the request's other fields.

    Raises
    ------
    RequestError
        400 for what is no stream, 413 for too large a one, 422 for wrong columns, types or
        lists that do not match.
    """
    batch, parameters = read_table(
        body, limits, required=("label", "gene", "count"), optional=("batch", "cell_id")
    )
    gene_ends, genes = _lists(batch, "gene", limits)
    count_ends, counts = _lists(batch, "count", limits)
    if not np.array_equal(gene_ends, count_ends):
        row = int(np.argmax(np.diff(gene_ends) != np.diff(count_ends)))
        raise UnprocessableError(
            f"gene and count are lists of {np.diff(gene_ends)[row]} and "
            f"{np.diff(count_ends)[row]} values at row {row}",
            "give one count for each gene of a cell",
            error="ragged_arrays",
        )
    cells = RawCells(
        labels=name_column(batch, "label") or [],
        indptr=gene_ends,
        indices=genes,
        counts=counts,
        batches=name_column(batch, "batch"),
        cell_ids=name_column(batch, "cell_id"),
    )
    return cells, parameters


def read_table(
    body: bytes, limits: StreamLimits, required: Sequence[str], optional: Sequence[str]
) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Read a request's IPC stream into one record batch.

    Parameters
    ----------
    body : bytes
        An Arrow IPC stream.
    limits : StreamLimits
        What it may take in memory.
    required, optional : sequence of str
        Names of the columns that must and that may be there; no others may.

    Returns
    -------
    tuple of RecordBatch and dict
        The rows, and the parameters from the schema's metadata.

    Raises
    ------
    RequestError
        As `decode_cells`.
    """
    if not body.endswith(END_OF_STREAM):
        raise UndecodableError(
            f"the body, {len(body):,} bytes, does not end as an Arrow IPC stream does",
            "send the whole stream, closed by its writer",
        )
    try:
        parts = messages(memoryview(body), limits)
        check_schema(next(parts), limits)
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_columns(reader.schema, required, optional)
            check_batches(parts, limits)
            table = reader.read_all()
        table.validate(full=True)
        batch = _one_batch(table)
    except (pa.ArrowException, OSError, ValueError, IndexError, StopIteration, struct.error) as e:
        raise UndecodableError(
            f"the body is no readable Arrow IPC stream ({first_line(e)})",
            "write it with pyarrow.ipc.new_stream or another Arrow library's stream writer",
        ) from e
    metadata = (batch.schema.metadata or {}).get(METADATA_KEY, b"{}")
    return batch, decode_object(metadata, f"the schema metadata under {METADATA_KEY.decode()!r}")


def name_column(batch: pa.RecordBatch, name: str) -> list[str | None] | None:
    """Return a column of names, None where there is no such column.

    Each text of a dictionary-encoded column is made once, whatever the number of its rows.

    Parameters
    ----------
    batch : RecordBatch
        A request's rows.
    name : str
        The column's name.

    Returns
    -------
    list of str or None, or None

    Raises
    ------
    UnprocessableError
        If a name is too long.
    """
    if name not in batch.schema.names:
        return None
    column = batch.column(name)
    if not pa.types.is_dictionary(column.type):
        return _names(column, name, range(len(column)))
    present = column.indices.is_valid().to_numpy(zero_copy_only=False)
    codes = column.indices.fill_null(0).to_numpy().astype(np.int64)
    used, first, position = np.unique(codes[present], return_index=True, return_inverse=True)
    texts = _names(column.dictionary.take(pa.array(used)), name, np.flatnonzero(present)[first])
    rows = np.full(len(codes), len(used))
    rows[present] = position
    texts.append(None)
    return [texts[row] for row in rows.tolist()]


def _names(
    values: pa.Array, name: str, rows: Sequence[int] | NDArray[np.int64]
) -> list[str | None]:
    """Return the names that stand in a column, each first in one of `rows`."""
    try:
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            n_bytes = pc.binary_length(values)
            position = pc.index(pc.greater(n_bytes, _MAX_NAME_BYTES), True).as_py()
            if position >= 0:  # one text may be a whole body, and wider as Python's
                beginning = pc.utf8_slice_codeunits(values.slice(position, 1), 0, 40)[0].as_py()
                size = f"{n_bytes[position].as_py():,} bytes"
                raise name_too_long(size, f"{beginning!r}...", position)
        return read_names(values.to_pylist())
    except BadEntryError as error:
        place = f"{name}[{rows[error.position[0]]}]" if error.position else name
        raise UnprocessableError(f"{place} {error.problem}", error.fix) from None


def number_column(batch: pa.RecordBatch, name: str) -> NDArray[np.float64]:
    """Return a column of numbers as float64; null becomes NaN.

    Parameters
    ----------
    batch : RecordBatch
        A request's rows.
    name : str
        The column's name.

    Returns
    -------
    array[n_rows] of float64
    """
    return batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    if len(batches) == 1:
        return batches[0]
    return pa.RecordBatch.from_pylist([], schema=table.schema)


def _lists(
    batch: pa.RecordBatch, name: str, limits: StreamLimits
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return offsets, from 0, and values of a column of number lists."""
    column = batch.column(name)
    values = column.flatten()
    n_bytes = len(values) * _BYTES_PER_VALUE
    if n_bytes > limits.max_bytes:
        raise PayloadTooLargeError(
            f"the column {name!r} has {len(values):,} values, {n_bytes:,} bytes as pairs of 32-bit "
            f"integers, above {limits.max_bytes:,}",
            "send fewer cells a request",
            error="body_too_large",
        )
    if column.null_count or values.null_count:
        raise UnprocessableError(
            f"the column {name!r} has nulls",
            "give an empty list for a cell without counts, and a number for each value",
        )
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], values.to_numpy(zero_copy_only=False)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_name(kind: pa.DataType) -> bool:
    """Return whether a column's entries are names: strings, or scalars that stand for them."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or pa.types.is_boolean(kind) or _is_number(kind)


def _is_list(kind: pa.DataType, of: Callable[[pa.DataType], bool]) -> bool:
    """Return whether a column's entries are lists; views and lists of one size are none."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and of(kind.value_type)


# Types that read_table lets through, and what to write in place of others: in all of them, what a
# column takes in memory is bounded by its buffers.
_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "label": (_is_name, "string"),
    "batch": (_is_name, "string"),
    "cell_id": (_is_name, "string"),
    "gene": (lambda kind: _is_list(kind, pa.types.is_integer), "list<int32>"),
    "count": (lambda kind: _is_list(kind, _is_number), "list<int32>"),
    "library": (_is_number, "double"),
}


def _check_columns(schema: pa.Schema, required: Sequence[str], optional: Sequence[str]) -> None:
    """Refuse a schema without the columns of a request, or with others or of other types."""
    names = list(schema.names)
    fix = f"columns: {', '.join(required)}; optional: {', '.join(optional)}"
    for name in required:
        if names.count(name) != 1:
            problem = "no" if name not in names else "more than one"
            raise UnprocessableError(f"the Arrow stream has {problem} column {name!r}", fix)
    for name in names:
        if name not in (*required, *optional) or names.count(name) != 1:
            raise UnprocessableError(
                f"the Arrow stream has an unknown or repeated column {name[:60]!r}", fix
            )
    for name in names:
        fits, wanted = _TYPES[name]
        kind = schema.field(name).type
        if not fits(kind):
            raise UnprocessableError(
                f"the column {name!r} is of type {str(kind)[:100]}", f"make it {wanted}"
            )
