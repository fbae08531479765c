"""An array on disk, read in this machine's types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.access import Access, place_of
from rayvaec.errors import FormatError

REWRITE = "write the file again"
"""What helps where a file contradicts itself."""


class ArrayView:
    """An array on disk, read in this machine's types.

    Big-endian numbers are turned round; float16, which scipy does not know, becomes float32.

    Parameters
    ----------
    array : array of h5py or zarr
        Where the values are.
    access : Access
        What reads them.
    field : str, optional
        The field of a structured array.

    Raises
    ------
    CountsError
        If `access` refuses to read it.
    """

    def __init__(self, array: Any, access: Access, field: str | None = None) -> None:
        access.check(array)
        if array.shape is None:
            raise FormatError(f"{place_of(array)} of {access.where} holds nothing", REWRITE)
        self._array, self._access, self._field = array, access, field
        self.place = place_of(array) if field is None else f"{place_of(array)}/{field}"
        self.shape: tuple[int, ...] = array.shape or (1,)
        self.chunks = array.chunks
        stored = np.dtype(array.dtype if field is None else array.dtype[field])
        self.dtype = _native(stored)
        if stored.kind == "O" and isinstance(array, h5py.Dataset):
            self.is_text = h5py.check_string_dtype(stored) is not None
        else:
            self.is_text = stored.kind in "OSTU"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        values = np.asarray(self._access.read(self._array, rows, self._field))
        return values.astype(self.dtype, copy=False)

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return some of the values as text."""
        return [text for part in self.text_blocks(start, stop) for text in part]

    def text_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[list[str]]:
        """Yield the values as text, no more at a time than `access` allows."""
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, self._access.names_block):
            values = self[first : min(first + self._access.names_block, stop)]
            if self.is_text:
                every = values.tolist()
                yield [v.decode() if isinstance(v, bytes) else str(v) for v in every]
            else:
                yield [str(value) for value in values]


def _native(stored: np.dtype[Any]) -> np.dtype[Any]:
    if stored.kind == "f" and stored.itemsize == 2:
        return np.dtype(np.float32)
    return stored if stored.isnative else stored.newbyteorder("=")
