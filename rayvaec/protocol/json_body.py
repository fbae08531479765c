"""JSON bodies: structure counted before parsing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import orjson

from rayvaec.errors import PayloadTooLargeError, UndecodableError, UnprocessableError
from rayvaec.protocol.entries import shown

MAX_KEYS = 1000
"""Keys of all objects of a request, which has some twenty."""

_BLOCK_BYTES = 2**18
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def decode_object(data: bytes, what: str, max_containers: int = MAX_KEYS) -> dict[str, Any]:
    """Parse a JSON object.

    Lists, objects and keys take up to eighty times their text in memory, and each list and object
    makes work for Python's garbage collector, which holds up every thread; so there may be only as
    many as requests have. Strings and numbers take at most twenty times their text.

    Parameters
    ----------
    data : bytes
        JSON in UTF-8.
    what : str
        What to call it in messages, such as ``"the body"``.
    max_containers : int
        Most lists and objects.

    Returns
    -------
    dict

    Raises
    ------
    UndecodableError
        If it is not JSON, or is nested deeper than 1,024 levels.
    PayloadTooLargeError
        If it has too many lists, objects or keys.
    UnprocessableError
        If it is not an object, or gives a field twice.
    """
    n_containers, n_keys = count_structure(data)
    for found, largest, things in (
        (n_containers, max_containers, "lists and objects"),
        (n_keys, MAX_KEYS, "keys"),
    ):
        if found > largest:
            raise PayloadTooLargeError(
                f"{what} has {found:,} {things}, above the largest number, {largest:,}",
                "send fewer cells a request, or an Arrow stream under its own Content-Type",
            )
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _not_json(error, what) from None
    if not isinstance(value, dict):
        raise UnprocessableError(f"{what} is {shown(value)}", "send a JSON object, {...}")
    top = len(value) + sum(len(entry) for entry in value.values() if isinstance(entry, dict))
    if top != n_keys and _n_keys(value) != n_keys:  # the second looks at every entry of every list
        raise UnprocessableError(f"{what} gives {_given_twice(data)} twice", "give it once")
    return value


def _not_json(error: orjson.JSONDecodeError, what: str) -> UndecodableError:
    for literal in _NOT_FINITE:
        if error.doc.startswith(literal, error.pos):
            return UndecodableError(
                f"{what} has {literal} at character {error.pos:,}, which is not JSON",
                "send raw counts, which are finite",
            )
    fix = "send JSON, or an Arrow stream under its own Content-Type"
    return UndecodableError(f"{what} is not valid JSON ({error})", fix)


def count_structure(data: bytes) -> tuple[int, int]:
    """Return how many lists and objects, and how many keys, a JSON text has.

    Parameters
    ----------
    data : bytes
        JSON in UTF-8; of other texts the numbers mean nothing.

    Returns
    -------
    tuple of int
        Opening brackets and braces, and colons, outside of strings.
    """
    if b"\\" in data:  # what is escaped is of no interest, and quotes then begin and end strings
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(data, np.uint8)
    n_containers = n_keys = within = 0
    for start in range(0, len(codes), _BLOCK_BYTES):
        block = codes[start : start + _BLOCK_BYTES]
        # The number of quotes so far is odd within a string; that it wraps at 256 changes nothing.
        n_quotes = np.cumsum(block == ord('"'), dtype=np.uint8) + np.uint8(within)
        outside = (n_quotes & 1) == 0
        within = int(n_quotes[-1] & 1)
        opens = (block == ord("[")) | (block == ord("{"))
        n_containers += int(np.count_nonzero(opens & outside))
        n_keys += int(np.count_nonzero((block == ord(":")) & outside))
    return n_containers, n_keys


def _n_keys(value: Any) -> int:
    """Return how many keys all objects within a value have."""
    total, waiting = 0, [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict):
            total += len(container)
            container = container.values()
        waiting += [entry for entry in container if isinstance(entry, dict | list)]
    return total


def _given_twice(data: bytes) -> str:
    """Return the first key that is written twice."""
    seen: set[bytes] = set()
    for match in re.finditer(rb'"([^"\\]{0,60})"\s*:', data):
        if match[1] in seen:
            return repr(match[1].decode(errors="replace"))
        seen.add(match[1])
    return "a field"
