"""Names in messages: short lists, nearest matches first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

_LONGEST_VALUE = 400
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Control characters, marks that turn the direction of text, and what UTF-8 or XML cannot hold."""


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
