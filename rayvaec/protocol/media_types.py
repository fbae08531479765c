"""Media types, the metadata key of parameters, and stream delimiters."""

from __future__ import annotations

import pyarrow as pa

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
H5AD = "application/x-hdf5"
METADATA_KEY = b"rayvaec"
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def stream_start(schema: pa.Schema) -> bytes:
    """Return the first bytes of an IPC stream; record batches and `END_OF_STREAM` follow."""
    return bytes(schema.serialize())


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, fit for one line of a message."""
    return str(error).partition("\n")[0][:120] or type(error).__name__
