"""`prepare`: any AnnData files -> one shuffled, sharded store, in bounded memory.

The first pass reads everything and checks it (`rayvaec.data.survey`); only then is anything
written. The second deals the cells, in the order of a seeded permutation, to one scratch file per
partition (`rayvaec.data.scatter`); each partition is then put in order and written on its own
(`rayvaec.data.partition`), by several Ray tasks if wanted. The manifest comes last.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayvaec import __version__
from rayvaec.data.cell_names import UniqueNames
from rayvaec.data.elements import check_codec
from rayvaec.data.inputs import Input
from rayvaec.data.manifest import Manifest, PartitionInfo
from rayvaec.data.names import listing
from rayvaec.data.partition import CountsDtypes, write_manifest
from rayvaec.data.partition_jobs import PartitionJob, write_partitions
from rayvaec.data.scatter import Scatter
from rayvaec.data.survey import Survey, aligned_blocks, read_names, survey
from rayvaec.data.variable_genes import FLAVOUR, most_variable
from rayvaec.errors import ConfigError, CountsError, StoreError
from rayvaec.files import check_free, remove, whole_output
from rayvaec.progress import Progress
from rayvaec.runtime import check_cpus, check_job_paths, check_seen, ray_session

logger = logging.getLogger("rayvaec")


@dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` does with its inputs.

    Parameters
    ----------
    labels_key : str
        Column of obs with the cell types.
    batch_key : str, optional
        Column of obs with the experimental batches, where these are to be modelled.
    layer : str, optional
        Layer with the counts; X by default, ``"raw"`` for `AnnData.raw`.
    genes : {"intersect", "union"} or path, optional
        Genes that all inputs have; genes that any has, zero where absent; those that a file
        names, one a line. By default all inputs must have the same genes.
    drop_empty : bool
        Whether to leave out cells without any counts, which otherwise are an error.
    val_fraction : float
        Part of the cells to hold out for validation.
    seed : int
        Seed of the shuffle.
    codec : {"lz4", "zstd"}
        lz4 reads fastest; zstd takes less room.
    rows_per_chunk : int, optional
        About how many cells to compress together.
    num_workers : int
        How many partitions to write at once, as Ray tasks where more than one.
    block_elements, partition_elements : int
        How many stored values to hold while reading, and to give a partition: what bounds the
        memory. The second shapes the store; nothing else here but seed and data does.

    Raises
    ------
    ConfigError
        If a value cannot be used.
    """

    labels_key: str
    batch_key: str | None = None
    layer: str | None = None
    genes: str | Path | None = None
    n_top_genes: int | None = None
    drop_empty: bool = False
    val_fraction: float = 0.1
    seed: int = 0
    codec: str = "lz4"
    rows_per_chunk: int | None = None
    num_workers: int = 1
    block_elements: int = 4_000_000
    partition_elements: int = 64_000_000

    def __post_init__(self) -> None:
        check_codec(self.codec)
        if self.batch_key == self.labels_key:
            raise ConfigError(
                f"labels and batches are both read from obs column {self.labels_key!r}",
                "give another --batch-key or none",
            )
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"--val-fraction is {self.val_fraction}", "use a number from 0 to below 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}", "use a number from 0 to 2**63 - 1")
        for name in (
            "n_top_genes",
            "rows_per_chunk",
            "num_workers",
            "block_elements",
            "partition_elements",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {value}", "use 1 or more")


def prepare(
    inputs: Sequence[Path], out: Path, config: PrepareConfig, *, overwrite: bool = False
) -> Manifest:
    """Write a store from AnnData files.

    The result depends on the inputs' content and order and on the seed alone. Memory is bounded
    by the config's element counts, plus some 50 bytes a cell.

    Parameters
    ----------
    inputs : sequence of Path
        h5ad files and AnnData-Zarr folders.
    out : Path
        Folder of the store.
    config : PrepareConfig
        What to do.
    overwrite : bool
        Whether an existing `out` may be replaced.

    Returns
    -------
    Manifest
        What the store holds.

    Raises
    ------
    CountsError
        If an input cannot be trained on; nothing is written then.
    ConfigError
        If there is no input, or Ray has fewer CPUs than workers.
    StoreError
        If `out` exists and `overwrite` is false, is one of the inputs, or has too little room.
    """
    check_job_paths([*inputs, out])
    _check_paths(inputs, out)
    check_free(out, overwrite)
    _remove_abandoned(out)
    with ExitStack() as stack:
        if config.num_workers > 1:
            stack.enter_context(ray_session())
            check_cpus(config.num_workers, f"{config.num_workers} workers")
            check_seen(inputs, [out])
        sources = [stack.enter_context(Input(path, config.layer)) for path in inputs]
        folder = stack.enter_context(whole_output(out, overwrite)).absolute()
        scratch = folder / ".scratch"
        genes, gene_choice = _choose_genes(sources, config, scratch)
        found = survey(
            sources,
            config.labels_key,
            config.batch_key,
            genes,
            config.block_elements,
            scratch,
        )
        kept = _kept_cells(sources, found, config.drop_empty)
        dtypes = CountsDtypes.smallest(found.max_count, found.registry.n_genes)
        _check_room(folder, found.nnz, dtypes)
        n_partitions = min(max(-(-found.nnz // config.partition_elements), 1), len(kept))
        bounds = np.arange(n_partitions + 1) * len(kept) // n_partitions
        _deal(sources, found, kept, bounds, dtypes, config, scratch)
        jobs = [
            PartitionJob(
                folder=folder,
                number=number,
                scratch=scratch / "partitions" / str(number),
                registry=found.registry,
                dtypes=dtypes,
                codec=config.codec,
                rows_per_chunk=config.rows_per_chunk,
            )
            for number in range(n_partitions)
        ]
        partitions = write_partitions(jobs, config.num_workers)
        remove(scratch)
        manifest = _manifest(sources, found, kept, partitions, config, gene_choice)
        write_manifest(folder, manifest)
    return manifest


def _choose_genes(
    sources: Sequence[Input], config: PrepareConfig, scratch: Path
) -> tuple[str | Path | tuple[str, ...] | None, dict[str, Any]]:
    """Return the choice of genes, made already where it depends on the counts, and its record."""
    if config.n_top_genes is None:
        return config.genes, {}
    names = read_names(sources, config.labels_key, config.batch_key, config.genes)
    genes = most_variable(sources, names, config.n_top_genes, config.block_elements, scratch)
    return genes, {
        "flavour": FLAVOUR,
        "n_top_genes": config.n_top_genes,
        "n_genes": names.registry.n_genes,
        "batch_key": config.batch_key,
    }


def _check_paths(inputs: Sequence[Path], out: Path) -> None:
    if not inputs:
        raise ConfigError("there is no input", "name one or more h5ad or AnnData-Zarr files")
    target, seen = out.resolve(), set[Path]()
    for path in inputs:
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise StoreError(f"--out {out} and the input {path} overlap", "choose another --out")
        if source in seen:
            raise ConfigError(f"the input {path} is given twice", "give it once")
        seen.add(source)


def _remove_abandoned(out: Path) -> None:
    """Remove what a process of this machine was writing at `out` when it was killed."""
    for path in out.parent.glob(f".{out.name}.*.partial"):
        process = path.name.removeprefix(f".{out.name}.").removesuffix(".partial")
        if process.isdigit() and not _is_running(int(process)):
            remove(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_room(folder: Path, nnz: int, dtypes: CountsDtypes) -> None:
    """Refuse to start what cannot end for want of room."""
    needed = int(1.2 * nnz * (dtypes.counts.itemsize + dtypes.indices.itemsize))
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise StoreError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and about {needed / 1e9:.1f} GB are "
            "needed while the cells are shuffled",
            "make room or choose another --out",
        )


def _kept_cells(sources: Sequence[Input], found: Survey, drop_empty: bool) -> NDArray[np.int64]:
    """Return which cells to write; one without counts is an error unless it shall be dropped."""
    n_empty = int(np.count_nonzero(found.empty))
    if n_empty and not drop_empty:
        cell, where = int(np.argmax(found.empty)), 0
        while cell >= sources[where].n_cells:
            cell, where = cell - sources[where].n_cells, where + 1
        source = sources[where]
        raise CountsError(
            f"{n_empty} of {len(found.empty)} cells have no counts in the "
            f"{found.registry.n_genes} genes, the first is {source.names(cell, cell + 1)[0]} in "
            f"{source.path}",
            "leave such cells out with --drop-empty",
        )
    if n_empty:
        logger.warning("left out %d of %d cells without counts", n_empty, len(found.empty))
    kept = np.flatnonzero(~found.empty)
    cells = np.bincount(found.labels[kept], minlength=found.registry.n_labels)
    if not cells.all():
        lost = [found.registry.labels[code] for code in np.flatnonzero(cells == 0)]
        raise CountsError(
            f"no cell of {listing(lost)} has counts", "remove these labels from the inputs"
        )
    return kept


def shuffled_positions(n: int, seed: int) -> NDArray[np.int64]:
    """Return where each of `n` cells goes: a permutation that follows from `seed`.

    Sorts the raw output of Philox, which numpy promises never to change.
    """
    order = np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")
    positions = np.empty(n, np.int64)
    positions[order] = np.arange(n)
    return positions


def _deal(
    sources: Sequence[Input],
    found: Survey,
    kept: NDArray[np.int64],
    bounds: NDArray[np.int64],
    dtypes: CountsDtypes,
    config: PrepareConfig,
    scratch: Path,
) -> None:
    """Read the inputs again and deal their cells to the partitions' scratch files."""
    positions = np.full(len(found.empty), -1, np.int64)
    positions[kept] = shuffled_positions(len(kept), config.seed)
    unique = UniqueNames(found.hashes[kept])
    if unique.n_renamed:
        logger.warning("%d cells have the name of another and get a suffix", unique.n_renamed)
    scatter = Scatter(scratch / "partitions", bounds, dtypes, 4 * config.block_elements)
    blocks = aligned_blocks(sources, found.targets, found.registry, config.block_elements, scratch)
    with Progress(len(positions), "cells", "shuffling") as progress:
        for start, names, x in blocks:
            rows = np.arange(start, start + x.shape[0])
            keep = np.flatnonzero(positions[rows] >= 0)
            first_kept = int(np.searchsorted(kept, start))
            scatter.add(
                positions[rows[keep]],
                x if len(keep) == len(rows) else x[keep],
                found.labels[rows[keep]],
                None if found.batches is None else found.batches[rows[keep]],
                unique.rename([names[row] for row in keep], first_kept),
            )
            progress.advance(len(rows))
    scatter.flush()


def _manifest(
    sources: Sequence[Input],
    found: Survey,
    kept: NDArray[np.int64],
    partitions: Sequence[PartitionInfo],
    config: PrepareConfig,
    gene_choice: dict[str, Any],
) -> Manifest:
    n_validation = round(len(kept) * config.val_fraction)
    if config.val_fraction and len(kept) > 1:
        n_validation = max(n_validation, 1)
    cells = np.bincount(found.labels[kept], minlength=found.registry.n_labels)
    return Manifest(
        registry=found.registry,
        n_cells=len(kept),
        nnz=found.nnz,
        cells_per_label=tuple(cells.tolist()),
        gene_totals=tuple(found.gene_totals.tolist()),
        total_counts=int(found.gene_totals.sum()),
        n_train=len(kept) - n_validation,
        seed=config.seed,
        sources=tuple(_source(source) for source in sources),
        partitions=tuple(partitions),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rayvaec_version=__version__,
        gene_choice=gene_choice,
    )


def _source(source: Input) -> dict[str, Any]:
    """Describe an input for the manifest."""
    return {
        "path": str(source.path.absolute()),
        "layer": source.layer,
        "n_cells": source.n_cells,
        "n_genes": source.n_genes,
    }
