"""One AnnData in HDF5 or Zarr: its frames, columns and matrices.

All encodings that anndata 0.6 to 0.13 wrote are understood. h5py's and zarr's groups have the same
face, so this one reader serves files, folders, stores on a web server and uploads; what it may
touch is decided by an `Access`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.access import Access, place_of
from rayvaec.data.names import choices, listing
from rayvaec.errors import CountsError, FormatError

RAW = "raw"
"""As a layer: the matrix and the genes of `AnnData.raw`."""

USUAL_LAYERS = ("counts", "raw_counts", "count")
"""Layers to look for in a store whose groups cannot be listed."""

_AGAIN = "write the file again"
_KINDS = {"i": "whole numbers", "u": "whole numbers", "f": "numbers", "b": "truth values"}
_ENCODINGS = {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}
_NULLABLE = ("nullable-string-array", "nullable-integer", "nullable-boolean")


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
        What the values are: ``"text"``, ``"whole numbers"``, ``"numbers"`` or ``"truth values"``.
    """

    codes: NDArray[np.int64]
    categories: tuple[str, ...]
    kind: str = "text"


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
            raise FormatError(f"{place_of(array)} of {access.where} holds nothing", _AGAIN)
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


class Frame:
    """obs or var: the names of its rows, and its columns.

    Parameters
    ----------
    element : group or structured array
        As anndata wrote it; a structured array is that of anndata 0.6.
    access : Access
        What reads it.
    uns : group, optional
        Where anndata 0.6 put the categories.

    Raises
    ------
    FormatError
        If it does not say which of its columns names the rows.
    """

    def __init__(self, element: Any, access: Access, uns: Any = None) -> None:
        self._element, self._access, self._uns = element, access, uns
        self.name = place_of(element)
        self._fields = tuple(element.dtype.names or ()) if hasattr(element, "dtype") else None
        self.index, self._missing_names = self._open_index()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.index)

    def names(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the names of some rows."""
        names = self.index.texts(start, stop)
        if self._missing_names is not None:
            missing = np.flatnonzero(self._missing_names[start : start + len(names)])
            if missing.size:
                raise self._damaged(f"has no name for row {start + int(missing[0])}")
        return names

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if self._fields is not None:
            return list(self._fields[1:])
        order = self._element.attrs.get("column-order")
        if order is not None:
            return [_as_text(name) for name in np.atleast_1d(np.asarray(order, object))]
        every = self._access.names(self._element)
        if every is None:
            raise self._damaged("has no column-order, and cannot be listed")
        return [name for name in every if name not in (self._index_name(), "__categories")]

    def column(self, key: str) -> Column:
        """Read a column.

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
            If there is no such column (the message lists those that there are), it has another
            number of values than there are rows, or codes and categories contradict each other.
        """
        coded = self.coded(key)
        if coded is not None:
            codes, categories, kind = coded
            values = codes[:].astype(np.int64)
            self.check_codes(key, values, len(categories))
            return Column(values, categories, kind)
        array, mask = self._values(key)
        column = _text_column(array) if array.is_text else _number_column(array)
        return column if mask is None else _masked(column, mask[:].astype(bool))

    def coded(self, key: str) -> tuple[ArrayView, tuple[str, ...], str] | None:
        """Open a column that is stored as codes.

        Parameters
        ----------
        key : str
            Its name.

        Returns
        -------
        tuple of ArrayView, tuple of str and str, or None
            The codes, not yet checked, the categories, and their kind as in `Column`; None for a
            column that is stored as values. Errors as in `column`.
        """
        found = self._find_coded(key)
        if found is None:
            return None
        codes, element = found
        self._check_length(key, codes)
        if codes.dtype.kind not in "iu":
            raise self._damaged(f"has codes of type {codes.dtype} in column {key!r}")
        values, mask = self._array_and_mask(element, key)
        if mask is not None and bool(mask[:].any()):
            raise self._damaged(f"has a category without a value in column {key!r}")
        categories = tuple(values.texts())
        if len(set(categories)) < len(categories):
            seen: set[str] = set()
            twice = next(name for name in categories if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise self._damaged(
                f"has the category {twice!r} of column {key!r} more than once",
                "give each category once, and its code to all of its cells",
            )
        return codes, categories, _kind(values)

    def check_codes(self, key: str, codes: NDArray[np.int64], n_categories: int) -> None:
        """Refuse codes that have no category.

        Parameters
        ----------
        key : str
            The column.
        codes : array[n_rows] of int64
            All of its codes.
        n_categories : int
            How many categories it has.

        Raises
        ------
        FormatError
            Naming the first such code and its row.
        """
        if codes.size and not -1 <= codes.min() <= codes.max() < n_categories:
            row = int(np.argmax((codes < -1) | (codes >= n_categories)))
            raise self._damaged(
                f"has the code {codes[row]} of row {row} in column {key!r}, which has "
                f"{n_categories} categories"
            )

    def _open_index(self) -> tuple[ArrayView, ArrayView | None]:
        name = self._index_name()
        if self._fields is not None and name is not None:
            array = ArrayView(self._element, self._access, name)
            return self._checked([array], name)[0], None
        found = None if name is None else self._access.child(self._element, name)
        if found is None:
            raise self._damaged("has no index: nothing says how its rows are called")
        return self._array_and_mask(found, str(name))

    def _index_name(self) -> str | None:
        if self._fields is not None:
            return self._fields[0] if self._fields else None
        name = self._element.attrs.get("_index")
        return _as_text(name) if isinstance(name, str | bytes) else None

    def _find_coded(self, key: str) -> tuple[ArrayView, Any] | None:
        """Return the codes and the element with the categories, None for a column of values."""
        element = self._child(key)
        if self._fields is not None:  # anndata 0.6
            array = ArrayView(element, self._access, key)
            categories = self._uns and self._access.child(self._uns, f"{key}_categories")
            is_coded = categories is not None and array.dtype.kind in "iu"
            return (array, categories) if is_coded else None
        if hasattr(element, "shape"):
            said = element.attrs.get("categories")
            if said is None:
                return None
            return ArrayView(element, self._access), self._legacy_categories(key, element, said)
        kind = element.attrs.get("encoding-type")
        parts = [self._access.child(element, name) for name in ("codes", "categories")]
        if kind not in (None, "categorical") or (kind is None and None in parts):
            return None
        codes, categories = parts
        if codes is None or categories is None or not hasattr(codes, "shape"):
            raise self._damaged(f"lacks codes or categories of column {key!r}")
        return ArrayView(codes, self._access), categories

    def _legacy_categories(self, key: str, element: Any, said: Any) -> Any:
        """Find the categories that a column of anndata 0.7 refers to."""
        path = f"__categories/{key}"
        if isinstance(said, h5py.Reference):
            name = h5py.h5r.get_name(said, element.id) if said else None
            path = _as_text(name or b"").strip("/").removeprefix(f"{self.name}/")
        elif isinstance(said, str | bytes):
            path = _as_text(said)
        found = self._element
        for part in path.split("/"):
            found = None if found is None else self._access.child(found, part)
        if found is None or found is self._element:
            raise self._damaged(f"refers to categories of column {key!r} that do not exist")
        return found

    def _values(self, key: str) -> tuple[ArrayView, ArrayView | None]:
        """Open a column that is stored as values, and what marks the missing ones."""
        if self._fields is not None:
            array = ArrayView(self._element, self._access, key)
            return self._checked([array], key)[0], None
        values, mask = self._array_and_mask(self._child(key), key)
        self._check_length(key, values)
        return values, mask

    def _array_and_mask(self, element: Any, key: str) -> tuple[ArrayView, ArrayView | None]:
        """Open values of any encoding."""
        arrays = [element]
        if not hasattr(element, "shape"):
            kind = element.attrs.get("encoding-type")
            arrays = [self._access.child(element, name) for name in ("values", "mask")]
            if kind not in _NULLABLE or not all(hasattr(array, "shape") for array in arrays):
                raise self._damaged(f"has the column {key!r} encoded as {kind!r:.60}")
        values, *masks = self._checked([ArrayView(a, self._access) for a in arrays], key)
        return values, masks[0] if masks else None

    def _checked(self, arrays: list[ArrayView], key: str) -> list[ArrayView]:
        """Refuse arrays that are no columns, or a mask of another length than its values."""
        for array in arrays:
            if len(array.shape) != 1 or not (array.is_text or array.dtype.kind in _KINDS):
                raise self._damaged(
                    f"has {len(array.shape)}-dimensional values of type {array.dtype} in column "
                    f"{key!r}"
                )
        if len({len(array) for array in arrays}) > 1:
            n_values, n_marks = map(len, arrays)
            raise self._damaged(f"has {n_marks} marks for {n_values} values in column {key!r}")
        return arrays

    def _child(self, key: str) -> Any:
        if key not in self.columns:
            raise CountsError(
                f"{self._access.where} has no {self.name} column {key!r}",
                f"the columns are {choices(key, self.columns)}",
            )
        if self._fields is not None:
            return self._element
        found = self._access.child(self._element, key)
        if found is None:
            raise self._damaged(f"names the column {key!r} and does not have it")
        return found

    def _check_length(self, key: str, array: ArrayView) -> None:
        if array.shape != (self.n_rows,):
            n = array.shape[0] if len(array.shape) == 1 else f"an array of {array.shape}"
            raise self._damaged(f"has {n} values in column {key!r} for {self.n_rows} rows")

    def _damaged(self, problem: str, fix: str = _AGAIN) -> FormatError:
        return FormatError(f"{self.name} of {self._access.where} {problem}", fix)


class Matrix:
    """Counts on disk: their encoding, shape and arrays, checked against each other.

    Parameters
    ----------
    element : group or array
        As anndata wrote it.
    access : Access
        What reads it.
    where : str
        What to call it in messages.

    Attributes
    ----------
    encoding : {"csr", "csc", "dense"}
        How it is stored.
    shape : tuple of int
        Cells and genes, as it states them.

    Raises
    ------
    FormatError
        If it is stored in another way, or its arrays do not fit together.
    """

    def __init__(self, element: Any, access: Access, where: str) -> None:
        self.where = where
        attributes = element.attrs
        if hasattr(element, "shape"):
            self.encoding, self._parts = "dense", {"values": ArrayView(element, access)}
            self.shape = tuple(element.shape)
        else:
            kind = attributes.get("encoding-type", attributes.get("h5sparse_format"))
            if kind not in _ENCODINGS:
                raise FormatError(
                    f"{where} is stored as {kind!r:.60}",
                    f"store it as one of array, {', '.join(sorted(_ENCODINGS)[1::2])}",
                )
            self.encoding = _ENCODINGS[kind]
            said = np.asarray(attributes.get("shape", attributes.get("h5sparse_shape", ())))
            self.shape = tuple(int(n) for n in said.ravel()) if said.dtype.kind in "iu" else ()
            self._parts = {}
            for name in ("data", "indices", "indptr"):
                array = access.child(element, name)
                if not hasattr(array, "shape"):
                    raise FormatError(f"{where} lacks {name}", _AGAIN)
                self._parts[name] = ArrayView(array, access)
            self._check_parts()
        if self.values.dtype.kind not in "buif":
            raise CountsError(
                f"{where} holds values of type {self.values.dtype}",
                "counts must be integers or floats",
            )

    def __getitem__(self, name: str) -> ArrayView:
        return self._parts[name]

    @property
    def values(self) -> ArrayView:
        """What holds the stored values."""
        return self._parts["values" if self.encoding == "dense" else "data"]

    def check_shape(self, n_cells: int, n_genes: int) -> None:
        """Refuse a matrix of another shape than obs and var have."""
        rows = {"csr": n_cells, "csc": n_genes}.get(self.encoding)
        if self.shape != (n_cells, n_genes):
            raise FormatError(
                f"{self.where} has shape {self.shape} but {n_cells} cells and {n_genes} genes "
                "have names",
                _AGAIN,
            )
        if rows is not None and len(self["indptr"]) != rows + 1:
            raise FormatError(
                f"{self.where} has {len(self['indptr']) - 1} row offsets for {rows}", _AGAIN
            )

    def _check_parts(self) -> None:
        shapes = {name: array.shape for name, array in self._parts.items()}
        flat = all(len(shape) == 1 for shape in shapes.values())
        if not flat or shapes["data"] != shapes["indices"]:
            raise FormatError(
                f"{self.where} has arrays that do not fit together: data {shapes['data']}, indices "
                f"{shapes['indices']}, indptr {shapes['indptr']}",
                _AGAIN,
            )
        for name in ("indices", "indptr"):
            if self[name].dtype.kind not in "iu":
                raise FormatError(f"{self.where} has {name} of type {self[name].dtype}", _AGAIN)


class AnnDataGroup:
    """The parts of one AnnData that counts, labels and names are read from.

    Parameters
    ----------
    root : group of h5py or zarr
        Where it lies.
    access : Access
        What reads it, and what to call it in messages.
    layer_option : str
        How the reader of a message names a layer, such as ``"--layer="``.

    Attributes
    ----------
    obs : Frame
        Cells.

    Raises
    ------
    FormatError
        If it is something else than an AnnData; the message says what, where that is known.
    """

    def __init__(self, root: Any, access: Access, layer_option: str = "--layer=") -> None:
        self._root, self._access, self._option = root, access, layer_option
        frames = [access.child(root, name) for name in ("obs", "var")]
        if None in frames or root.attrs.get("encoding-type") == "MuData":
            raise _something_else(root, access)
        self.obs = self._frame(frames[0], "obs")
        self._var = frames[1]

    def matrix(self, layer: str | None) -> tuple[Matrix, Frame]:
        """Open counts and the frame that names their columns, which fit together.

        Parameters
        ----------
        layer : str, optional
            Name of a layer; X by default, ``"raw"`` for the matrix of `AnnData.raw`.

        Returns
        -------
        tuple of Matrix and Frame

        Raises
        ------
        CountsError
            If there is no such layer (the message lists those that there are).
        FormatError
            If it contradicts itself, obs or var.
        """
        element, var = self._find(layer)
        where = f"{self._access.where}, {'X' if layer is None else f'layer {layer}'}"
        matrix, frame = Matrix(element, self._access, where), self._frame(var, "var")
        matrix.check_shape(self.obs.n_rows, frame.n_rows)
        return matrix, frame

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers that hold a matrix, ``"raw"`` last."""
        group = self._access.child(self._root, "layers")
        names = [] if group is None else self._access.names(group)
        if names is None:  # only what is asked for by name is found
            names = [name for name in USUAL_LAYERS if self._access.child(group, name) is not None]
        return names if RAW in names or self._raw() is None else [*names, RAW]

    def _find(self, layer: str | None) -> tuple[Any, Any]:
        child, root = self._access.child, self._root
        if layer is None:
            element = child(root, "X")
            if element is None or element.attrs.get("encoding-type") == "null":
                raise CountsError(
                    f"{self._access.where} has no X",
                    f"use {self._option}NAME (layers: {listing(self.layers)})",
                )
            return element, self._var
        layers = child(root, "layers")
        element = None if layers is None else child(layers, layer)
        if element is not None:
            return element, self._var
        raw = self._raw() if layer == RAW else None
        if raw is not None:
            return raw
        known = f"the layers are {choices(layer, self.layers)}"
        raise CountsError(
            f"{self._access.where} has no layer {layer!r}",
            known if self.layers else f"leave out {self._option.strip(' ?=')} to read X",
        )

    def _raw(self) -> tuple[Any, Any] | None:
        """Return matrix and var of `AnnData.raw`, None where there is none."""
        child, raw = self._access.child, self._access.child(self._root, RAW)
        group = hasattr(raw, "keys")  # else it may stand for None
        matrix = child(raw, "X") if group else child(self._root, "raw.X")  # as anndata 0.6 wrote it
        var = child(raw, "var") if group else child(self._root, "raw.var")
        return None if matrix is None or var is None else (matrix, var)

    def _frame(self, element: Any, name: str) -> Frame:
        if not hasattr(element, "keys") and getattr(element.dtype, "names", None) is None:
            raise FormatError(
                f"{name} of {self._access.where} is not a table", "write the file with anndata"
            )
        uns = None if hasattr(element, "keys") else self._access.child(self._root, "uns")
        return Frame(element, self._access, uns)


def _something_else(root: Any, access: Access) -> FormatError:
    """Say what a file is that has no obs and var, and how to get an AnnData out of it."""
    where, modalities = access.where, access.child(root, "mod")
    if root.attrs.get("encoding-type") == "MuData" or hasattr(modalities, "keys"):
        names = (access.names(modalities) if hasattr(modalities, "keys") else None) or []
        first = names[0] if names else "rna"
        return FormatError(
            f"{where} is a MuData of the modalities {listing(names)}",
            f"write one of them alone: mudata.read(FILE)[{first!r}].write_h5ad(...)",
        )
    if root.attrs.get("encoding-type") == "annbatch-preshuffled":
        return FormatError(f"{where} is a store already", "train on it, or give its sources")
    if hasattr(access.child(root, "matrix"), "keys"):
        return FormatError(
            f"{where} is a 10x file, not an AnnData",
            "convert it: scanpy.read_10x_h5(FILE).write_h5ad(...)",
        )
    return FormatError(
        f"{where} has no obs and var, so it is not an AnnData",
        "give an h5ad file or an AnnData-Zarr folder",
    )


def _native(stored: np.dtype[Any]) -> np.dtype[Any]:
    if stored.kind == "f" and stored.itemsize == 2:
        return np.dtype(np.float32)
    return stored if stored.isnative else stored.newbyteorder("=")


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _kind(array: ArrayView) -> str:
    return "text" if array.is_text else _KINDS[array.dtype.kind]


def _text_column(array: ArrayView) -> Column:
    """Read a column of text in parts: as objects, a whole one would take a hundred bytes a cell."""
    positions: dict[str, int] = {}
    codes, start = np.empty(len(array), np.int64), 0
    for names in array.text_blocks():
        found = [positions.setdefault(name, len(positions)) for name in names]
        codes[start : start + len(found)] = found
        start += len(found)
    order = sorted(positions)
    rank = {name: place for place, name in enumerate(order)}
    places = np.array([rank[name] for name in positions], np.int64)
    return Column(places[codes] if len(codes) else codes, tuple(order))


def _masked(column: Column, missing: NDArray[np.bool_]) -> Column:
    """Take values away, and the categories that only these had: they are placeholders."""
    codes = np.where(missing, -1, column.codes)
    used = np.unique(codes[codes >= 0])
    places = np.full(len(column.categories) + 1, -1, np.int64)  # the last one is that of -1
    places[used] = np.arange(len(used))
    return Column(places[codes], tuple(column.categories[code] for code in used), column.kind)


def _number_column(array: ArrayView) -> Column:
    values = array[:]
    distinct, codes = np.unique(values, return_inverse=True)
    codes = codes.astype(np.int64)
    if distinct.dtype.kind == "f" and distinct.size and np.isnan(distinct[-1]):
        codes[np.isnan(values)] = -1
        distinct = distinct[:-1]
    return Column(codes, tuple(str(value) for value in distinct), _kind(array))
