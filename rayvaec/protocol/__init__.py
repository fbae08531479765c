"""Wire format between client and server: Arrow IPC streams.

Cells go to the server, one row each::

    label: string, gene: list<int32>, count: list<int32>[, batch: string][, cell_id: string]

of any integer or float type in place of int32, and dictionaries, numbers or truth values in place
of strings. Draws come back, one row per cell and draw, in the order of the cells and then of the
draws::

    cell: int32, sample: int32, gene: list<int32>, count: list<int32>

so that `gene`'s list offsets are a CSR indptr. Dense answers (latent, expression, moments) hold one
row per cell, with a column of fixed-size float32 lists each. Whatever else there is to say stands
as JSON in the schema's metadata under `METADATA_KEY`: the request's parameters, and in an answer
the seed, the model's hash and `rows`, the number of rows that a whole answer has.
"""

from __future__ import annotations

from rayvaec.protocol.incremental_reader import AnswerStream
from rayvaec.protocol.ipc_limits import StreamLimits
from rayvaec.protocol.media_types import (
    ARROW,
    END_OF_STREAM,
    H5AD,
    JSON,
    METADATA_KEY,
    stream_start,
)
from rayvaec.protocol.requests import (
    RawCells,
    decode_cells,
    encode_cells,
    encode_new_cells,
    name_column,
    number_column,
    read_table,
)
from rayvaec.protocol.responses import (
    DrawnRows,
    dense_schema,
    draws_schema,
    encode_dense,
    encode_draws,
)

__all__ = [
    "ARROW",
    "END_OF_STREAM",
    "H5AD",
    "JSON",
    "METADATA_KEY",
    "AnswerStream",
    "DrawnRows",
    "RawCells",
    "StreamLimits",
    "decode_cells",
    "dense_schema",
    "draws_schema",
    "encode_cells",
    "encode_dense",
    "encode_draws",
    "encode_new_cells",
    "name_column",
    "number_column",
    "read_table",
    "stream_start",
]
