"""Validation of counts: finite, non-negative, whole, below 2**31."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.errors import CountsError
from rayvaec.util.messages import join_names

LARGEST_COUNT = 2**31 - 1


def as_counts(
    data: NDArray[Any],
    locate: Callable[[int], tuple[str, str]],
    *,
    where: str,
    layers: Sequence[str] = (),
    option: str = "--layer=",
) -> NDArray[np.int32]:
    """Check every value and return the values as integers.

    Parameters
    ----------
    data : array[n_values]
        Stored values of a matrix, of any real dtype.
    locate : callable
        Gives the names of cell and gene for a position in `data`; called only for an error.
    where : str
        File, or file and layer, for the message.
    layers : sequence of str
        Layers that could be read instead, named in the fix for values that are not counts.
    option : str
        How the reader of the message names a layer: ``"--layer="``, ``"layer="`` or
        ``"?layer="``.

    Returns
    -------
    array[n_values] of int32
        The same values.

    Raises
    ------
    CountsError
        If a value is NaN, infinite, negative, not whole or above 2**31 - 1; the message names
        the first such value, its place, how many there are, and what to do.
    """
    check_dtype(data.dtype, where)
    if data.size == 0:
        return np.empty(0, np.int32)
    # As Python's numbers: a float32 cannot tell the bound from 2**31. NaN makes this false, and
    # within the bounds the cast is defined.
    if data.min().item() >= 0 and data.max().item() <= LARGEST_COUNT:
        counts = data.astype(np.int32, copy=False)
        if data.dtype.kind in "bui" or np.array_equal(counts, data):
            return counts
    raise _refusal(data, locate, where, _fix(layers, option))


def check_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Refuse values that are neither integers, truth values nor floats; `where` names them."""
    if dtype.kind not in "buif":
        raise CountsError(
            f"{where} holds values of type {dtype}", "counts must be integers or floats"
        )


def _refusal(
    data: NDArray[Any], locate: Callable[[int], tuple[str, str]], where: str, fix: str
) -> CountsError:
    """Describe the first value that is no count."""
    wide = data.astype(np.float64)
    finite = np.isfinite(wide)
    bad = ~finite | (wide < 0) | (wide > LARGEST_COUNT) | (np.floor(wide) != wide)
    first = int(np.argmax(bad))
    value = wide[first]
    if not finite[first]:
        problem, fix = "is not finite", "remove or correct such values"
    elif value < 0:
        problem = "is negative"
    elif value > LARGEST_COUNT:
        problem, fix = f"is above the largest count, {LARGEST_COUNT}", "correct such values"
    else:
        problem = "is not a whole number"
    cell, gene = locate(first)
    # float32's own digits: 0.1 reads better than 0.10000000149011612.
    return CountsError(f"{where}: {data[first]!s} at cell {cell}, gene {gene} {problem}", fix)


def _fix(layers: Sequence[str], option: str) -> str:
    """Say how raw counts are passed where the values look normalised or scaled."""
    if not layers:
        return "pass raw counts (these look normalised or scaled, and there are no other layers)"
    example = next((name for name in layers if "count" in name.lower()), layers[0])
    quoted = example if option.startswith("?") else repr(example)
    known = join_names(layers) + (
        "; raw is adata.raw.X unless a layer is called so" if "raw" in layers else ""
    )
    return f"pass raw counts, such as {option}{quoted} (layers: {known})"
