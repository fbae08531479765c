"""First pass of `prepare`: read and check every value, and decide what to write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.align import align_columns, place_in_csr
from rayvaec.data.inputs.cell_names import name_hashes
from rayvaec.data.inputs.counts import as_counts
from rayvaec.data.inputs.obs import read_codes, refuse_nothing
from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare.gene_selection import choose_genes, columns_of
from rayvaec.data.prepare.job import Workspace, append_durably
from rayvaec.data.registry import Registry
from rayvaec.util.progress import Progress


class ValidationState:
    """Running results of the first pass; begins with what a workspace has noted.

    Parameters
    ----------
    work : Workspace
        Where to note.
    n_cells, n_genes : int
        Cells of all inputs, and genes of the store.

    Attributes
    ----------
    cells : int
        How many cells are checked.
    empty, hashes : array[n_cells] of bool and uint64
        As in `rayvaec.data.prepare.validate.ValidationResult`, for the checked cells.
    gene_totals : array[n_genes] of int64
        Sum of each gene's counts.
    nnz, max_count : int
        Number of stored values, and the largest.
    """

    def __init__(self, work: Workspace, n_cells: int, n_genes: int) -> None:
        self._work, self._saved = work, 0
        self.cells = self.nnz = self.max_count = 0
        self.empty = np.zeros(n_cells, bool)
        self.hashes = np.zeros(n_cells, np.uint64)
        self.gene_totals = np.zeros(n_genes, np.int64)
        record = work.read("survey")
        if record is not None:
            self.cells = self._saved = record["cells"]
            self.nnz, self.max_count = record["nnz"], record["max_count"]
            self.gene_totals[:] = record["gene_totals"]
            for path, array in self._files():
                array[: self.cells] = np.fromfile(path, array.dtype, count=self.cells)

    def _files(self) -> list[tuple[Path, NDArray[Any]]]:
        return [
            (self._work.scratch / "empty", self.empty),
            (self._work.scratch / "hashes", self.hashes),
        ]

    def add(self, start: int, names: list[str], x: sparse.csr_array) -> None:
        """Add the next cells.

        Parameters
        ----------
        start : int
            Number of the first of them, which is `cells`.
        names : list of str
            Their names.
        x : csr_array[n_rows, n_genes] of int32
            Their counts, without stored zeros.
        """
        self.cells = start + x.shape[0]
        self.empty[start : self.cells] = np.diff(x.indptr) == 0
        self.hashes[start : self.cells] = name_hashes(names)
        # Sums of whole numbers below 2**53 are exact in bincount's float64.
        totals = np.bincount(x.indices, x.data, len(self.gene_totals))
        self.gene_totals += totals.astype(np.int64)
        self.nnz, self.max_count = self.nnz + x.nnz, max(self.max_count, int(x.data.max(initial=0)))

    def save(self) -> None:
        """Note what is found, durably."""
        if self._saved == self.cells:
            return
        for path, array in self._files():
            append_durably(path, array[self._saved : self.cells], self._saved * array.itemsize)
        self._saved = self.cells
        record = {
            "cells": self.cells,
            "nnz": self.nnz,
            "max_count": self.max_count,
            "gene_totals": self.gene_totals.tolist(),
        }
        self._work.write("survey", record)


@dataclass(frozen=True)
class Names:
    """The inputs' genes, labels and batches; arrays run over the cells of all inputs.

    Parameters
    ----------
    registry, targets, labels, batches
        As in `ValidationResult`.
    """

    registry: Registry
    targets: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64] | None


@dataclass(frozen=True)
class ValidationResult:
    """What the inputs hold; arrays run over the cells of all inputs, one input after the other.

    Parameters
    ----------
    registry : Registry
        Genes, labels and batches of the store.
    targets : tuple of array[n_genes of the input] of int64
        For each input, the store's column of each of its columns, -1 for none.
    labels : array[n_cells] of int64
        Label codes.
    batches : array[n_cells] of int64, optional
        Batch codes.
    empty : array[n_cells] of bool
        Which cells have no counts in the registry's genes.
    hashes : array[n_cells] of uint64
        Of the cells' names.
    gene_totals : array[n_genes] of int64
        Sum of each gene's counts.
    nnz, max_count : int
        Number of stored values, and the largest.
    """

    registry: Registry
    targets: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64] | None
    empty: NDArray[np.bool_]
    hashes: NDArray[np.uint64]
    gene_totals: NDArray[np.int64]
    nnz: int
    max_count: int


def validate(
    inputs: Sequence[Input], names: Names, block_elements: int, work: Workspace
) -> ValidationResult:
    """Check every value and name of the inputs.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    names : Names
        Their genes, labels and batches.
    block_elements : int
        About how many stored values to hold in memory.
    work : Workspace
        Where to note what is checked; what is noted there already is not read again.

    Returns
    -------
    ValidationResult

    Raises
    ------
    CountsError
        For whatever cannot be trained on; the message names value and place.
    """
    registry, n_cells = names.registry, len(names.labels)
    notes = ValidationState(work, n_cells, registry.n_genes)
    with Progress(n_cells, "cells", "checking", done=notes.cells) as progress:
        blocks = aligned_blocks(
            inputs=inputs,
            targets=names.targets,
            registry=registry,
            elements=block_elements,
            scratch=work.scratch,
            first=notes.cells,
        )
        for start, cells, x in blocks:
            notes.add(start, cells, x)
            progress.advance(x.shape[0])
            if work.is_due():
                notes.save()
    notes.save()
    return ValidationResult(
        registry,
        names.targets,
        labels=names.labels,
        batches=names.batches,
        empty=notes.empty,
        hashes=notes.hashes,
        gene_totals=notes.gene_totals,
        nnz=notes.nnz,
        max_count=notes.max_count,
    )


def read_names(
    inputs: Sequence[Input],
    labels_key: str,
    batch_key: str | None,
    genes: str | Path | tuple[str, ...] | None,
) -> Names:
    """Read and check all names but those of the cells.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    labels_key, batch_key, genes
        As in `rayvaec.data.prepare.config.PrepareConfig`; or the genes themselves.

    Returns
    -------
    Names

    Raises
    ------
    CountsError
        For whatever cannot be trained on; the message names value and place.
    ConfigError
        If `genes` names a file that cannot be read.
    """
    for source in inputs:
        refuse_nothing(source)
    kept_genes = choose_genes(inputs, genes)
    labels, label_codes = read_codes(inputs, labels_key, "label")
    batches: tuple[str, ...] = ()
    batch_codes = None
    if batch_key is not None:
        batches, batch_codes = read_codes(inputs, batch_key, "batch")
    registry = Registry(kept_genes, labels, labels_key, batches, batch_key)
    return Names(registry, columns_of(registry, inputs), label_codes, batch_codes)


def aligned_blocks(
    inputs: Sequence[Input],
    targets: Sequence[NDArray[np.int64]],
    registry: Registry,
    elements: int,
    scratch: Path,
    first: int = 0,
) -> Iterator[tuple[int, list[str], sparse.csr_array]]:
    """Read all inputs in blocks, every value checked, columns in the registry's order.

    Parameters
    ----------
    inputs, targets, registry
        As in `ValidationResult`.
    elements : int
        About how many stored values a block shall hold.
    scratch : Path
        Folder for temporary files.
    first : int
        Number of the first row to read, among all inputs' cells.

    Yields
    ------
    tuple of int, list of str, csr_array[n_rows, n_genes] of int32
        Number of the first row among all inputs' cells, the cells' names, and their counts.

    Raises
    ------
    CountsError
        For a value that is no count.
    """
    offset = 0
    for number, (source, target) in enumerate(zip(inputs, targets, strict=True)):
        begin = max(first - offset, 0)
        blocks: Iterable[tuple[int, sparse.csr_array]] = ()
        if begin < source.n_cells:
            blocks = source.blocks(elements, scratch / f"input_{number}", begin)
        for start, raw in blocks:
            names = source.names(start, start + raw.shape[0])
            locate = place_in_csr(raw.indptr, raw.indices, names.__getitem__, source.genes)
            counts = as_counts(raw.data, locate, where=source.where, layers=source.layers)
            x = sparse.csr_array((counts, raw.indices, raw.indptr), shape=raw.shape)
            yield offset + start, names, align_columns(x, target, registry.n_genes)
        offset += source.n_cells
