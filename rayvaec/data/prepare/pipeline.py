"""`prepare`: AnnData files to one shuffled, sharded store, in bounded memory.

The first pass reads everything and checks it (`rayvaec.data.prepare.validate`); only then are cells
written. The second deals them, in the order of a seeded permutation, to one scratch file per
partition (`rayvaec.data.prepare.spill`); each partition is then put in order and written on its own
(`rayvaec.data.prepare.partitions`), by several Ray tasks if wanted. The manifest comes last.

Everything is written in a folder beside the output, where each step is noted when it is done
(`rayvaec.data.prepare.job`), by one process at a time (`rayvaec.util.lock`).
"""

from __future__ import annotations

import logging
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
from rayvaec.cluster import check_cpus, check_job_paths, check_seen, ray_session
from rayvaec.data.inputs.reader import Input, split_layer
from rayvaec.data.prepare.append import (
    OldStore,
    appended_names,
    check_counts,
    joined,
    publish_appended,
    read_old,
)
from rayvaec.data.prepare.config import PrepareConfig
from rayvaec.data.prepare.gene_selection import share_gene_names
from rayvaec.data.prepare.highly_variable_genes import FLAVOUR, most_variable
from rayvaec.data.prepare.job import Workspace, work_plan, working
from rayvaec.data.prepare.memory import Budget, plan_memory
from rayvaec.data.prepare.partition_tasks import PartitionJob, write_partitions
from rayvaec.data.prepare.partitions import CountsDtypes, write_manifest
from rayvaec.data.prepare.shuffle import PartitionPlan, deal, plan_partitions, shuffled_positions
from rayvaec.data.prepare.validate import Names, ValidationResult, read_names, validate
from rayvaec.data.store.manifest import Manifest, PartitionInfo
from rayvaec.errors import ConfigError, CountsError, StoreError
from rayvaec.util.atomic import check_free, check_suffix, remove
from rayvaec.util.lock import WriteLock
from rayvaec.util.messages import join_names

logger = logging.getLogger("rayvaec")

__all__ = ["PrepareConfig", "prepare"]

NO_HASHES = np.empty(0, np.uint64)


@dataclass(frozen=True)
class _PrepareJob:
    """One call of `prepare`: what is read, how, and where it is written."""

    sources: list[Input]
    config: PrepareConfig
    budget: Budget
    work: Workspace
    old: OldStore | None


def prepare(
    inputs: Sequence[Path | str],
    out: Path,
    config: PrepareConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    append: bool = False,
) -> Manifest:
    """Write a store from AnnData files, or append their cells to one.

    The result depends on the inputs' content and order and on what the config calls shaping. Peak
    memory stays within the config's budget.

    Parameters
    ----------
    inputs : sequence of Path or str
        h5ad files and AnnData-Zarr folders; ``FILE::LAYER`` reads another layer than the config's.
    out : Path
        Folder of the store.
    config : PrepareConfig
        What to do; to append, what `rayvaec.data.prepare.append.append_config` gives.
    overwrite : bool
        Whether an existing `out`, and unfinished work on it, may be replaced.
    resume : bool
        Whether to go on with unfinished work; without any, it begins.
    append : bool
        Whether `out` is a store that shall get the inputs' cells as new partitions.

    Returns
    -------
    Manifest
        What the store holds.

    Raises
    ------
    CountsError
        If an input cannot be trained on; nothing is written then.
    ConfigError
        If there is no input, too little memory, Ray has fewer CPUs than workers, or unfinished
        work to go on with was another.
    StoreError
        If `out` exists and may not be replaced, is one of the inputs, is being written, or has too
        little room; or if there is unfinished work and nothing says what to do with it.
    """
    named = [split_layer(given, config.layer) for given in inputs]
    paths = [path for path, _ in named]
    check_job_paths([*paths, out])
    _check_inputs(paths, out)
    if not append and not resume:
        check_suffix(out)
    out = out.absolute()
    with WriteLock(out), ExitStack() as stack:
        if not append and not (resume and Workspace(out).read("manifest")):
            check_free(out, overwrite)
        old = read_old(out) if append else None
        if old is not None and resume and _is_appended(out, old):
            remove(Workspace(out).folder)
            return old.manifest
        sources = [Input(path, layer) for path, layer in named]
        n_genes = share_gene_names(sources)
        budget = plan_memory(config, sources, n_genes, old.manifest.n_cells if old else 0)
        if config.num_workers > 1:
            stack.enter_context(ray_session())
            check_cpus(config.num_workers, f"{config.num_workers} workers")
            check_seen(paths, [out])
        plan = work_plan(named, config, old.manifest.hash() if old else None)
        with working(out, plan, resume=resume, overwrite=overwrite) as work:
            task = _PrepareJob(sources, config, budget, work, old)
            record = work.read("manifest")
            manifest = Manifest.from_json(record, str(out)) if record else _write(task)
            _publish(task, manifest)
    return manifest


def _check_inputs(inputs: Sequence[Path], out: Path) -> None:
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


def _is_appended(out: Path, old: OldStore) -> bool:
    """Return whether an interrupted process had nothing left to do but to tidy up."""
    record = Workspace(out).read("manifest")
    return record is not None and Manifest.from_json(record, str(out)).hash() == old.manifest.hash()


def _write(task: _PrepareJob) -> Manifest:
    """Write all partitions into the workspace, and note the manifest there."""
    sources, config, work, old = task.sources, task.config, task.work, task.old
    if old is not None:
        old.remove_strays()
    names, gene_choice = _names(task)
    found = validate(sources, names, task.budget.block_elements, work)
    kept = _kept_cells(sources, found, config.drop_empty)
    dtypes = CountsDtypes.smallest(found.max_count, found.registry.n_genes)
    if old is not None:
        dtypes = check_counts(old, found.max_count)
    plan = plan_partitions(len(kept), found.nnz, dtypes, task.budget, work)
    if work.read("dealt") is None:
        _check_room(work.out, plan)
    destinations = np.full(len(found.empty), -1, np.int64)
    portion = old.n_portions if old else 0
    destinations[kept] = shuffled_positions(len(kept), config.seed, portion)
    old_hashes = old.name_hashes() if old else NO_HASHES
    deal(sources, found, destinations, old_hashes, plan, task.budget, work)
    del destinations
    partitions = _partitions(task, found, plan)
    manifest = _manifest(task, found, kept, plan, partitions, gene_choice)
    if old is None:
        write_manifest(work.store, manifest)
    else:
        manifest = joined(old.manifest, manifest)
    work.write("manifest", manifest.to_json())
    return manifest


def _names(task: _PrepareJob) -> tuple[Names, dict[str, Any]]:
    """Return the inputs' names with the genes to keep, and how these were chosen by counts."""
    sources, config, work = task.sources, task.config, task.work
    if task.old is not None:
        return appended_names(task.old, sources, config), {}
    keys = (config.labels_key, config.batch_key)
    if config.n_top_genes is None:
        return read_names(sources, *keys, config.genes), {}
    chosen = work.read("genes")
    if chosen is None:
        names = read_names(sources, *keys, config.genes)
        genes = most_variable(
            sources, names, config.n_top_genes, task.budget.block_elements, work.scratch
        )
        choice = {
            "flavour": FLAVOUR,
            "n_top_genes": config.n_top_genes,
            "n_genes": names.registry.n_genes,
            "batch_key": config.batch_key,
        }
        chosen = {"genes": genes, "choice": choice}
        work.write("genes", chosen)
    return read_names(sources, *keys, tuple(chosen["genes"])), chosen["choice"]


def _check_room(out: Path, plan: PartitionPlan) -> None:
    """Refuse to start what cannot end for want of room."""
    needed = int(1.2 * plan.nnz * (plan.dtypes.counts.itemsize + plan.dtypes.indices.itemsize))
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StoreError(
            f"{out.parent} has {free / 1e9:.1f} GB free and about {needed / 1e9:.1f} GB are "
            "needed while the cells are shuffled",
            "make room or choose another --out",
        )


def _kept_cells(
    sources: Sequence[Input], found: ValidationResult, drop_empty: bool
) -> NDArray[np.int64]:
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
    there = np.unique(found.labels)
    lost = np.setdiff1d(there, np.unique(found.labels[kept]))
    if lost.size:
        raise CountsError(
            f"no cell of {join_names([found.registry.labels[code] for code in lost])} has counts",
            "remove these labels from the inputs",
        )
    return kept


def _partitions(
    task: _PrepareJob, found: ValidationResult, plan: PartitionPlan
) -> list[PartitionInfo]:
    """Write the partitions, as many at once as are wanted and as memory allows."""
    config, first = task.config, len(task.old.manifest.partitions) if task.old else 0
    jobs = [
        PartitionJob(
            folder=task.work.store,
            number=first + number,
            scratch=task.work.scratch / "partitions" / str(number),
            registry=found.registry,
            dtypes=plan.dtypes,
            codec=config.codec,
            rows_per_chunk=config.rows_per_chunk,
        )
        for number in range(plan.n_partitions)
    ]
    largest = min(plan.elements, plan.nnz)
    workers = task.budget.workers(config.num_workers, largest, plan.dtypes, plan.mean_row)
    if workers < config.num_workers:
        logger.warning("writing %d partitions at once: --memory allows no more", workers)
    return write_partitions(jobs, workers, task.work)


def _manifest(
    task: _PrepareJob,
    found: ValidationResult,
    kept: NDArray[np.int64],
    plan: PartitionPlan,
    partitions: Sequence[PartitionInfo],
    gene_choice: dict[str, Any],
) -> Manifest:
    config = task.config
    n_validation = round(len(kept) * config.val_fraction)
    if config.val_fraction and len(kept) > 1:
        n_validation = max(n_validation, 1)
    cells = np.bincount(found.labels[kept], minlength=found.registry.n_labels)
    given = config.genes in (None, "intersect", "union") and not gene_choice
    return Manifest(
        registry=found.registry,
        n_cells=len(kept),
        nnz=found.nnz,
        cells_per_label=tuple(cells.tolist()),
        gene_totals=tuple(found.gene_totals.tolist()),
        total_counts=int(found.gene_totals.sum()),
        n_train=len(kept) - n_validation,
        seed=config.seed,
        sources=tuple(_source(source) for source in task.sources),
        partitions=tuple(partitions),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rayvaec_version=__version__,
        options={
            "genes": config.genes if given else "list",
            "val_fraction": config.val_fraction,
            "codec": config.codec,
            "rows_per_chunk": config.rows_per_chunk,
            "partition_elements": plan.elements,
        },
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


def _publish(task: _PrepareJob, manifest: Manifest) -> None:
    """Put what is written in its place."""
    work, old = task.work, task.old
    if old is not None:
        publish_appended(work, old, manifest)
    elif work.store.exists():  # else a process was interrupted just after this
        aside = work.out.with_name(f".{work.out.name}.old")
        remove(aside)
        if work.out.exists():
            work.out.rename(aside)
        work.store.rename(work.out)
        remove(aside)
