from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayvaec import protocol
from rayvaec.errors import RequestError
from rayvaec.protocol import AnswerStream, DrawnRows, RawCells, StreamLimits
from rayvaec.protocol.responses import PIECE_BYTES

MEGABYTE = 2**20
LIMITS = StreamLimits(max_bytes=MEGABYTE)
rows_of_values = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=5),
    max_size=8,
)


def csr(rows: list[list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    indptr = np.cumsum([0, *(len(row) for row in rows)])
    flat = np.array([pair for row in rows for pair in row], np.int64).reshape(-1, 2)
    return indptr, flat[:, 0], flat[:, 1]


def stream_of(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def cells_table(**columns: object) -> pa.Table:
    table = {
        "label": pa.array(["a", "b", "c"]),
        "gene": pa.array([[0, 2], [], [1]], pa.list_(pa.int32())),
        "count": pa.array([[4, 1], [], [7]], pa.list_(pa.int32())),
    }
    return pa.table({**table, **columns})


@given(rows_of_values, st.booleans(), st.dictionaries(st.text(), st.integers(-(2**63), 2**64 - 1)))
def test_cells_come_back_as_they_were_sent(rows, named, parameters):
    indptr, indices, counts = csr(rows)
    names = [f"cell {i}" for i in range(len(rows))] if named else None
    sent = RawCells(["é"] * len(rows), indptr, indices, counts, batches=names, cell_ids=names)
    got, said = protocol.decode_cells(protocol.encode_cells(sent, parameters), LIMITS)
    assert said == parameters
    assert (got.labels, got.cell_ids, got.batches) == (sent.labels, names, names)
    for name in ("indptr", "indices", "counts"):
        assert np.array_equal(getattr(got, name), getattr(sent, name))


def test_counts_that_are_no_counts_travel_unchanged():
    odd = np.array([0.5, np.nan, 3e9])
    sent = RawCells(["a"], np.array([0, 3]), np.arange(3), odd)
    got, _ = protocol.decode_cells(protocol.encode_cells(sent, {}), LIMITS)
    assert np.array_equal(got.counts, odd, equal_nan=True)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_streams_of_other_writers_are_read(compression):
    other = cells_table(
        label=pa.array(["a", "b", "a"]).dictionary_encode(),
        gene=pa.array([[0, 2], [], [1]], pa.large_list(pa.uint16())),
        count=pa.array([[4.0, 1.0], [], [7.0]], pa.list_(pa.float32())),
    )
    cells, said = protocol.decode_cells(stream_of(other, compression), LIMITS)
    assert (cells.labels, cells.cell_ids, said) == (["a", "b", "a"], None, {})
    assert cells.indptr.tolist() == [0, 2, 2, 3]
    assert cells.indices.tolist() == [0, 2, 1]
    assert cells.counts.tolist() == [4, 1, 7]


def test_a_sliced_list_column_keeps_its_own_values():
    table = cells_table().slice(2, 1)
    cells, _ = protocol.decode_cells(stream_of(table), LIMITS)
    assert (cells.labels, cells.indices.tolist(), cells.counts.tolist()) == (["c"], [1], [7])


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_bomb_is_refused_before_it_is_decompressed(compression):
    zeros = pa.array([np.zeros(MEGABYTE, np.int32)] * 3, pa.list_(pa.int32()))
    body = stream_of(cells_table(gene=zeros, count=zeros), compression)
    assert len(body) < MEGABYTE
    with pytest.raises(RequestError, match="16,7.* bytes or more decompressed") as caught:
        protocol.decode_cells(body, LIMITS)
    assert caught.value.status == 413


def test_a_bomb_in_a_dictionary_is_refused():
    label = pa.array(["x" * MEGABYTE] * 3).dictionary_encode()
    body = stream_of(cells_table(label=label), "zstd")
    with pytest.raises(RequestError) as caught:
        protocol.decode_cells(body, StreamLimits(max_bytes=MEGABYTE // 2))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"gene": pa.array(["x", "y", "z"])}, "column 'gene' is of type string"),
        ({"gene": pa.array([[0.0, 2.0], [], [1.0]])}, "column 'gene' is of type list<.*double"),
        ({"count": pa.array([["4", "1"], [], ["7"]])}, "column 'count' is of type list<.*string"),
        ({"label": pa.array([b"a", b"b", b"c"])}, "column 'label' is of type binary"),
        ({"count": pa.array([[4, None], [], [7]])}, "column 'count' has nulls"),
        ({"gene": pa.array([[0, 2], None, [1]])}, "column 'gene' has nulls"),
        ({"count": pa.array([[4], [], [7]])}, "lists of 2 and 1 values at row 0"),
        ({"size": pa.array([1, 2, 3])}, "unknown or repeated column 'size'"),
    ],
)
def test_wrong_columns_are_named(columns, words):
    with pytest.raises(RequestError, match=words) as caught:
        protocol.decode_cells(stream_of(cells_table(**columns)), LIMITS)
    assert caught.value.status == 422
    assert caught.value.fix


def test_a_missing_column_is_named():
    with pytest.raises(RequestError, match="no column 'label'.*columns: label, gene, count"):
        protocol.decode_cells(stream_of(cells_table().drop_columns("label")), LIMITS)


def test_metadata_must_be_an_object():
    table = cells_table().replace_schema_metadata({protocol.METADATA_KEY: b"[1]"})
    with pytest.raises(RequestError, match=r"under 'rayvaec' is \[1\]") as caught:
        protocol.decode_cells(stream_of(table), LIMITS)
    assert caught.value.status == 422


WHOLE = stream_of(cells_table(), "zstd")


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b + protocol.END_OF_STREAM))
def test_garbage_is_refused(body):
    with pytest.raises(RequestError) as caught:
        protocol.decode_cells(body, LIMITS)
    assert caught.value.status == 400


@pytest.mark.parametrize("length", range(0, len(WHOLE), 61))
def test_a_cut_stream_is_refused(length):
    with pytest.raises(RequestError, match="does not end as") as caught:
        protocol.decode_cells(WHOLE[:length], LIMITS)
    assert caught.value.status == 400


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
def test_a_damaged_stream_is_read_or_refused(damage):
    body = bytearray(WHOLE)
    for position, value in damage:
        body[position] = value
    with suppress(RequestError):
        protocol.decode_cells(bytes(body), LIMITS)


def drawn(rows: list[list[tuple[int, int]]]) -> DrawnRows:
    indptr, indices, counts = csr(rows)
    number = np.arange(len(rows), dtype=np.int32)
    return DrawnRows(number, number + 7, indptr, indices.astype(np.int32), counts.astype(np.int32))


def answer(schema: pa.Schema, pieces: list[bytes]) -> list[bytes]:
    return [protocol.stream_start(schema), *pieces, protocol.END_OF_STREAM]


@given(rows_of_values, st.integers(1, 50))
def test_draws_come_back_as_they_were_sent(rows, step):
    sent = drawn(rows)
    schema = protocol.draws_schema({"rows": len(rows), "seed": 3})
    body = b"".join(answer(schema, protocol.encode_draws(schema, sent)))
    chunks = [body[i : i + step] for i in range(0, len(body), step)]
    stream = AnswerStream(chunks)
    stream.finish()
    got = stream.draws()
    assert stream.parameters == {"rows": len(rows), "seed": 3}
    for name in ("cells", "samples", "indptr", "indices", "counts"):
        assert np.array_equal(getattr(got, name), getattr(sent, name))


def test_large_answers_are_cut_into_pieces():
    n_rows, width = 3000, 200
    rows = DrawnRows(
        cells=np.zeros(n_rows, np.int32),
        samples=np.zeros(n_rows, np.int32),
        indptr=np.arange(n_rows + 1) * width,
        indices=np.zeros(n_rows * width, np.int32),
        counts=np.ones(n_rows * width, np.int32),
    )
    pieces = protocol.encode_draws(protocol.draws_schema({}), rows)
    assert len(pieces) == -(-n_rows * (16 + 8 * width) // PIECE_BYTES)
    assert all(len(piece) < 1.1 * PIECE_BYTES for piece in pieces)


def test_a_row_larger_than_a_piece_is_sent_whole():
    n = PIECE_BYTES
    rows = DrawnRows(
        cells=np.zeros(2, np.int32),
        samples=np.zeros(2, np.int32),
        indptr=np.array([0, n, n + 1]),
        indices=np.zeros(n + 1, np.int32),
        counts=np.ones(n + 1, np.int32),
    )
    assert len(protocol.encode_draws(protocol.draws_schema({}), rows)) == 2


@pytest.mark.parametrize("width", [1, 7, 200_000])
def test_dense_rows_come_back_as_they_were_sent(width):
    values = np.random.default_rng(0).random((5, width)).astype(np.float32)
    schema = protocol.dense_schema({"mean": width, "var": 2}, {"rows": 5})
    pieces = protocol.encode_dense(schema, 0, {"mean": values, "var": np.ones((5, 2))})
    got = AnswerStream(answer(schema, pieces)).dense()
    assert np.array_equal(got["mean"], values)
    assert got["var"].shape == (5, 2)


SCHEMA = protocol.draws_schema({"rows": 3})
PIECES = protocol.encode_draws(SCHEMA, drawn([[(1, 2)], [(3, 4)], [(5, 6)]]))


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "no readable Arrow stream"),
        ([b"Internal Server Error"], "no readable Arrow stream"),
        ([protocol.stream_start(SCHEMA)], "ended after 0 of 3 rows"),
        (answer(SCHEMA, []), "ended after 0 of 3 rows"),
        (answer(SCHEMA, PIECES * 2), "ended after 6 of 3 rows"),
        ([protocol.stream_start(SCHEMA), PIECES[0][:-8]], "broke off after 0 of 3 rows"),
    ],
)
def test_an_answer_that_is_not_whole_is_noticed(chunks, words):
    with pytest.raises(RequestError, match=words) as caught:
        AnswerStream(chunks).finish()
    assert caught.value.error == "broken_answer"


def test_rows_can_be_taken_while_more_come():
    stream = AnswerStream([protocol.stream_start(SCHEMA)])
    taken = []
    for rows in ([[(1, 2)]], [[(3, 4)], [(5, 6)]]):
        for piece in protocol.encode_draws(SCHEMA, drawn(rows)):
            stream.feed(piece)
        assert stream.n_waiting > 0
        taken.append(stream.draws())
        assert stream.n_waiting == 0
    assert [rows.indices.tolist() for rows in taken] == [[1], [3, 5]]
    assert stream.draws().indptr.tolist() == [0]
    stream.finish()


def test_parameters_are_json_in_the_metadata():
    schema = protocol.draws_schema({"seed": 2**62})
    assert json.loads(schema.metadata[b"rayvaec"]) == {"seed": 2**62}
