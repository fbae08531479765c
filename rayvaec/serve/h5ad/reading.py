"""Cells out of an h5ad file that a stranger sent. Runs in the process of `sandbox`.

Nothing but the names and arrays that a request needs is touched, each after a look at what it says
it is: HDF5 would follow links to other files, load filters and allocate whatever a file declares.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import RequestError
from rayvaec.serve.wire import RawCells

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_STRINGS_AT_A_TIME = 4096
_REFERENCE_BYTES = 64
"""What a string takes in memory beside its characters."""


@dataclass(frozen=True)
class Columns:
    """Where in the file a request's cells stand.

    Parameters
    ----------
    labels_key : str
        Column of obs with the labels.
    batch_key : str, optional
        Column of obs with the batches.
    layer : str, optional
        Layer with the counts; X by default.
    """

    labels_key: str
    batch_key: str | None = None
    layer: str | None = None


def looks_like_hdf5(body: bytes) -> bool:
    """Return whether a body begins as HDF5 files do."""
    return body.startswith(_SIGNATURE)


def read_cells(body: bytes, columns: Columns, max_bytes: int) -> tuple[RawCells, list[str]]:
    """Read cells and the names of their genes.

    Parameters
    ----------
    body : bytes
        The file.
    columns : Columns
        Where the cells stand.
    max_bytes : int
        Most memory that what is read may take.

    Returns
    -------
    tuple of RawCells and list of str

    Raises
    ------
    RequestError
        400 for what is no h5ad file or points elsewhere, 413 for too large a one, 422 for columns
        or layers that it does not have or that hold something else.
    OSError, RuntimeError, ...
        Whatever h5py raises on damaged files.
    """
    with h5py.File(io.BytesIO(body), "r") as file:
        reader = _Reader(file, body, max_bytes)
        obs, var = (reader.group(name) for name in ("obs", "var"))
        names, genes = reader.index(obs, "obs"), reader.index(var, "var")
        where = "X" if columns.layer is None else f"layers/{columns.layer}"
        matrix = reader.matrix(columns.layer, (len(names), len(genes)), where)
        batches = None
        if columns.batch_key is not None:
            batches = reader.column(obs, columns.batch_key, "batch_key", len(names))
        labels = reader.column(obs, columns.labels_key, "labels_key", len(names))
        return RawCells(labels, *matrix, batches, list(names)), genes


class _Reader:
    """Reads parts of one file within a budget."""

    def __init__(self, file: h5py.File, body: bytes, max_bytes: int) -> None:
        self._file, self._body = file, body
        self._max_bytes, self._left = max_bytes, max_bytes

    def group(self, name: str) -> h5py.Group:
        """Return one of the groups that every h5ad file has."""
        found = self._child(self._file, name, name)
        if not isinstance(found, h5py.Group):
            raise _not_h5ad(f"it has no group {name!r}")
        return found

    def index(self, frame: h5py.Group, where: str) -> list[str]:
        """Return the names of a dataframe's rows."""
        name = frame.attrs.get("_index")
        found = self._child(frame, name, where) if isinstance(name, str) else None
        if not isinstance(found, h5py.Dataset):
            raise _not_h5ad(f"{where} has no index")
        return self._strings(found, f"{where}/{name}")

    def column(self, obs: h5py.Group, key: str, option: str, n_cells: int) -> list[str | None]:
        """Return a column of obs as strings, None where a value is missing."""
        where = f"obs/{key}"
        found = self._child(obs, key, where)
        if found is None:
            known = ", ".join(repr(name) for name in list(obs)[:10] if isinstance(name, str))
            raise RequestError(
                f"obs has no column {key!r}",
                f"name one with {option}; there are {known}",
                *(422, "invalid_request"),
            )
        values = self._values(found, where)
        if len(values) != n_cells:
            raise _not_h5ad(f"{where} has {len(values)} rows and there are {n_cells} cells")
        return values

    def matrix(
        self, layer: str | None, shape: tuple[int, int], where: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """Return counts as CSR arrays, their values not yet checked."""
        parent = self._file if layer is None else self.group("layers")
        found = self._child(parent, "X" if layer is None else layer, where)
        if found is None:
            fix = "name a layer with counts, as ?layer=NAME" if layer is None else "leave layer out"
            raise RequestError(f"the file has no {where}", fix, 422, "invalid_request")
        if isinstance(found, h5py.Dataset):
            dense = self._array(found, where, "biuf", 2)
            _same_shape(dense.shape, shape, where)
            rows, columns = np.nonzero(dense)
            ends = np.searchsorted(rows, np.arange(shape[0] + 1))
            return ends.astype(np.int64), columns.astype(np.int64), dense[rows, columns]
        return self._sparse(found, shape, where)

    def _sparse(
        self, group: Any, shape: tuple[int, int], where: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        kind = group.attrs.get("encoding-type")
        if kind not in ("csr_matrix", "csc_matrix"):
            raise _not_h5ad(f"{where} is neither a matrix nor a sparse one")
        said = np.asarray(group.attrs.get("shape", ())).tolist()
        _same_shape(tuple(said) if isinstance(said, list) else (), shape, where)
        parts = [self._child(group, name, where) for name in ("indptr", "indices", "data")]
        if not all(isinstance(part, h5py.Dataset) for part in parts):
            raise _not_h5ad(f"{where} lacks indptr, indices or data")
        indptr, indices, data = (
            self._array(part, where, kinds, 1)
            for part, kinds in zip(parts, ("iu", "iu", "biuf"), strict=True)
        )
        along, across = shape if kind == "csr_matrix" else shape[::-1]
        indptr, indices = indptr.astype(np.int64), indices.astype(np.int64)
        _fit_together(indptr, indices, data, along, across, where)
        if kind == "csr_matrix":
            return indptr, indices, data
        order = np.argsort(indices, kind="stable")
        columns = np.repeat(np.arange(along), np.diff(indptr))[order]
        ends = np.searchsorted(indices[order], np.arange(across + 1))
        return ends.astype(np.int64), columns, data[order]

    def _values(self, found: Any, where: str) -> list[str | None]:
        """Return strings of a column in any of anndata's encodings."""
        if isinstance(found, h5py.Dataset):
            return [*self._texts(found, where)]
        kind = found.attrs.get("encoding-type")
        if kind == "categorical":
            categories, codes = (self._part(found, n, where) for n in ("categories", "codes"))
            names = self._texts(categories, where)
            numbers = self._array(codes, where, "iu", 1).astype(np.int64)
            if numbers.size and not -1 <= numbers.min() <= numbers.max() < len(names):
                raise _not_h5ad(f"{where} has codes without a category")
            return [None if code < 0 else names[code] for code in numbers.tolist()]
        if kind in ("nullable-string-array", "nullable-integer", "nullable-boolean"):
            values, masked = (self._part(found, n, where) for n in ("values", "mask"))
            mask = self._array(masked, where, "b", 1).tolist()
            texts = self._texts(values, where)
            if len(mask) != len(texts):
                raise _not_h5ad(f"{where} has {len(mask)} marks for {len(texts)} values")
            return [None if no else text for text, no in zip(texts, mask, strict=True)]
        raise _not_h5ad(f"{where} is encoded as {kind!r:.60}, which is not understood")

    def _part(self, group: h5py.Group, name: str, where: str) -> h5py.Dataset:
        found = self._child(group, name, where)
        if not isinstance(found, h5py.Dataset):
            raise _not_h5ad(f"{where} has no {name}")
        return found

    def _texts(self, dataset: h5py.Dataset, where: str) -> Sequence[str]:
        if dataset.dtype.kind in "biu":
            return [str(value) for value in self._array(dataset, where, "biu", 1).tolist()]
        return self._strings(dataset, where)

    def _strings(self, dataset: h5py.Dataset, where: str) -> list[str]:
        """Read strings a part at a time: what they take stands nowhere before they are read."""
        if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
            raise RequestError(
                f"{where} is of type {dataset.dtype}", "make it strings", 422, "invalid_request"
            )
        self._check(dataset, where, _REFERENCE_BYTES + dataset.dtype.itemsize)
        texts: list[str] = []
        for start in range(0, len(dataset), _STRINGS_AT_A_TIME):
            part = self._read(dataset, slice(start, start + _STRINGS_AT_A_TIME), where)
            self._spend(sum(map(len, part.tolist())), where)
            texts += part.tolist()
        return texts

    def _array(self, dataset: h5py.Dataset, where: str, kinds: str, n_axes: int) -> NDArray[Any]:
        if dataset.dtype.kind not in kinds or dataset.ndim != n_axes:
            raise RequestError(
                f"{where} holds an array of {dataset.ndim} axes of type {dataset.dtype}",
                f"make it {n_axes} axes of numbers",
                *(422, "invalid_request"),
            )
        self._check(dataset, where, dataset.dtype.itemsize)
        return self._read(dataset, slice(None), where)

    def _read(self, dataset: h5py.Dataset, rows: slice, where: str) -> NDArray[Any]:
        try:
            return (dataset.asstr() if dataset.dtype.kind in "OS" else dataset)[rows]
        except OSError as error:
            if _is_bomb(dataset, self._body):
                raise self._too_large(where) from error
            raise

    def _check(self, dataset: h5py.Dataset, where: str, item_bytes: int) -> None:
        """Refuse a dataset that stands elsewhere, cannot be decoded, or is too large."""
        if dataset.external or dataset.is_virtual:
            raise _elsewhere(where)
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        for number in filters:
            if number not in _FILTERS:
                raise RequestError(
                    f"{where} is compressed by HDF5's filter {number}",
                    "write it with gzip, lzf or without compression",
                    *(422, "invalid_request"),
                )
        # A chunk is decompressed whole, and may be declared larger than what it is part of.
        if dataset.chunks and prod(dataset.chunks) * dataset.dtype.itemsize > self._max_bytes:
            raise self._too_large(where)
        self._spend(prod(dataset.shape) * item_bytes, where)

    def _spend(self, n_bytes: int, where: str) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise self._too_large(where)

    def _too_large(self, where: str) -> RequestError:
        return RequestError(
            f"the file takes more than {self._max_bytes:,} bytes decompressed (at {where})",
            "send fewer cells a request",
            *(413, "body_too_large"),
        )

    def _child(self, group: h5py.Group, name: str, where: str) -> Any:
        """Return what stands in a group under a name, None for nothing; follow no links."""
        if name in ("", ".") or "/" in name:
            return None
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _elsewhere(where)
        return group[name]


def _is_bomb(dataset: h5py.Dataset, body: bytes) -> bool:
    """Return whether a chunk decompresses to more than it says, which HDF5 only calls a failure."""
    if dataset.compression != "gzip" or dataset.chunks is None:
        return False
    says = prod(dataset.chunks) * dataset.dtype.itemsize
    for number in range(dataset.id.get_num_chunks()):
        chunk = dataset.id.get_chunk_info(number)
        stored = body[chunk.byte_offset : chunk.byte_offset + chunk.size]
        with suppress(zlib.error):
            if len(zlib.decompressobj().decompress(stored, says + 1)) > says:
                return True
    return False


def _same_shape(found: tuple[int, ...], shape: tuple[int, int], where: str) -> None:
    if found != shape:
        raise _not_h5ad(f"{where} is of shape {found}, obs and var of {shape}")


def _fit_together(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int64],
    data: NDArray[Any],
    n_along: int,
    n_across: int,
    where: str,
) -> None:
    good = (
        len(indptr) == n_along + 1
        and len(indices) == len(data) == indptr[-1]
        and indptr[0] == 0
        and bool((np.diff(indptr) >= 0).all())
    )
    if not good:
        raise RequestError(
            f"indptr, indices and data of {where} do not fit together",
            "write the file with anndata",
            *(422, "ragged_arrays"),
        )
    outside = np.flatnonzero((indices < 0) | (indices >= n_across))
    if outside.size:
        raise RequestError(
            f"{where}/indices[{outside[0]}] is {indices[outside[0]]}",
            f"give indices from 0 to {n_across - 1}",
            *(422, "unknown_gene"),
        )


def _not_h5ad(problem: str) -> RequestError:
    return RequestError(
        f"the body is no h5ad file that is understood: {problem}",
        "write it with anndata 0.8 or later",
        *(400, "undecodable"),
    )


def _elsewhere(where: str) -> RequestError:
    return RequestError(
        f"{where} is a link, or its values stand in another file",
        "send a file that holds its own values, as anndata writes it",
        *(400, "undecodable"),
    )
