"""AnnData in Zarr that rayvaec did not write, seen as a store's partitions see it.

One AnnData Zarr, or the members ``dataset_0``, ``dataset_1``, ... of an annbatch collection, in
Zarr v2 or v3. Nothing is listed, so that it works behind a web server as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray

from rayvaec.data.blobs import Blobs, ByteRange
from rayvaec.data.delta import without_delta_warning
from rayvaec.data.groups import COLLECTION, group_attributes
from rayvaec.data.names import choices, listing
from rayvaec.data.shards import Vector, ZarrVector, open_vector
from rayvaec.errors import CountsError, StoreError
from rayvaec.location import Location


class CastVector:
    """Another vector's elements in another type.

    Parameters
    ----------
    inner : Vector
        Where they are read.
    dtype : dtype
        What they become.
    table : array, optional
        What stands for each of them, negative ones counted from its end.
    """

    def __init__(self, inner: Vector, dtype: Any, table: NDArray[Any] | None = None) -> None:
        self._inner, self._dtype, self._table = inner, np.dtype(dtype), table

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element."""
        return self._dtype

    def __len__(self) -> int:
        return len(self._inner)

    def span(self, start: int, stop: int) -> int:
        """Return how many elements of room `read_into` needs for this range."""
        return stop - start

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range as a new array; errors as in `Vector.read_into`."""
        values = self._inner.read(start, stop)
        if self._table is not None:
            values = self._table[values]
        return values.astype(self._dtype, copy=False)

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Read a range into a buffer; see `Vector.read_into`."""
        out[: stop - start] = self.read(start, stop)
        return 0

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return the parts of files that `read_into` will read, as far as they are known."""
        return self._inner.files(start, stop)


class HeldVector(CastVector):
    """Elements in memory.

    Parameters
    ----------
    values : array
        All of them.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self._dtype = values, values.dtype

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a range."""
        return self._values[start:stop]

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return nothing."""
        return []


@dataclass(frozen=True)
class CodedColumn:
    """An obs column as codes.

    Parameters
    ----------
    codes : Vector, [n_cells]
        Positions in `categories`, negative where a value is missing.
    categories : tuple of str
        The values as text; some may be of no cell.
    """

    codes: Vector
    categories: tuple[str, ...]


class Member:
    """One AnnData Zarr.

    Parameters
    ----------
    where : Path or Url
        The store that it belongs to, for messages.
    blobs : Blobs
        The store's files.
    name : str
        Its group in the store; empty where the store is this AnnData.

    Raises
    ------
    CountsError
        If it is no AnnData with a CSR matrix X and a name for every cell and gene.
    """

    def __init__(self, where: Location, blobs: Blobs, name: str) -> None:
        self.blobs, self.name = blobs, name
        self.where = str(where / name if name else where)
        try:
            self.group = zarr.open_group(
                blobs.zarr_store(), path=name or None, mode="r", use_consolidated=False
            )
            self._names, self._genes = self._index("obs"), self._index("var")
            self._check_matrix()
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            raise CountsError(
                f"{self.where} is no AnnData that can be read ({error})",
                "write it with anndata.write_zarr of anndata 0.8 or later",
            ) from error

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return int(self._names.shape[0])

    @property
    def n_genes(self) -> int:
        """Number of columns."""
        return int(self._genes.shape[0])

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(str(name) for name in self._genes[:])

    @cached_property
    def layers(self) -> list[str]:
        """The layers that hold counts by their name, as far as can be told without listing."""
        usual = ("counts", "raw_counts", "count")
        return [name for name in usual if f"layers/{name}" in self.group]

    @property
    def columns(self) -> list[str]:
        """Names of the obs columns."""
        return [str(name) for name in self.group["obs"].attrs["column-order"]]  # type: ignore[union-attr]

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of a range of cells."""
        return [str(name) for name in self._name_vector.read(start, stop)]

    @cached_property
    def _name_vector(self) -> Vector:
        return ZarrVector(self.blobs, self._names.path)

    def vector(self, path: str) -> Vector:
        """Open an array of this AnnData."""
        return open_vector(self.blobs, f"{self.name}/{path}".lstrip("/"))

    def column(self, key: str) -> CodedColumn:
        """Open an obs column.

        Parameters
        ----------
        key : str
            Its name.

        Returns
        -------
        CodedColumn

        Raises
        ------
        CountsError
            If there is no such column; the message lists those that there are.
        """
        if key not in self.columns:
            raise CountsError(
                f"{self.where} has no obs column {key!r}",
                f"the columns are {choices(key, self.columns)}",
            )
        element: Any = self.group[f"obs/{key}"]
        if element.attrs.get("encoding-type") == "categorical":
            categories = read_elem(element["categories"])
            return CodedColumn(
                self.vector(f"obs/{key}/codes"), tuple(str(value) for value in categories)
            )
        values = pd.Categorical(read_elem(element))
        return CodedColumn(
            HeldVector(values.codes), tuple(str(value) for value in values.categories)
        )

    def digest(self, keys: Sequence[str]) -> str:
        """Return what changes where the shape, the types or the layout of the AnnData change.

        Parameters
        ----------
        keys : sequence of str
            The obs columns that matter.
        """
        texts = [f"{self.n_cells} {self.n_genes}"]
        paths = [f"X/{part}" for part in ("data", "indices", "indptr")]
        for path in [*paths, *(f"obs/{key}" for key in keys)]:
            with without_delta_warning():
                metadata: Any = self.group[path].metadata
            texts.append(f"{path} {metadata.to_dict()}")
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def _index(self, frame: str) -> Any:
        group: Any = self.group[frame]
        index = group[group.attrs["_index"]]
        return index["values"] if isinstance(index, zarr.Group) else index

    def _check_matrix(self) -> None:
        matrix: Any = self.group["X"]
        kind = matrix.attrs.get("encoding-type", "array")
        if kind != "csr_matrix":
            raise CountsError(
                f"X of {self.where} is stored as {kind} and is read by rows, from CSR",
                "make a store of it with `rayvaec prepare`, which reads CSC and dense too",
            )
        shape = tuple(int(n) for n in matrix.attrs["shape"])
        with without_delta_warning():
            nnz = {matrix[part].shape for part in ("data", "indices")}
        rows = matrix["indptr"].shape
        if shape != (self.n_cells, self.n_genes) or rows != (self.n_cells + 1,) or len(nnz) > 1:
            raise CountsError(
                f"X of {self.where} has shape {shape} and {rows[0] - 1} rows of values, but "
                f"{self.n_cells} cells and {self.n_genes} genes have names",
                "write it again",
            )


def open_members(where: Location, blobs: Blobs) -> list[Member]:
    """Open what rayvaec did not write.

    Parameters
    ----------
    where : Path or Url
        An AnnData Zarr, or an annbatch collection.
    blobs : Blobs
        Its files.

    Returns
    -------
    list of Member
        In the order of their numbers.

    Raises
    ------
    StoreError
        If it is neither.
    CountsError
        If a member cannot be read, or the members' genes differ.
    """
    kind = (group_attributes(blobs) or {}).get("encoding-type")
    if kind != COLLECTION:
        if kind != "anndata":
            raise StoreError(
                f"{where} is no AnnData Zarr, no annbatch collection and no store",
                "write a store with `rayvaec prepare INPUT... --out STORE --labels-key KEY`",
            )
        return [Member(where, blobs, "")]
    members: list[Member] = []
    while group_attributes(blobs, f"dataset_{len(members)}/") is not None:
        members.append(Member(where, blobs, f"dataset_{len(members)}"))
    if not members:
        raise StoreError(f"the collection {where} has no member dataset_0", "copy it again")
    for member in members[1:]:
        _check_genes(members[0], member)
    return members


def _check_genes(first: Member, other: Member) -> None:
    if first.genes == other.genes:
        return
    ours, theirs = set(first.genes), set(other.genes)
    if ours == theirs:
        problem = f"has its genes in another order than {first.where}"
    else:
        only_first = [gene for gene in first.genes if gene not in theirs]
        only_other = [gene for gene in other.genes if gene not in ours]
        problem = (
            f"has other genes: it lacks {listing(only_first, 3)}, and {first.where} lacks "
            f"{listing(only_other, 3)}"
        )
    raise CountsError(
        f"{other.where} {problem}",
        "make one store of them with `rayvaec prepare ... --genes intersect`",
    )
