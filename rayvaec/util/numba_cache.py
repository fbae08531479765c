"""Numba compilation with an on-disk cache.

numba itself looks at the file of a function alone when it judges whether kept code is still right,
and fails on a file that was cut short. Here code is kept together with a digest of all sources it
was made of, and what cannot be read, does not belong to these sources, or cannot be written is
compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.serialize import dumps

_FROM = re.compile(r"^\s*from ([\w.]+) import (\([^)]*\)|.*)", re.MULTILINE)
_IMPORT = re.compile(r"^\s*import ([\w.]+)", re.MULTILINE)
_WORD = re.compile(r"\w+")


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function without the GIL, and keep the machine code for the next process.

    It is kept beside the source, in the folder that NUMBA_CACHE_DIR names, or in the user's cache
    folder where the source is in a read-only place. Where none of them can be written, the function
    is compiled anew in every process.

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
    dispatcher = njit(nogil=True, **options)(function)
    try:
        dispatcher._cache = _KernelCache(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    return dispatcher


class _KernelCache(FunctionCache):
    """numba's cache of a function, with files of our own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        sources = _sources_digest(function.__module__, Path(function.__code__.co_filename))
        stamp = self._impl.locator.get_source_stamp(), sources
        self._cache_file = _CacheFile(self._cache_path, self._impl.filename_base, stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save what was compiled, if the cache can be written."""
        with suppress(OSError):  # a full disk, or a folder that has gone or become read-only
            super().save_overload(sig, data)


class _CacheFile(IndexDataCacheFile):
    """Index and data files of a function: whole and of these sources, or not used.

    Several processes may write at once, and so may versions of the package that share a cache
    folder. An index can then name a data file that another process has replaced: so data carries
    what it belongs to.
    """

    def load(self, key: Any) -> Any:
        """Return what was saved under a key, None where that is not to be had."""
        try:
            stamp, of_key, digest, data = super().load(key)
            if (stamp, of_key, digest) == (self._source_stamp, key, _digest(data)):
                return pickle.loads(data)  # noqa: S301 - numba's files are pickles, and no less safe
        except Exception:  # pickle raises whatever comes up in what was cut short
            return None
        return None

    def save(self, key: Any, data: Any) -> None:
        """Save data under a key."""
        whole = dumps(data)
        super().save(key, (self._source_stamp, key, _digest(whole), whole))

    def _load_index(self) -> dict[Any, str]:
        try:
            return super()._load_index()
        except Exception:
            return {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _sources_digest(module: str, source: Path) -> str:
    """Return a digest of a module and of all that it imports from its own package."""
    package, *below = module.split(".")
    if not (below and source.is_file()):
        return ""  # numba's own stamp has the one file
    root = source.parents[len(below) + (source.name == "__init__.py")]
    found: dict[str, str] = {}
    waiting = [str(source)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path], imports = _read_source(path, package, str(root))
            waiting += imports
    return _digest("".join(found[path] for path in sorted(found)).encode())


@cache
def _read_source(path: str, package: str, root: str) -> tuple[str, list[str]]:
    """Return the digest of a source file, and the files in a package that it imports from."""
    text = Path(path).read_text()
    names = set(_IMPORT.findall(text))
    for module, imported in _FROM.findall(text):
        names |= {module, *(f"{module}.{word}" for word in _WORD.findall(imported))}
    files = [_file_of(name, root) for name in names if name.split(".")[0] == package]
    return _digest(text.encode()), [file for file in files if file]


@cache
def _file_of(name: str, root: str) -> str:
    """Return the file of a module, empty where a dotted name is not one."""
    place = os.path.join(root, *name.split("."))
    files = (f"{place}.py", os.path.join(place, "__init__.py"))
    return next(filter(os.path.isfile, files), "")
