"""Memory that an Arrow IPC stream will take, computed before decompression.

A small stream may ask for any amount of memory: compressed buffers are allocated at the size that
they state, entries of a schema may point to the same text again and again, and a dictionary that
grows is copied whenever it does. pyarrow has no options to bound this, but all of it stands in the
flatbuffers in front of the buffers (Message.fbs and Schema.fbs in Arrow's columnar format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rayvaec.errors import PayloadTooLargeError
from rayvaec.protocol.flatbuffer import FlatTable

MAX_FIELDS = 16
"""Fields of a schema, those within lists among them; requests have seven at most."""
MAX_BATCHES = 10_000
"""Batches of a stream: each takes some kilobytes of pyarrow's objects, whatever it holds."""
MAX_BUFFERS = 64
MAX_BATCH_METADATA_BYTES = 64 * 1024

_MARK = b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3
_VERSION_5 = 4  # as Message.fbs numbers it
_TEXT_OVERHEAD_BYTES = 64
_FEWER = "send fewer cells a request"


@dataclass(frozen=True)
class StreamLimits:
    """Bounds on a request's IPC stream.

    Parameters
    ----------
    max_bytes : int
        Most memory that its columns may take once decompressed.
    max_rows : int
        Most rows of all record batches together.
    max_metadata_bytes : int
        Largest schema, the request's parameters included.
    """

    max_bytes: int
    max_rows: int = 100_000
    max_metadata_bytes: int = 8 * 2**20


class Message(NamedTuple):
    """One message of an IPC stream.

    Parameters
    ----------
    kind : int
        What its header is.
    header : FlatTable
        The schema or batch, as Arrow's flatbuffers describe it.
    body : memoryview
        The buffers.
    """

    kind: int
    header: FlatTable
    body: memoryview


def messages(stream: memoryview, limits: StreamLimits) -> Iterator[Message]:
    """Yield the messages of an IPC stream, without reading what they hold.

    Parameters
    ----------
    stream : memoryview
        The stream.
    limits : StreamLimits
        Bounds on their metadata.

    Yields
    ------
    Message

    Raises
    ------
    PayloadTooLargeError
        If a message's metadata is too large.
    ValueError, struct.error
        If this is not an IPC stream.
    """
    start, largest = 0, limits.max_metadata_bytes
    while True:
        mark, n_metadata = struct.unpack_from("<4si", stream, start)
        if mark != _MARK or n_metadata < 0:
            raise ValueError(f"a message begins with {bytes(stream[start : start + 8])!r}")
        if n_metadata == 0:
            return
        if n_metadata > largest:
            raise PayloadTooLargeError(
                f"the Arrow stream has {n_metadata:,} bytes of metadata in one message, above "
                f"{largest:,}",
                "name fewer genes a request",
                error="body_too_large",
            )
        metadata = stream[start + 8 : start + 8 + n_metadata]
        root, start = FlatTable(metadata), start + 8 + n_metadata
        header, n_body = root.table(2), root.number(3, "<q")
        if header is None or n_body < 0 or start + n_body > len(stream):
            raise ValueError("a message has no header, or breaks off")
        if root.number(0, "<h") < _VERSION_5 and root.at(4) is not None:
            # It may say so that buffers are compressed, in a form that states no sizes elsewhere.
            raise ValueError("its messages have metadata in a form of before Arrow 1.0")
        yield Message(root.number(1, "<B"), header, stream[start : start + n_body])
        start, largest = start + n_body, MAX_BATCH_METADATA_BYTES


def check_schema(message: Message, limits: StreamLimits) -> None:
    """Refuse a schema that takes more memory than its bytes.

    Parameters
    ----------
    message : Message
        The first of a stream.
    limits : StreamLimits
        Bounds on its texts.

    Raises
    ------
    PayloadTooLargeError
        For too many fields, or too much text in their names and metadata.
    ValueError
        If it is not a schema.
    """
    if message.kind != _SCHEMA:
        raise ValueError("it does not begin with a schema")
    n_bytes = 0
    for number, field in enumerate(_fields(message.header, 1)):
        if number == MAX_FIELDS:
            raise PayloadTooLargeError(
                f"the Arrow stream has more than {MAX_FIELDS} columns",
                "send the columns that a request has",
            )
        n_bytes += field.length(0) + _text_bytes(field, 6, limits.max_metadata_bytes)
    n_bytes += _text_bytes(message.header, 2, limits.max_metadata_bytes)
    if n_bytes > limits.max_metadata_bytes:
        raise PayloadTooLargeError(
            f"the schema's names and metadata take more than {limits.max_metadata_bytes:,} bytes",
            "name fewer genes a request",
            error="body_too_large",
        )


def _fields(parent: FlatTable, entry: int) -> Iterator[FlatTable]:
    """Yield fields and those within them."""
    for field in parent.tables(entry):
        yield field
        yield from _fields(field, 5)


def _text_bytes(table: FlatTable, entry: int, enough: int) -> int:
    """Add up the custom metadata of a schema or field, until it is more than `enough`."""
    total = 0
    for pair in table.tables(entry):
        total += pair.length(0) + pair.length(1) + _TEXT_OVERHEAD_BYTES
        if total > enough:
            break
    return total


def check_batches(batches: Iterator[Message], limits: StreamLimits) -> None:
    """Refuse batches that would take too much memory once decompressed and joined.

    Parameters
    ----------
    batches : iterator of Message
        All messages after the schema.
    limits : StreamLimits
        The bounds.

    Raises
    ------
    PayloadTooLargeError
        For too many batches, rows or bytes.
    ValueError, struct.error
        If a message is damaged.
    """
    n_rows = n_bytes = 0
    dictionaries: dict[int, int] = {}
    for number, message in enumerate(batches):
        if number == MAX_BATCHES:
            raise PayloadTooLargeError(
                f"the Arrow stream has more than {MAX_BATCHES:,} batches",
                "write larger record batches",
            )
        batch: FlatTable | None = message.header
        if message.kind == _DICTIONARY_BATCH:
            name, batch = message.header.number(0, "<q"), message.header.table(1)
        size = 0 if batch is None else sum(_buffer_sizes(batch, message.body))
        if message.kind == _DICTIONARY_BATCH:
            if message.header.number(2, "<B"):  # appended to what there is, which is then copied
                size += dictionaries.get(name, 0)
            dictionaries[name] = size
        elif batch is not None:
            n_rows += max(batch.number(0, "<q"), 0)
        n_bytes += size
        _check_totals(n_rows, n_bytes, limits)


def _check_totals(n_rows: int, n_bytes: int, limits: StreamLimits) -> None:
    if n_rows > limits.max_rows:
        raise PayloadTooLargeError(
            f"{n_rows:,} cells or more are above the largest number a request, {limits.max_rows:,}",
            "send several requests; draws are the same where cell_ids are given",
        )
    if n_bytes > limits.max_bytes:
        raise PayloadTooLargeError(
            f"the Arrow stream takes {n_bytes:,} bytes or more decompressed, above "
            f"{limits.max_bytes:,}",
            _FEWER,
            error="body_too_large",
        )


def _buffer_sizes(batch: FlatTable, body: memoryview) -> Iterator[int]:
    """Yield the decompressed size of each buffer of a batch."""
    n_buffers, compressed = batch.length(2), batch.at(3) is not None
    if n_buffers > MAX_BUFFERS:
        raise ValueError(f"a batch has {n_buffers} buffers")
    for offset, length in batch.pairs(2):
        if compressed and length >= 8:
            size = struct.unpack_from("<q", body, offset)[0]
            yield length if size == -1 else max(size, 0)  # -1: this buffer is not compressed
        else:
            yield max(length, 0)
