"""External stores: AnnData Zarr and annbatch collections that `prepare` did not write.

What `prepare` knows of its own stores, a survey finds out for this one
(`rayvaec.data.store.external_scan`). The result is kept in a description beside what is made of the
store; nothing is written into the store.

Its rows may be sorted, so the validation cells are not the last ones: they are short runs of rows
from all over the store, drawn once, by a seed of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.arrays.sharded import Array1D
from rayvaec.data.inputs.zarr_reader import CastArray1D, CodedColumn, Member, open_members
from rayvaec.data.io.object_store import open_reader
from rayvaec.data.loading.sampler import permutation
from rayvaec.data.prepare.partitions import CountsDtypes
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest, PartitionInfo, RowRange, ScanResult
from rayvaec.data.store.store import Partition, Store
from rayvaec.errors import StoreError
from rayvaec.util.location import Location

SPLIT_SEED = 0
VAL_FRACTION = 0.1
MOST_RUN_ROWS = 256


class ExternalPartition(Partition):
    """A member of a foreign store, in the types and codes that a store's partitions have.

    Parameters
    ----------
    member : Member
        The AnnData.
    info : PartitionInfo
        What the manifest says about it.
    registry : Registry
        Genes, labels and batches of the whole store.
    dtypes : CountsDtypes
        Types that hold every count and gene of the whole store.
    """

    def __init__(
        self, member: Member, info: PartitionInfo, registry: Registry, dtypes: CountsDtypes
    ) -> None:
        super().__init__(member.blobs, info, registry)
        self._member, self._dtypes = member, dtypes

    @cached_property
    def indptr(self) -> Array1D:
        """CSR row offsets, [n_cells + 1]."""
        return _cast(self._member.matrix_part("indptr"), np.int64)

    @cached_property
    def indices(self) -> Array1D:
        """Gene positions, [nnz]."""
        return _cast(self._member.matrix_part("indices"), self._dtypes.indices)

    @cached_property
    def counts(self) -> Array1D:
        """Counts, [nnz]."""
        return _cast(self._member.matrix_part("data"), self._dtypes.counts)

    @cached_property
    def labels(self) -> Array1D:
        """Label codes, [n_cells]."""
        column = self._member.coded_column(self._registry.labels_key)
        return recoded(column, self._registry.labels)

    @cached_property
    def batches(self) -> Array1D | None:
        """Batch codes, [n_cells]; None where the store has no batches."""
        if self._registry.batch_key is None:
            return None
        return recoded(self._member.coded_column(self._registry.batch_key), self._registry.batches)

    def names(self, start: int, stop: int) -> list[str]:
        """Return the names of a range of cells."""
        return self._member.names(start, stop)


def _cast(vector: Array1D, dtype: Any) -> Array1D:
    return vector if vector.dtype == dtype else CastArray1D(vector, dtype)


def recoded(column: CodedColumn, names: Sequence[str]) -> Array1D:
    """Return a column's codes as positions in `names`, -1 where that has no such name.

    Parameters
    ----------
    column : CodedColumn
        With codes of its own.
    names : sequence of str
        What to find its values in.

    Returns
    -------
    Array1D
        Of int32.
    """
    position = {name: code for code, name in enumerate(names)}
    # The code of a missing value, -1, stands for the last entry.
    table = [position.get(category, -1) for category in column.categories] + [-1]
    return CastArray1D(column.codes, np.int32, np.array(table))


class ExternalStore(Store):
    """A surveyed store that rayvaec did not write.

    Parameters
    ----------
    path : Path or Url
        Where it lies.
    manifest : Manifest
        What the survey found; its partitions have no files.
    findings : ScanResult
        What else it found.
    members : sequence of Member, optional
        The opened store, where it is open already.
    validation_last : bool
        Whether the validation rows come last, as in every store; otherwise rows are in the order
        in which they lie, and there are no splits to speak of.

    Raises
    ------
    StoreError
        If another store lies there than was surveyed.
    """

    def __init__(
        self,
        path: Location,
        manifest: Manifest,
        findings: ScanResult,
        members: Sequence[Member] | None = None,
        *,
        validation_last: bool = True,
    ) -> None:
        self.findings: ScanResult = findings
        self._validation_last = validation_last
        if members is None:
            members = open_members(path, open_reader(path), manifest.sources[0].get("layer"))
        self._members = members
        if store_digest(members, manifest.registry) != findings.digest:
            raise StoreError(
                f"{path} is not what it was when it was surveyed",
                "survey it again: name the store itself, with --labels-key, in a new run",
            )
        super().__init__(path, manifest, members[0].blobs)

    def __reduce__(self) -> tuple[Any, ...]:
        store = ExternalStore if self._validation_last else _open_as_stored
        return store, (self.path, self.manifest, self.findings)

    def _open_partitions(self) -> list[Partition]:
        registry = self.manifest.registry
        dtypes = CountsDtypes.smallest(self.findings.largest, registry.n_genes)
        return [
            ExternalPartition(member, info, registry, dtypes)
            for member, info in zip(self._members, self.manifest.partitions, strict=True)
        ]

    def _order(self) -> tuple[RowRange, ...]:
        cells = [info.n_cells for info in self.manifest.partitions]
        if self._validation_last:
            train, validation = split(cells)
            return train + validation
        return tuple(RowRange(number, 0, n) for number, n in enumerate(cells))

    @property
    def has_unique_names(self) -> bool:
        """Whether every cell is known to have a name of its own: nobody has looked."""
        return False

    @property
    def is_shuffled(self) -> bool:
        """Whether rows are in random order; nobody has said so."""
        return False

    def as_stored(self) -> Store:
        """Return the store with its rows in the order in which they lie."""
        return ExternalStore(
            self.path, self.manifest, self.findings, self._members, validation_last=False
        )

    def places_of(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows of `as_stored` stand among this store's rows."""
        firsts = np.cumsum([0] + [info.n_cells for info in self.manifest.partitions])
        rows = [firsts[part] + np.arange(start, stop) for part, start, stop in self._order()]
        places = np.empty(self.n_cells, np.int64)
        places[np.concatenate(rows)] = np.arange(self.n_cells)
        return places[stored]

    def verify(self) -> None:
        """Refuse: there are no checksums.

        Raises
        ------
        StoreError
            Always.
        """
        raise StoreError(
            f"{self.path} has no checksums: rayvaec did not write it",
            "make a store of it with `rayvaec prepare`",
        )


def _open_as_stored(path: Location, manifest: Manifest, findings: ScanResult) -> ExternalStore:
    return ExternalStore(path, manifest, findings, validation_last=False)


def store_digest(members: Sequence[Member], registry: Registry) -> str:
    """Return one digest over those of all members."""
    keys = [key for key in (registry.labels_key, registry.batch_key) if key is not None]
    return " ".join(member.digest(keys)[:16] for member in members)


def split(cells: Sequence[int]) -> tuple[tuple[RowRange, ...], tuple[RowRange, ...]]:
    """Draw the validation cells: short runs of rows from all over the store.

    Runs, because rows are read in runs: single ones would leave none whole. They are as short as
    gives some 200 of them, and never longer than a block of the loader.

    Parameters
    ----------
    cells : sequence of int
        Rows of each partition.

    Returns
    -------
    tuple of two tuples of RowRange
        The training rows and the validation rows, each in the order in which they lie.
    """
    n_cells = sum(cells)
    rows = int(np.clip(n_cells * VAL_FRACTION // 200, 1, MOST_RUN_ROWS))
    runs = [
        RowRange(number, start, min(start + rows, n))
        for number, n in enumerate(cells)
        for start in range(0, n, rows)
    ]
    wanted = round(len(runs) * VAL_FRACTION) or int(len(runs) > 1)
    drawn = set(permutation(len(runs), SPLIT_SEED)[:wanted].tolist())
    parts: tuple[list[RowRange], list[RowRange]] = ([], [])
    for number, run in enumerate(runs):
        part = parts[number in drawn]
        if part and (part[-1].partition, part[-1].stop) == run[:2]:
            run = part.pop()._replace(stop=run.stop)
        part.append(run)
    return tuple(parts[0]), tuple(parts[1])
