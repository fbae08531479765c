"""How much memory an Arrow IPC stream will take, found out before it is decompressed.

Arrow allocates what a compressed buffer says it holds. A small body may so ask for any amount of
memory; pyarrow has no option to bound it, but the sizes stand in the stream: every compressed
buffer begins with its length as a 64-bit integer (Arrow columnar format, "Body compression"), and
the positions of the buffers stand in the flatbuffer that describes the record batch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa

from rayvaec.serve.wire.flatbuffer import FlatTable

_DICTIONARY_BATCH = 2
_RECORD_BATCH = 3


def unpacked_bytes(body: bytes) -> int:
    """Add up the sizes of all buffers of an IPC stream after decompression.

    Parameters
    ----------
    body : bytes
        An Arrow IPC stream.

    Returns
    -------
    int
        Bytes; for a stream without compression never more than its own length for each column.

    Raises
    ------
    pyarrow.ArrowException, OSError, struct.error
        If the stream cannot be read.
    """
    total = 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
        if message.body is not None:
            total += sum(_buffer_sizes(memoryview(message.metadata), memoryview(message.body)))
    return total


def _buffer_sizes(metadata: memoryview, body: memoryview) -> Iterator[int]:
    """Yield the decompressed size of each buffer of one message (Arrow's Message.fbs)."""
    root = FlatTable(metadata)
    kind_at, header = root.at(1), root.pointed(2)
    kind = metadata[kind_at] if kind_at is not None else 0
    if header is not None and kind == _DICTIONARY_BATCH:
        header = FlatTable(metadata, header).pointed(1)
    elif kind != _RECORD_BATCH:
        return
    if header is None:
        return
    batch = FlatTable(metadata, header)
    buffers, compressed = batch.pointed(2), batch.at(3) is not None
    if buffers is None:
        return
    for i in range(struct.unpack_from("<I", metadata, buffers)[0]):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * i)
        if compressed and length >= 8:
            size = struct.unpack_from("<q", body, offset)[0]
            yield length if size == -1 else max(size, 0)  # -1: this buffer is not compressed
        else:
            yield max(length, 0)
