"""Access to the elements of a file: permissive for local files, restricted for uploads."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import CountsError, FormatError

_FILTERS = {
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}
"""Names of filters that HDF5 has registered and does not bring along."""


def place_of(element: Any) -> str:
    """Return the path of an element within its file or store, without a slash in front."""
    return str(element.name).strip("/")


class Access:
    """Reads whatever a file of this machine holds; a stricter one overrides every method.

    Parameters
    ----------
    where : str
        The file, for messages.

    Attributes
    ----------
    names_block : int
        How many strings are read at a time.
    """

    names_block = 2**20

    def __init__(self, where: str) -> None:
        self.where = where

    def child(self, group: Any, name: str) -> Any:
        """Return an element of a group, None where there is none.

        Parameters
        ----------
        group : group of h5py or zarr
            Where to look.
        name : str
            Name of the element.

        Raises
        ------
        FormatError
            If the name is that of a link to nothing.
        """
        found = group.get(name)
        if found is None and isinstance(group, h5py.Group):
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
                target = link.path if isinstance(link, h5py.SoftLink) else link.filename
                raise FormatError(
                    f"{place_of(group)}/{name} of {self.where} is a link to {target}, which does "
                    "not exist".lstrip("/"),
                    "put back what it points to, or write the file again",
                )
        return found

    def names(self, group: Any) -> list[str] | None:
        """Return the names of a group's elements, None where they cannot be listed."""
        return [str(name) for name in group]

    def check(self, array: Any) -> None:
        """Look at an array before anything is read from it.

        Parameters
        ----------
        array : array of h5py or zarr
            What will be read.

        Raises
        ------
        CountsError
            If it is compressed by a filter that this machine does not have.
        """
        for number in filters_of(array):
            if h5py.h5z.filter_avail(number):
                continue
            with suppress(ImportError):
                import hdf5plugin  # noqa: F401 - registers its filters
            if not h5py.h5z.filter_avail(number):
                raise CountsError(
                    f"{place_of(array)} of {self.where} is compressed by the HDF5 filter "
                    f"{_FILTERS.get(number, number)}, which is not installed",
                    "pip install hdf5plugin, or write the file with gzip",
                )

    def read(self, array: Any, rows: slice, field: str | None = None) -> NDArray[Any]:
        """Read a part of an array.

        Parameters
        ----------
        array : array of h5py or zarr
            Checked before.
        rows : slice
            Along its first axis.
        field : str, optional
            The field of a structured array.

        Returns
        -------
        array
            As it is stored.
        """
        source = array if field is None else array.fields(field)
        return source[rows] if array.shape else np.atleast_1d(source[()])


def filters_of(array: Any) -> list[int]:
    """Return HDF5's numbers of the filters of an array; none for one of zarr's."""
    if not isinstance(array, h5py.Dataset):
        return []
    plist = array.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
