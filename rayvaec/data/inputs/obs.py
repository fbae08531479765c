"""Label and batch columns of obs: names, codes, and their checks.

The parts are input files, the members of a store that rayvaec did not write, or an upload; each
check is made here, for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import ConfigError, CountsError
from rayvaec.util.messages import join_names

if TYPE_CHECKING:
    from rayvaec.data.inputs.frame import Column

logger = logging.getLogger("rayvaec")


@dataclass(frozen=True)
class ObsKeys:
    """Where labels, batches and counts are in a store that rayvaec did not write.

    Parameters
    ----------
    labels : str
        The obs column of cell types.
    batches : str, optional
        The obs column of experimental batches, where these are modelled.
    layer : str, optional
        The layer with the counts; X by default, ``"raw"`` for `AnnData.raw`.

    Raises
    ------
    ConfigError
        If both columns are the same.
    """

    labels: str
    batches: str | None = None
    layer: str | None = None

    def __post_init__(self) -> None:
        if self.labels == self.batches:
            raise ConfigError(
                f"labels and batches are both read from obs column {self.labels!r}",
                "give another --batch-key or none",
            )


class Part(Protocol):
    """One AnnData of several."""

    @property
    def place(self) -> str:
        """What messages call it."""

    @property
    def n_cells(self) -> int:
        """Number of rows."""

    @property
    def n_genes(self) -> int:
        """Number of columns."""

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of some cells."""

    def column(self, key: str) -> Column:
        """Read an obs column."""


def refuse_nothing(part: Part) -> None:
    """Refuse a part without cells or genes."""
    for n, what in ((part.n_cells, "cells"), (part.n_genes, "genes")):
        if n == 0:
            raise CountsError(f"{part.place} has no {what}", "leave this input out")


def read_codes(
    parts: Sequence[Part], key: str, what: str, known: Sequence[str] = ()
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Read the labels or the batches of all parts.

    Categories that no cell has are left out, and logged.

    Parameters
    ----------
    parts : sequence of Part
        Opened for reading.
    key : str
        The obs column.
    what : str
        What it holds, singular: ``"label"`` or ``"batch"``.
    known : sequence of str
        Names that the store has already, where cells are appended; their codes stay.

    Returns
    -------
    tuple of str, and array[n_cells] of int64
        The names that some cell has and that are not known, sorted, and the codes over the cells
        of all parts: positions in `known` and then in these.

    Raises
    ------
    CountsError
        If a column is missing or damaged, a cell has no value, or the same value would get two
        names, such as 0 and 0.0.
    """
    columns = [part.column(key) for part in parts]
    for part, column in zip(parts, columns, strict=True):
        refuse_missing_values(part, column, key, what)
    _refuse_two_kinds(parts, columns, key)
    used = [[column.categories[code] for code in np.unique(column.codes)] for column in columns]
    _refuse_twins([part.place for part in parts], used, key, known)
    names = {name for own in used for name in own}
    _say_unused(columns, names, key)
    new = tuple(sorted(names - set(known)))
    return new, _recode(columns, (*known, *new))


def refuse_missing_values(part: Part, column: Column, key: str, what: str) -> None:
    """Refuse a column in which a cell has no value.

    Parameters
    ----------
    part : Part
        Whose column it is.
    column : Column
        The column.
    key : str
        Its name.
    what : str
        What it holds, singular.

    Raises
    ------
    CountsError
        With the number of such cells, and the first.
    """
    missing = np.flatnonzero(column.codes < 0)
    if missing.size:
        first = int(missing[0])
        raise CountsError(
            f"{part.place}: obs column {key!r} has no value for {missing.size} of "
            f"{part.n_cells} cells, the first {part.names(first, first + 1)[0]}",
            f"remove these cells or give each a {what}",
        )


def _refuse_two_kinds(parts: Sequence[Part], columns: Sequence[Column], key: str) -> None:
    """Refuse floats beside something else: 1 would be called 1 in one part, 1.0 in another."""
    floats = [column.kind == "numbers" for column in columns]
    if any(floats) and not all(floats):
        one, other = floats.index(True), floats.index(False)
        fractions = any(_whole(name) is None for name in columns[one].categories)
        text = f"adata.obs[{key!r}] = adata.obs[{key!r}]"
        if not fractions:
            fix = f"in {parts[one].place}: {text}.astype(int).astype(str)"
        elif columns[other].kind == "whole numbers":
            fix = f"in every input: {text}.astype(float).astype(str)"
        else:
            fix = f"in {parts[one].place}: {text}.astype(str)"
        raise CountsError(
            f"obs column {key!r} holds floating-point numbers in {parts[one].place} and "
            f"{columns[other].kind} in {parts[other].place}",
            fix,
        )


def _refuse_twins(
    places: Sequence[str], used: Sequence[Sequence[str]], key: str, known: Sequence[str]
) -> None:
    """Refuse parts of which one calls a number 0 and another 0.0, unless one has both names."""
    owners = dict(zip([*places, "the store"], [*used, known], strict=True))
    everywhere = {name for names in owners.values() for name in names}
    for name in sorted(everywhere):
        twin = _whole(name)
        if twin is None or twin == name or twin not in everywhere:
            continue
        if any({name, twin} <= set(names) for names in owners.values()):
            continue
        here = next(place for place, names in owners.items() if name in names)
        there = next(place for place, names in owners.items() if twin in names)
        text = f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)"
        raise CountsError(
            f"obs column {key!r} holds {name!r} in {here} and {twin!r} in {there}, which are the "
            "same number",
            f"in {there}: {text} + '.0'"
            if here == "the store"
            else f"in {here}: {text}.str.removesuffix('.0')",
        )


def _whole(name: str) -> str | None:
    """Return what a whole number's name is as an integer; None for the name of anything else."""
    try:
        number = float(name)
    except ValueError:
        return None
    if not number.is_integer():
        return None
    return str(int(number)) if name in (str(number), str(int(number))) else None


def _say_unused(columns: Sequence[Column], used: set[str], key: str) -> None:
    unused = sorted({name for column in columns for name in column.categories} - used)
    if unused:
        logger.info(
            "%d categories of obs column %r have no cells and are left out: %s",
            len(unused),
            key,
            join_names(unused),
        )


def _recode(columns: Sequence[Column], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Turn each part's codes into positions in `names`, end to end."""
    code = {name: position for position, name in enumerate(names)}
    parts = []
    for column in columns:
        target = np.array([code.get(name, -1) for name in column.categories], np.int64)
        parts.append(target[column.codes])
    return np.concatenate(parts)
