"""Lists of names in messages: shortened, closest matches first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeAlias

from rayvaec.errors import CountsError

Names: TypeAlias = "str | int | Iterable[str | int]"
"""One name or several, as a person gives them: numbers stand for their text."""

_LONGEST_VALUE = 400
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Control characters, marks that turn the direction of text, and what UTF-8 or XML cannot hold."""


def join_names(names: Iterable[str], limit: int = 10) -> str:
    """Join names for a message, the first `limit` of them.

    Parameters
    ----------
    names : iterable of str
        What to list.
    limit : int
        How many to show.

    Returns
    -------
    str
        Such as ``"a, b, c and 7 more"``; ``"none"`` for an empty list.
    """
    every = list(names)
    if not every:
        return "none"
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit:,} more"


def suggest(unknown: str, known: Sequence[str], limit: int = 10) -> str:
    """List the valid names for a message, those most like the unknown one first.

    Parameters
    ----------
    unknown : str
        The name that was given.
    known : sequence of str
        The names that are valid.
    limit : int
        How many to show.

    Returns
    -------
    str
        As `join_names`.
    """
    # Matching is quadratic in a name's length; past some thousand names it would take seconds.
    near = get_close_matches(unknown, known[:5000], n=3, cutoff=0.5)
    return join_names(near + [name for name in known if name not in near], limit)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in what one plan of work differs from another.

    Parameters
    ----------
    before, now : mapping
        JSON-able values by name.

    Returns
    -------
    str
        Such as ``"seed was 0 and is 1"``; empty where nothing differs.
    """
    found = []
    for key in dict.fromkeys([*now, *before]):
        old, new = (json.dumps(values.get(key, "not given")) for values in (before, now))
        if old != new:
            found.append(f"{key} was {_shortened(old)} and is {_shortened(new)}")
    return ", ".join(found)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def printable(text: str, keep: str = "") -> str:
    """Return text with a replacement character for each that cannot be shown.

    Parameters
    ----------
    text : str
        Such as a label that somebody else chose.
    keep : str
        Control characters to leave as they are.

    Returns
    -------
    str
        Text that XML, HTML and a terminal take for nothing but text.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else "\ufffd", text)


def refuse_duplicates(names: Sequence[str], what: str, where: str) -> None:
    """Raise a `CountsError` that names the first name occurring twice, if one does.

    Parameters
    ----------
    names : sequence of str
        What must be unique.
    what : str
        What they are, singular, such as ``"gene"``.
    where : str
        Where they come from, for the message.

    Raises
    ------
    CountsError
        If a name occurs twice.
    """
    if len(set(names)) == len(names):
        return
    twice = [name for name, occurrences in Counter(names).items() if occurrences > 1]
    fix = "make them unique, such as with adata.var_names_make_unique()"
    raise CountsError(
        f"{where} has {len(twice)} {what} names more than once: {join_names(twice)}",
        fix if what == "gene" else "make them unique",
    )


def as_names(names: Names) -> list[str]:
    """Return names as text: a scalar is one name, and numbers are their text.

    Parameters
    ----------
    names : str, number or iterable of them
        Such as ``"T cells"``, ``0``, or ``[0, 1]``.

    Returns
    -------
    list of str
    """
    if isinstance(names, Iterable) and not is_one_name(names):
        return [str(name) for name in names]
    return [str(names)]


def is_one_name(names: Names) -> bool:
    """Return whether this is a scalar: text, a number, or numpy's array of no dimensions."""
    is_scalar_array = getattr(names, "ndim", 1) == 0
    return isinstance(names, str) or is_scalar_array or not isinstance(names, Iterable)


def missing_values(
    values: Sequence[Any], what: str, where: str, cells: Sequence[str] | None = None
) -> CountsError:
    """Return the error that says how many cells have no value, and which is the first.

    Parameters
    ----------
    values : sequence
        One per cell, at least one of them missing.
    what : str
        What a value is, singular, such as ``"label"``.
    where : str
        Where they come from.
    cells : sequence of str, optional
        Names of the cells.

    Returns
    -------
    CountsError
    """
    missing = [position for position, value in enumerate(values) if is_missing(value)]
    return CountsError(
        f"{where} has no {what} for {len(missing)} of {len(values)} cells, "
        f"the first {cell_at(missing[0], cells)}",
        f"remove these cells or give them a {what}",
    )


def cell_at(position: int, cells: Sequence[str] | None) -> str:
    """Return what messages call the cell at a position: its name, where cells have names."""
    return f"at position {position}" if cells is None else cells[position]


def is_missing(value: Any) -> bool:
    """Return whether a value stands for "no value": None, NaN, NaT or pandas' NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and bool(value != value)
