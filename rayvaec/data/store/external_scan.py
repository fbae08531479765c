"""Scan of an external store: read and check every value and name once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec import __version__
from rayvaec.data.inputs.counts import as_counts
from rayvaec.data.inputs.obs import ObsKeys, read_codes, refuse_nothing
from rayvaec.data.inputs.zarr_reader import Member, open_members
from rayvaec.data.io.object_store import open_reader
from rayvaec.data.registry import Registry
from rayvaec.data.store.external import SPLIT_SEED, ExternalStore, split, store_digest
from rayvaec.data.store.manifest import Manifest, PartitionInfo, ScanResult
from rayvaec.errors import CountsError
from rayvaec.util.location import Location
from rayvaec.util.messages import refuse_duplicates
from rayvaec.util.progress import Progress

logger = logging.getLogger("rayvaec")

BLOCK_ELEMENTS = 4_000_000
BLOCK_ROWS = 65_536
LOADER_BLOCK, LOADER_BLOCKS, MINIBATCH = 256, 64, 1024
"""How the loader mixes by default: a minibatch comes from as many blocks of as many rows."""


def scan_external_store(where: Location, keys: ObsKeys) -> ExternalStore:
    """Check every value, label and name of a store that rayvaec did not write.

    Parameters
    ----------
    where : Path or Url
        An AnnData Zarr, or an annbatch collection.
    keys : ObsKeys
        Its columns of labels and batches.

    Returns
    -------
    ExternalStore

    Raises
    ------
    StoreError
        If it is neither, or a file cannot be read.
    CountsError
        For whatever cannot be trained on; the message names value and place.
    """
    members = open_members(where, open_reader(where), keys.layer)
    for member in members:
        refuse_nothing(member)
    refuse_duplicates(members[0].genes, "gene", members[0].place)
    labels, label_codes = read_codes(members, keys.labels, "label")
    batches: tuple[str, ...] = ()
    if keys.batches is not None:
        batches, _ = read_codes(members, keys.batches, "batch")
    registry = Registry(members[0].genes, labels, keys.labels, batches, keys.batches)
    n_cells = [member.n_cells for member in members]
    gene_totals, largest, infos = np.zeros(registry.n_genes, np.int64), 0, []
    with Progress(sum(n_cells), "cells", "checking") as progress:
        for member in members:
            audit = _Audit(member, registry.n_genes)
            for n in audit.blocks():
                progress.advance(n)
            gene_totals += audit.gene_totals
            largest = max(largest, audit.largest)
            infos.append(audit.info())
    train, _ = split(n_cells)
    manifest = Manifest(
        registry=registry,
        n_cells=sum(n_cells),
        nnz=sum(info.nnz for info in infos),
        cells_per_label=tuple(np.bincount(label_codes, minlength=len(labels)).tolist()),
        gene_totals=tuple(gene_totals.tolist()),
        total_counts=int(gene_totals.sum()),
        n_train=sum(segment.stop - segment.start for segment in train),
        seed=SPLIT_SEED,
        sources=tuple(_source(member) for member in members),
        partitions=tuple(infos),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rayvaec_version=__version__,
    )
    store = ExternalStore(
        where, manifest, ScanResult(largest, store_digest(members, registry)), members
    )
    _say_how_it_mixes(store, label_codes)
    return store


class _Audit:
    """Reads one member, block by block, and sums up.

    Parameters
    ----------
    member : Member
        What to read.
    n_genes : int
        Number of its columns.
    """

    def __init__(self, member: Member, n_genes: int) -> None:
        self._member, self._n_genes = member, n_genes
        self._indptr, self._indices, self._data = (
            member.matrix_part(name) for name in ("indptr", "indices", "data")
        )
        self._hashes = [hashlib.sha256() for _ in range(3)]
        self.gene_totals, self.largest = np.zeros(n_genes, np.int64), 0

    def blocks(self) -> Iterator[int]:
        """Read everything; yield the number of cells read each time."""
        n, last = self._member.n_cells, 0
        for first in range(0, n, BLOCK_ROWS):
            rows = min(BLOCK_ROWS, n - first)
            offsets = self._indptr.read(first, first + rows + 1).astype(np.int64)
            if offsets[0] != last or np.any(np.diff(offsets) < 0):
                raise self._contradiction("its row offsets do not follow one another")
            last, start = int(offsets[-1]), 0
            if last > len(self._data):
                raise self._contradiction(f"it has {len(self._data)} values, not {last}")
            while start < rows:
                reach = int(np.searchsorted(offsets, offsets[start] + BLOCK_ELEMENTS, "right"))
                stop = max(reach - 1, start + 1)
                self._block(first + start, offsets[start : stop + 1])
                yield stop - start
                start = stop
        if last != len(self._data):
            raise self._contradiction(f"it has {len(self._data)} values, not {last}")

    def info(self) -> PartitionInfo:
        """Return what the manifest says about the member, with a checksum of its contents."""
        joint = hashlib.sha256(b"".join(part.digest() for part in self._hashes)).hexdigest()
        return PartitionInfo(
            self._member.name, self._member.n_cells, len(self._data), {}, f"sha256:{joint}"
        )

    def _block(self, first: int, offsets: NDArray[np.int64]) -> None:
        begin, end = int(offsets[0]), int(offsets[-1])
        raw = self._data.read(begin, end)
        indices = self._indices.read(begin, end).astype(np.int64)
        offsets = offsets - begin
        if end > begin and not 0 <= indices.min() <= indices.max() < self._n_genes:
            raise self._contradiction(f"it has values of genes beyond its {self._n_genes}")
        self._check_order(first, offsets, indices)
        counts = self._counts(first, offsets, indices, raw)
        x = sparse.csr_array((counts, indices, offsets), shape=(len(offsets) - 1, self._n_genes))
        empty = np.flatnonzero(x.sum(axis=1, dtype=np.int64) == 0)
        if len(empty):
            name = self._name(first + int(empty[0]))
            raise CountsError(
                f"cell {name} of {self._member.place} has no counts", _prepare("--drop-empty")
            )
        # Sums of whole numbers below 2**53 are exact in bincount's float64.
        self.gene_totals += np.bincount(indices, counts, self._n_genes).astype(np.int64)
        self.largest = max(self.largest, int(counts.max(initial=0)))
        contents: tuple[NDArray[Any], ...] = (np.diff(offsets), indices, counts)
        for part, values in zip(self._hashes, contents, strict=True):
            part.update(values.astype("<u4").data)

    def _counts(
        self, first: int, offsets: NDArray[Any], indices: NDArray[Any], raw: NDArray[Any]
    ) -> NDArray[np.int32]:
        member = self._member

        def locate(at: int) -> tuple[str, str]:
            row = int(np.searchsorted(offsets, at, "right")) - 1
            return self._name(first + row), member.genes[int(indices[at])]

        return as_counts(raw, locate, where=member.where, layers=member.layers)

    def _check_order(self, first: int, offsets: NDArray[Any], indices: NDArray[Any]) -> None:
        """Refuse rows whose genes are not in order, each once."""
        falls = np.diff(indices) <= 0
        falls[offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < len(indices))] - 1] = False
        if not falls.any():
            return
        at = int(np.argmax(falls))
        row = int(np.searchsorted(offsets, at, "right")) - 1
        genes = indices[offsets[row] : offsets[row + 1]]
        name, where = self._name(first + row), self._member.place
        twice = len(np.unique(genes)) < len(genes)
        values, times = np.unique(genes, return_counts=True)
        gene = self._member.genes[int(values[np.argmax(times)])]
        problem = f"holds gene {gene} more than once" if twice else "has its genes out of order"
        raise CountsError(f"cell {name} of {where} {problem}", _prepare(""))

    def _name(self, row: int) -> str:
        return self._member.names(row, row + 1)[0]

    def _contradiction(self, problem: str) -> CountsError:
        return CountsError(
            f"{self._member.where} contradicts itself: {problem}", "copy or write it again"
        )


def _prepare(option: str) -> str:
    return f"make a store of it with `rayvaec prepare INPUT {option}".rstrip() + "`"


def _source(member: Member) -> dict[str, Any]:
    return {
        "path": member.place,
        "layer": member.layer,
        "n_cells": member.n_cells,
        "n_genes": member.n_genes,
    }


def _say_how_it_mixes(store: ExternalStore, labels: NDArray[np.int64]) -> None:
    """Say what reading a store as it lies costs: minibatches that are mixed less, decoding twice.

    Parameters
    ----------
    store : ExternalStore
        Surveyed.
    labels : array[n_cells] of int64
        Label codes in the order in which the cells lie.
    """
    found, ideal = label_distance(labels)
    logger.info(
        "%s is read as it lies, in runs of %d cells: labels of a minibatch differ from the whole's "
        "by %.3f (total variation), %.3f where cells are perfectly shuffled",
        store.path,
        LOADER_BLOCK,
        found,
        ideal,
    )
    if found > 1.5 * ideal:
        logger.warning(
            "the cells of %s are not shuffled, and minibatches will not be quite: `rayvaec "
            "prepare` makes a store that is, and reads faster",
            store.path,
        )


def label_distance(labels: NDArray[np.int64], draws: int = 200) -> tuple[float, float]:
    """Measure how far the labels of minibatches are from those of all cells.

    Parameters
    ----------
    labels : array[n_cells] of int64
        Label codes in the order in which the cells lie.
    draws : int
        How many minibatches to look at.

    Returns
    -------
    (float, float)
        Mean total-variation distance of minibatches as the loader draws them by default, and of
        as many cells drawn one by one.
    """
    rng = np.random.Generator(np.random.Philox(key=SPLIT_SEED))
    whole = np.bincount(labels) / len(labels)
    n_blocks = -(-len(labels) // LOADER_BLOCK)
    distances = np.zeros((draws, 2))
    for draw in range(draws):
        blocks = rng.permutation(n_blocks)[:LOADER_BLOCKS]
        rows = (blocks[:, None] * LOADER_BLOCK + np.arange(LOADER_BLOCK)).ravel()
        rows = rows[rows < len(labels)]
        size = min(MINIBATCH, len(rows))
        mixed = rng.permutation(rows)[:size], rng.choice(len(labels), size, replace=False)
        for way, cells in enumerate(mixed):
            mix = np.bincount(labels[cells], minlength=len(whole))
            distances[draw, way] = np.abs(mix / size - whole).sum() / 2
    found, ideal = distances.mean(axis=0).tolist()
    return found, ideal
