"""Which groups of cells are compared with which, and the table of all comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.names import choices
from rayvaec.errors import ConfigError, CountsError
from rayvaec.infer.differential import REST, Comparison, compare, to_frame
from rayvaec.infer.populations import Populations, pooled
from rayvaec.model.vaec import VAEC

if TYPE_CHECKING:
    from pandas import DataFrame


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
    """Two groups, by their codes; ``two`` is None for all other cells."""

    one: int
    two: int | None


def contrasts(
    key: str, names: Sequence[str], group1: str | Sequence[str] | None, group2: str | None
) -> list[Contrast]:
    """Find the groups that are to be compared.

    Parameters
    ----------
    key : str
        The column of obs that the groups are values of, for messages.
    names : sequence of str
        All groups.
    group1 : str or sequence of str, optional
        Each of these is compared; by default every group.
    group2 : str, optional
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
    if group1 is None:
        group1 = [name for name in names if name != group2]
    elif isinstance(group1, str):
        group1 = [group1]
    for name in [*group1, *([] if group2 is None else [group2])]:
        if name not in names:
            raise ConfigError(
                f"there is no group {name!r} in {key}", f"choose from {choices(str(name), names)}"
            )
        if name == group2 and name in group1:
            raise ConfigError(f"group {name!r} is compared with itself", "name two groups")
    if len(names) < 2:
        raise ConfigError(f"{key} has the group {names[0]!r} alone", "name a column with several")
    code = {name: position for position, name in enumerate(names)}
    return [Contrast(code[name], None if group2 is None else code[group2]) for name in group1]


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
        As of `rayvaec.infer.differential.to_frame`, one comparison after the other.

    Raises
    ------
    CountsError
        If a group has fewer than two cells.
    """
    from pandas import concat

    pairs = []
    for one, two in wanted:
        others = [two] if two is not None else [g for g in range(len(names)) if g != one]
        sides = [(names[one], [one]), (REST if two is None else names[two], others)]
        pairs.append([(name, pooled(populations, groups, how.n_samples)) for name, groups in sides])
    # Before anything is computed: the tables may take long.
    for name, population in (side for pair in pairs for side in pair):
        check_size(name, population)
    tables = [
        to_frame(compare(module, one, two, how), genes, (name1, name2), how)
        for (name1, one), (name2, two) in pairs
    ]
    return concat(tables)


def check_size(name: str, population: Populations) -> None:
    """Refuse a population of fewer than two cells, with a `CountsError` that names it."""
    n_cells = int(population.n_cells[0])
    if n_cells < 2:
        raise too_small(name, n_cells)


def too_small(name: str, n_cells: int) -> CountsError:
    """Return the error that says that a group has too few cells to be compared."""
    return CountsError(
        f"group {name!r} has {n_cells} cell{'' if n_cells == 1 else 's'}, and a comparison needs "
        "at least 2",
        "compare other groups",
    )
