"""Output formats of bulk inference, chosen by suffix: Zarr, h5ad, CSV, Parquet.

Everything is copied in pieces, so that memory does not grow with the number of cells.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr

from rayvaec.util.atomic import remove

if TYPE_CHECKING:
    import pandas as pd

_PIECE_BYTES = 16 * 2**20
_ROWS = 8192

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""First characters of text that spreadsheets compute (OWASP, CSV injection)."""


def convert(source: Path, target: Path) -> None:
    """Write an AnnData in Zarr in the format that the name of `target` says.

    Parameters
    ----------
    source : Path
        AnnData in Zarr, as bulk work writes it.
    target : Path
        Where to write; nothing is done if it is `source` itself, what else is there is removed.
        ``.h5ad`` holds what `source` does; ``.csv`` and ``.parquet`` a row a cell, with the columns
        of obs and those of every matrix in obsm, and of X.
    """
    if target == source:
        return
    remove(target)
    root = zarr.open_group(source, mode="r", use_consolidated=False)
    if target.suffix == ".h5ad":
        _write_h5ad(root, target)
    else:
        _write_tables(_tables(root), target)


def write_table(target: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV or Parquet, as the name of `target` says; its index comes first."""
    _write_tables(iter([table]), target)


def _write_h5ad(root: zarr.Group, target: Path) -> None:
    import h5py

    with h5py.File(target, "w") as file:
        file.attrs.update(_h5_attributes(root))
        _copy_group(root, file)


def _copy_group(source: zarr.Group, target: Any) -> None:
    """Copy what a Zarr group holds to an HDF5 group, attributes included."""
    for name, member in sorted(source.members()):
        if isinstance(member, zarr.Group):
            copy = target.create_group(name)
            _copy_group(member, copy)
        else:
            copy = _copy_array(member, target, name)
        copy.attrs.update(_h5_attributes(member))


def _copy_array(source: zarr.Array[Any], target: Any, name: str) -> Any:
    import h5py

    text = source.dtype.kind in "OTU"
    dtype = h5py.string_dtype() if text else source.dtype
    if source.ndim == 0:
        value: Any = source[()]
        return target.create_dataset(name, data=str(value) if text else value, dtype=dtype)
    row_bytes = int(np.prod(source.shape[1:], dtype=np.int64)) * (64 if text else dtype.itemsize)
    step = max(_PIECE_BYTES // max(row_bytes, 1), 1)
    if text or source.shape[0] == 0:
        options: dict[str, Any] = {}
    else:
        chunk = (min(max(step // 16, 1), source.shape[0]), *source.shape[1:])
        options = {"chunks": chunk, "compression": "gzip", "compression_opts": 1, "shuffle": True}
    copy = target.create_dataset(name, shape=source.shape, dtype=dtype, **options)
    for start in range(0, source.shape[0], step):
        piece: Any = source[start : start + step]
        copy[start : start + step] = piece.astype(object) if text else piece
    return copy


def _h5_attributes(source: zarr.Group | zarr.Array[Any]) -> dict[str, Any]:
    """Return the attributes of an element as anndata has them in HDF5."""
    import h5py

    attributes: dict[str, Any] = dict(source.attrs)
    if "column-order" in attributes:
        attributes["column-order"] = np.array(attributes["column-order"], h5py.string_dtype())
    if "shape" in attributes:
        attributes["shape"] = np.array(attributes["shape"], np.int64)
    return attributes


def _tables(root: zarr.Group) -> Iterator[pd.DataFrame]:
    """Yield the rows of an AnnData as tables, some thousand rows at a time."""
    import pandas as pd

    obs = cast(zarr.Group, root["obs"])
    index = cast("zarr.Array[Any]", obs["_index"])
    order = cast(list[str], obs.attrs["column-order"])
    for start in range(0, max(index.shape[0], 1), _ROWS):
        rows = slice(start, start + _ROWS)
        columns: dict[str, Any] = {name: _column(obs[name], rows) for name in order}
        matrices = dict(sorted(cast(zarr.Group, root["obsm"]).arrays()))
        for name, matrix in matrices.items():
            values: Any = matrix[rows]
            columns |= {f"{name}_{i}": values[:, i] for i in range(values.shape[1])}
        if "X" in root:
            values = cast("zarr.Array[Any]", root["X"])[rows]
            genes: Any = cast("zarr.Array[Any]", root["var/_index"])[:]
            columns |= {str(gene): values[:, i] for i, gene in enumerate(genes)}
        names: Any = index[rows]
        yield pd.DataFrame(columns, pd.Index([str(name) for name in names], name="cell"))


def _column(element: Any, rows: slice) -> Any:
    """Return some rows of a column of obs."""
    import pandas as pd

    if isinstance(element, zarr.Group):
        codes: Any = cast("zarr.Array[Any]", element["codes"])[rows]
        categories: Any = cast("zarr.Array[Any]", element["categories"])[:]
        return pd.Categorical.from_codes(codes, [str(name) for name in categories])
    return element[rows]


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose text no spreadsheet computes.

    Parameters
    ----------
    table : DataFrame
        With an index of names.

    Returns
    -------
    DataFrame
        With an apostrophe before each text, name of a row or of a column that starts with one of
        `FORMULA_STARTS`; numbers are as they were.
    """
    text = table.select_dtypes(["object", "string", "category"]).columns
    safe = table.assign(**{column: table[column].map(_without_formula) for column in text})
    return safe.rename(index=_without_formula, columns=_without_formula)


def _without_formula(value: Any) -> Any:
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula else value


def _write_tables(tables: Iterator[pd.DataFrame], target: Path) -> None:
    """Write tables of the same columns, one below the other."""
    if target.suffix == ".csv":
        for number, table in enumerate(tables):
            # Unquoted, a carriage return would end a row.
            without_formulas(table).to_csv(
                target, mode="a", header=number == 0, quoting=csv.QUOTE_NONNUMERIC
            )
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    try:
        for table in tables:
            piece = pa.Table.from_pandas(table)
            writer = writer or pq.ParquetWriter(target, piece.schema, compression="zstd")
            writer.write_table(piece)
    finally:
        if writer is not None:
            writer.close()
