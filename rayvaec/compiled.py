"""Numba compilation that is cached on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function without the GIL, and keep the machine code for the next process.

    Numba keeps it beside the source, or in the user's cache folder where the source stands in a
    read-only place. Where neither can be written it raises, at import: then the function is
    compiled anew in every process.

    Parameters
    ----------
    function : callable, optional
        Plain Python that numba can compile; without it, the result is a decorator.
    **options
        Further options of `numba.njit`.

    Returns
    -------
    callable
        The compiled function; it is specialised at the first call with new types.
    """
    if function is None:
        return partial(compiled, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return njit(nogil=True, **options)(function)
