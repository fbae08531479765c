"""Delta encoding of gene indices, as stored by ``--codec zstd``.

Indices rise along a row, so their differences are small numbers, and those take three fifths of
the space. The codec is the one that zarr knows as ``numcodecs.delta``: the first value of a chunk
as it is, then differences modulo the type's size. zarr-python reads it with nothing added; that
the specification of Zarr v3 does not have it, it says in a warning, which is not worth repeating.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.util.numba_cache import compiled

DELTA = "numcodecs.delta"


@contextmanager
def without_delta_warning() -> Iterator[None]:
    """Keep zarr from warning that the codec is numcodecs', as arrays are opened or created."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        yield


def delta_filter(dtype: Any) -> Any:
    """Return zarr's codec for differences.

    Parameters
    ----------
    dtype : dtype
        Type of the array's elements, an integer; the differences have the same.

    Returns
    -------
    zarr.codecs.numcodecs.Delta
        To be given to zarr as a filter.
    """
    from zarr.codecs.numcodecs import Delta

    return Delta(dtype=np.dtype(dtype).newbyteorder("<").str)


def is_delta(codec: dict[str, Any], dtype: np.dtype[Any]) -> bool:
    """Tell whether a codec's metadata mean what `undo_delta` undoes.

    Parameters
    ----------
    codec : dict
        Name and configuration, decoded from JSON.
    dtype : dtype
        Type of the array's elements.

    Returns
    -------
    bool

    Raises
    ------
    KeyError or TypeError
        If the configuration is no configuration of this codec.
    """
    if codec["name"] != DELTA:
        return False
    stored = codec["configuration"]
    types = [stored["dtype"], stored.get("astype", stored["dtype"])]
    return dtype.kind in "iu" and all(np.dtype(name) == dtype for name in types)


def undo_delta(values: NDArray[Any], chunk: int) -> None:
    """Turn differences into values, in place and without the GIL.

    Parameters
    ----------
    values : array of integers
        Decoded chunks, one after the other.
    chunk : int
        Elements of a chunk.
    """
    # Unsigned, as overflow is defined only there.
    _add_up(values.view(f"u{values.dtype.itemsize}"), chunk)


@compiled
def _add_up(values: NDArray[Any], chunk: int) -> None:
    for start in range(0, len(values), chunk):
        total = np.uint64(0)
        for at in range(start, min(start + chunk, len(values))):
            total += np.uint64(values[at])
            values[at] = total
