"""Store: partitions on disk or in object storage, as one sequence of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.arrays.sharded import Array1D, ZarrArray1D, open_array_1d
from rayvaec.data.io.byte_reader import ByteReader
from rayvaec.data.io.object_store import open_reader
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest, PartitionInfo, RowRange, ScanResult
from rayvaec.data.store.verify import check_text, verify_partitions
from rayvaec.errors import StoreError
from rayvaec.util.location import Location

SPLITS = ("train", "validation", "all")

Span = tuple[Array1D, int, int]
"""An array, and a range of its elements."""


@dataclass(frozen=True)
class Rows:
    """Consecutive cells of a store.

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
    """

    indptr: NDArray[np.int64]
    indices: NDArray[Any]
    counts: NDArray[Any]
    labels: NDArray[np.int32]
    batches: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.labels)


class Partition:
    """One member of a store, its arrays opened at first use.

    Parameters
    ----------
    blobs : ByteReader
        The store's files.
    info : PartitionInfo
        What the manifest says about it.
    registry : Registry
        The store's genes, labels and batches.
    """

    def __init__(self, blobs: ByteReader, info: PartitionInfo, registry: Registry) -> None:
        self._blobs, self._registry = blobs, registry
        self.info = info
        self._checksums = {f"{info.name}/{path}": found for path, found in info.files.items()}

    @cached_property
    def indptr(self) -> Array1D:
        """CSR row offsets, [n_cells + 1]."""
        return self._vector("X/indptr", self.info.n_cells + 1)

    @cached_property
    def indices(self) -> Array1D:
        """Gene positions, [nnz]."""
        return self._vector("X/indices", self.info.nnz)

    @cached_property
    def counts(self) -> Array1D:
        """Counts, [nnz]."""
        return self._vector("X/data", self.info.nnz)

    @cached_property
    def labels(self) -> Array1D:
        """Label codes, [n_cells]."""
        return self._vector(f"obs/{self._registry.labels_key}/codes", self.info.n_cells)

    @cached_property
    def batches(self) -> Array1D | None:
        """Batch codes, [n_cells]; None where the store has no batches."""
        if self._registry.batch_key is None:
            return None
        return self._vector(f"obs/{self._registry.batch_key}/codes", self.info.n_cells)

    def annotation_spans(self, start: int, stop: int) -> list[Span]:
        """Return what is read of a range of cells first: offsets and codes."""
        spans: list[Span] = [(self.indptr, start, stop + 1), (self.labels, start, stop)]
        if self.batches is not None:
            spans.append((self.batches, start, stop))
        return spans

    def value_spans(self, begin: int, end: int) -> list[Span]:
        """Return what is read of a range of stored values."""
        return [(self.counts, begin, end), (self.indices, begin, end)]

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of a range of cells."""
        path = f"{self.info.name}/obs/_index"
        key = f"{path}/zarr.json"
        check_text(self._blobs, key, self._blobs.text(key) or "", self._checksums)
        vector = ZarrArray1D(self._blobs, path)
        return [str(name) for name in vector.read(start, stop)]

    def _vector(self, path: str, n: int) -> Array1D:
        path = f"{self.info.name}/{path}"
        vector = open_array_1d(self._blobs, path, self._checksums)
        if len(vector) != n:
            raise StoreError(
                f"the array {self._blobs.locate(path)} has {len(vector)} elements and the "
                f"manifest speaks of {n}",
                "copy the store again",
            )
        return vector


class Store:
    """A finished store; `rayvaec.data.store.open.open_store` opens one.

    Parameters
    ----------
    path : Path or Url
        Where it lies.
    manifest : Manifest
        What it holds.
    blobs : ByteReader, optional
        Its files, where they are open already.
    """

    findings: ScanResult | None = None
    """Of an external store, what its survey found."""

    def __init__(self, path: Location, manifest: Manifest, blobs: ByteReader | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._blobs = blobs or open_reader(path)
        self.partitions = self._open_partitions()
        self._segments = self._order()
        cells = [segment.stop - segment.start for segment in self._segments]
        self._starts = np.concatenate([[0], np.cumsum(cells)]).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens its own files.
        return type(self), (self.path, self.manifest)

    def _open_partitions(self) -> list[Partition]:
        registry = self.manifest.registry
        return [Partition(self._blobs, info, registry) for info in self.manifest.partitions]

    def _order(self) -> tuple[RowRange, ...]:
        """Return what the rows are, in order."""
        return self.manifest.segments()

    def as_stored(self) -> Store:
        """Return the store with its rows in the order in which they lie."""
        return self

    def places_of(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows of `as_stored` stand among this store's rows."""
        return stored

    @property
    def registry(self) -> Registry:
        """Genes, labels and batches."""
        return self.manifest.registry

    @property
    def n_cells(self) -> int:
        """Number of cells, both splits together."""
        return self.manifest.n_cells

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.manifest.registry.n_genes

    @property
    def n_train(self) -> int:
        """Number of training cells; they come first."""
        return self.manifest.n_train

    @property
    def is_shuffled(self) -> bool:
        """Whether rows are in random order, so that the first of a split stand for all of it."""
        return len(self.manifest.portions) <= 1

    @cached_property
    def hash(self) -> str:
        """Identity of the contents; see `Manifest.hash`."""
        return self.manifest.hash()

    @property
    def has_unique_names(self) -> bool:
        """Whether every cell is known to have a name of its own."""
        return True

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine, or look as if they were."""
        return self._blobs.is_local

    def rows(self, split: str) -> range:
        """Return the rows of a split.

        Parameters
        ----------
        split : {"train", "validation", "all"}
            Which one.

        Returns
        -------
        range

        Raises
        ------
        StoreError
            If there is no such split.
        """
        if split not in SPLITS:
            raise StoreError(f"there is no split {split!r}", f"choose one of {', '.join(SPLITS)}")
        start = self.n_train if split == "validation" else 0
        return range(start, self.n_train if split == "train" else self.n_cells)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Partition, int, int]]:
        """Yield the partitions behind a range of rows, each with the range inside it."""
        if not 0 <= start <= stop <= self.n_cells:
            raise StoreError(
                f"rows {start} to {stop} are not in the store {self.path}",
                f"it has {self.n_cells} rows",
            )
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for segment, begin in zip(
            self._segments[first:], self._starts[first:].tolist(), strict=False
        ):
            if begin >= stop:
                return
            shift = segment.start - begin
            begin, end = max(start, begin) + shift, min(stop + shift, segment.stop)
            if begin < end:
                yield self.partitions[segment.partition], begin, end

    def read(self, start: int, stop: int) -> Rows:
        """Read consecutive cells.

        Parameters
        ----------
        start, stop : int
            Rows, ``0 <= start <= stop <= n_cells``.

        Returns
        -------
        Rows

        Raises
        ------
        StoreError
            If a file is missing, cut short or damaged (it is named), or there are no such rows.
        """
        return self.read_runs([range(start, stop)])

    def read_runs(self, runs: Iterable[range]) -> Rows:
        """Read the cells of several ranges, one after the other; errors as in `read`.

        Parameters
        ----------
        runs : iterable of range
            Consecutive rows each.

        Returns
        -------
        Rows
        """
        pieces = [piece for run in runs for piece in self.pieces(run.start, run.stop)]
        parts = self._read(pieces or [(self.partitions[0], 0, 0)])
        if len(parts) == 1:
            return parts[0]
        offsets = np.cumsum([0] + [part.indptr[-1] for part in parts])
        tails = [part.indptr[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        batches = [part.batches for part in parts if part.batches is not None]
        return Rows(
            indptr=np.concatenate([np.zeros(1, np.int64), *tails]),
            indices=np.concatenate([part.indices for part in parts]),
            counts=np.concatenate([part.counts for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            batches=np.concatenate(batches) if batches else None,
        )

    def obs_names(self, start: int, stop: int) -> list[str]:
        """Return the names of consecutive cells; parameters and errors as in `read`."""
        return [
            name
            for partition, begin, end in self.pieces(start, stop)
            for name in partition.names(begin, end)
        ]

    def fetch(self, spans: Iterable[Span]) -> None:
        """Read what many spans consist of at once, where that is faster than one by one.

        The calling thread's reads find it in memory until it fetches again.

        Parameters
        ----------
        spans : iterable of (Array1D, int, int)
            Arrays of this store's partitions, each with a range; not looked at where reading is
            fast anyway.

        Raises
        ------
        StoreError
            If a file is missing, cut short or damaged; the message names it.
        """
        if not self._blobs.is_local:
            self._blobs.fetch(part for vector, *span in spans for part in vector.files(*span))

    def _read(self, pieces: Sequence[tuple[Partition, int, int]]) -> list[Rows]:
        """Read ranges of partitions; far away, in two requests for all of them."""
        self.fetch(
            span for part, start, stop in pieces for span in part.annotation_spans(start, stop)
        )
        heads = []
        for part, start, stop in pieces:
            batches = part.batches
            heads.append(
                (
                    part.indptr.read(start, stop + 1),
                    part.labels.read(start, stop).astype(np.int32),
                    None if batches is None else batches.read(start, stop).astype(np.int32),
                )
            )
        ranges = [
            (part, int(at[0]), int(at[-1]))
            for (part, *_), (at, *_) in zip(pieces, heads, strict=True)
        ]
        self.fetch(span for part, begin, end in ranges for span in part.value_spans(begin, end))
        return [
            Rows(
                indptr=offsets - begin,
                indices=part.indices.read(begin, end),
                counts=part.counts.read(begin, end),
                labels=labels,
                batches=batches,
            )
            for (part, begin, end), (offsets, labels, batches) in zip(ranges, heads, strict=True)
        ]

    def verify(self) -> None:
        """Compare every file of every partition with its checksum.

        Raises
        ------
        StoreError
            If a file is missing or has other bytes; the message names it.
        """
        verify_partitions(self._blobs, self.manifest.partitions)
