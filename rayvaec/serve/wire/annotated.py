"""The client's side of the wire: AnnData to cells, and answers to AnnData, matrices or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import CountsError, RequestError
from rayvaec.serve.wire.answers import DrawnRows
from rayvaec.serve.wire.cells import RawCells

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

Form = Literal["adata", "csr", "array"]


def cells_of(
    adata: AnnData, labels_key: str, batch_key: str | None, layer: str | None
) -> tuple[RawCells, list[str]]:
    """Take cells and gene names out of an AnnData; the server checks their values.

    Parameters
    ----------
    adata : AnnData
        Counts of cells x genes, sparse or dense.
    labels_key : str
        Column of obs with the labels.
    batch_key : str, optional
        Column of obs with the batches.
    layer : str, optional
        Layer with the counts; X by default.

    Returns
    -------
    tuple of RawCells and list of str

    Raises
    ------
    CountsError
        If a column or layer does not exist, or values are missing or not numbers.
    """
    from scipy import sparse

    if layer is not None and layer not in adata.layers:
        raise CountsError(f"adata has no layer {layer!r}", f"it has {_names(adata.layers)}")
    matrix: Any = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise CountsError("adata has no X", f"name a layer: {_names(adata.layers)}")
    if hasattr(matrix, "to_memory"):  # an AnnData opened with backed="r"
        matrix = matrix.to_memory()
    values: Any = matrix if sparse.issparse(matrix) else np.asarray(matrix)
    x = sparse.csr_array(values)
    if x.dtype.kind not in "buif":
        raise CountsError(f"adata holds values of type {x.dtype}", "counts must be numbers")
    if not x.has_canonical_format:
        x = x.copy()  # its arrays are the AnnData's own
        x.sum_duplicates()
    cells = RawCells(
        labels=_column(adata, labels_key),
        indptr=x.indptr.astype(np.int64),
        indices=x.indices.astype(np.int64),
        counts=x.data.astype(np.int8) if x.dtype.kind == "b" else x.data,
        batches=None if batch_key is None else _column(adata, batch_key),
        cell_ids=adata.obs_names.astype(str).tolist(),
    )
    return cells, adata.var_names.astype(str).tolist()


def rows_as(
    form: Form,
    rows: DrawnRows,
    facts: Mapping[str, Any],
    obs: pd.DataFrame,
    genes: Sequence[str],
) -> AnnData | list[csr_matrix] | NDArray[np.int32]:
    """Put drawn rows into the form that was asked for.

    Parameters
    ----------
    form : {"adata", "csr", "array"}
        Which.
    rows : DrawnRows
        All rows of the answer.
    facts : mapping
        What the answer says beside them.
    obs : DataFrame
        Of the cells.
    genes : sequence of str
        Names of the answer's columns.

    Returns
    -------
    AnnData, list of csr_matrix, or array[n_cells, n_genes, n_samples] of int32

    Raises
    ------
    RequestError
        If the rows are not those that the answer says it has.
    """
    from scipy import sparse

    n_cells, n_samples = facts["n_cells"], facts["n_samples"]
    in_order = np.array_equal(rows.cells, np.repeat(np.arange(n_cells), n_samples))
    if not in_order or not np.array_equal(rows.samples, np.tile(np.arange(n_samples), n_cells)):
        raise RequestError(
            f"the answer's rows are not {n_cells} cells of {n_samples} draws in order",
            "use the same release of rayvaec on client and server",
            *(502, "broken_answer"),
        )
    shape = (n_cells * n_samples, len(genes))
    every = sparse.csr_matrix((rows.counts, rows.indices, rows.indptr), shape=shape)
    draws = [every[sample::n_samples] for sample in range(n_samples)]
    if form == "csr":
        return draws
    if form == "array":
        counts = np.zeros((n_cells, len(genes), n_samples), np.int32)
        row = np.repeat(np.arange(len(rows.cells)), np.diff(rows.indptr))
        counts[rows.cells[row], rows.indices, rows.samples[row]] = rows.counts
        return counts
    layers = {f"sample_{sample}": draw for sample, draw in enumerate(draws)}
    return _annotated(layers, facts, obs, genes)


def moments_as(
    form: Form,
    moments: dict[str, NDArray[np.float32]],
    facts: Mapping[str, Any],
    obs: pd.DataFrame,
    genes: Sequence[str],
) -> AnnData | dict[str, NDArray[np.float32]]:
    """Put moments into the form that was asked for; parameters as in `rows_as`.

    Returns
    -------
    AnnData, or dict of arrays[n_cells, n_genes]
    """
    return _annotated(moments, facts, obs, genes) if form == "adata" else moments


def _annotated(
    layers: Mapping[str, Any], facts: Mapping[str, Any], obs: pd.DataFrame, genes: Sequence[str]
) -> AnnData:
    import anndata
    import pandas as pd

    said = {name: facts[name] for name in ("seed", "model_hash", "n_samples")}
    return anndata.AnnData(
        obs=obs.copy(), var=pd.DataFrame(index=list(genes)), layers=layers, uns={"rayvaec": said}
    )


def _column(adata: AnnData, key: str) -> list[str | None]:
    if key not in adata.obs:
        raise CountsError(
            f"adata.obs has no column {key!r}", f"the columns are {_names(adata.obs.columns)}"
        )
    column = adata.obs[key]
    missing = np.flatnonzero(column.isna())
    if missing.size:
        raise CountsError(
            f"adata.obs[{key!r}] has no value for {missing.size} of {len(column)} cells, the first "
            f"at position {missing[0]}",
            "remove these cells or give them one",
        )
    return column.astype(str).tolist()


def _names(names: Any) -> str:
    every = [str(name) for name in names]
    more = f" and {len(every) - 10} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more if every else "none"
