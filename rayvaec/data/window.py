"""Runs of rows decoded into memory, and minibatches gathered from them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.compiled import compiled
from rayvaec.data.shards import Vector
from rayvaec.data.store import Partition, Store


class Buffers:
    """Room for stored values that is used again and again.

    Fresh memory costs as much as decoding into it: the system hands it out page by page. These
    buffers start at 4 MiB, from where on numpy asks for huge pages; untouched, they cost nothing.

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
        # A view holds a reference to the array whose memory it shows; a tensor holds the view.
        return sys.getrefcount(self.counts) + sys.getrefcount(self.indices)


def _room(n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An eighth more than asked: sizes differ a little, and growing means new memory.
    return np.empty(max(n + n // 8, 2**22 // dtype.itemsize), dtype)


@dataclass(frozen=True)
class _Piece:
    """Rows of one partition: where they are and where their values begin."""

    partition: Partition
    start: int
    stop: int
    offsets: NDArray[np.int64]

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
    buffers : Buffers
        Where the values are.
    counts_at, indices_at : array[n_rows] of uint64
        Where each row's values begin in the buffers.
    lengths : array[n_rows] of uint64
        How many values each row has.
    labels : array[n_rows] of int32
        Label codes.
    batches : array[n_rows] of int32, optional
        Batch codes.
    cells : array[n_rows] of int64
        Row numbers in the store.
    """

    begin: int
    end: int
    buffers: Buffers
    counts_at: NDArray[np.uint64]
    indices_at: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    labels: NDArray[np.int32]
    batches: NDArray[np.int32] | None
    cells: NDArray[np.int64]


def load_window(
    store: Store,
    runs: Sequence[tuple[int, int]],
    buffers: Buffers,
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
    buffers : Buffers
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
    pieces = [
        _Piece(partition, start, stop, partition.indptr.read(start, stop + 1))
        for partition, start, stop in places
    ]
    labels = _codes([p.partition.labels.read(p.start, p.stop) for p in pieces])
    batches = _batches(pieces)
    store.fetch(span for p in pieces for span in p.partition.value_spans(*p.values))
    buffers.reserve(
        sum(piece.partition.counts.span(*piece.values) for piece in pieces),
        sum(piece.partition.indices.span(*piece.values) for piece in pieces),
    )
    counts_at = _decode([(p.partition.counts, p) for p in pieces], buffers.counts)
    indices_at = _decode([(p.partition.indices, p) for p in pieces], buffers.indices)
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return Window(
        *line,
        buffers=buffers,
        counts_at=counts_at[order].view(np.uint64),
        indices_at=indices_at[order].view(np.uint64),
        lengths=lengths[order].view(np.uint64),
        labels=labels[order],
        batches=None if batches is None else batches[order],
        cells=np.concatenate([np.arange(*run) for run in runs])[order],
    )


def _decode(parts: Sequence[tuple[Vector, _Piece]], out: NDArray[Any]) -> NDArray[np.int64]:
    """Decode the values of pieces one after the other; return where each row begins in `out`."""
    rows, end = [], 0
    for vector, piece in parts:
        at = vector.read_into(*piece.values, out[end:])
        rows.append(piece.offsets[:-1] + (end + at - piece.offsets[0]))
        end += vector.span(*piece.values)
    return np.concatenate(rows)


def _codes(parts: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate(parts).astype(np.int32)


def _batches(pieces: Sequence[_Piece]) -> NDArray[np.int32] | None:
    vectors = [piece.partition.batches for piece in pieces]
    parts = [v.read(p.start, p.stop) for v, p in zip(vectors, pieces, strict=True) if v is not None]
    return _codes(parts) if parts else None


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
    store: Store, picks: Sequence[Pick], room: Buffers, n_global: int, step: int
) -> Minibatch:
    """Copy rows out of windows.

    Parameters
    ----------
    store : Store
        Where the windows come from.
    picks : sequence of Pick
        Which rows to take, in the order of the result.
    room : Buffers
        Where to put the values; the result holds views of it.
    n_global, step : int
        As in `Minibatch`.

    Returns
    -------
    Minibatch
    """
    lengths = [pick.window.lengths[pick.rows] for pick in picks]
    indptr = np.zeros(sum(map(len, lengths)) + 1, np.int64)
    np.cumsum(_joined(lengths, np.uint64), out=indptr[1:].view(np.uint64))
    nnz = int(indptr[-1])
    room.reserve(nnz, nnz)
    counts, indices = room.counts[:nnz], room.indices[:nnz]
    to, at = indptr.view(np.uint64), 0
    for pick, row_lengths in zip(picks, lengths, strict=True):
        window, rows = pick.window, pick.rows
        n = len(row_lengths)
        copy_rows(
            *(to[at : at + n], row_lengths),
            *(window.counts_at[rows], window.buffers.counts, counts),
            *(window.indices_at[rows], window.buffers.indices, indices),
        )
        at += n
    return Minibatch(
        indptr=indptr,
        indices=indices,
        counts=counts,
        labels=_joined([pick.window.labels[pick.rows] for pick in picks], np.int32),
        batches=None
        if store.registry.batch_key is None
        else _joined(
            [p.window.batches[p.rows] for p in picks if p.window.batches is not None], np.int32
        ),
        cells=_joined([pick.window.cells[pick.rows] for pick in picks], np.int64),
        n_genes=store.n_genes,
        n_global=n_global,
        step=step,
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    # A rank may have no cells of a last, short minibatch.
    return np.concatenate(parts) if parts else np.empty(0, dtype)


@compiled
def copy_rows(
    to: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    counts_at: NDArray[np.uint64],
    counts: NDArray[Any],
    out_counts: NDArray[Any],
    indices_at: NDArray[np.uint64],
    indices: NDArray[Any],
    out_indices: NDArray[Any],
) -> None:
    """Copy row i, ``lengths[i]`` counts and indices, to ``to[i]`` of the outputs.

    All positions are unsigned: signed ones may wrap around, and the checks for that keep the
    copying loops from becoming vector instructions.
    """
    for i in range(len(to)):
        at, begin = to[i], counts_at[i]
        for k in range(lengths[i]):
            out_counts[at + k] = counts[begin + k]
        begin = indices_at[i]
        for k in range(lengths[i]):
            out_indices[at + k] = indices[begin + k]
