"""One AnnData in HDF5 or Zarr: its frames and matrices.

All encodings that anndata 0.6 to 0.13 wrote are understood. h5py's and zarr's groups have the same
face, so this one reader serves files, folders, stores on a web server and uploads; what it may
touch is decided by an `Access`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from rayvaec.data.inputs.access import Access
from rayvaec.data.inputs.array_view import REWRITE, ArrayView
from rayvaec.data.inputs.frame import Frame
from rayvaec.errors import CountsError, FormatError
from rayvaec.util.messages import join_names, suggest

RAW = "raw"
"""As a layer: the matrix and the genes of `AnnData.raw`."""

USUAL_LAYERS = ("counts", "raw_counts", "count")
"""Layers to look for in a store whose groups cannot be listed."""

_ENCODINGS = {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}


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
                    raise FormatError(f"{where} lacks {name}", REWRITE)
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
                REWRITE,
            )
        if rows is not None and len(self["indptr"]) != rows + 1:
            raise FormatError(
                f"{self.where} has {len(self['indptr']) - 1} row offsets for {rows}", REWRITE
            )

    def _check_parts(self) -> None:
        shapes = {name: array.shape for name, array in self._parts.items()}
        flat = all(len(shape) == 1 for shape in shapes.values())
        if not flat or shapes["data"] != shapes["indices"]:
            raise FormatError(
                f"{self.where} has arrays that do not fit together: data {shapes['data']}, indices "
                f"{shapes['indices']}, indptr {shapes['indptr']}",
                REWRITE,
            )
        for name in ("indices", "indptr"):
            if self[name].dtype.kind not in "iu":
                raise FormatError(f"{self.where} has {name} of type {self[name].dtype}", REWRITE)


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
                    f"use {self._option}NAME (layers: {join_names(self.layers)})",
                )
            return element, self._var
        layers = child(root, "layers")
        element = None if layers is None else child(layers, layer)
        if element is not None:
            return element, self._var
        raw = self._raw() if layer == RAW else None
        if raw is not None:
            return raw
        known = f"the layers are {suggest(layer, self.layers)}"
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
            f"{where} is a MuData of the modalities {join_names(names)}",
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
