"""Labels and batches of all inputs: one set of names, and a code for every cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.reader import Column, Input
from rayvaec.data.names import listing
from rayvaec.errors import CountsError


def refuse_nothing(source: Input) -> None:
    """Refuse an input without cells or genes."""
    for n, what in ((source.n_cells, "cells"), (source.n_genes, "genes")):
        if n == 0:
            raise CountsError(f"{source.path} has no {what}", "leave this input out")


def read_labels(inputs: Sequence[Input], key: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Read the labels of all inputs.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    key : str
        The obs column.

    Returns
    -------
    tuple of str, and array[n_cells] of int64
        The labels, sorted, and their codes over the cells of all inputs.

    Raises
    ------
    CountsError
        If a cell has no label, a label has no cells, or one input holds fractions and another
        something else, so that the same value would get two names.
    """
    columns = _columns(inputs, key, "label")
    used = _used(columns)
    for source, column in zip(inputs, columns, strict=True):
        unused = [name for name in column.categories if name not in used]
        if unused:
            raise CountsError(
                f"{source.path}: {len(unused)} of {len(column.categories)} categories of obs "
                f"column {key!r} have no cells: {listing(unused)}",
                f"drop them: adata.obs[{key!r}] = "
                f"adata.obs[{key!r}].cat.remove_unused_categories()",
            )
    return used, _recode(columns, used)


def read_batches(inputs: Sequence[Input], key: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Read the batches of all inputs; as `read_labels`, but a batch may have no cells."""
    columns = _columns(inputs, key, "batch")
    used = _used(columns)
    return used, _recode(columns, used)


def read_appended(
    inputs: Sequence[Input], key: str, known: Sequence[str], what: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Read labels or batches of cells that are appended to a store.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    key : str
        The obs column.
    known : sequence of str
        The store's labels or batches; their codes stay.
    what : str
        What they are, singular.

    Returns
    -------
    tuple of str, and array[n_cells] of int64
        The new ones that have cells, and the codes over the cells of all inputs: new ones count on
        from the known.

    Raises
    ------
    CountsError
        If a cell has no value, or as in `read_labels`.
    """
    columns = _columns(inputs, key, what)
    new = tuple(name for name in _used(columns) if name not in set(known))
    return new, _recode(columns, (*known, *new))


def _columns(inputs: Sequence[Input], key: str, what: str) -> list[Column]:
    """Read an obs column of every input; a cell without a value is an error."""
    columns = []
    for source in inputs:
        column = source.column(key)
        missing = np.flatnonzero(column.codes < 0)
        if missing.size:
            first = int(missing[0])
            raise CountsError(
                f"{source.path}: obs column {key!r} has no value for {missing.size} of "
                f"{source.n_cells} cells, the first {source.names(first, first + 1)[0]}",
                f"remove these cells or give each a {what}",
            )
        columns.append(column)
    _refuse_two_kinds(inputs, columns, key)
    return columns


def _refuse_two_kinds(inputs: Sequence[Input], columns: Sequence[Column], key: str) -> None:
    """Refuse fractions beside something else: 1 would be called 1 in one input, 1.0 in another."""
    fractions = [column.kind == "numbers" for column in columns]
    if any(fractions) and not all(fractions):
        one, other = fractions.index(True), fractions.index(False)
        raise CountsError(
            f"obs column {key!r} holds numbers with fractions in {inputs[one].path} and "
            f"{columns[other].kind} in {inputs[other].path}",
            f"make them text in all inputs: adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)",
        )


def _used(columns: Sequence[Column]) -> tuple[str, ...]:
    used = {column.categories[code] for column in columns for code in np.unique(column.codes)}
    return tuple(sorted(used))


def _recode(columns: Sequence[Column], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Turn each input's codes into positions in `names`, end to end."""
    code = {name: position for position, name in enumerate(names)}
    parts = []
    for column in columns:
        target = np.array([code.get(name, -1) for name in column.categories], np.int64)
        parts.append(target[column.codes])
    return np.concatenate(parts)
