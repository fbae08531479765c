"""What the first pass of `prepare` has found so far, kept so that another process can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.inputs.cell_names import name_hashes
from rayvaec.data.workspace import Workspace, append_durably


class SurveyNotes:
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
        As in `rayvaec.data.survey.Survey`, for the checked cells.
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
