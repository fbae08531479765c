"""Read the cells of an uploaded h5ad file with the reader of `prepare`."""

from __future__ import annotations

import io
from dataclasses import dataclass

import h5py
import numpy as np
from scipy import sparse

from rayvaec.data.inputs.align import (
    align_columns,
    check_offsets,
    check_positions,
    place_in_csr,
)
from rayvaec.data.inputs.counts import as_counts
from rayvaec.data.inputs.elements import AnnDataGroup, Matrix
from rayvaec.data.inputs.frame import Column
from rayvaec.data.inputs.obs import refuse_missing_values
from rayvaec.errors import CountsError, FormatError, UndecodableError, UnprocessableError
from rayvaec.protocol import RawCells
from rayvaec.serving.decoding.h5ad.access import UploadAccess

FILE, LAYER_OPTION = "the file", "?layer="
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


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
        Layer with the counts; X by default, ``"raw"`` for `AnnData.raw`.
    """

    labels_key: str
    batch_key: str | None = None
    layer: str | None = None


class Upload:
    """An uploaded file, as the checks of `rayvaec.data.inputs.obs` see a part of some data.

    Parameters
    ----------
    root : h5py.File
        The file.
    access : UploadAccess
        What reads it.
    layer : str, optional
        Layer with the counts.
    """

    place = FILE

    def __init__(self, root: h5py.File, access: UploadAccess, layer: str | None) -> None:
        self._layer = layer
        self._group = AnnDataGroup(root, access, LAYER_OPTION)
        self._matrix, var = self._group.matrix(layer)
        self._names, self.genes = self._group.obs.names(), var.names()
        self.n_cells, self.n_genes = len(self._names), len(self.genes)

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of some cells."""
        return self._names[start:stop]

    def column(self, key: str) -> Column:
        """Read an obs column."""
        return self._group.obs.column(key)

    def values(self, key: str, what: str) -> list[str | None]:
        """Return a column's value of every cell, and refuse one in which some have none."""
        column = self.column(key)
        refuse_missing_values(self, column, key, what)
        return [column.categories[code] for code in column.codes.tolist()]

    def counts(self) -> sparse.csr_array:
        """Return the counts, every value checked, genes of a cell in order and once."""
        x = _in_memory(self._matrix, (self.n_cells, self.n_genes))
        locate = place_in_csr(x.indptr, x.indices, self._names.__getitem__, self.genes)
        layers = [name for name in self._group.layers if name != self._layer]
        where = self._matrix.where
        x.data = as_counts(x.data, locate, where=where, layers=layers, option=LAYER_OPTION)
        return align_columns(x, np.arange(self.n_genes), self.n_genes)


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
    UndecodableError
        If it is not an h5ad file, is damaged or points elsewhere.
    PayloadTooLargeError
        If it takes too much memory.
    UnprocessableError
        If it has no such column or layer, a cell has no label, or a value is no count.
    OSError, RuntimeError, ...
        Whatever h5py raises on damaged files.
    """
    try:
        with h5py.File(io.BytesIO(body), "r") as file:
            upload = Upload(file, UploadAccess(FILE, body, max_bytes), columns.layer)
            x = upload.counts()
            batches = None
            if columns.batch_key is not None:
                batches = upload.values(columns.batch_key, "batch")
            cells = RawCells(
                labels=upload.values(columns.labels_key, "label"),
                indptr=x.indptr.astype(np.int64),
                indices=x.indices.astype(np.int64),
                counts=x.data,
                batches=batches,
                cell_ids=[*upload.names(0, upload.n_cells)],
            )
            return cells, upload.genes
    except FormatError as error:
        raise UndecodableError(error.detail, error.fix) from error
    except CountsError as error:
        raise UnprocessableError(error.detail, error.fix) from error


def _in_memory(matrix: Matrix, shape: tuple[int, int]) -> sparse.csr_array:
    """Read a whole matrix."""
    if matrix.encoding == "dense":
        return sparse.csr_array(matrix.values[:])
    is_csr = matrix.encoding == "csr"
    along, across = shape if is_csr else shape[::-1]
    indptr = matrix["indptr"][:].astype(np.int64)
    check_offsets(indptr, along, len(matrix["data"]), matrix.where)
    indices, data = matrix["indices"][:], matrix["data"][:]
    check_positions(indices, across, matrix.where)
    arrays = (data, indices, indptr)
    return sparse.csr_array(arrays, shape) if is_csr else sparse.csc_array(arrays, shape).tocsr()
