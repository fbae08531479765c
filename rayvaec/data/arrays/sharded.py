"""Direct reader of sharded one-dimensional Zarr v3 arrays.

zarr-python reads a run of a thousand rows through some hundred coroutines; training asks for
thousands of such runs a second. For the arrays that a store consists of, this module reads past
that pipeline: the index of every shard is kept in memory, the chunks of a run are read with one
positioned read and decoded straight into the caller's buffer. Whatever it does not understand
(other codecs, other dimensions, other types) is left to zarr itself, behind the same interface.

Positioned reads and not a memory map: a shard that shrinks or a network file system that fails
must end in an error that names the file, where a map would kill the process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from rayvaec.data.arrays.decode import ChunkRun, checked, decode_chunks, read_chunks
from rayvaec.data.arrays.delta import undo_delta, without_delta_warning
from rayvaec.data.arrays.metadata import ArrayMetadata
from rayvaec.data.io.byte_reader import ByteRange, ByteReader, LocalByteReader
from rayvaec.data.store.verify import check_text
from rayvaec.errors import StoreError


def read_together(reads: Sequence[tuple[Array1D, int, int, NDArray[Any]]]) -> list[int]:
    """Read ranges of arrays into buffers, with one call without the GIL where that is possible.

    Parameters
    ----------
    reads : sequence of (Array1D, int, int, array)
        The arguments of `Array1D.read_into`.

    Returns
    -------
    list of int
        What `Array1D.read_into` returns for each; errors as there.
    """
    runs: list[ChunkRun] = []
    finish: list[Callable[[int, int, NDArray[Any]], int]] = []
    for vector, start, stop, out in reads:
        found = vector.runs(start, stop, out) if isinstance(vector, ShardedArray1D) else None
        if isinstance(vector, ShardedArray1D) and found is not None:
            runs += found
            finish.append(vector.finish)
        else:
            finish.append(vector.read_into)
    if runs and not read_runs(runs):
        # Whatever it is, one by one the files are named.
        finish = [vector.read_into for vector, *_ in reads]
    return [then(*read[1:]) for then, read in zip(finish, reads, strict=True)]


def read_ranges(ranges: Sequence[tuple[Array1D, int, int]]) -> list[NDArray[Any]]:
    """Read ranges of arrays as new arrays, as `read_together`; errors as in `Array1D.read_into`."""
    reads = [(*of, np.empty(of[0].span(*of[1:]), of[0].dtype)) for of in ranges]
    return [
        out[at : at + stop - start]
        for at, (_, start, stop, out) in zip(read_together(reads), reads, strict=True)
    ]


SCRATCH_BYTES = 4 * 2**20
_per_thread = threading.local()

_ABSENT = 2**64 - 1


class Array1D(Protocol):
    """A 1-d array on disk."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element."""

    def __len__(self) -> int: ...

    def span(self, start: int, stop: int) -> int:
        """Return how many elements of room `read_into` needs for this range."""

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Read a range, and whatever lies in the same chunks, into a buffer.

        Parameters
        ----------
        start, stop : int
            The range; ``0 <= start <= stop <= len(self)``.
        out : array[at least span(start, stop)]
            Contiguous buffer of this array's dtype.

        Returns
        -------
        int
            Position in `out` of the element `start`.

        Raises
        ------
        StoreError
            If a file is missing, cut short or damaged; the message names it.
        """

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range as a new array; errors as in `read_into`."""

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return the parts of files that `read_into` will read, as far as they are known."""


def _scratch(n: int) -> NDArray[np.uint8]:
    """Return room for `n` bytes, valid until this thread's next call.

    Fresh memory for every run would cost a third of the time that decoding it takes: the system
    hands it out page by page, and takes it back after every run.
    """
    if n > SCRATCH_BYTES:
        return np.empty(n, np.uint8)
    if not hasattr(_per_thread, "scratch"):
        _per_thread.scratch = np.empty(SCRATCH_BYTES, np.uint8)
    return _per_thread.scratch[:n]


class ShardedArray1D:
    """A sharded array, read past zarr's pipeline.

    Parameters
    ----------
    blobs : ByteReader
        Where the files are.
    path : str
        The array's path in `blobs`.
    layout : ArrayMetadata
        What its metadata says.
    required : collection of str, optional
        Paths of files that must exist; any other shard that is missing is all fill value, as
        zarr's specification has it.
    """

    def __init__(
        self, blobs: ByteReader, path: str, layout: ArrayMetadata, required: Collection[str] = ()
    ) -> None:
        self._blobs, self._path, self._layout, self._required = blobs, path, layout, required
        self._chunk_bytes = layout.chunk * layout.dtype.itemsize
        self._chunks_per_shard = layout.shard // layout.chunk
        self._indexes: dict[int, NDArray[np.uint64]] = {}
        self._with_gaps: set[int] = set()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element."""
        return self._layout.dtype

    def __len__(self) -> int:
        return self._layout.n

    def span(self, start: int, stop: int) -> int:
        """Return how many elements of room `read_into` needs for this range."""
        chunk = self._layout.chunk
        return (-(-stop // chunk) - start // chunk) * chunk if stop > start else 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range as a new array; errors as in `read_into`."""
        out = np.empty(self.span(start, stop), self.dtype)
        at = self.read_into(start, stop, out)
        return out[at : at + stop - start]

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Read whole chunks into a buffer; see `Array1D.read_into`."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"elements {start} to {stop} of {len(self)} in {self._path}")
        if start == stop:
            return 0
        chunk = self._layout.chunk
        first, last = start // chunk, -(-stop // chunk)
        runs = self.runs(start, stop, out)
        if runs and read_runs(runs):
            return self.finish(start, stop, out)
        at, chunks = first, self._chunks_per_shard
        while at < last:
            end = min(last, (at // chunks + 1) * chunks)
            to = (at - first) * chunk
            self._read_chunks(at // chunks, at % chunks, end - at, out[to:])
            at = end
        return start - first * chunk

    def runs(self, start: int, stop: int, out: NDArray[Any]) -> list[ChunkRun] | None:
        """Return what `read_into` does as runs of chunks, None where it is more than that."""
        in_range = 0 <= start < stop <= len(self) and len(out) >= self.span(start, stop)
        if not (in_range and self._layout.blosc and isinstance(self._blobs, LocalByteReader)):
            return None
        chunk, chunks = self._layout.chunk, self._chunks_per_shard
        at, last, room, found = start // chunk, -(-stop // chunk), out.view(np.uint8), []
        while at < last:
            shard, first = divmod(at, chunks)
            places = self._index(shard)[first : first + last - at].view(np.int64)
            if shard in self._with_gaps:
                return None
            try:
                file = self._blobs.file(self._key(shard))
            except OSError:
                return None
            found.append(ChunkRun(file, places, room, self._chunk_bytes, self._layout.crc))
            at += len(places)
            room = room[len(places) * self._chunk_bytes :]
        return found

    def finish(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Return what `read_into` returns, once its runs of chunks are in the buffer."""
        if self._layout.delta:
            undo_delta(out[: self.span(start, stop)], self._layout.chunk)
        return start % self._layout.chunk

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return the parts of files that `read_into` will read."""
        chunk, found = self._layout.chunk, []
        first, last = start // chunk, -(-stop // chunk) if stop > start else start // chunk
        while first < last:
            shard, at = divmod(first, self._chunks_per_shard)
            n = min(last - first, self._chunks_per_shard - at)
            places = self._index(shard)[at : at + n]
            places = places[places[:, 0] != _ABSENT]
            found += [
                (self._key(shard), begin, begin + length) for begin, length in places.tolist()
            ]
            first += n
        return _joined(found)

    def _read_chunks(self, shard: int, first: int, n: int, out: NDArray[Any]) -> None:
        """Decode `n` chunks of one shard to the start of `out`, neighbours with one read."""
        places = self._index(shard)[first : first + n]
        begins, ends = places[:, 0].tolist(), places.sum(axis=1).tolist()
        chunk, i = self._layout.chunk, 0
        while i < n:
            if begins[i] == _ABSENT:
                out[i * chunk : (i + 1) * chunk] = self._layout.fill_value
                i += 1
                continue
            j = i + 1
            while j < n and begins[j] == ends[j - 1]:
                j += 1
            run = _scratch(ends[j - 1] - begins[i])
            to = out[i * chunk : j * chunk]
            self._blobs.read(self._key(shard), begins[i], run)
            bad = self._decode(run, places[i:j], to)
            if bad >= 0:
                chunk_number = first + i + bad
                raise self._damaged(shard, f"chunk {chunk_number} does not match its checksum")
            if self._layout.delta:
                undo_delta(to, chunk)
            i = j

    def _decode(self, run: NDArray[np.uint8], places: NDArray[np.uint64], out: NDArray[Any]) -> int:
        """Decode neighbouring chunks; return the first that is damaged, or -1."""
        crc, size = self._layout.crc, self._chunk_bytes
        if self._layout.blosc:
            return decode_chunks(run, places.view(np.int64), out.view(np.uint8), size, crc)
        first = int(places[0, 0])
        for k, (begin, length) in enumerate(places.tolist()):
            stored = run[begin - first : begin - first + length]
            chunk = checked(stored) if crc else stored
            if chunk is None or len(chunk) != size:
                return k
            out[k * self._layout.chunk : (k + 1) * self._layout.chunk].view(np.uint8)[:] = chunk
        return -1

    def _index(self, shard: int) -> NDArray[np.uint64]:
        """Return offset and length of every chunk of a shard, [n_chunks, 2]."""
        index = self._indexes.get(shard)
        if index is None:
            index = self._read_index(shard)
            if (index[:, 0] == _ABSENT).any():
                self._with_gaps.add(shard)
            self._indexes[shard] = index
        return index

    def _read_index(self, shard: int) -> NDArray[np.uint64]:
        key, n = self._key(shard), self._chunks_per_shard
        size = self._blobs.size(key)
        if size is None:
            if key in self._required:
                raise StoreError(
                    f"the file {self._blobs.locate(key)} is missing",
                    "copy the store again: its manifest lists this file",
                )
            return np.full((n, 2), _ABSENT, np.uint64)
        if size < 16 * n + 4:
            raise self._damaged(shard, f"{size} bytes are too few for its index")
        at = size - (16 * n + 4) if self._layout.index_at_end else 0
        encoded = np.empty(16 * n + 4, np.uint8)
        self._blobs.read(key, at, encoded)
        if google_crc32c.value(encoded[:-4]) != int.from_bytes(encoded[-4:], "little"):
            raise self._damaged(shard, "its index does not match its checksum")
        places = encoded[:-4].view("<u8").reshape(n, 2)
        written = places[places[:, 0] != _ABSENT]
        if written.size and max(written.max(), written.sum(axis=1).max()) > size:
            raise self._damaged(shard, "its index points past its end")
        return places

    def _key(self, shard: int) -> str:
        return f"{self._path}/c{self._layout.separator}{shard}"

    def _damaged(self, shard: int, how: str) -> StoreError:
        return StoreError(
            f"the file {self._blobs.locate(self._key(shard))} is damaged or cut short ({how})",
            "copy it again, or write the store again with `rayvaec prepare ... --overwrite`",
        )


def read_runs(runs: Sequence[ChunkRun]) -> bool:
    """Read and decode runs of chunks in one call; return whether that went well."""
    return read_chunks(runs, _scratch(SCRATCH_BYTES))


def _joined(ranges: list[ByteRange]) -> list[ByteRange]:
    """Join neighbours, as `ShardedArray1D` reads them."""
    joined: list[ByteRange] = []
    for key, start, stop in ranges:
        if joined and joined[-1][0] == key and joined[-1][2] == start:
            start = joined.pop()[1]
        joined.append((key, start, stop))
    return joined


class ZarrArray1D:
    """Any 1-d array, read by zarr itself.

    Parameters
    ----------
    blobs : ByteReader
        Where the files are.
    path : str
        The array's path in `blobs`.
    """

    def __init__(self, blobs: ByteReader, path: str) -> None:
        self._where = blobs.locate(path)
        try:
            with without_delta_warning():
                self._array = blobs.zarr_array(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(error) from error

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element, in native byte order."""
        stored = np.dtype(self._array.dtype)
        return stored if stored.isnative else stored.newbyteorder("=")

    def __len__(self) -> int:
        return self._array.shape[0]

    def span(self, start: int, stop: int) -> int:
        """Return how many elements of room `read_into` needs for this range."""
        return stop - start

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range as a new array; errors as in `read_into`."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"elements {start} to {stop} of {len(self)} in {self._where}")
        try:
            return np.asarray(self._array[start:stop], self.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(error) from error

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return nothing: zarr reads on its own."""
        return []

    def _unreadable(self, error: Exception) -> StoreError:
        return StoreError(
            f"the array {self._where} cannot be read ({error})", "copy the store again"
        )

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Read a range into a buffer; see `Array1D.read_into`."""
        out[: stop - start] = self.read(start, stop)
        return 0


def open_array_1d(
    blobs: ByteReader, path: str, checksums: Mapping[str, str] = MappingProxyType({})
) -> Array1D:
    """Open a 1-d array, with the direct reader where it understands the array.

    Parameters
    ----------
    blobs : ByteReader
        Where the files are.
    path : str
        The array's path in `blobs`.
    checksums : mapping of str to str, optional
        Checksums of files that must exist, by path; the metadata is held to its own at once.

    Returns
    -------
    Array1D

    Raises
    ------
    StoreError
        If there is no such array, or its metadata is damaged.
    """
    key = f"{path}/zarr.json"
    text = blobs.text(key)
    if text is None:
        if blobs.text(f"{path}/.zarray") is not None:  # Zarr v2
            return ZarrArray1D(blobs, path)
        raise StoreError(f"the file {blobs.locate(key)} is missing", "copy the store again")
    check_text(blobs, key, text, checksums)
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"the file {blobs.locate(key)} is damaged ({error})", "copy the store again"
        ) from error
    layout = ArrayMetadata.parse(metadata)
    if layout is None:
        return ZarrArray1D(blobs, path)
    return ShardedArray1D(blobs, path, layout, checksums)
