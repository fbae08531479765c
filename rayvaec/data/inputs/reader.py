"""Read AnnData files in blocks of rows: h5ad and AnnData Zarr; CSR, CSC and dense.

Of a matrix no more is in memory than a block; of annotation, one obs column at a time. What stands
where in a file is known to `rayvaec.data.inputs.elements`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.access import Access
from rayvaec.data.inputs.align import check_offsets, check_positions
from rayvaec.data.inputs.csc import csc_rows
from rayvaec.data.inputs.elements import AnnDataGroup, Matrix
from rayvaec.data.inputs.failures import missing_file, reading
from rayvaec.data.inputs.frame import Column
from rayvaec.data.inputs.zarr_access import ZarrAccess
from rayvaec.errors import ConfigError, CountsError, FormatError

CSC_BLOCKS = 4  # blocks whose values are sorted by row together
NAMES_BLOCK = 2**20


class _Opened:
    """An open file and what is read from it."""

    def __init__(self, path: Path, layer: str | None) -> None:
        root, access = _open(path)
        self._root = root
        try:
            self.group = AnnDataGroup(root, access)
            self.matrix, self.var = self.group.matrix(layer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()


class Input:
    """One AnnData on disk, read in blocks.

    The file is open only while something is read from it, so that there may be more inputs than
    a process may have open files; as a context manager an input keeps it open.

    Parameters
    ----------
    path : Path
        An h5ad file or an AnnData-Zarr folder.
    layer : str, optional
        Layer with the counts; X by default, ``"raw"`` for the matrix of `AnnData.raw`.

    Attributes
    ----------
    n_cells, n_genes : int
        Shape of the matrix.
    encoding : {"csr", "csc", "dense"}
        How it is stored.

    Raises
    ------
    CountsError
        If `path` does not exist, is not an AnnData or has no such layer; and from every method
        where the file cannot be read, or was changed meanwhile.
    """

    def __init__(self, path: Path, layer: str | None = None) -> None:
        self.path, self.layer = path, layer
        self._state = _file_state(path)
        self._readers = 0
        with self._reading() as opened:
            self.encoding = opened.matrix.encoding
            self.n_cells, self.n_genes = opened.group.obs.n_rows, opened.var.n_rows

    def __enter__(self) -> Self:
        self._readers += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave()

    @contextmanager
    def _reading(self) -> Iterator[_Opened]:
        """Keep the file open; what goes wrong becomes an error that names it."""
        self._readers += 1
        try:
            with reading(self.path):
                yield self._opened
        finally:
            self._leave()

    def _leave(self) -> None:
        """Close the file when nobody reads any more; the next one who does opens it again."""
        self._readers -= 1
        opened = None if self._readers else self.__dict__.pop("_opened", None)
        if opened is not None:
            opened.close()

    @cached_property
    def _opened(self) -> _Opened:
        if _file_state(self.path) != self._state:
            raise CountsError(
                f"{self.path} was changed while it was read", "leave inputs alone, and begin anew"
            )
        return _Opened(self.path, self.layer)

    @property
    def place(self) -> str:
        """What messages call the file."""
        return str(self.path)

    @property
    def where(self) -> str:
        """What messages call the matrix."""
        return f"{self.path}, {'X' if self.layer is None else f'layer {self.layer}'}"

    @property
    def layers(self) -> list[str]:
        """Names of the layers that hold a matrix, other than the one that is read."""
        with self._reading() as opened:
            return [name for name in opened.group.layers if name != self.layer]

    @property
    def columns(self) -> list[str]:
        """Names of the obs columns."""
        with self._reading() as opened:
            return opened.group.obs.columns

    @cached_property
    def genes(self) -> list[str]:
        """Names of the columns."""
        with self._reading() as opened:
            return opened.var.names()

    @cached_property
    def stored(self) -> int:
        """Number of stored values."""
        if self.encoding == "dense":
            return self.n_cells * self.n_genes
        with self._reading() as opened:
            return len(opened.matrix["data"])

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of a stored value."""
        with self._reading() as opened:
            return int(opened.matrix.values.dtype.itemsize)

    @cached_property
    def longest_row(self) -> int:
        """The most values that a row has stored; of a CSC matrix, the most that it may have."""
        if self.encoding != "csr":
            return min(self.n_genes, self.stored)
        longest = 0
        with self._reading() as opened:
            indptr = opened.matrix["indptr"]
            for start in range(0, self.n_cells, NAMES_BLOCK):
                offsets = indptr[start : start + NAMES_BLOCK + 1]
                longest = max(longest, int(np.diff(offsets.astype(np.int64)).max(initial=0)))
        return min(longest, self.stored)

    def names(self, start: int, stop: int) -> list[str]:
        """Return the obs names of the rows from `start` to `stop`."""
        with self._reading() as opened:
            return opened.group.obs.names(start, stop)

    def column(self, key: str) -> Column:
        """Read an obs column; parameters, result and errors as in `Frame.column`."""
        with self._reading() as opened:
            return opened.group.obs.column(key)

    def blocks(
        self, elements: int, scratch: Path, start: int = 0
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        """Read the matrix, some rows at a time.

        Parameters
        ----------
        elements : int
            About how many stored values a block holds; a row at least.
        scratch : Path
            Folder for temporary files; a CSC matrix is transposed there on the first call.
        start : int
            First row to read.

        Yields
        ------
        tuple of int and csr_array[n_rows, n_genes]
            Number of the block's first row, and its values as they are stored.

        Raises
        ------
        CountsError
            If the matrix contradicts itself, or the file is damaged.
        """
        with self._reading() as opened:
            if self.encoding == "dense":
                yield from self._dense_blocks(opened.matrix, elements, start)
            elif self.encoding == "csr":
                yield from self._csr_blocks(opened.matrix, elements, start)
            else:
                yield from self._csc_blocks(opened.matrix, elements, scratch, start)

    def _csr_blocks(
        self, matrix: Matrix, elements: int, start: int
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        indptr = matrix["indptr"][:].astype(np.int64, copy=False)
        check_offsets(indptr, self.n_cells, self.stored, self.where)
        data, indices = matrix["data"], matrix["indices"]
        while start < self.n_cells:
            stop = _block_end(indptr, start, elements)
            part = slice(int(indptr[start]), int(indptr[stop]))
            columns = indices[part]
            check_positions(columns, self.n_genes, self.where)
            offsets = indptr[start : stop + 1] - indptr[start]
            shape = (stop - start, self.n_genes)
            yield start, sparse.csr_array((data[part], columns, offsets), shape=shape)
            start = stop

    def _csc_blocks(
        self, matrix: Matrix, elements: int, scratch: Path, start: int
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        """Read ranges of rows, each of which is sorted in memory, and yield their parts."""
        shape = (self.n_cells, self.n_genes)
        ranges = csc_rows(matrix, shape, CSC_BLOCKS * elements, scratch, self.where, start)
        for first, x in ranges:
            begin = 0
            while begin < x.shape[0]:
                end = _block_end(x.indptr, begin, elements)
                yield first + begin, x[begin:end]
                begin = end

    def _dense_blocks(
        self, matrix: Matrix, elements: int, start: int
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        rows = max(elements // max(self.n_genes, 1), 1)
        chunk = matrix.values.chunks[0] if matrix.values.chunks else 1
        if chunk <= rows:  # a chunk is decompressed once for every block that it reaches into
            rows = rows // chunk * chunk
        for first in range(start, self.n_cells, rows):
            yield first, sparse.csr_array(matrix.values[first : first + rows])


def split_layer(given: Path | str, layer: str | None) -> tuple[Path, str | None]:
    """Tell the path of an input from the layer that ``PATH::LAYER`` asks for.

    Parameters
    ----------
    given : Path or str
        A path, ``PATH::LAYER``, or ``PATH::X`` where other inputs have their counts in a layer.
    layer : str, optional
        The layer of inputs that name none.

    Returns
    -------
    tuple of Path and str, or None for X

    Raises
    ------
    ConfigError
        If nothing follows the colons.
    """
    path, colons, own = str(given).rpartition("::")
    if not colons or Path(given).exists():
        return Path(given), layer
    if not path or not own:
        raise ConfigError(f"the input {given} names no file or no layer", "write FILE::LAYER")
    return Path(path), None if own == "X" else own


def _open(path: Path) -> tuple[Any, Access]:
    """Open a file or folder that may be an AnnData."""
    if not path.exists():
        raise missing_file(path)
    fix = "give an h5ad file or an AnnData-Zarr folder"
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise FormatError(f"{path} is a folder but not a Zarr group", fix)
        # Consolidated metadata may be out of date, and zarr mixes up foo and Foo in it.
        return zarr.open_group(path, mode="r", use_consolidated=False), ZarrAccess(str(path))
    path.open("rb").close()  # is_hdf5 takes what may not be read for another kind of file
    if not h5py.is_hdf5(path):
        raise FormatError(f"{path} is not an HDF5 file", fix)
    return h5py.File(path, "r"), Access(str(path))


def _file_state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None for a folder, and where there is nothing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return None if path.is_dir() else (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _block_end(indptr: NDArray[Any], start: int, elements: int) -> int:
    """Return the row before which a block from `start` on has `elements` values at most."""
    end = int(np.searchsorted(indptr, indptr[start] + elements, side="right")) - 1
    return max(end, start + 1)
