"""External AnnData Zarr stores and annbatch collections, opened member by member.

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
import zarr
from numpy.typing import NDArray

from rayvaec.data.arrays.delta import without_delta_warning
from rayvaec.data.arrays.sharded import Array1D, open_array_1d
from rayvaec.data.inputs.elements import AnnDataGroup
from rayvaec.data.inputs.failures import reading
from rayvaec.data.inputs.frame import Column
from rayvaec.data.inputs.zarr_access import ZarrAccess
from rayvaec.data.io.byte_reader import ByteRange, ByteReader
from rayvaec.data.store.manifest import COLLECTION, group_attributes
from rayvaec.errors import CountsError, StoreError
from rayvaec.util.location import Location
from rayvaec.util.messages import join_names


class CastArray1D:
    """Another vector's elements in another type.

    Parameters
    ----------
    inner : Array1D
        Where they are read.
    dtype : dtype
        What they become.
    table : array, optional
        What stands for each of them, negative ones counted from its end.
    """

    def __init__(self, inner: Array1D, dtype: Any, table: NDArray[Any] | None = None) -> None:
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
        """Return a range as a new array; errors as in `Array1D.read_into`."""
        values = self._inner.read(start, stop)
        if self._table is not None:
            values = self._table[values]
        return values.astype(self._dtype, copy=False)

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> int:
        """Read a range into a buffer; see `Array1D.read_into`."""
        out[: stop - start] = self.read(start, stop)
        return 0

    def files(self, start: int, stop: int) -> list[ByteRange]:
        """Return the parts of files that `read_into` will read, as far as they are known."""
        return self._inner.files(start, stop)


class InMemoryArray1D(CastArray1D):
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
    """An obs column as codes that are read on demand.

    Parameters
    ----------
    codes : Array1D, [n_cells]
        Positions in `categories`, negative where a value is missing.
    categories : tuple of str
        The values as text; some may be of no cell.
    """

    codes: Array1D
    categories: tuple[str, ...]


class Member:
    """One AnnData Zarr.

    Parameters
    ----------
    where : Path or Url
        The store that it belongs to, for messages.
    blobs : ByteReader
        The store's files.
    name : str
        Its group in the store; empty where the store is this AnnData.
    layer : str, optional
        Layer with the counts; X by default, ``"raw"`` for the matrix of `AnnData.raw`.

    Attributes
    ----------
    place : str
        What messages call it.
    where : str
        What messages call its matrix.
    n_cells, n_genes : int
        Shape of the matrix.

    Raises
    ------
    CountsError
        If it is not an AnnData with a CSR matrix and a name for every cell and gene.
    """

    def __init__(
        self, where: Location, blobs: ByteReader, name: str, layer: str | None = None
    ) -> None:
        self.blobs, self.name, self.layer = blobs, name, layer
        self.place = str(where / name if name else where)
        self.where = f"{self.place}, {'X' if layer is None else f'layer {layer}'}"
        with reading(self.place):
            root = zarr.open_group(
                blobs.zarr_store(), path=name or None, mode="r", use_consolidated=False
            )
            self._group = AnnDataGroup(root, ZarrAccess(self.place))
            self._matrix, self._var = self._group.matrix(layer)
        self.n_cells, self.n_genes = self._group.obs.n_rows, self._var.n_rows
        if self._matrix.encoding != "csr":
            raise CountsError(
                f"{self.where} is stored as {self._matrix.encoding} and is read by rows, from csr",
                "make a store of it with `rayvaec prepare`, which reads CSC and dense too",
            )

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Names of the columns."""
        with reading(self.place):
            return tuple(self._var.names())

    @cached_property
    def layers(self) -> list[str]:
        """The layers other than the one that is read, as far as can be told."""
        with reading(self.place):
            return [name for name in self._group.layers if name != self.layer]

    @property
    def columns(self) -> list[str]:
        """Names of the obs columns."""
        with reading(self.place):
            return self._group.obs.columns

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of a range of cells."""
        with reading(self.place):
            return self._group.obs.names(start, stop)

    def matrix_part(self, part: str) -> Array1D:
        """Open ``data``, ``indices`` or ``indptr`` of the matrix."""
        return open_array_1d(self.blobs, self._matrix[part].place)

    def column(self, key: str) -> Column:
        """Read an obs column; parameters, result and errors as in `Frame.column`."""
        with reading(self.place):
            return self._group.obs.column(key)

    def coded_column(self, key: str) -> CodedColumn:
        """Open an obs column whose codes are read on demand, where it is stored as codes.

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
            As in `Frame.column`.
        """
        with reading(self.place):
            coded = self._group.obs.coded(key)
            if coded is not None:
                codes, categories, _ = coded
                return CodedColumn(open_array_1d(self.blobs, codes.place), categories)
            column = self._group.obs.column(key)
        return CodedColumn(InMemoryArray1D(column.codes), column.categories)

    def digest(self, keys: Sequence[str]) -> str:
        """Return what changes where the shape, the types or the layout of the AnnData change.

        Parameters
        ----------
        keys : sequence of str
            The obs columns that matter.
        """
        texts = [f"{self.n_cells} {self.n_genes}"]
        root: Any = zarr.open_group(self.blobs.zarr_store(), mode="r", use_consolidated=False)
        paths = [self._matrix[part].place for part in ("data", "indices", "indptr")]
        prefix = f"{self.name}/" if self.name else ""
        for path in [*paths, *(f"{prefix}obs/{key}" for key in keys)]:
            with without_delta_warning():
                metadata: Any = root[path].metadata
            texts.append(f"{path.removeprefix(prefix)} {metadata.to_dict()}")
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def open_members(where: Location, blobs: ByteReader, layer: str | None = None) -> list[Member]:
    """Open what rayvaec did not write.

    Parameters
    ----------
    where : Path or Url
        An AnnData Zarr, or an annbatch collection.
    blobs : ByteReader
        Its files.
    layer : str, optional
        Layer with the counts of every member.

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
                f"{where} is neither an AnnData Zarr, nor an annbatch collection, nor a store",
                "write a store with `rayvaec prepare INPUT... --out STORE --labels-key KEY`",
            )
        return [Member(where, blobs, "", layer)]
    members: list[Member] = []
    while group_attributes(blobs, f"dataset_{len(members)}/") is not None:
        members.append(Member(where, blobs, f"dataset_{len(members)}", layer))
    if not members:
        raise StoreError(f"the collection {where} has no member dataset_0", "copy it again")
    for member in members[1:]:
        _check_genes(members[0], member)
    return members


def _check_genes(first: Member, other: Member) -> None:
    if first.genes == other.genes:
        other.genes = first.genes  # held once, whatever the number of members
        return
    ours, theirs = set(first.genes), set(other.genes)
    if ours == theirs:
        problem = f"has its genes in another order than {first.place}"
    else:
        only_first = [gene for gene in first.genes if gene not in theirs]
        only_other = [gene for gene in other.genes if gene not in ours]
        problem = (
            f"has other genes: it lacks {join_names(only_first, 3)}, and {first.place} lacks "
            f"{join_names(only_other, 3)}"
        )
    raise CountsError(
        f"{other.place} {problem}",
        "make one store of them with `rayvaec prepare ... --genes intersect`",
    )
