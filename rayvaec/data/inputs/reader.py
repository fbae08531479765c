"""AnnData files read in blocks of rows: h5ad and AnnData-Zarr; CSR, CSC and dense.

h5py's and zarr's groups have the same face, so one class reads both. Of a matrix no more is in
memory than a block; of annotation, one obs column at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.delta import without_delta_warning
from rayvaec.data.inputs.align import check_offsets, check_positions
from rayvaec.data.inputs.csc import csc_rows
from rayvaec.data.names import choices, listing
from rayvaec.errors import CountsError
from rayvaec.files import FULL_DISK

RAW = "raw"  # as a layer: the matrix and the genes of `AnnData.raw`
CSC_BLOCKS = 4  # blocks whose values are sorted by row together
NAMES_BLOCK = 2**20


@dataclass(frozen=True)
class Column:
    """An obs column as codes.

    Parameters
    ----------
    codes : array[n_cells] of int64
        Positions in `categories`, -1 where the value is missing.
    categories : tuple of str
        The distinct values as text; of a categorical column also those that no cell has.
    kind : str
        What the values are: ``"text"``, ``"whole numbers"``, ``"numbers"``, ``"truth values"`` or
        ``"other values"``.
    """

    codes: NDArray[np.int64]
    categories: tuple[str, ...]
    kind: str = "text"


class Input:
    """One AnnData on disk, opened for reading in blocks; a context manager.

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
        If `path` does not exist or is no AnnData, or has no such layer; and from every method
        where the file is damaged.
    """

    def __init__(self, path: Path, layer: str | None = None) -> None:
        self.path, self.layer = path, layer
        with _reading(path):
            self._root = _open(path)
        try:
            with _reading(path):
                self._matrix, self._var = self._find_matrix()
                self.encoding = _encoding(self._matrix, self.where)
                self.n_cells = self._index("obs").shape[0]
                self.n_genes = self._index(self._var).shape[0]
                self._check_shape()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()

    @property
    def where(self) -> str:
        """What messages call the matrix."""
        return f"{self.path}, {'X' if self.layer is None else f'layer {self.layer}'}"

    @property
    def layers(self) -> list[str]:
        """Names of the layers that hold a matrix, other than the one that is read."""
        names = list(self._root["layers"]) if "layers" in self._root else []
        if self._has_raw:
            names.append(RAW)
        return [name for name in names if name != self.layer]

    @property
    def columns(self) -> list[str]:
        """Names of the obs columns."""
        return [str(name) for name in self._root["obs"].attrs["column-order"]]

    @cached_property
    def genes(self) -> list[str]:
        """Names of the columns."""
        with _reading(self.path):
            return _strings(self._index(self._var), 0, self.n_genes)

    @property
    def stored(self) -> int:
        """Number of stored values."""
        if self.encoding == "dense":
            return self.n_cells * self.n_genes
        return int(self._matrix["data"].shape[0])

    @property
    def value_bytes(self) -> int:
        """Bytes of a stored value."""
        matrix = self._matrix if self.encoding == "dense" else self._matrix["data"]
        return int(matrix.dtype.itemsize)

    @cached_property
    def longest_row(self) -> int:
        """The most values that a row has stored; of a CSC matrix, the most that it may have."""
        if self.encoding != "csr":
            return min(self.n_genes, self.stored)
        longest = 0
        with _reading(self.path):
            for start in range(0, self.n_cells, NAMES_BLOCK):
                offsets = self._matrix["indptr"][start : start + NAMES_BLOCK + 1]
                longest = max(longest, int(np.diff(offsets.astype(np.int64)).max(initial=0)))
        return min(longest, self.stored)

    def names(self, start: int, stop: int) -> list[str]:
        """Return the obs names of the rows from `start` to `stop`."""
        with _reading(self.path):
            return _strings(self._index("obs"), start, stop)

    def column(self, key: str) -> Column:
        """Read an obs column.

        Parameters
        ----------
        key : str
            Its name.

        Returns
        -------
        Column

        Raises
        ------
        CountsError
            If there is no such column; the message lists those that there are.
        """
        if key not in self.columns:
            raise CountsError(
                f"{self.path} has no obs column {key!r}",
                f"the columns are {choices(key, self.columns)}",
            )
        with _reading(self.path):
            item = self._root["obs"][key]
            if not hasattr(item, "keys") and _is_text(item):
                return _text_column(item)
            values = read_elem(item)
        if not isinstance(values, pd.Categorical):
            values = pd.Categorical(values)
        categories = tuple(str(value) for value in values.categories)
        kind = _KINDS.get(pd.api.types.infer_dtype(values.categories), "other values")
        return Column(values.codes.astype(np.int64), categories, kind)

    def blocks(
        self, elements: int, scratch: Path, start: int = 0
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        """Read the matrix, some rows at a time.

        Parameters
        ----------
        elements : int
            About how many stored values a block shall hold; a row at least.
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
        with _reading(self.path):
            if self.encoding == "dense":
                yield from self._dense_blocks(elements, start)
            elif self.encoding == "csr":
                yield from self._csr_blocks(elements, start)
            else:
                yield from self._csc_blocks(elements, scratch, start)

    def _csr_blocks(self, elements: int, start: int) -> Iterator[tuple[int, sparse.csr_array]]:
        indptr = self._matrix["indptr"][:].astype(np.int64, copy=False)
        check_offsets(indptr, self.n_cells, self.stored, self.where)
        with without_delta_warning():
            data, indices = self._matrix["data"], self._matrix["indices"]
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
        self, elements: int, scratch: Path, start: int
    ) -> Iterator[tuple[int, sparse.csr_array]]:
        """Read ranges of rows, each of which is sorted in memory, and yield their parts."""
        shape = (self.n_cells, self.n_genes)
        ranges = csc_rows(self._matrix, shape, CSC_BLOCKS * elements, scratch, self.where, start)
        for first, x in ranges:
            begin = 0
            while begin < x.shape[0]:
                end = _block_end(x.indptr, begin, elements)
                yield first + begin, x[begin:end]
                begin = end

    def _dense_blocks(self, elements: int, start: int) -> Iterator[tuple[int, sparse.csr_array]]:
        rows = max(elements // max(self.n_genes, 1), 1)
        chunk = self._matrix.chunks[0] if self._matrix.chunks else 1
        if chunk <= rows:  # a chunk is decompressed once for every block that it reaches into
            rows = rows // chunk * chunk
        for first in range(start, self.n_cells, rows):
            yield first, sparse.csr_array(self._matrix[first : first + rows])

    @property
    def _has_raw(self) -> bool:
        raw = self._root.get(RAW)
        return hasattr(raw, "keys") and "X" in raw  # else it may stand for None

    def _find_matrix(self) -> tuple[Any, str]:
        """Return the matrix and the path of the frame that names its columns."""
        names = self.layers  # without the one that is read
        layer = self.layer
        if layer is None:
            if "X" not in self._root or self._root["X"].attrs.get("encoding-type") == "null":
                raise CountsError(
                    f"{self.path} has no X", f"use --layer (layers: {listing(names)})"
                )
            return self._root["X"], "var"
        if "layers" in self._root and layer in self._root["layers"]:
            return self._root["layers"][layer], "var"
        if layer == RAW and self._has_raw:
            return self._root[RAW]["X"], f"{RAW}/var"
        raise CountsError(
            f"{self.path} has no layer {layer!r}",
            f"the layers are {choices(layer, names)}" if names else "leave out --layer to read X",
        )

    def _index(self, frame: str) -> Any:
        """Return the array with a frame's row names."""
        group = self._root[frame]
        if group.attrs.get("encoding-version") != "0.2.0" or "_index" not in group.attrs:
            raise CountsError(
                f"{self.path} was written by an old version of anndata",
                "read it with anndata.read_h5ad and write it again",
            )
        index = group[group.attrs["_index"]]
        return index["values"] if hasattr(index, "keys") else index  # a nullable-string-array

    def _check_shape(self) -> None:
        sparse_shape = self.encoding != "dense"
        shape = self._matrix.attrs["shape"] if sparse_shape else self._matrix.shape
        if tuple(shape) != (self.n_cells, self.n_genes):
            raise CountsError(
                f"{self.where} has shape {tuple(int(n) for n in shape)} but {self.n_cells} cells "
                f"and {self.n_genes} genes have names",
                "write the file again",
            )


def _open(path: Path) -> Any:
    """Open a file or folder that looks like an AnnData."""
    if not path.exists():
        raise CountsError(f"there is no file {path}", "check the path of the input")
    fix = "give an h5ad file or an AnnData-Zarr folder"
    root: Any
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise CountsError(f"{path} is a folder but no Zarr group", fix)
        root = zarr.open_group(path, mode="r")
    elif h5py.is_hdf5(path):
        root = h5py.File(path, "r")
    else:
        raise CountsError(f"{path} is not an HDF5 file", fix)
    if not all(name in root for name in ("obs", "var")):
        kind = root.attrs.get("encoding-type")
        if isinstance(root, h5py.File):
            root.close()
        if kind == "annbatch-preshuffled":
            raise CountsError(f"{path} is a store already", "train on it, or give its sources")
        raise CountsError(f"{path} has no obs and var, so it is no AnnData", fix)
    return root


def _encoding(matrix: Any, where: str) -> str:
    """Return "csr", "csc" or "dense"."""
    kind = matrix.attrs.get("encoding-type", "array")
    encodings = {"csr_matrix": "csr", "csc_matrix": "csc", "array": "dense"}
    if kind not in encodings:
        raise CountsError(
            f"{where} is stored as {kind!r}", f"use one of {', '.join(sorted(encodings))}"
        )
    return encodings[kind]


_KINDS = {
    "string": "text",
    "integer": "whole numbers",
    "floating": "numbers",
    "boolean": "truth values",
    "empty": "text",
}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file makes h5py and zarr raise into an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise  # no fault of the input: a CSC matrix is transposed on disk
        raise CountsError(
            f"{path} is damaged or cut short ({str(error).strip()})",
            "copy or download it again, or leave it out",
        ) from error


def _block_end(indptr: NDArray[Any], start: int, elements: int) -> int:
    """Return the row before which a block from `start` on has `elements` values at most."""
    end = int(np.searchsorted(indptr, indptr[start] + elements, side="right")) - 1
    return max(end, start + 1)


def _is_text(array: Any) -> bool:
    if isinstance(array, h5py.Dataset):
        return h5py.check_string_dtype(array.dtype) is not None
    return str(array.attrs.get("encoding-type")) == "string-array"


def _text_column(array: Any) -> Column:
    """Read a column of text in parts: as objects, a whole one would take a hundred bytes a cell."""
    positions: dict[str, int] = {}
    codes = np.empty(array.shape[0], np.int64)
    for start in range(0, len(codes), NAMES_BLOCK):
        found, names = pd.factorize(np.array(_strings(array, start, start + NAMES_BLOCK), object))
        known = [positions.setdefault(str(name), len(positions)) for name in names]
        codes[start : start + NAMES_BLOCK] = np.array(known, np.int64)[found]
    order = sorted(positions)
    rank = {name: place for place, name in enumerate(order)}
    places = np.array([rank[name] for name in positions], np.int64)
    return Column(places[codes], tuple(order))


def _strings(array: Any, start: int, stop: int) -> list[str]:
    """Read a part of an array of names, however they are stored."""
    if isinstance(array, h5py.Dataset) and h5py.check_string_dtype(array.dtype):
        array = array.asstr()
    return [str(value) for value in array[start:stop]]
