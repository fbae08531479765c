"""Cells of a store in a model's gene order and codes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rayvaec.data.inputs.align import align_columns
from rayvaec.data.inputs.cell_names import Repetitions, find_repetitions, warn_of_repeated
from rayvaec.data.registry import Registry, inverse
from rayvaec.data.store.open import Rows, Store
from rayvaec.errors import ModelError
from rayvaec.inference.cells import Cells
from rayvaec.kernels.counts import is_ascending
from rayvaec.kernels.rng import cell_keys
from rayvaec.util.messages import join_names, suggest

logger = logging.getLogger("rayvaec")


class StoreCells:
    """Reads a store in a model's gene order and codes.

    The store must have every gene of the model, in any order; genes beyond those are left out.
    Labels and batches are matched by name.

    Parameters
    ----------
    store : Store
        Where the cells lie.
    registry : Registry
        The model's genes, labels and batches.
    repetitions : Repetitions, optional
        Of `repeated_names`; without it, names are taken to be unique.

    Raises
    ------
    ModelError
        If the store lacks genes, or has labels or batches that the model does not know; they are
        listed.
    """

    def __init__(
        self, store: Store, registry: Registry, repetitions: Repetitions | None = None
    ) -> None:
        self._store, self._n_genes = store, registry.n_genes
        self._repetitions = repetitions
        own = store.registry
        genes = registry.align_genes(own.genes)
        if genes.missing:
            raise ModelError(
                f"the store {store.path} lacks {len(genes.missing)} of the model's "
                f"{registry.n_genes} genes: {join_names(genes.missing)}",
                "prepare it again with --genes FILE that lists the model's genes",
            )
        self.extra_genes = genes.extra
        self._columns = inverse(genes.columns, own.n_genes)
        self._moves = not np.array_equal(self._columns, np.arange(self._n_genes))
        self._labels = _matched(own.labels, registry.labels, "label", store)
        self._batches = None
        if registry.batch_key is not None:
            if own.batch_key is None:
                raise ModelError(
                    f"the model has batches ({registry.batch_key}) and the store {store.path} has "
                    "none",
                    "prepare it again with --batch-key",
                )
            self._batches = _matched(own.batches, registry.batches, "batch", store)

    def read(self, start: int, stop: int, *, keyed: bool = True) -> tuple[Rows, list[str], Cells]:
        """Read consecutive cells.

        Parameters
        ----------
        start, stop : int
            Rows of the store.
        keyed : bool
            Whether the keys of the cells' noise are needed; 0 stands for them otherwise. Hashing
            the names takes longer than reading the counts.

        Returns
        -------
        tuple of Rows, list of str and Cells
            What the store holds, the names of the cells, and what the model sees of them.
        """
        return self.read_runs([range(start, stop)], keyed=keyed)

    def read_runs(
        self, runs: Sequence[range], *, keyed: bool = True
    ) -> tuple[Rows, list[str], Cells]:
        """Read the cells of several ranges of rows, one after the other; as `read`."""
        rows = self._store.read_runs(runs)
        names = [self._store.obs_names(run.start, run.stop) for run in runs]
        indptr, indices, counts = rows.indptr, rows.indices, rows.counts
        if self._moves or not (counts.all() and is_ascending(indptr, indices)):
            x = csr_array(
                (counts.astype(np.int32), indices.astype(np.int32), indptr),
                shape=(len(rows), len(self._columns)),
            )
            x = align_columns(x, self._columns, self._n_genes)
            indptr, indices, counts = x.indptr.astype(np.int64), x.indices, x.data
        keys = np.zeros(len(rows), np.uint64)
        if keyed:
            unique, repetitions = names, self._repetitions
            if repetitions is not None:
                parts = zip(names, runs, strict=True)
                unique = [repetitions.rename(part, run.start) for part, run in parts]
            keys = cell_keys([*chain.from_iterable(unique)])
        batches = None
        if self._batches is not None and rows.batches is not None:
            batches = self._batches[rows.batches]
        cells = Cells(
            indptr=indptr,
            indices=indices,
            counts=counts,
            labels=self._labels[rows.labels],
            batches=batches,
            keys=keys,
        )
        return rows, [*chain.from_iterable(names)], cells


def repeated_names(store: Store) -> Repetitions | None:
    """Find the cells of a store whose name an earlier one has, and log how many there are.

    Which occurrence a cell is follows from the whole store in the order in which it lies, so that
    its random numbers depend neither on how the work is cut nor on what it is.

    Parameters
    ----------
    store : Store

    Returns
    -------
    Repetitions or None
        None where every name occurs once, as in every store that rayvaec wrote.
    """
    if store.has_unique_names:
        return None
    stored = store.as_stored()
    found = find_repetitions(stored.obs_names, store.n_cells)
    if not len(found.rows):
        return None
    row = int(found.rows[0])
    (example,) = found.rename(stored.obs_names(row, row + 1), row)
    warn_of_repeated(str(store.path), len(found.rows), store.n_cells, example)
    rows = store.places_of(found.rows)
    order = np.argsort(rows)
    return Repetitions(rows[order], found.suffixes[order])


def _matched(
    own: Sequence[str], known: Sequence[str], what: str, store: Store
) -> NDArray[np.int64]:
    """Return the model's code of each of the store's names."""
    code = {name: position for position, name in enumerate(known)}
    unknown = [name for name in own if name not in code]
    # A model without labels takes every cell for one of the same kind.
    if unknown and known:
        plural = {"label": "labels", "batch": "batches"}[what]
        raise ModelError(
            f"the store {store.path} has {len(unknown)} {plural} that the model does not know: "
            f"{join_names(unknown)}",
            f"the model knows {suggest(unknown[0], known)}",
        )
    return np.array([code.get(name, 0) for name in own], np.int64)
