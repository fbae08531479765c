"""obs and var: names of rows, and columns in every encoding that anndata 0.6 to 0.13 wrote."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.access import Access, place_of
from rayvaec.data.inputs.array_view import REWRITE, ArrayView
from rayvaec.errors import CountsError, FormatError
from rayvaec.util.messages import suggest

_KINDS = {"i": "whole numbers", "u": "whole numbers", "f": "numbers", "b": "truth values"}
_NULLABLE = ("nullable-string-array", "nullable-integer", "nullable-boolean")


@dataclass(frozen=True)
class Column:
    """An obs column as codes.

    Parameters
    ----------
    codes : array[n_cells] of int64
        Positions in `categories`, -1 where the value is missing.
    categories : tuple of str
        The distinct values as text; of a categorical column also those that no cell has.
    kind : str
        What the values are: ``"text"``, ``"whole numbers"``, ``"numbers"`` or ``"truth values"``.
    """

    codes: NDArray[np.int64]
    categories: tuple[str, ...]
    kind: str = "text"


class Frame:
    """obs or var: the names of its rows, and its columns.

    Parameters
    ----------
    element : group or structured array
        As anndata wrote it; a structured array is that of anndata 0.6.
    access : Access
        What reads it.
    uns : group, optional
        Where anndata 0.6 put the categories.

    Raises
    ------
    FormatError
        If it does not say which of its columns names the rows.
    """

    def __init__(self, element: Any, access: Access, uns: Any = None) -> None:
        self._element, self._access, self._uns = element, access, uns
        self.name = place_of(element)
        self._fields = tuple(element.dtype.names or ()) if hasattr(element, "dtype") else None
        self.index, self._missing_names = self._open_index()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.index)

    def names(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the names of some rows."""
        names = self.index.texts(start, stop)
        if self._missing_names is not None:
            missing = np.flatnonzero(self._missing_names[start : start + len(names)])
            if missing.size:
                raise self._damaged(f"has no name for row {start + int(missing[0])}")
        return names

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if self._fields is not None:
            return list(self._fields[1:])
        order = self._element.attrs.get("column-order")
        if order is not None:
            return [_as_text(name) for name in np.atleast_1d(np.asarray(order, object))]
        every = self._access.names(self._element)
        if every is None:
            raise self._damaged("has no column-order, and cannot be listed")
        return [name for name in every if name not in (self._index_name(), "__categories")]

    def column(self, key: str) -> Column:
        """Read a column.

        Parameters
        ----------
        key : str
            Its name.

        Returns
        -------
        Column

        Raises
        ------
        CountsError
            If there is no such column (the message lists those that there are), it has another
            number of values than there are rows, or codes and categories contradict each other.
        """
        coded = self.coded(key)
        if coded is not None:
            codes, categories, kind = coded
            values = codes[:].astype(np.int64)
            self.check_codes(key, values, len(categories))
            return Column(values, categories, kind)
        array, mask = self._values(key)
        column = _text_column(array) if array.is_text else _number_column(array)
        return column if mask is None else _masked(column, mask[:].astype(bool))

    def coded(self, key: str) -> tuple[ArrayView, tuple[str, ...], str] | None:
        """Open a column that is stored as codes.

        Parameters
        ----------
        key : str
            Its name.

        Returns
        -------
        tuple of ArrayView, tuple of str and str, or None
            The codes, not yet checked, the categories, and their kind as in `Column`; None for a
            column that is stored as values. Errors as in `column`.
        """
        found = self._find_coded(key)
        if found is None:
            return None
        codes, element = found
        self._check_length(key, codes)
        if codes.dtype.kind not in "iu":
            raise self._damaged(f"has codes of type {codes.dtype} in column {key!r}")
        values, mask = self._array_and_mask(element, key)
        if mask is not None and bool(mask[:].any()):
            raise self._damaged(f"has a category without a value in column {key!r}")
        categories = tuple(values.texts())
        if len(set(categories)) < len(categories):
            seen: set[str] = set()
            twice = next(name for name in categories if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise self._damaged(
                f"has the category {twice!r} of column {key!r} more than once",
                "give each category once, and its code to all of its cells",
            )
        return codes, categories, _kind(values)

    def check_codes(self, key: str, codes: NDArray[np.int64], n_categories: int) -> None:
        """Refuse codes that have no category.

        Parameters
        ----------
        key : str
            The column.
        codes : array[n_rows] of int64
            All of its codes.
        n_categories : int
            How many categories it has.

        Raises
        ------
        FormatError
            Naming the first such code and its row.
        """
        if codes.size and not -1 <= codes.min() <= codes.max() < n_categories:
            row = int(np.argmax((codes < -1) | (codes >= n_categories)))
            raise self._damaged(
                f"has the code {codes[row]} of row {row} in column {key!r}, which has "
                f"{n_categories} categories"
            )

    def _open_index(self) -> tuple[ArrayView, ArrayView | None]:
        name = self._index_name()
        if self._fields is not None and name is not None:
            array = ArrayView(self._element, self._access, name)
            return self._checked([array], name)[0], None
        found = None if name is None else self._access.child(self._element, name)
        if found is None:
            raise self._damaged("has no index: nothing says how its rows are called")
        return self._array_and_mask(found, str(name))

    def _index_name(self) -> str | None:
        if self._fields is not None:
            return self._fields[0] if self._fields else None
        name = self._element.attrs.get("_index")
        return _as_text(name) if isinstance(name, str | bytes) else None

    def _find_coded(self, key: str) -> tuple[ArrayView, Any] | None:
        """Return the codes and the element with the categories, None for a column of values."""
        element = self._child(key)
        if self._fields is not None:  # anndata 0.6
            array = ArrayView(element, self._access, key)
            categories = self._uns and self._access.child(self._uns, f"{key}_categories")
            is_coded = categories is not None and array.dtype.kind in "iu"
            return (array, categories) if is_coded else None
        if hasattr(element, "shape"):
            said = element.attrs.get("categories")
            if said is None:
                return None
            return ArrayView(element, self._access), self._legacy_categories(key, element, said)
        kind = element.attrs.get("encoding-type")
        parts = [self._access.child(element, name) for name in ("codes", "categories")]
        if kind not in (None, "categorical") or (kind is None and None in parts):
            return None
        codes, categories = parts
        if codes is None or categories is None or not hasattr(codes, "shape"):
            raise self._damaged(f"lacks codes or categories of column {key!r}")
        return ArrayView(codes, self._access), categories

    def _legacy_categories(self, key: str, element: Any, said: Any) -> Any:
        """Find the categories that a column of anndata 0.7 refers to."""
        path = f"__categories/{key}"
        if isinstance(said, h5py.Reference):
            name = h5py.h5r.get_name(said, element.id) if said else None
            path = _as_text(name or b"").strip("/").removeprefix(f"{self.name}/")
        elif isinstance(said, str | bytes):
            path = _as_text(said)
        found = self._element
        for part in path.split("/"):
            found = None if found is None else self._access.child(found, part)
        if found is None or found is self._element:
            raise self._damaged(f"refers to categories of column {key!r} that do not exist")
        return found

    def _values(self, key: str) -> tuple[ArrayView, ArrayView | None]:
        """Open a column that is stored as values, and what marks the missing ones."""
        if self._fields is not None:
            array = ArrayView(self._element, self._access, key)
            return self._checked([array], key)[0], None
        values, mask = self._array_and_mask(self._child(key), key)
        self._check_length(key, values)
        return values, mask

    def _array_and_mask(self, element: Any, key: str) -> tuple[ArrayView, ArrayView | None]:
        """Open values of any encoding."""
        arrays = [element]
        if not hasattr(element, "shape"):
            kind = element.attrs.get("encoding-type")
            arrays = [self._access.child(element, name) for name in ("values", "mask")]
            if kind not in _NULLABLE or not all(hasattr(array, "shape") for array in arrays):
                raise self._damaged(f"has the column {key!r} encoded as {kind!r:.60}")
        values, *masks = self._checked([ArrayView(a, self._access) for a in arrays], key)
        return values, masks[0] if masks else None

    def _checked(self, arrays: list[ArrayView], key: str) -> list[ArrayView]:
        """Refuse arrays that are no columns, or a mask of another length than its values."""
        for array in arrays:
            if len(array.shape) != 1 or not (array.is_text or array.dtype.kind in _KINDS):
                raise self._damaged(
                    f"has {len(array.shape)}-dimensional values of type {array.dtype} in column "
                    f"{key!r}"
                )
        if len({len(array) for array in arrays}) > 1:
            n_values, n_marks = map(len, arrays)
            raise self._damaged(f"has {n_marks} marks for {n_values} values in column {key!r}")
        return arrays

    def _child(self, key: str) -> Any:
        if key not in self.columns:
            raise CountsError(
                f"{self._access.where} has no {self.name} column {key!r}",
                f"the columns are {suggest(key, self.columns)}",
            )
        if self._fields is not None:
            return self._element
        found = self._access.child(self._element, key)
        if found is None:
            raise self._damaged(f"names the column {key!r} and does not have it")
        return found

    def _check_length(self, key: str, array: ArrayView) -> None:
        if array.shape != (self.n_rows,):
            n = array.shape[0] if len(array.shape) == 1 else f"an array of {array.shape}"
            raise self._damaged(f"has {n} values in column {key!r} for {self.n_rows} rows")

    def _damaged(self, problem: str, fix: str = REWRITE) -> FormatError:
        return FormatError(f"{self.name} of {self._access.where} {problem}", fix)


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _kind(array: ArrayView) -> str:
    return "text" if array.is_text else _KINDS[array.dtype.kind]


def _text_column(array: ArrayView) -> Column:
    """Read a column of text in parts: as objects, a whole one would take a hundred bytes a cell."""
    positions: dict[str, int] = {}
    codes, start = np.empty(len(array), np.int64), 0
    for names in array.text_blocks():
        found = [positions.setdefault(name, len(positions)) for name in names]
        codes[start : start + len(found)] = found
        start += len(found)
    order = sorted(positions)
    rank = {name: place for place, name in enumerate(order)}
    places = np.array([rank[name] for name in positions], np.int64)
    return Column(places[codes] if len(codes) else codes, tuple(order))


def _masked(column: Column, missing: NDArray[np.bool_]) -> Column:
    """Take values away, and the categories that only these had: they are placeholders."""
    codes = np.where(missing, -1, column.codes)
    used = np.unique(codes[codes >= 0])
    places = np.full(len(column.categories) + 1, -1, np.int64)  # the last one is that of -1
    places[used] = np.arange(len(used))
    return Column(places[codes], tuple(column.categories[code] for code in used), column.kind)


def _number_column(array: ArrayView) -> Column:
    values = array[:]
    distinct, codes = np.unique(values, return_inverse=True)
    codes = codes.astype(np.int64)
    if distinct.dtype.kind == "f" and distinct.size and np.isnan(distinct[-1]):
        codes[np.isnan(values)] = -1
        distinct = distinct[:-1]
    return Column(codes, tuple(str(value) for value in distinct), _kind(array))
