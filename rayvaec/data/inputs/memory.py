"""Reader of an AnnData in memory: counts, names and obs columns, all checked.

In-process analyses and the HTTP client both read through it. The client imports neither torch nor
Ray, so nothing here may. Whatever is returned has memory of its own: the AnnData is never changed.
"""

from __future__ import annotations

import logging
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pandas.api.types import is_list_like
from scipy import sparse

from rayvaec.data.inputs.align import canonical, check_offsets, check_positions, place_in_csr
from rayvaec.data.inputs.cell_names import tell_apart
from rayvaec.data.inputs.counts import as_counts, check_dtype
from rayvaec.errors import ConfigError, CountsError
from rayvaec.util.messages import join_names, missing_values, refuse_duplicates, suggest

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger("rayvaec")

RAW = "raw"  # as a layer: the matrix and the genes of `AnnData.raw`


class InMemory:
    """An AnnData in memory, or opened with ``backed="r"``, as counts and names.

    Parameters
    ----------
    adata : AnnData, [n_cells, n_genes]
        Raw counts: CSR, CSC or dense.
    layer : str, optional
        Layer with the counts; X by default, ``"raw"`` for ``adata.raw`` where no layer has that
        name.
    rows : array-like of int or bool, optional
        Positions of the cells to read, in that order, or a mask of them; all by default.
    where : str
        What messages call `adata`.

    Attributes
    ----------
    n_cells : int
        Number of cells to read.

    Raises
    ------
    ConfigError
        If `rows` leads outside `adata`.
    CountsError
        If `adata` is not an AnnData in memory, or has no such layer.
    """

    def __init__(
        self,
        adata: AnnData,
        layer: str | None = None,
        *,
        rows: ArrayLike | None = None,
        where: str = "adata",
    ) -> None:
        refuse_other_types(adata, where)
        self._adata, self._layer, self._where = adata, layer, where
        self._rows = None if rows is None else positions(rows, adata.n_obs, "indices")
        self._check_layer()
        self.n_cells = adata.n_obs if self._rows is None else len(self._rows)

    @property
    def where(self) -> str:
        """What messages call the matrix."""
        if self._layer is None:
            return f"{self._where}.X"
        return f"{self._where}.raw.X" if self._is_raw else f"{self._where}.layers[{self._layer!r}]"

    @property
    def layers(self) -> list[str]:
        """Names of the layers, other than the one that is read."""
        names = [str(name) for name in self._adata.layers]
        if self._adata.raw is not None and RAW not in names:
            names.append(RAW)
        return [name for name in names if name != self._layer]

    @property
    def _is_raw(self) -> bool:
        return self._layer == RAW and RAW not in self._adata.layers

    @cached_property
    def genes(self) -> list[str]:
        """Names of the matrix's columns, each of them once."""
        names = self._adata.raw.var_names if self._is_raw else self._adata.var_names
        genes = names.astype(str).tolist()
        refuse_duplicates(genes, "gene", self._where)
        return genes

    @cached_property
    def names(self) -> list[str]:
        """Names of the cells, each of them once: repeated ones are told apart by occurrence.

        Which occurrence a cell is follows from all cells of the AnnData, not from the chosen ones;
        a cell that is chosen several times counts as several.
        """
        names = tell_apart(self._adata.obs_names.astype(str).tolist(), f"{self._where}.obs_names")
        if self._rows is None:
            return names
        return tell_apart([names[row] for row in self._rows.tolist()])

    def column(self, key: str) -> list[str | None]:
        """Return the names that an obs column gives the cells.

        Parameters
        ----------
        key : str
            The column: text, numbers, truth values or a categorical of those; numbers are read as
            their text.

        Returns
        -------
        list of str or None
            One per cell; None where the value is missing.

        Raises
        ------
        CountsError
            If there is no such column, there are two, or a value is not a name.
        """
        values = self._obs_column(key)
        try:
            # pandas has no index of float16.
            coded = pd.Categorical(values.astype("f4") if values.dtype == np.float16 else values)
        except TypeError as error:  # lists, arrays and the like
            raise self._not_names(key, values) from error
        if any(map(is_list_like, coded.categories)):  # tuples
            raise self._not_names(key, values)
        names = np.array([*map(_as_text, coded.categories.to_numpy()), None], object)
        self._report_unused(key, coded.codes, names[:-1])
        return names[coded.codes if self._rows is None else coded.codes[self._rows]].tolist()

    def named_column(self, key: str, what: str) -> list[str]:
        """Return a column without missing values; `what` says in messages what a value is."""
        names = self.column(key)
        present = [name for name in names if name is not None]
        if len(present) < len(names):
            raise missing_values(names, what, f"{self._where}.obs[{key!r}]", self.names)
        return present

    def counts(self) -> sparse.csr_array:
        """Return the counts of the cells.

        Returns
        -------
        csr_array[n_cells, n_genes] of int32
            Genes ascending in every cell, without duplicates or zeros, in memory of its own.

        Raises
        ------
        CountsError
            If the matrix is not in memory or contradicts itself, or a value is not a count.
        """
        chosen, back = self._adata, None
        if self._rows is not None:
            # Files are read in ascending order, each row once.
            ascending, back = np.unique(self._rows, return_inverse=True)
            chosen = self._adata[ascending]
        x = _as_csr(self._matrix(chosen), self.where)
        names = chosen.obs_names
        values = as_counts(
            x.data,
            place_in_csr(x.indptr, x.indices, lambda row: str(names[row]), self.genes),
            where=self.where,
            layers=self.layers,
            option="layer=",
        )
        own = values.astype(np.int32), x.indices.astype(np.int32), x.indptr.astype(np.int64)
        x = canonical(sparse.csr_array(own, shape=x.shape))
        if back is None or np.array_equal(back, np.arange(len(back))):
            return x
        return x[back]

    def _matrix(self, adata: AnnData) -> Any:
        if self._is_raw:
            return adata.raw.X
        return adata.X if self._layer is None else adata.layers[self._layer]

    def _check_layer(self) -> None:
        """Refuse a layer that does not exist, or an X that does not."""
        layer, layers = self._layer, self.layers
        if layer is None:
            if self._adata.X is None:
                raise CountsError(f"{self._where} has no X", f"name a layer: {join_names(layers)}")
        elif layer not in self._adata.layers and (layer != RAW or self._adata.raw is None):
            fix = f"the layers are {suggest(str(layer), layers)}"
            if not layers:
                fix = "there are no layers: leave out layer= to read X"
            raise CountsError(f"{self._where} has no layer {layer!r}", fix)

    def _obs_column(self, key: str) -> pd.Series[Any]:
        obs = self._adata.obs
        if key not in obs:
            fix = f"the columns are {suggest(str(key), list(map(str, obs.columns)))}"
            if key in self._adata.obsm:
                fix = f"obsm has {key!r}: make it a column with one name for each cell"
            raise CountsError(f"{self._where}.obs has no column {key!r}", fix)
        if isinstance(obs[key], pd.DataFrame):
            raise CountsError(f"{self._where}.obs has column {key!r} more than once", "drop one")
        return obs[key]

    def _not_names(self, key: str, values: pd.Series[Any]) -> CountsError:
        """Describe the first value that is a list or the like."""
        at = next(row for row, value in enumerate(values) if is_list_like(value))
        return CountsError(
            f"{self._where}.obs[{key!r}] holds {values.iloc[at]!r:.60} for cell "
            f"{self._adata.obs_names[at]}, which is not a name",
            "give every cell one name, as text or a categorical (one-hot rows have no names)",
        )

    def _report_unused(self, key: str, codes: NDArray[Any], names: NDArray[Any]) -> None:
        unused = np.bincount(codes[codes >= 0], minlength=len(names)) == 0
        if unused.any():
            logger.info(
                "%s.obs[%r]: %d categories have no cells and are left out: %s",
                self._where,
                key,
                unused.sum(),
                join_names(names[unused]),
            )


def _as_text(value: Any) -> str:
    """Return a value as files are read: numbers in numpy's shortest form, bytes decoded."""
    return value.decode() if isinstance(value, bytes) else str(value)


def refuse_other_types(adata: Any, where: str) -> None:
    """Refuse what is not an AnnData with its annotation in memory.

    Parameters
    ----------
    adata : object
        What was passed.
    where : str
        What messages call it.

    Raises
    ------
    CountsError
        That says how to make an AnnData of it.
    """
    from anndata import AnnData

    kind = type(adata).__name__
    if isinstance(adata, AnnData):
        if isinstance(adata.obs, pd.DataFrame):
            return
        raise CountsError(f"{where} is opened lazily", "read it: adata.to_memory()")
    if isinstance(adata, str | os.PathLike):
        fix = "read it first, such as with anndata.read_h5ad"
        raise CountsError(f"{where} is the path {os.fspath(adata)!r}, not an AnnData", fix)
    fix = "pass an AnnData of cells x genes"
    if kind == "MuData":
        fix = f"pass one of its modalities: {join_names(map(repr, adata.mod))}"
    elif isinstance(adata, pd.DataFrame | np.ndarray) or sparse.issparse(adata):
        fix = "pass anndata.AnnData(X, obs, var): genes by name in var, labels in obs"
    raise CountsError(f"{where} is a {kind}, not an AnnData", fix)


def positions(which: ArrayLike, n_cells: int, name: str) -> NDArray[np.int64]:
    """Return the positions of chosen cells.

    Parameters
    ----------
    which : array-like of int or bool
        Positions, or a mask of all cells.
    n_cells : int
        Number of cells to choose from.
    name : str
        The argument's name, for the message.

    Returns
    -------
    array[n_chosen] of int64

    Raises
    ------
    ConfigError
        If it is neither a mask of all cells nor positions of some.
    """
    given = np.asarray(which)
    if given.dtype.kind == "b" and given.shape == (n_cells,):
        return np.flatnonzero(given)
    given = np.atleast_1d(given)
    if given.size == 0 and given.ndim == 1:
        return np.zeros(0, np.int64)
    if given.dtype.kind in "iu" and given.ndim == 1:
        outside = (given < 0) | (given >= n_cells)
        if not outside.any():
            return given.astype(np.int64)
        found = f"{name} has the position {given[outside][0]}, and there are {n_cells} cells"
    else:
        found = f"{name} is an array of {given.dtype} of shape {given.shape} for {n_cells} cells"
    fix = f"give {n_cells} truth values, or whole numbers from 0 to {n_cells - 1}"
    if given.dtype.kind in "OUT":
        fix += ", such as adata.obs_names.get_indexer(names)"
    raise ConfigError(found, fix)


def _as_csr(given: Any, where: str) -> sparse.csr_array:
    """Return a matrix as CSR, which may share its memory, in a type that scipy knows."""
    matrix: Any = given
    if hasattr(matrix, "to_memory"):  # sparse, of an AnnData opened with backed="r"
        matrix = matrix.to_memory()
    elif type(matrix).__module__.split(".")[0] in ("h5py", "zarr"):  # dense, of the same
        matrix = matrix[...]
    # AnnData allows no other formats.
    if sparse.issparse(matrix) and getattr(matrix, "format", None) in ("csr", "csc"):
        return _csr_of_sparse(matrix, where)
    if isinstance(matrix, np.ma.MaskedArray):
        raise CountsError(f"{where} is a masked array", "fill it: adata.X = adata.X.filled(0)")
    if not isinstance(matrix, np.ndarray):
        kind = f"{type(matrix).__module__}.{type(matrix).__qualname__}"
        fix = "make it a numpy array or a scipy CSR matrix"
        if hasattr(matrix, "compute"):  # dask
            fix = "bring it into memory: adata.to_memory(), or adata.X = adata.X.compute()"
        raise CountsError(f"{where} is a {kind}", fix)
    return sparse.csr_array(_known_type(np.atleast_2d(matrix), where))


def _csr_of_sparse(matrix: Any, where: str) -> sparse.csr_array:
    """Return a CSR or CSC matrix as CSR once its arrays fit together."""
    by_row = matrix.format == "csr"
    n_major, n_minor = matrix.shape if by_row else matrix.shape[::-1]
    stored = int(matrix.indptr[-1])  # scipy allows for more room
    values, indices = matrix.data[:stored], matrix.indices[:stored]
    check_offsets(matrix.indptr, n_major, min(len(values), len(indices)), where)
    check_positions(indices, n_minor, where)
    make: Any = sparse.csr_array if by_row else sparse.csc_array
    parts = _known_type(values, where), indices, matrix.indptr
    return sparse.csr_array(make(parts, shape=matrix.shape))


def _known_type(values: NDArray[Any], where: str) -> NDArray[Any]:
    """Return values in a type that scipy computes with: native, and no float16."""
    check_dtype(values.dtype, where)
    if values.dtype.itemsize == 2 and values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)
