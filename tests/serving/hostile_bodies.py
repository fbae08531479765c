"""Run as a script: reads bodies that want to become large, within a bound on this process's memory.

Prints a JSON line for each: its name, the status that it is answered with (500 for a failure, such
as that of memory), what is said, and the mebibytes that reading it took at most.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from rayvaec.data.registry import Registry
from rayvaec.errors import RequestError
from rayvaec.protocol import JSON, METADATA_KEY
from rayvaec.protocol.flatbuffer import FlatTable
from rayvaec.protocol.media_types import END_OF_STREAM
from rayvaec.serving.decoding import parsing
from rayvaec.serving.decoding.bodies import Sent, unpack
from rayvaec.serving.middleware.limits import Limits

MEBIBYTE = 2**20
LIMITS = Limits()
MODEL: Any = SimpleNamespace(
    registry=Registry(tuple(f"g{gene}" for gene in range(25)), ("0", "1"), "type"), hash=""
)
SANDBOX: Any = None

TOKENS = (
    *('""', '"a"', '"ab"', '"\\u00e9"', '"\U0001f600"', "0", "-1", "1e5", "0.5", "null", "true"),
    *("[]", "[0]", '["a"]', "{}", '{"":0}', '{"":{}}', "[[]]", "18446744073709551615", "1e400"),
)
IN_CELLS = ("indptr", "indices", "counts", "dense")
PLACES = (
    *IN_CELLS,
    *("labels", "batches", "cell_ids", "genes", "out_genes", "reduce", "quantiles", "seed", "none"),
)


def repeated(place: str, token: str, size: int) -> bytes:
    """Write a request in which a list repeats something, in `size` bytes."""
    many = "[" + ",".join([token] * (size // (len(token.encode()) + 1))) + "]"
    cells = {"indptr": "[0,0]", "indices": "[]", "counts": "[]"}
    fields = {"labels": '["0"]', "n_samples": "1"}
    if place == "dense":
        cells = {"dense": many}
    elif place in IN_CELLS:
        cells[place] = many
    else:
        fields[place] = many
    fields["cells"] = "{" + ",".join(f'"{name}":{value}' for name, value in cells.items()) + "}"
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()


def json_bodies() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names of bodies of nearly 8 MiB, and what makes them."""
    size = 8 * MEBIBYTE - 400
    for number, token in enumerate(TOKENS):
        for place in (PLACES[number % len(PLACES)], PLACES[(5 * number + 4) % len(PLACES)]):
            yield f"{token} in {place}", lambda p=place, t=token: repeated(p, t, size)

    def keys() -> bytes:
        return ",".join(f'"{number:x}":0' for number in range(size // 12)).encode()

    yield "keys", lambda: b"{" + keys() + b"}"
    yield "keys of cells", lambda: b'{"cells":{' + keys() + b"}}"
    yield "the same key", lambda: b"{" + b",".join([b'"labels":[]'] * (size // 12)) + b"}"
    yield "nested lists", lambda: b"[" * (size // 2) + b"]" * (size // 2)
    yield "nested objects", lambda: b'{"":' * (size // 5) + b"0" + b"}" * (size // 5)
    yield "a long key", lambda: b'{"' + b"a" * size + b'":0}'
    yield "a wide name", lambda: b'{"labels":["' + b"a" * size + "\U0001f600".encode() + b'"]}'
    yield "a long number", lambda: b'{"seed":' + b"9" * size + b"}"
    yield "backslashes", lambda: b'{"label":"' + b"\\" * size + b'"}'


def stream(
    columns: Mapping[str, Any],
    compression: str | None = "zstd",
    parameters: Mapping[str, Any] | None = None,
    batches: int = 1,
) -> bytes:
    """Write columns as an IPC stream, as often as asked for."""
    metadata = {METADATA_KEY: json.dumps(parameters or {"n_samples": 1})}
    batch = pa.record_batch(dict(columns)).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def cells(n_rows: int, **columns: Any) -> dict[str, Any]:
    """Return the columns of cells without counts, some of them replaced."""
    ends = pa.array(np.zeros(n_rows + 1, np.int32))
    empty = pa.ListArray.from_arrays(ends, pa.array([], pa.int32()))
    return {"label": of_one_text(n_rows, "0"), "gene": empty, "count": empty} | columns


def of_one_text(n_rows: int, text: str) -> pa.Array:
    """Return rows that all refer to one text."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n_rows, np.int8)), pa.array([text]))


def large_lists(n: int, kind: type) -> dict[str, pa.Array]:
    """Return `gene` and `count` of one cell with many zeros."""
    zeros = pa.array(np.zeros(n, kind))
    one = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), zeros)
    return {"gene": one, "count": one}


def list_views(n_rows: int) -> pa.Array:
    """Return rows that are all the same large list."""
    starts = pa.array(np.zeros(n_rows, np.int32))
    sizes = pa.array(np.full(n_rows, MEBIBYTE, np.int32))
    return pa.ListViewArray.from_arrays(starts, sizes, pa.array(np.zeros(MEBIBYTE, np.int32)))


def growing_dictionary() -> bytes:
    """Write batches each of which appends to a large dictionary, which is copied each time."""
    texts = [f"{number}{'a' * MEBIBYTE}" for number in range(8)]
    sink, columns = pa.BufferOutputStream(), cells(2)
    columns["label"] = pa.DictionaryArray.from_arrays([0, 0], texts)
    options = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, pa.record_batch(columns).schema, options=options) as writer:
        for number in range(60):
            columns["label"] = pa.DictionaryArray.from_arrays([0, 0], [*texts])
            writer.write_batch(pa.record_batch(columns))
            texts.append(f"{number}")
    return sink.getvalue().to_pybytes()


def old_compression() -> bytes:
    """Write buffers that are compressed as before Arrow 1.0, which says so in another place."""
    batch = pa.record_batch(cells(1) | large_lists(100 * MEBIBYTE, np.int32))
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "ZSTD"})
    body, at = bytearray(sink.getvalue().to_pybytes()), 0
    while (n_metadata := struct.unpack_from("<i", body, at + 4)[0]) > 0:
        metadata = memoryview(body)[at + 8 : at + 8 + n_metadata]
        message = FlatTable(metadata)
        struct.pack_into("<h", metadata, message.at(0), 3)  # the version before
        header = message.table(2)
        if message.number(1, "<B") == 3:  # the compression that a record batch itself states
            struct.pack_into("<H", metadata, header._offsets + 4 + 2 * 3, 0)
        at += 8 + n_metadata + message.number(3, "<q")
    return bytes(body)


def shared_metadata() -> bytes:
    """Write a schema whose ten thousand entries of metadata are all the same large one."""
    pairs = {f"{number}": "" for number in range(10_000)}
    schema = pa.record_batch(cells(1)).schema.with_metadata(pairs | {"large": "a" * 2**19})
    body = bytearray(schema.serialize())
    metadata = memoryview(body)[8:]
    header = FlatTable(metadata).table(2)
    start, n_pairs = header.pointed(2), header.length(2)
    (last,) = (p._position for p in header.tables(2) if p.length(1) == 2**19)
    for entry in range(start + 4, start + 4 + 4 * n_pairs, 4):
        struct.pack_into("<I", metadata, entry, last - entry)
    return bytes(body) + END_OF_STREAM


def arrow_bodies() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names of streams that expand, and what makes them."""
    long, rows = "a" * MEBIBYTE, 800
    for name in ("label", "batch", "cell_id"):
        yield (
            f"dictionary of {name}",
            lambda n=name: stream(cells(rows, **{n: of_one_text(rows, long)})),
        )
    ends = pa.array([rows], pa.int32())
    views = pa.array([long] * 40, pa.string_view())
    yield "rows", lambda: stream(cells(6 * MEBIBYTE))
    yield "rows of many batches", lambda: stream(cells(99_999), batches=50)
    yield "batches", lambda: stream(cells(0), None, batches=50_000)
    yield "columns", lambda: stream({f"c{number}": pa.array([0]) for number in range(20_000)})
    yield (
        "a wide name",
        lambda: stream(cells(1, label=pa.array(["a" * (60 * MEBIBYTE) + "\U0001f600"]))),
    )
    yield "views", lambda: stream(cells(40, label=views))
    yield (
        "run ends",
        lambda: stream(
            cells(rows, label=pa.RunEndEncodedArray.from_arrays(ends, pa.array([long])))
        ),
    )
    yield "nulls", lambda: stream(cells(rows, label=pa.nulls(rows)))
    yield "list views", lambda: stream(cells(rows, gene=list_views(rows)))
    yield "small integers", lambda: stream(cells(1) | large_lists(30 * MEBIBYTE, np.uint8))
    yield "compressed", lambda: stream(cells(1) | large_lists(100 * MEBIBYTE, np.int32))
    yield "compressed as of old", old_compression
    yield "a dictionary that grows", growing_dictionary
    yield "names in the metadata", lambda: stream(cells(1), None, {"genes": ["g"] * (3 * MEBIBYTE)})
    yield "lists in the metadata", lambda: stream(cells(1), None, {"genes": [[]] * MEBIBYTE})
    yield (
        "keys in the metadata",
        lambda: stream(cells(1), None, {f"{number}": 0 for number in range(500_000)}),
    )
    yield "shared metadata", shared_metadata


def answer(body: bytes, kind: str) -> tuple[int, str]:
    """Return the status and the words that a body is answered with."""
    try:
        sent = Sent(body, kind, False, (), JSON)
        parsing.sample_task(unpack(sent, MODEL.registry, LIMITS, SANDBOX), MODEL, LIMITS)
    except RequestError as error:
        return error.status, str(error)
    except Exception as error:
        return 500, repr(error)
    return 200, ""


def mebibytes(name: str) -> float:
    """Return one of the sizes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(kind: str, most: int) -> None:
    """Read all bodies of a kind, with at most so many mebibytes beyond what there is."""
    answer(b"{}", JSON)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    for name, make in json_bodies() if kind == JSON else arrow_bodies():
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        body = make()
        pa.default_memory_pool().release_unused()
        Path("/proc/self/clear_refs").write_text("5")
        before = mebibytes("VmRSS")
        bound = int(mebibytes("VmData") + most) * MEBIBYTE
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
        status, words = answer(body, kind)
        grown = mebibytes("VmHWM") - before
        del body
        print(json.dumps([name, status, words[:300], round(grown)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
