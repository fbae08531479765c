"""Cells of a request: checked, and brought into the model's gene order and codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.align import align_columns, place_in_csr, refuse_missing
from rayvaec.data.inputs.counts import as_counts
from rayvaec.data.registry import Registry, inverse
from rayvaec.errors import CountsError, UnprocessableError
from rayvaec.inference.cells import Cells
from rayvaec.kernels.rng import cell_keys, position_keys
from rayvaec.protocol import RawCells
from rayvaec.serving.http.schemas import Counts
from rayvaec.util.messages import join_names, suggest

RAGGED, BAD_COUNTS, UNKNOWN_GENE = "ragged_arrays", "bad_counts", "unknown_gene"


@dataclass(frozen=True)
class Aligned:
    """Cells that the model can take, and how the request's genes differed from its own.

    Parameters
    ----------
    cells : Cells
        In the model's gene order and codes.
    missing, extra : tuple of str
        Genes that only the model has, and that only the request has.
    """

    cells: Cells
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def raw_counts(
    counts: Counts, n_columns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Turn a JSON request's counts into CSR arrays.

    Parameters
    ----------
    counts : Counts
        As validated by its schema.
    n_columns : int
        Number of genes that a dense row must have.

    Returns
    -------
    tuple of arrays
        indptr, indices and counts, not yet checked.

    Raises
    ------
    UnprocessableError
        For dense rows of another length.
    """
    form: Any = counts  # all of one form is there, as its schema has it
    if form.dense is None:
        return form.indptr, form.indices, form.counts
    lengths, values = form.dense
    wrong = np.flatnonzero(lengths != n_columns)
    if wrong.size:
        raise UnprocessableError(
            f"cells.dense[{wrong[0]}] has {lengths[wrong[0]]} counts for {n_columns} genes",
            "give one count per gene, zeros too, or name the columns in genes",
            error=RAGGED,
        )
    position = np.flatnonzero(values)
    rows, columns = np.divmod(position, max(n_columns, 1))
    indptr = np.searchsorted(rows, np.arange(len(lengths) + 1))
    return indptr.astype(np.int64), columns, values[position]


def align_cells(
    raw: RawCells, genes: Sequence[str] | None, allow_missing: bool, registry: Registry
) -> Aligned:
    """Check a request's cells and bring them into the model's genes and codes.

    Parameters
    ----------
    raw : RawCells
        The cells as the request states them.
    genes : sequence of str, optional
        Names of their columns; without names these are the model's genes.
    allow_missing : bool
        Whether genes that `genes` lacks count as zero.
    registry : Registry
        The model's names.

    Returns
    -------
    Aligned

    Raises
    ------
    UnprocessableError
        It names the value, its place and what to do.
    """
    columns = registry.genes if genes is None else tuple(genes)
    n_cells = _check_shape(raw)
    names = _cell_names(raw.cell_ids, n_cells)
    _check_indices(raw, names, len(columns))
    counts = _checked_counts(raw, names, columns)
    x = sparse.csr_array(
        # Copies: what stands in an Arrow body cannot be written to, and is sorted in place here.
        (counts.copy(), raw.indices.astype(np.int32), raw.indptr.copy()),
        shape=(n_cells, len(columns)),
    )
    target, missing, extra = _align_genes(registry, columns, genes is not None, allow_missing)
    try:
        x = align_columns(x, target, registry.n_genes)
    except CountsError as error:
        raise UnprocessableError(f"cells: {error.detail}", error.fix, error=BAD_COUNTS) from error
    cells = Cells(
        indptr=x.indptr.astype(np.int64),
        indices=x.indices.astype(np.int32, copy=False),
        counts=x.data.astype(np.int32, copy=False),
        labels=label_codes(raw.labels, n_cells, registry, raw.cell_ids),
        batches=batch_codes(raw.batches, n_cells, registry, raw.cell_ids),
        keys=keys_of(raw.cell_ids, n_cells),
    )
    return Aligned(cells, missing, extra)


def label_codes(
    labels: Sequence[str | None],
    n_cells: int,
    registry: Registry,
    cell_ids: Sequence[str | None] | None = None,
) -> NDArray[np.int64]:
    """Turn a request's labels into codes.

    Parameters
    ----------
    labels : sequence of str or None
        One per cell.
    n_cells : int
        How many there must be.
    registry : Registry
        The model's names.
    cell_ids : sequence of str, optional
        Names of the cells, for messages.

    Returns
    -------
    array[n_cells] of int64

    Raises
    ------
    UnprocessableError
        For another number of labels, or an unknown one.
    """
    _check_length("labels", labels, n_cells)
    try:
        return registry.encode_labels(labels, "labels", _names_in_messages(cell_ids, n_cells))
    except CountsError as error:
        raise UnprocessableError(error.detail, error.fix, error="unknown_label") from error


def batch_codes(
    batches: Sequence[str | None] | None,
    n_cells: int,
    registry: Registry,
    cell_ids: Sequence[str | None] | None = None,
) -> NDArray[np.int64] | None:
    """Turn a request's batches into codes, None for a model without batches.

    Parameters
    ----------
    batches : sequence of str or None, optional
        One per cell; ignored where the model has no batches.
    n_cells : int
        How many there must be.
    registry : Registry
        The model's names.
    cell_ids : sequence of str, optional
        Names of the cells, for messages.

    Returns
    -------
    array[n_cells] of int64, or None

    Raises
    ------
    UnprocessableError
        For missing, unknown, or another number of batches.
    """
    if registry.batch_key is None:
        return None
    if batches is None:
        raise UnprocessableError(
            "batches is missing, and the model tells experimental batches apart",
            f"give one per cell of {join_names(registry.batches)}",
            error="unknown_batch",
        )
    _check_length("batches", batches, n_cells)
    try:
        return registry.encode_batches(batches, "batches", _names_in_messages(cell_ids, n_cells))
    except CountsError as error:
        raise UnprocessableError(error.detail, error.fix, error="unknown_batch") from error


def keys_of(cell_ids: Sequence[str | None] | None, n_cells: int) -> NDArray[np.uint64]:
    """Return the keys of the cells' random numbers: from their names, or their positions.

    Parameters
    ----------
    cell_ids : sequence of str or None, optional
        One per cell.
    n_cells : int
        How many there must be.

    Returns
    -------
    array[n_cells] of uint64

    Raises
    ------
    UnprocessableError
        For another number of names, one that is missing, or one that occurs twice.
    """
    if cell_ids is None:
        return position_keys(0, n_cells)
    _check_length("cell_ids", cell_ids, n_cells)
    names = [name for name in cell_ids if name is not None]
    if len(names) != n_cells:
        raise UnprocessableError(
            f"cell_ids has no name at position {list(cell_ids).index(None)}",
            "name every cell, or leave cell_ids out",
        )
    if len(set(names)) != n_cells:
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UnprocessableError(
            f"cell_ids has {twice!r} more than once; both cells would get the same random numbers",
            "make the names unique, such as with adata.obs_names_make_unique()",
        )
    return cell_keys(names)


def gene_columns(out_genes: Sequence[str] | None, registry: Registry) -> NDArray[np.int64] | None:
    """Find the genes that an answer shall hold.

    Parameters
    ----------
    out_genes : sequence of str, optional
        Their names, in the answer's order; all of the model's by default.
    registry : Registry
        The model's names.

    Returns
    -------
    array[n_out] of int64, or None for all

    Raises
    ------
    UnprocessableError
        For a gene that the model does not have, or that is named twice.
    """
    if out_genes is None:
        return None
    code = {gene: column for column, gene in enumerate(registry.genes)}
    unknown = [gene for gene in out_genes if gene not in code]
    if unknown:
        raise UnprocessableError(
            f"out_genes has {len(unknown)} genes that the model lacks: {join_names(unknown)}",
            f"its genes are {suggest(unknown[0], registry.genes)}",
            error=UNKNOWN_GENE,
        )
    if len(set(out_genes)) != len(out_genes):
        raise UnprocessableError("out_genes names a gene twice", "name it once", error=UNKNOWN_GENE)
    return np.array([code[gene] for gene in out_genes], np.int64)


def _check_shape(raw: RawCells) -> int:
    """Check that the arrays fit together; return the number of cells."""
    indptr, n_values = raw.indptr, len(raw.indices)
    if len(raw.counts) != n_values:
        raise UnprocessableError(
            f"cells.indices has {n_values} entries and cells.counts has {len(raw.counts)}",
            "give one gene index for each count",
            error=RAGGED,
        )
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != n_values:
        found = f"starts at {indptr[0]} and ends at {indptr[-1]}" if len(indptr) else "is empty"
        raise UnprocessableError(
            f"cells.indptr {found}, and there are {n_values} counts",
            f"let it start at 0 and end at {n_values}",
            error=RAGGED,
        )
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if falls.size:
        at = int(falls[0]) + 1
        raise UnprocessableError(
            f"cells.indptr[{at}] is {indptr[at]}, below the {indptr[at - 1]} before it",
            "each cell's end must not be below its beginning",
            error=RAGGED,
        )
    return len(indptr) - 1


def _check_length(name: str, values: Sequence[Any], n_cells: int) -> None:
    if len(values) != n_cells:
        raise UnprocessableError(
            f"{name} has {len(values)} entries for {n_cells} cells",
            "give one per cell",
            error=RAGGED,
        )


def _names_in_messages(cell_ids: Sequence[str | None] | None, n_cells: int) -> Sequence[str] | None:
    """Return the names of the cells, None where not each of them has one."""
    if cell_ids is None or len(cell_ids) != n_cells or None in cell_ids:
        return None
    return cast("Sequence[str]", cell_ids)


def _cell_names(cell_ids: Sequence[str | None] | None, n_cells: int) -> Sequence[Any]:
    """Return what to call the cells in messages."""
    return _names_in_messages(cell_ids, n_cells) or range(n_cells)


def _check_indices(raw: RawCells, names: Sequence[Any], n_columns: int) -> None:
    outside = np.flatnonzero((raw.indices < 0) | (raw.indices >= n_columns))
    if outside.size:
        position = int(outside[0])
        cell = int(np.searchsorted(raw.indptr, position, side="right")) - 1
        raise UnprocessableError(
            f"gene index {raw.indices[position]} of cell {names[cell]} (value {position}) is out "
            f"of range, there are {n_columns} genes",
            f"give indices from 0 to {n_columns - 1}",
            error=UNKNOWN_GENE,
        )


def _checked_counts(
    raw: RawCells, names: Sequence[Any], columns: Sequence[str]
) -> NDArray[np.int32]:
    locate = place_in_csr(raw.indptr, raw.indices, lambda row: str(names[row]), columns)
    try:
        return as_counts(raw.counts, locate, where="cells")
    except CountsError as error:
        raise UnprocessableError(error.detail, "send raw counts", error=BAD_COUNTS) from error


def _align_genes(
    registry: Registry, columns: Sequence[str], named: bool, allow_missing: bool
) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[str, ...]]:
    """Return where each column goes, and the genes that are missing or extra."""
    if not named:
        return np.arange(registry.n_genes), (), ()
    try:
        found = registry.align_genes(columns, "genes")
        refuse_missing(registry.genes, found.missing, columns, allow_missing, "genes")
    except CountsError as error:
        fix = error.fix.replace("pass allow_missing=True", "set allow_missing to true")
        raise UnprocessableError(error.detail, fix, error=UNKNOWN_GENE) from error
    return inverse(found.columns, len(columns)), found.missing, found.extra
