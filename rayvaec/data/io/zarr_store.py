"""zarr store interface on top of the remote byte reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

    from rayvaec.data.io.byte_reader import ByteReader


class ByteReaderStore(Store):
    """Read-only files for zarr; they cannot be listed.

    Parameters
    ----------
    blobs : ByteReader
        The files.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, blobs: ByteReader) -> None:
        super().__init__(read_only=True)
        self._blobs = blobs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteReaderStore) and other._blobs is self._blobs

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return self._blobs.locate("")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file or a part of it, None where there is no such file."""
        content = await asyncio.to_thread(self._read, key, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Return parts of files, in order."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        return await asyncio.to_thread(self._blobs.size, key) is not None

    def _read(self, key: str, part: ByteRequest | None) -> bytes | None:
        if part is None:
            return self._blobs.whole(key)
        size = self._blobs.size(key)
        if size is None:
            return None
        start, stop = _bounds(part, size)
        out = np.empty(max(stop - start, 0), np.uint8)
        if len(out):
            self._blobs.read(key, start, out)
        return out.tobytes()

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse."""
        self._refuse()

    async def delete(self, key: str) -> None:
        """Refuse."""
        self._refuse()

    def list(self) -> AsyncIterator[str]:
        """Refuse."""
        self._refuse()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Refuse."""
        self._refuse()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Refuse."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError("remote files are read by name alone")


def _bounds(part: Any, size: int) -> tuple[int, int]:
    """Return first and one past the last byte of what zarr asks for."""
    if isinstance(part, RangeByteRequest):
        return part.start, min(part.end, size)
    if isinstance(part, OffsetByteRequest):
        return part.offset, size
    if isinstance(part, SuffixByteRequest):
        return max(size - part.suffix, 0), size
    raise TypeError(f"unknown byte range {part!r}")
