"""As much of flatbuffers as it takes to read the sizes in the messages of an Arrow IPC stream."""

from __future__ import annotations

import struct


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
