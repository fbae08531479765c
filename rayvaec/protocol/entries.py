"""Lists of names and numbers in a request, validated as a whole.

Errors stop at the first entry that is wrong: a list may have millions of them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from reprlib import Repr
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_NAME_LENGTH = 1000
"""Most characters of the name of a label, batch, gene or cell."""
MAX_NAMES = 1_000_000
"""Most names of one list: more than any request has cells or genes."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class BadEntryError(ValueError):
    """A list, or an entry of one, that cannot be used.

    Parameters
    ----------
    problem : str
        What it is, to follow the place: ``"is 'x'"``.
    fix : str
        What it should be.
    *position : int
        Where in the list the entry stands; none for the list itself.
    """

    def __init__(self, problem: str, fix: str, *position: int) -> None:
        super().__init__(problem, fix, *position)
        self.problem, self.fix, self.position = problem, fix, position


class Rows(NamedTuple):
    """Rows of numbers, perhaps of different lengths.

    Parameters
    ----------
    lengths : array[n_rows] of int64
        Numbers of each row.
    values : array[n_values] of int64 or float64
        The numbers, row by row.
    """

    lengths: NDArray[np.int64]
    values: NDArray[Any]


def shown(value: Any) -> str:
    """Return a value as Python writes it, in about sixty characters."""
    return _SHORT.repr(value)


def read_names(values: Any) -> list[str | None]:
    """Check a list of names.

    Parameters
    ----------
    values : list of str, int, float, bool or None
        Scalars stand for their text, by `str`, as everywhere; None and NaN for a missing name.

    Returns
    -------
    list of str or None

    Raises
    ------
    BadEntryError
        For anything else, more than `MAX_NAMES`, or a name longer than `MAX_NAME_LENGTH`.
    """
    kinds = _kinds(values, (str, int, float, bool, type(None)), "name")
    if len(values) > MAX_NAMES:
        raise BadEntryError(f"has {len(values):,} names", f"give at most {MAX_NAMES:,}")
    if not kinds <= {str, type(None)}:
        values = [_text(value) for value in values]
    if max(map(len, filter(None, values)), default=0) > MAX_NAME_LENGTH:
        position = next(i for i, name in enumerate(values) if len(name or "") > MAX_NAME_LENGTH)
        name = values[position]
        raise name_too_long(f"{len(name):,} characters", shown(name), position)
    return values


def name_too_long(size: str, beginning: str, position: int) -> BadEntryError:
    """Return the error for a name of more than `MAX_NAME_LENGTH` characters."""
    fix = f"give at most {MAX_NAME_LENGTH:,} characters"
    return BadEntryError(f"is a name of {size}, {beginning}", fix, position)


def read_genes(values: Any) -> list[str]:
    """Check a list of names none of which may be missing; errors as `read_names`."""
    names = read_names(values)
    genes = [name for name in names if name is not None]
    if len(genes) != len(names):
        raise BadEntryError("is None", "name every gene", names.index(None))
    return genes


def read_chosen_genes(values: Any) -> list[str]:
    """Check a list of one gene name or more; errors as `read_names`."""
    if not (genes := read_genes(values)):
        raise BadEntryError("is []", "name one gene at least")
    return genes


def _text(value: Any) -> str | None:
    return None if value is None or value != value else str(value)


def read_integers(values: Any) -> NDArray[np.int64]:
    """Check a list of integers of 64 bits and return it as an array; errors as `read_names`."""
    _kinds(values, (int,), "integer")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        position = next(i for i, value in enumerate(values) if not -(2**63) <= value < 2**63)
        problem = f"is {shown(values[position])}"
        raise BadEntryError(problem, "give integers of 64 bits", position) from None


def read_numbers(values: Any) -> NDArray[Any]:
    """Check a list of numbers and return it as an array.

    Parameters
    ----------
    values : list of int or float
        The numbers.

    Returns
    -------
    array of int64 or float64
        Integers where all numbers are whole, so that messages show them as they were written.

    Raises
    ------
    BadEntryError
        If there is anything else.
    """
    _kinds(values, (int, float), "number")
    return _as_array(values)


def read_rows(values: Any) -> Rows:
    """Check a list of lists of numbers and return their lengths and numbers.

    Parameters
    ----------
    values : list of lists of int or float
        The rows.

    Returns
    -------
    Rows

    Raises
    ------
    BadEntryError
        If there is anything else.
    """
    _kinds(values, (list,), "list of numbers")
    flat = list(chain.from_iterable(values))
    if not set(map(type, flat)) <= {int, float}:
        for row, numbers in enumerate(values):
            try:
                _kinds(numbers, (int, float), "number")
            except BadEntryError as error:
                raise BadEntryError(error.problem, error.fix, row, *error.position) from None
    return Rows(np.fromiter(map(len, values), np.int64, count=len(values)), _as_array(flat))


def _as_array(numbers: list[Any]) -> NDArray[Any]:
    wide = np.array(numbers, np.float64)
    with np.errstate(invalid="ignore"):  # what no integer can be, which then differs
        whole = wide.astype(np.int64)
    return whole if np.array_equal(whole, wide) else wide


def _kinds(values: Any, allowed: Collection[type], what: str) -> set[type]:
    """Return the types of a list's entries, all of them among those that are allowed."""
    article = "an" if what[0] in "aeiou" else "a"
    if type(values) is not list:
        raise BadEntryError(
            f"is {shown(values)}", f"it should be a list with {article} {what} each"
        )
    kinds = set(map(type, values))
    if not kinds <= set(allowed):
        position = next(i for i, value in enumerate(values) if type(value) not in allowed)
        problem = f"is {shown(values[position])}"
        raise BadEntryError(problem, f"it should be {article} {what}", position)
    return kinds
