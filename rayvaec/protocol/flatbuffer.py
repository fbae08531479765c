"""Minimal flatbuffers reader for the buffer sizes in Arrow IPC messages."""

from __future__ import annotations

import struct
from collections.abc import Iterator


class FlatTable:
    """A flatbuffer table: fields are found through an offset table in front of it.

    Parameters
    ----------
    data : memoryview
        The flatbuffer.
    position : int, optional
        Where the table begins; by default that of the root.

    Raises
    ------
    struct.error
        If the table, or a field asked for, lies outside `data`.
    """

    def __init__(self, data: memoryview, position: int | None = None) -> None:
        if position is None:
            position = struct.unpack_from("<I", data, 0)[0]
        self._data, self._position = data, position
        self._offsets = position - struct.unpack_from("<i", data, position)[0]
        self._size = struct.unpack_from("<H", data, self._offsets)[0]

    def at(self, field: int) -> int | None:
        """Return the position of a field's value, None where the field is absent."""
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return None
        offset = struct.unpack_from("<H", self._data, self._offsets + entry)[0]
        return self._position + offset if offset else None

    def pointed(self, field: int) -> int | None:
        """Return the position that a field points to, None where the field is absent."""
        position = self.at(field)
        if position is None:
            return None
        return position + struct.unpack_from("<I", self._data, position)[0]

    def number(self, field: int, form: str) -> int:
        """Return a number of the `struct` format `form`, 0 where the field is absent."""
        position = self.at(field)
        return 0 if position is None else struct.unpack_from(form, self._data, position)[0]

    def length(self, field: int) -> int:
        """Return the number of entries of a vector or string, 0 where the field is absent."""
        position = self.pointed(field)
        return 0 if position is None else struct.unpack_from("<I", self._data, position)[0]

    def table(self, field: int) -> FlatTable | None:
        """Return the table that a field points to, None where the field is absent."""
        position = self.pointed(field)
        return None if position is None else FlatTable(self._data, position)

    def tables(self, field: int) -> Iterator[FlatTable]:
        """Yield the tables of a vector; several entries may point to the same table."""
        start = self.pointed(field)
        if start is None:
            return
        for entry in range(start + 4, start + 4 + 4 * self.length(field), 4):
            offset = struct.unpack_from("<I", self._data, entry)[0]
            yield FlatTable(self._data, entry + offset)

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yield the entries of a vector of pairs of 64-bit integers."""
        start = self.pointed(field)
        if start is not None:
            for entry in range(start + 4, start + 4 + 16 * self.length(field), 16):
                yield struct.unpack_from("<qq", self._data, entry)
