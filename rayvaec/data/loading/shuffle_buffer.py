"""Shuffle buffer: decoded rows in memory, from which minibatches are gathered."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from rayvaec.data.arrays.decode import address
from rayvaec.data.arrays.sharded import read_ranges, read_together
from rayvaec.data.store.open import Partition, Store
from rayvaec.errors import StoreError
from rayvaec.util.numba_cache import compiled

HUGE_PAGE = 2**21
"""Bytes of a page that the system hands out and finds faster; it must begin at a multiple."""

SMALL_ROOM = 2**19
"""Bytes of the smallest room: there are dozens, and in each a huge page would stay mostly empty."""

COUNTS_AT, INDICES_AT, LENGTH, CELL, LABEL, BATCH = range(6)


class ReusableBuffers:
    """Room for stored values that is used again and again.

    Fresh memory costs as much as decoding into it: the system hands it out page by page. Where half
    a megabyte is too little, they have 4 MiB or more, from where on numpy asks for huge pages.

    Parameters
    ----------
    store : Store
        Whose types of counts and indices to use.

    Attributes
    ----------
    counts, indices : array[capacity]
        The room.
    """

    def __init__(self, store: Store) -> None:
        partition = store.partitions[0]
        self.counts: NDArray[Any] = _room(0, partition.counts.dtype)
        self.indices: NDArray[Any] = _room(0, partition.indices.dtype)
        self._idle = self._references()

    def reserve(self, n_counts: int, n_indices: int) -> None:
        """Make room; what the buffers held is lost where they must grow."""
        if len(self.counts) < n_counts:
            self.counts = _room(n_counts, self.counts.dtype)
        if len(self.indices) < n_indices:
            self.indices = _room(n_indices, self.indices.dtype)

    def in_use(self) -> bool:
        """Return whether anybody holds a view of this room, or something made of one."""
        return self._references() > self._idle

    def _references(self) -> int:
        # A view holds a reference to the array that owns its memory; a tensor holds the view.
        return sys.getrefcount(self.counts.base) + sys.getrefcount(self.indices.base)


def _room(n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    if n * dtype.itemsize <= SMALL_ROOM:
        return np.empty(SMALL_ROOM, np.uint8).view(dtype)
    # An eighth more than asked: sizes differ a little, and growing means new memory.
    n_bytes = max((n + n // 8) * dtype.itemsize, 2**22)
    memory = np.empty(n_bytes + HUGE_PAGE, np.uint8)
    start = -address(memory) % HUGE_PAGE
    return memory[start : start + n_bytes // dtype.itemsize * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class _Piece:
    """Rows of one partition: where their values begin, and their codes."""

    partition: Partition
    offsets: NDArray[np.int64]
    labels: NDArray[Any]
    batches: NDArray[Any] | None

    @property
    def values(self) -> tuple[int, int]:
        """First and one past the last of the rows' stored values."""
        return int(self.offsets[0]), int(self.offsets[-1])


@dataclass(frozen=True)
class Window:
    """Decoded rows, in the order of their use.

    Parameters
    ----------
    begin, end : int
        The part of a lane's line that these rows are.
    buffers : ReusableBuffers
        Where the values are.
    rows : array[n_rows, 6] of int64
        For each row the addresses of its counts and of its indices in the buffers, how many there
        are, and its number in the store, label and batch (0 without batches). One array, so that
        a minibatch takes one slice of it.
    """

    begin: int
    end: int
    buffers: ReusableBuffers
    rows: NDArray[np.int64]


def load_window(
    store: Store,
    runs: Sequence[tuple[int, int]],
    buffers: ReusableBuffers,
    line: tuple[int, int],
    order: NDArray[np.int64],
) -> Window:
    """Read and decode runs of rows.

    Parameters
    ----------
    store : Store
        Where to read.
    runs : sequence of (int, int)
        Rows, as (start, stop), at least one.
    buffers : ReusableBuffers
        Where to put the values; they belong to the window from now on.
    line : (int, int)
        `begin` and `end` of the window.
    order : array[n_rows] of int64
        The order to put the rows into.

    Returns
    -------
    Window

    Raises
    ------
    StoreError
        If a file is missing, cut short or damaged; the message names it.
    """
    places = [place for run in runs for place in store.pieces(*run)]
    store.fetch(span for p, start, stop in places for span in p.annotation_spans(start, stop))
    pieces = _pieces(places)
    store.fetch(span for p in pieces for span in p.partition.value_spans(*p.values))
    places_of_values = _decode(pieces, buffers)
    rows = np.empty((len(order), 6), np.int64)
    bad = fill_rows(
        rows,
        order,
        places_of_values,
        np.concatenate([piece.offsets for piece in pieces]),
        np.concatenate([np.arange(*run) for run in runs]),
        _codes([p.labels for p in pieces]),
        _codes([np.zeros_like(p.labels) if p.batches is None else p.batches for p in pieces]),
    )
    if bad >= 0:
        raise StoreError(
            f"the offsets in {pieces[bad].partition.info.name}/X/indptr decrease",
            "write the store again from its sources",
        )
    return Window(*line, buffers=buffers, rows=rows)


def _pieces(places: Sequence[tuple[Partition, int, int]]) -> list[_Piece]:
    """Read offsets and codes."""
    spans = [partition.annotation_spans(start, stop) for partition, start, stop in places]
    found = iter(read_ranges([span for several in spans for span in several]))
    return [
        _Piece(place[0], next(found), next(found), next(found) if len(several) > 2 else None)
        for place, several in zip(places, spans, strict=True)
    ]


def _decode(pieces: Sequence[_Piece], buffers: ReusableBuffers) -> NDArray[np.int64]:
    """Decode the values of pieces one after the other.

    Returns
    -------
    array[n_pieces, 5] of int64
        For each piece its number of rows, the addresses of its first count and of its first
        index, and the bytes of a count and of an index.
    """
    spans = [piece.partition.value_spans(*piece.values) for piece in pieces]
    ends = np.cumsum([[vector.span(*span) for vector, *span in two] for two in spans], axis=0)
    buffers.reserve(*ends[-1].tolist())
    rooms = (buffers.counts, buffers.indices)
    begins = [(0, 0), *ends[:-1].tolist()]
    reads = [
        (vector, start, stop, room[begin:])
        for two, at in zip(spans, begins, strict=True)
        for (vector, start, stop), begin, room in zip(two, at, rooms, strict=True)
    ]
    shifts = np.reshape(read_together(reads), (-1, 2)) + begins
    sizes = [room.itemsize for room in rooms]
    at = shifts * sizes + [address(room) for room in rooms]
    n_rows = [len(piece.labels) for piece in pieces]
    return np.column_stack([n_rows, at, np.broadcast_to(sizes, at.shape)])


def _codes(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64)


@compiled
def fill_rows(
    rows: NDArray[np.int64],
    order: NDArray[np.int64],
    places: NDArray[np.int64],
    offsets: NDArray[np.int64],
    cells: NDArray[np.int64],
    labels: NDArray[np.int64],
    batches: NDArray[np.int64],
) -> int:
    """Fill the rows of a window.

    Parameters
    ----------
    rows : array[n_rows, 6] of int64
        What to fill, as in `Window`.
    order : array[n_rows] of int64
        The order to put the rows into.
    places : array[n_pieces, 5] of int64
        As `_decode` returns them.
    offsets : array[n_rows + n_pieces] of int64
        Where each row's values begin, and at the end of each piece where they end.
    cells, labels, batches : array[n_rows] of int64
        Row numbers and codes.

    Returns
    -------
    int
        The first piece whose offsets decrease, or -1: rows are copied without further checks.
    """
    to = np.empty(len(order), np.int64)
    for i in range(len(order)):
        to[order[i]] = i
    i, at = 0, 0
    for piece in range(len(places)):
        n_rows, counts_at, indices_at, counts_size, indices_size = places[piece]
        first = offsets[at]
        for _ in range(n_rows):
            row = rows[to[i]]
            row[LENGTH] = offsets[at + 1] - offsets[at]
            if row[LENGTH] < 0:
                return piece
            row[COUNTS_AT] = counts_at + (offsets[at] - first) * counts_size
            row[INDICES_AT] = indices_at + (offsets[at] - first) * indices_size
            row[CELL], row[LABEL], row[BATCH] = cells[i], labels[i], batches[i]
            i += 1
            at += 1
        at += 1
    return -1


@dataclass(frozen=True)
class Minibatch:
    """One rank's cells of one global minibatch.

    Parameters
    ----------
    indptr : array[n_cells + 1] of int64
        CSR row offsets, starting at 0.
    indices, counts : array[nnz] of unsigned int
        Gene positions and counts, in the types they are stored in.
    labels : array[n_cells] of int32
        Label codes.
    batches : array[n_cells] of int32, optional
        Batch codes, None where the store has no batches.
    cells : array[n_cells] of int64
        Row numbers in the store.
    n_genes : int
        Number of columns.
    n_global : int
        Cells of the global minibatch, over all ranks.
    step : int
        Number of the minibatch in its epoch, from 0.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[Any]
    counts: NDArray[Any]
    labels: NDArray[np.int32]
    batches: NDArray[np.int32] | None
    cells: NDArray[np.int64]
    n_genes: int
    n_global: int
    step: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pick:
    """Some consecutive rows of a window.

    Parameters
    ----------
    window : Window
        Where to take them.
    rows : slice
        Which ones.
    """

    window: Window
    rows: slice


def gather(
    store: Store, picks: Sequence[Pick], room: ReusableBuffers, n_global: int, step: int
) -> Minibatch:
    """Copy rows out of windows.

    Parameters
    ----------
    store : Store
        Where the windows come from.
    picks : sequence of Pick
        Which rows to take, in the order of the result.
    room : ReusableBuffers
        Where to put the values; the result holds views of it.
    n_global, step : int
        As in `Minibatch`.

    Returns
    -------
    Minibatch
    """
    # A rank may have no cells of a last, short minibatch.
    parts = [pick.window.rows[pick.rows] for pick in picks] or [np.empty((0, 6), np.int64)]
    rows = np.concatenate(parts)
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows[:, LENGTH], out=indptr[1:])
    nnz = int(indptr[-1])
    room.reserve(nnz, nnz)
    counts, indices = room.counts[:nnz], room.indices[:nnz]
    copy_rows(rows, counts, indices)
    has_batches = store.registry.batch_key is not None
    return Minibatch(
        indptr=indptr,
        indices=indices,
        counts=counts,
        labels=rows[:, LABEL].astype(np.int32),
        batches=rows[:, BATCH].astype(np.int32) if has_batches else None,
        cells=rows[:, CELL].copy(),
        n_genes=store.n_genes,
        n_global=n_global,
        step=step,
    )


def _build_copy(typing_context: Any, to: Any, source: Any, n: Any) -> Any:
    """Copy `n` bytes between two addresses."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to, source, n = values
        pointer = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(
            builder, builder.inttoptr(to, pointer), builder.inttoptr(source, pointer), n, 1
        )
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), build


_copy: Any = intrinsic(_build_copy)


@compiled
def copy_rows(rows: NDArray[np.int64], counts: NDArray[Any], indices: NDArray[Any]) -> None:
    """Copy the counts and indices of some windows' rows, one row after the other.

    Whoever calls holds the windows, and with them the memory that the addresses lead to.
    """
    counts_to, indices_to = np.uint64(counts.ctypes.data), np.uint64(indices.ctypes.data)
    for i in range(len(rows)):
        n = np.uint64(rows[i, LENGTH] * counts.itemsize)
        _copy(counts_to, np.uint64(rows[i, COUNTS_AT]), n)
        counts_to += n
    for i in range(len(rows)):
        n = np.uint64(rows[i, LENGTH] * indices.itemsize)
        _copy(indices_to, np.uint64(rows[i, INDICES_AT]), n)
        indices_to += n
