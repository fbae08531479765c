"""Names in messages: short lists, nearest matches first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def listing(names: Iterable[str], limit: int = 10) -> str:
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


def choices(unknown: str, known: Sequence[str], limit: int = 10) -> str:
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
        As `listing`.
    """
    # Matching is quadratic in a name's length; past some thousand names it would take seconds.
    near = get_close_matches(unknown, known[:5000], n=3, cutoff=0.5)
    return listing(near + [name for name in known if name not in near], limit)
