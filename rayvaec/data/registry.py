"""Names of genes, labels and batches, and their integer codes.

Every store and every model carries one `Registry`. Codes are positions in its tuples, so two
registries with the same `hash` can exchange codes and gene columns freely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayvaec.errors import CountsError
from rayvaec.util.messages import (
    cell_at,
    is_missing,
    missing_values,
    refuse_duplicates,
    suggest,
)

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class GeneAlignment:
    """Where a registry's genes stand in other data.

    Parameters
    ----------
    columns : array[n_genes] of int64
        Position of each registry gene among the given names, -1 where it is missing.
    missing : tuple of str
        Registry genes that were not given.
    extra : tuple of str
        Given genes that the registry does not have.
    """

    columns: NDArray[np.int64]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class AlignedCells:
    """Cells in a registry's gene order and codes.

    Parameters
    ----------
    indptr, indices, counts : arrays of int64, int32, int32
        CSR counts, [n_cells, n_genes]; indices sorted within a row, no stored zeros.
    labels : array[n_cells] of int64
        Label codes.
    batches : array[n_cells] of int64, optional
        Batch codes, None where the registry has no batches.
    names : list of str
        Names of the cells; those that repeat another's are told apart by their occurrence.
    missing, extra : tuple of str
        As in `GeneAlignment`.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    counts: NDArray[np.int32]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    names: list[str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class Registry:
    """The names behind columns and codes, in order.

    Parameters
    ----------
    genes : tuple of str
        Column names of the counts.
    labels : tuple of str
        Cell types; a label's code is its position.
    labels_key : str
        The obs column that held the labels.
    batches : tuple of str
        Experimental batches; empty where none are modelled.
    batch_key : str, optional
        The obs column that held the batches.

    Raises
    ------
    CountsError
        If a gene, label or batch occurs twice, or batches and their key do not come together.
    """

    genes: tuple[str, ...]
    labels: tuple[str, ...]
    labels_key: str
    batches: tuple[str, ...] = ()
    batch_key: str | None = None

    def __post_init__(self) -> None:
        refuse_duplicates(self.genes, "gene", "the registry")
        refuse_duplicates(self.labels, "label", "the registry")
        refuse_duplicates(self.batches, "batch", "the registry")
        if (self.batch_key is None) != (not self.batches):
            raise CountsError(
                f"the registry has {len(self.batches)} batches and batch key {self.batch_key!r}",
                "give batches and their obs column together, or neither",
            )

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.genes)

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.labels)

    @property
    def n_batches(self) -> int:
        """Number of batches, 0 where none are modelled."""
        return len(self.batches)

    def hash(self) -> str:
        """Return the SHA-256 of the canonical JSON form, as 64 hexadecimal digits."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_json` reads."""
        return {
            "genes": list(self.genes),
            "labels": list(self.labels),
            "labels_key": self.labels_key,
            "batches": list(self.batches),
            "batch_key": self.batch_key,
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what `to_json` gave.

        Parameters
        ----------
        value : dict
            Decoded JSON; entries beyond the registry's own are ignored.

        Returns
        -------
        Registry

        Raises
        ------
        CountsError
            If an entry is missing or of another type; the message names it.
        """
        if not isinstance(value, dict):
            raise CountsError(f"a registry must be a JSON object, not {type(value).__name__}")
        return cls(
            genes=_names(value, "genes"),
            labels=_names(value, "labels"),
            labels_key=_name(value, "labels_key"),
            batches=_names(value, "batches"),
            batch_key=None if value.get("batch_key") is None else _name(value, "batch_key"),
        )

    def encode_labels(
        self, values: Iterable[Any], where: str, cells: Sequence[str] | None = None
    ) -> NDArray[np.int64]:
        """Turn labels into codes.

        Parameters
        ----------
        values : iterable of str
            One label per cell; numbers are read as their text.
        where : str
            Where they come from, for the message.
        cells : sequence of str, optional
            Names of the cells, for the message; positions by default.

        Returns
        -------
        array[n_cells] of int64
            Positions in `labels`.

        Raises
        ------
        CountsError
            If a value is missing (how many, the first cell) or unknown (the valid ones).
        """
        return _encode(values, self.labels, "label", where, cells)

    def encode_batches(
        self, values: Iterable[Any], where: str, cells: Sequence[str] | None = None
    ) -> NDArray[np.int64]:
        """Turn batches into codes; parameters and errors as in `encode_labels`."""
        return _encode(values, self.batches, "batch", where, cells)

    def align_genes(self, names: Sequence[str], where: str = "the data") -> GeneAlignment:
        """Find this registry's genes among other names.

        Parameters
        ----------
        names : sequence of str
            Column names of other data.
        where : str
            Where they come from, for the message.

        Returns
        -------
        GeneAlignment

        Raises
        ------
        CountsError
            If a name occurs twice in `names`.
        """
        refuse_duplicates(names, "gene", where)
        position = {name: column for column, name in enumerate(names)}
        columns = np.fromiter((position.get(gene, -1) for gene in self.genes), np.int64)
        known = set(self.genes)
        return GeneAlignment(
            columns=columns,
            missing=tuple(gene for gene in self.genes if gene not in position),
            extra=tuple(name for name in names if name not in known),
        )

    def align(
        self,
        adata: AnnData,
        *,
        layer: str | None = None,
        labels_key: str | None = None,
        allow_missing: bool = False,
        rows: ArrayLike | None = None,
        where: str = "adata",
    ) -> AlignedCells:
        """Bring an AnnData into this registry's gene order and codes.

        Parameters
        ----------
        adata : AnnData, [n_cells, any genes]
            Raw counts, sparse or dense.
        layer : str, optional
            Layer with the counts; X by default, ``"raw"`` reads ``adata.raw``.
        labels_key : str, optional
            Column of obs with the labels; the registry's own by default.
        allow_missing : bool
            Whether genes that `adata` lacks count as zero instead of being an error.
        rows : array-like of int or bool, optional
            Positions of the cells to take, or a mask of them; all by default.
        where : str
            What to call `adata` in messages.

        Returns
        -------
        AlignedCells

        Raises
        ------
        ConfigError
            If `rows` leads outside `adata`.
        CountsError
            If `adata` is not an AnnData in memory, a value is not a count, genes are missing, or a
            label is missing or unknown.
        """
        # Bring scipy and pandas, which a training worker does without.
        from rayvaec.data.inputs.align import align_columns, refuse_missing
        from rayvaec.data.inputs.memory import InMemory

        source = InMemory(adata, layer, rows=rows, where=where)
        found = self.align_genes(source.genes, where)
        refuse_missing(self.genes, found.missing, source.genes, allow_missing, where)
        key = labels_key or self.labels_key
        labels = self.encode_labels(source.column(key), f"{where}.obs[{key!r}]", source.names)
        batches = None
        if self.batch_key is not None:
            values = source.column(self.batch_key)
            batches = self.encode_batches(values, f"{where}.obs[{self.batch_key!r}]", source.names)
        columns = inverse(found.columns, len(source.genes))
        x = align_columns(source.counts(), columns, self.n_genes)
        return AlignedCells(
            indptr=x.indptr.astype(np.int64),
            indices=x.indices.astype(np.int32, copy=False),
            counts=x.data,
            labels=labels,
            batches=batches,
            names=source.names,
            missing=found.missing,
            extra=found.extra,
        )


def inverse(columns: NDArray[np.int64], n_names: int) -> NDArray[np.int64]:
    """Turn "where each gene stands among the names" into "which gene each name is".

    Parameters
    ----------
    columns : array[n_genes] of int64
        As in `GeneAlignment`.
    n_names : int
        Number of names.

    Returns
    -------
    array[n_names] of int64
        Position of each name among the genes, -1 where it is none of them.
    """
    target = np.full(n_names, -1, np.int64)
    present = np.flatnonzero(columns >= 0)
    target[columns[present]] = present
    return target


def _encode(
    values: Iterable[Any],
    known: tuple[str, ...],
    what: str,
    where: str,
    cells: Sequence[str] | None,
) -> NDArray[np.int64]:
    code = {name: position for position, name in enumerate(known)}
    every = list(values)
    # A dict lookup per distinct value: numbers and the like are turned to text only once each.
    for value in dict.fromkeys(every):
        code.setdefault(value, -1 if is_missing(value) else code.get(str(value), -2))
    codes = np.fromiter((code[value] for value in every), np.int64, count=len(every))
    if codes.size and codes.min() < 0:
        raise _encode_error(every, codes, known, what, where, cells)
    return codes


def _encode_error(
    values: list[Any],
    codes: NDArray[np.int64],
    known: tuple[str, ...],
    what: str,
    where: str,
    cells: Sequence[str] | None,
) -> CountsError:
    if (codes == -1).any():
        return missing_values(values, what, where, cells)
    unknown = np.flatnonzero(codes == -2)
    value = str(values[int(unknown[0])])
    return CountsError(
        f"{where} has the unknown {what} {value!r} ({unknown.size} of {len(values)} cells with "
        f"unknown ones, the first {cell_at(int(unknown[0]), cells)})",
        f"valid ones are {suggest(value, known)}",
    )


def _name(value: dict[str, Any], key: str) -> str:
    if not isinstance(value.get(key), str):
        raise CountsError(f"the registry's {key!r} must be a string, not {value.get(key)!r}")
    return value[key]


def _names(value: dict[str, Any], key: str) -> tuple[str, ...]:
    names = value.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CountsError(f"the registry's {key!r} must be a list of strings")
    return tuple(names)
