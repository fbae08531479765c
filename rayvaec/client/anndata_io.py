"""AnnData to request cells, and responses to AnnData, CSR matrices or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import BrokenAnswerError
from rayvaec.protocol.requests import RawCells
from rayvaec.protocol.responses import DrawnRows

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

Form = Literal["adata", "csr", "array"]


def cells_of(
    adata: AnnData, labels_key: str, batch_key: str | None, layer: str | None
) -> tuple[RawCells, list[str]]:
    """Take cells and gene names out of an AnnData, checked as in process.

    Parameters
    ----------
    adata : AnnData
        Counts of cells x genes, sparse or dense.
    labels_key : str
        Column of obs with the labels.
    batch_key : str, optional
        Column of obs with the batches.
    layer : str, optional
        Layer with the counts; X by default, ``"raw"`` for ``adata.raw``.

    Returns
    -------
    tuple of RawCells and list of str
        Cells with names of their own: repeated ones are told apart by their occurrence.

    Raises
    ------
    CountsError
        If `adata` is not an AnnData in memory, a column or layer does not exist, a label is
        missing, or a value is not a count.
    """
    from rayvaec.data.inputs.memory import InMemory

    source = InMemory(adata, layer)
    x = source.counts()
    cells = RawCells(
        labels=list(source.named_column(labels_key, "label")),
        indptr=x.indptr.astype(np.int64),
        indices=x.indices.astype(np.int64),
        counts=x.data,
        batches=None if batch_key is None else list(source.named_column(batch_key, "batch")),
        cell_ids=list(source.names),
    )
    return cells, source.genes


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
        raise BrokenAnswerError(
            f"the answer's rows are not {n_cells} cells of {n_samples} draws in order",
            "use the same release of rayvaec on client and server",
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
