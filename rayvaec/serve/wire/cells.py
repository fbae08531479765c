"""Requests: cells as an Arrow IPC stream, written by the client, read with care by the server."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayvaec.errors import RequestError
from rayvaec.serve.wire.common import END_OF_STREAM, METADATA_KEY, first_line, stream_start
from rayvaec.serve.wire.size import unpacked_bytes


@dataclass(frozen=True)
class RawCells:
    """Cells as a request states them, nothing about their values checked yet.

    Parameters
    ----------
    labels : list of str or None
        One per cell; None where the cell has none.
    indptr, indices : arrays of int64
        CSR, columns in the order of the request's genes.
    counts : array[n_values]
        Any integer or float type.
    batches, cell_ids : list of str or None, optional
        One per cell.
    """

    labels: list[str | None]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
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


def decode_cells(body: bytes, max_bytes: int) -> tuple[RawCells, dict[str, Any]]:
    """Read what `encode_cells`, or any other Arrow writer, wrote.

    Parameters
    ----------
    body : bytes
        An Arrow IPC stream.
    max_bytes : int
        Most memory that its columns may take once decompressed.

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
        body, max_bytes, required=("label", "gene", "count"), optional=("batch", "cell_id")
    )
    gene_ends, genes = _lists(batch, "gene")
    count_ends, counts = _lists(batch, "count")
    if not np.array_equal(gene_ends, count_ends):
        row = int(np.argmax(np.diff(gene_ends) != np.diff(count_ends)))
        raise RequestError(
            f"gene and count are lists of {np.diff(gene_ends)[row]} and "
            f"{np.diff(count_ends)[row]} values at row {row}",
            "give one count for each gene of a cell",
            *(422, "ragged_arrays"),
        )
    if genes.dtype.kind not in "iu":
        raise _wrong_type("gene", batch, "list<int32>")
    cells = RawCells(
        labels=text_column(batch, "label") or [],
        indptr=gene_ends,
        indices=genes.astype(np.int64),
        counts=counts,
        batches=text_column(batch, "batch"),
        cell_ids=text_column(batch, "cell_id"),
    )
    return cells, parameters


def read_table(
    body: bytes, max_bytes: int, required: Sequence[str], optional: Sequence[str]
) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Read a request's IPC stream into one record batch.

    Parameters
    ----------
    body : bytes
        An Arrow IPC stream.
    max_bytes : int
        Most memory that its columns may take once decompressed.
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
        raise RequestError(
            f"the body, {len(body):,} bytes, does not end as an Arrow IPC stream does",
            "send the whole stream, closed by its writer",
            *(400, "undecodable"),
        )
    try:
        unpacked = unpacked_bytes(body)
        if unpacked > max_bytes:
            raise RequestError(
                f"the Arrow stream takes {unpacked:,} bytes decompressed, above {max_bytes:,}",
                "send fewer cells a request",
                *(413, "body_too_large"),
            )
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            table = reader.read_all()
        table.validate(full=True)
        batch = _one_batch(table)
        parameters = json.loads((batch.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise RequestError(
            f"the body is no readable Arrow IPC stream ({first_line(error)})",
            "write it with pyarrow.ipc.new_stream or another Arrow library's stream writer",
            *(400, "undecodable"),
        ) from error
    if not isinstance(parameters, dict):
        raise RequestError(
            f"the schema metadata under {METADATA_KEY.decode()!r} is not a JSON object",
            'give the parameters as one, such as {"n_samples": 10}',
            *(400, "undecodable"),
        )
    _check_columns(batch.schema.names, required, optional)
    return batch, parameters


def text_column(batch: pa.RecordBatch, name: str) -> list[str | None] | None:
    """Return a column of strings, None where there is no such column.

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
    RequestError
        422 if the column holds something else.
    """
    if name not in batch.schema.names:
        return None
    column = batch.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _wrong_type(name, batch, "string")
    return column.to_pylist()


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

    Raises
    ------
    RequestError
        422 if the column holds something else.
    """
    column = batch.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise _wrong_type(name, batch, "float")
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    if len(batches) == 1:
        return batches[0]
    return pa.RecordBatch.from_pylist([], schema=table.schema)


def _lists(batch: pa.RecordBatch, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return offsets, from 0, and values of a column of number lists."""
    column = batch.column(name)
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise _wrong_type(name, batch, "list<int32>")
    if not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        raise _wrong_type(name, batch, "list<int32>")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise RequestError(
            f"the column {name!r} has nulls",
            "give an empty list for a cell without counts, and a number for each value",
            *(422, "invalid_request"),
        )
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], values.to_numpy(zero_copy_only=False)


def _check_columns(names: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> None:
    for name in required:
        if list(names).count(name) != 1:
            problem = "no" if name not in names else "more than one"
            raise RequestError(
                f"the Arrow stream has {problem} column {name!r}",
                f"columns: {', '.join(required)}; optional: {', '.join(optional)}",
                *(422, "invalid_request"),
            )
    known = [*required, *optional]
    for name in names:
        if name not in known or list(names).count(name) != 1:
            raise RequestError(
                f"the Arrow stream has an unknown or repeated column {name!r}",
                f"columns: {', '.join(required)}; optional: {', '.join(optional)}",
                *(422, "invalid_request"),
            )


def _wrong_type(name: str, batch: pa.RecordBatch, wanted: str) -> RequestError:
    return RequestError(
        f"the column {name!r} is of type {batch.schema.field(name).type}",
        f"make it {wanted}",
        *(422, "invalid_request"),
    )
