"""Restricted access to the elements of an uploaded h5ad file, within a memory budget.

HDF5 would follow links to other files, load filters and allocate whatever a file declares.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from math import prod
from typing import Any

import h5py
from numpy.typing import NDArray

from rayvaec.data.inputs.access import Access, filters_of, place_of
from rayvaec.errors import PayloadTooLargeError, UndecodableError, UnprocessableError

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_REFERENCE_BYTES = 64
"""What a string takes in memory beside its characters."""


class UploadAccess(Access):
    """Reads arrays of a file that a stranger sent, each after a look at what it declares.

    Parameters
    ----------
    where : str
        What messages call the file.
    body : bytes
        The file.
    max_bytes : int
        Most memory that what is read may take.
    """

    names_block = 4096

    def __init__(self, where: str, body: bytes, max_bytes: int) -> None:
        super().__init__(where)
        self._body, self._max_bytes, self._left = body, max_bytes, max_bytes

    def child(self, group: Any, name: str) -> Any:
        """Return an element of a group, None where there is none; a link is refused."""
        if name in ("", ".", "..") or "/" in name or not isinstance(group, h5py.Group):
            return None
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _elsewhere(f"{place_of(group)}/{name}".lstrip("/"))
        return group[name]

    def check(self, array: Any) -> None:
        """Refuse an array whose values stand elsewhere, cannot be decoded, or are too large."""
        if array.external or array.is_virtual:
            raise _elsewhere(place_of(array))
        for number in filters_of(array):
            if number not in _FILTERS:
                raise UnprocessableError(
                    f"{place_of(array)} of {self.where} is compressed by HDF5's filter {number}",
                    "write it with gzip, lzf or without compression",
                )
        # A chunk is decompressed whole, and may be declared larger than what it is part of.
        if array.chunks and prod(array.chunks) * array.dtype.itemsize > self._max_bytes:
            raise self._too_large(array)

    def read(self, array: Any, rows: slice, field: str | None = None) -> NDArray[Any]:
        """Read a part of an array, and count what it takes before and after."""
        dtype = array.dtype if field is None else array.dtype[field]
        n_rows = len(range(*rows.indices(array.shape[0]))) if array.shape else 1
        n = n_rows * prod(array.shape[1:])
        strings = dtype.kind in "OS"
        self._spend(n * (dtype.itemsize + strings * _REFERENCE_BYTES), array)
        try:
            values = super().read(array, rows, field)
        except OSError as error:
            if _is_bomb(array, self._body):
                raise self._too_large(array) from error
            raise
        if dtype.kind == "O" and h5py.check_string_dtype(dtype):
            self._spend(sum(map(len, values.tolist())), array)
        return values

    def _spend(self, n_bytes: int, array: Any) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise self._too_large(array)

    def _too_large(self, array: Any) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"{self.where} takes more than {self._max_bytes:,} bytes decompressed (at "
            f"{place_of(array)})",
            "send fewer cells a request",
            error="body_too_large",
        )


def _is_bomb(array: h5py.Dataset, body: bytes) -> bool:
    """Return whether a chunk decompresses to more than it says, which HDF5 only calls a failure."""
    if array.compression != "gzip" or array.chunks is None:
        return False
    says = prod(array.chunks) * array.dtype.itemsize
    for number in range(array.id.get_num_chunks()):
        chunk = array.id.get_chunk_info(number)
        stored = body[chunk.byte_offset : chunk.byte_offset + chunk.size]
        with suppress(zlib.error):
            if len(zlib.decompressobj().decompress(stored, says + 1)) > says:
                return True
    return False


def _elsewhere(place: str) -> UndecodableError:
    return UndecodableError(
        f"{place} is a link, or its values stand in another file",
        "send a file that holds its own values, as anndata writes it",
    )
