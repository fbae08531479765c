"""Groups compared in differential expression, and the table of results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import ConfigError, CountsError
from rayvaec.inference.analyses.differential import REST, Comparison, compare, to_frame
from rayvaec.inference.analyses.group_stats import Populations, pooled
from rayvaec.model.vaec import VAEC
from rayvaec.util.messages import Names, as_names, join_names, suggest

if TYPE_CHECKING:
    from pandas import DataFrame


logger = logging.getLogger("rayvaec")

MIN_CELLS = 2
"""Cells that a group must have to be compared."""


class Groups(NamedTuple):
    """A column of obs as codes.

    Parameters
    ----------
    key : str
        Name of the column.
    names : sequence of str
        Its values.
    codes : array[n_cells] of int64
        Value of each cell, -1 for none.
    """

    key: str
    names: Sequence[str]
    codes: NDArray[np.int64]


class Contrast(NamedTuple):
    """Two groups to compare.

    Parameters
    ----------
    one : int
        Code of the first.
    two : int or None
        Code of the second; None for all other cells.
    required : bool
        Whether the first was asked for by name, and must not be left out for having too few cells.
    """

    one: int
    two: int | None
    required: bool = True


def contrasts(
    key: str, names: Sequence[str], group1: Names | None, group2: str | int | None
) -> list[Contrast]:
    """Find the groups that are to be compared.

    Parameters
    ----------
    key : str
        The column of obs that the groups are values of, for messages.
    names : sequence of str
        All groups.
    group1 : str, number or sequence of them, optional
        Each of these is compared; by default every group. Numbers are read as their text.
    group2 : str or number, optional
        With this; by default with all other cells.

    Returns
    -------
    list of Contrast

    Raises
    ------
    ConfigError
        If a name is unknown (the valid ones are listed), a group would be compared with itself, or
        there is one group only.
    """
    second = None if group2 is None else str(group2)
    required = group1 is not None
    first = [name for name in names if name != second] if group1 is None else as_names(group1)
    for name in [*first, *([] if second is None else [second])]:
        if name not in names:
            raise ConfigError(
                f"there is no group {name!r} in {key}", f"choose from {suggest(name, names)}"
            )
        if name == second and name in first:
            raise ConfigError(f"group {name!r} is compared with itself", "name two groups")
    if len(names) < 2:
        alone = f"the group {names[0]!r} alone" if names else "no groups"
        raise ConfigError(f"{key} has {alone}", "name a column with several")
    code = {name: position for position, name in enumerate(names)}
    two = None if second is None else code[second]
    return [Contrast(code[name], two, required) for name in first]


def compare_all(
    module: VAEC,
    genes: tuple[str, ...],
    populations: Populations,
    names: Sequence[str],
    wanted: Sequence[Contrast],
    how: Comparison,
) -> DataFrame:
    """Compare groups and join the tables.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    genes : tuple of str
        Names of its genes.
    populations : Populations
        Summaries of all groups, with `how.n_samples` cells chosen of each.
    names : sequence of str
        Names of the groups.
    wanted : sequence of Contrast
        What to compare.
    how : Comparison
        Options.

    Returns
    -------
    DataFrame
        As of `rayvaec.inference.analyses.differential.to_frame`, one comparison after the other.

    Raises
    ------
    CountsError
        If a group that was asked for has fewer than two cells, or none is left to compare.
    """
    from pandas import concat

    # Before anything is computed: the tables may take long.
    compared = large_enough(names, populations.n_cells, wanted)
    pairs = []
    for one, two, _ in compared:
        others = [two] if two is not None else [g for g in range(len(names)) if g != one]
        sides = [(names[one], [one]), (REST if two is None else names[two], others)]
        pairs.append([(name, pooled(populations, groups, how.n_samples)) for name, groups in sides])
    tables = [
        to_frame(compare(module, one, two, how), genes, (name1, name2), how)
        for (name1, one), (name2, two) in pairs
    ]
    return concat(tables)


def large_enough(
    names: Sequence[str], n_cells: NDArray[np.int64], wanted: Sequence[Contrast]
) -> list[Contrast]:
    """Leave out comparisons with too few cells, with a warning.

    Parameters
    ----------
    names : sequence of str
        Names of the groups.
    n_cells : array[n_groups] of int64
        Cells of each group.
    wanted : sequence of Contrast
        What was asked for.

    Returns
    -------
    list of Contrast

    Raises
    ------
    CountsError
        If a group that was asked for has fewer than two cells, or no comparison is left.
    """
    kept, small = [], {}
    for contrast in wanted:
        n_one, n_rest = int(n_cells[contrast.one]), int(n_cells.sum() - n_cells[contrast.one])
        sides = [(names[contrast.one], n_one, contrast.required)]
        if contrast.two is None:
            sides.append((REST, n_rest, contrast.required))
        else:
            sides.append((names[contrast.two], int(n_cells[contrast.two]), True))
        too_few = [side for side in sides if side[1] < MIN_CELLS]
        for name, n, required in too_few:
            if required:
                raise too_small(name, n)
            small[name] = n
        if not too_few:
            kept.append(contrast)
    if not kept:
        raise too_small(*next(iter(small.items())))
    if small:
        shown = join_names(f"{name!r} ({n})" for name, n in small.items())
        logger.warning(
            "groups with fewer than %d cells are not compared with the others: %s", MIN_CELLS, shown
        )
    return kept


def check_size(name: str, population: Populations) -> None:
    """Refuse a population of fewer than two cells, with a `CountsError` that names it."""
    n_cells = int(population.n_cells[0])
    if n_cells < MIN_CELLS:
        raise too_small(name, n_cells)


def too_small(name: str, n_cells: int) -> CountsError:
    """Return the error that says that a group has too few cells to be compared."""
    return CountsError(
        f"group {name!r} has {n_cells} cell{'' if n_cells == 1 else 's'}, and a comparison needs "
        f"at least {MIN_CELLS}",
        "compare other groups",
    )
