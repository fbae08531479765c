"""Spill files of the external shuffle: one per partition, read back in shuffled order.

A scratch file is a sequence of segments. A segment holds some cells in order of their position:
a header (cells, stored values, bytes of names), position, number of values, label, batch and
length of name of each cell, the names, the indices, the counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.prepare.partitions import CountsDtypes, PartitionCells
from rayvaec.util.atomic import remove

CELL = np.dtype(
    [("position", "<i8"), ("nnz", "<i4"), ("label", "<i4"), ("batch", "<i4"), ("name", "<i4")]
)


@dataclass(frozen=True)
class _Block:
    """Cells in order of their position, waiting to be written."""

    cells: NDArray[Any]  # of CELL
    offsets: NDArray[np.int64]  # of the values of each cell
    name_offsets: NDArray[np.int64]
    names: bytes
    indices: NDArray[Any]
    counts: NDArray[Any]

    def write(self, file: IO[bytes], start: int, stop: int) -> None:
        """Append the cells from `start` to `stop` to a file as one segment."""
        values = slice(int(self.offsets[start]), int(self.offsets[stop]))
        names = self.names[int(self.name_offsets[start]) : int(self.name_offsets[stop])]
        header = [stop - start, values.stop - values.start, len(names)]
        file.write(np.array(header, "<i8").tobytes())
        file.write(self.cells[start:stop].tobytes())
        file.write(names)
        file.write(self.indices[values].tobytes())
        file.write(self.counts[values].tobytes())


class Scatter:
    """Deals cells to scratch files, with few and large writes.

    Parameters
    ----------
    folder : Path
        Where the files go; partition k's is ``<k>``.
    bounds : array[n_partitions + 1] of int64
        Partition k takes the positions from ``bounds[k]`` to ``bounds[k + 1]``.
    dtypes : CountsDtypes
        Types to hold indices and counts in.
    buffer_elements : int
        How many stored values may wait in memory.
    sizes : sequence of int, optional
        What `sync` returned to a process that was interrupted; whatever came to the files since
        is cut off. By default there is nothing yet.
    """

    def __init__(
        self,
        folder: Path,
        bounds: NDArray[np.int64],
        dtypes: CountsDtypes,
        buffer_elements: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        if sizes is None:
            remove(folder)
            folder.mkdir(parents=True)
        for partition, size in enumerate(sizes or ()):
            os.truncate(folder / str(partition), size)
        self._folder, self._bounds, self._dtypes = folder, bounds, dtypes
        self._buffer_elements = buffer_elements
        self._blocks: list[_Block] = []
        self._waiting = 0

    def add(
        self,
        positions: NDArray[np.int64],
        x: sparse.csr_array,
        labels: NDArray[Any],
        batches: NDArray[Any] | None,
        names: Sequence[str],
    ) -> None:
        """Deal some cells.

        Parameters
        ----------
        positions : array[n_cells] of int64
            Row of each cell in the store.
        x : csr_array[n_cells, n_genes]
            Their counts.
        labels, batches : array[n_cells] of int
            Their codes.
        names : sequence of str
            Their names.
        """
        order = np.argsort(positions, kind="stable")
        encoded = [names[row].encode() for row in order]
        cells = np.zeros(len(order), CELL)
        cells["position"] = positions[order]
        cells["nnz"] = np.diff(x.indptr)[order]
        cells["label"] = labels[order]
        if batches is not None:
            cells["batch"] = batches[order]
        cells["name"] = [len(name) for name in encoded]
        source = runs(x.indptr[:-1][order], cells["nnz"])
        self._blocks.append(
            _Block(
                cells=cells,
                offsets=offsets(cells["nnz"]),
                name_offsets=offsets(cells["name"]),
                names=b"".join(encoded),
                indices=x.indices.astype(self._dtypes.indices)[source],
                counts=x.data.astype(self._dtypes.counts)[source],
            )
        )
        self._waiting += x.nnz
        if self._waiting >= self._buffer_elements:
            self.flush()

    def flush(self) -> None:
        """Write what waits; to be called once more at the end."""
        cuts = [np.searchsorted(block.cells["position"], self._bounds) for block in self._blocks]
        for partition in range(len(self._bounds) - 1):
            with (self._folder / str(partition)).open("ab") as file:
                for block, cut in zip(self._blocks, cuts, strict=True):
                    if cut[partition] < cut[partition + 1]:
                        block.write(file, int(cut[partition]), int(cut[partition + 1]))
        self._blocks.clear()
        self._waiting = 0

    def sync(self) -> list[int]:
        """Write what waits, durably; return the size of every file."""
        self.flush()
        sizes = []
        for partition in range(len(self._bounds) - 1):
            with (self._folder / str(partition)).open("ab") as file:
                os.fsync(file.fileno())
                sizes.append(file.tell())
        return sizes


def gather(path: Path, dtypes: CountsDtypes, has_batches: bool) -> PartitionCells:
    """Read a scratch file and put its cells in order.

    Values are copied to their place segment by segment, so that memory holds the partition and
    one segment.

    Parameters
    ----------
    path : Path
        A file of `Scatter`.
    dtypes : CountsDtypes
        As given to `Scatter`.
    has_batches : bool
        Whether the cells have batches.

    Returns
    -------
    PartitionCells
    """
    segments = list(_segments(path, dtypes))
    cells = np.concatenate([segment.cells for segment in segments])
    names = [name for segment in segments for name in segment.names]
    order = np.argsort(cells["position"], kind="stable")
    indptr = offsets(cells["nnz"][order])
    starts = np.empty(len(order), np.int64)
    starts[order] = indptr[:-1]
    indices = np.empty(indptr[-1], dtypes.indices)
    counts = np.empty(indptr[-1], dtypes.counts)
    done = 0
    for segment in segments:
        n = len(segment.cells)
        target = runs(starts[done : done + n], segment.cells["nnz"])
        indices[target] = segment.read(path, dtypes.indices, segment.indices_at, len(target))
        counts[target] = segment.read(path, dtypes.counts, segment.counts_at, len(target))
        done += n
    cells = cells[order]
    return PartitionCells(
        indptr=indptr,
        indices=indices,
        counts=counts,
        names=[names[row] for row in order],
        labels=cells["label"].copy(),
        batches=cells["batch"].copy() if has_batches else None,
    )


@dataclass(frozen=True)
class _Segment:
    """What is in memory of a segment, and where in the file the rest is."""

    cells: NDArray[Any]  # of CELL
    names: list[str]
    indices_at: int
    counts_at: int

    def read(self, path: Path, dtype: Any, at: int, n: int) -> NDArray[Any]:
        """Read values of the file from a byte on."""
        return np.fromfile(path, dtype, count=n, offset=at)


def _segments(path: Path, dtypes: CountsDtypes) -> Iterator[_Segment]:
    """Read all of a file but its indices and counts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            n, nnz, name_bytes = (int(value) for value in np.frombuffer(file.read(24), "<i8"))
            cells = np.frombuffer(file.read(n * CELL.itemsize), CELL)
            text, ends = file.read(name_bytes), offsets(cells["name"]).tolist()
            names = [text[a:b].decode() for a, b in pairwise(ends)]
            indices_at = file.tell()
            counts_at = indices_at + nnz * dtypes.indices.itemsize
            yield _Segment(cells, names, indices_at, counts_at)
            file.seek(counts_at + nnz * dtypes.counts.itemsize)


def offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Return where runs of these lengths, laid end to end, start; and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def runs(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Return the positions of runs, one after the other: ``start, start + 1, ...`` of each."""
    ends = offsets(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
