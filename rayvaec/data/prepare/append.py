"""Append cells to a store as new partitions; existing partitions stay unchanged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.cell_names import hashes_of
from rayvaec.data.inputs.obs import read_codes, refuse_nothing
from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare.config import PARTITION_ELEMENTS, PrepareConfig
from rayvaec.data.prepare.gene_selection import check_appended_genes, columns_of
from rayvaec.data.prepare.job import Workspace
from rayvaec.data.prepare.partitions import CountsDtypes, write_manifest
from rayvaec.data.prepare.validate import Names
from rayvaec.data.store.manifest import Manifest, Portion
from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, CountsError, StoreError
from rayvaec.util.atomic import remove
from rayvaec.util.messages import join_names, suggest

logger = logging.getLogger("rayvaec")

NAMES_BLOCK = 2**16


@dataclass(frozen=True)
class OldStore:
    """The store that cells are appended to.

    Parameters
    ----------
    path : Path
        Where it lies.
    manifest : Manifest
        What it holds.
    """

    path: Path
    manifest: Manifest

    @property
    def n_portions(self) -> int:
        """How often cells were written to it."""
        return max(len(self.manifest.portions), 1)

    def name_hashes(self) -> NDArray[np.uint64]:
        """Return the hashes of all its cells' names."""
        return hashes_of(open_store(self.path).obs_names, self.manifest.n_cells)

    def dtypes(self) -> CountsDtypes:
        """Return the types that its counts and indices have."""
        partition = open_store(self.path).partitions[0]
        return CountsDtypes(counts=partition.counts.dtype, indices=partition.indices.dtype)

    def remove_strays(self) -> None:
        """Remove partitions that an interrupted process left: the manifest does not know them."""
        known = {info.name for info in self.manifest.partitions}
        for folder in self.path.glob("dataset_*"):
            if folder.name not in known:
                remove(folder)


def read_old(path: Path) -> OldStore:
    """Read the manifest of a store that cells shall be appended to.

    Parameters
    ----------
    path : Path
        Its folder.

    Returns
    -------
    OldStore

    Raises
    ------
    StoreError
        If there is none, or `prepare` did not write it.
    """
    file = path / "zarr.json"
    if not file.is_file():
        raise StoreError(f"there is no store at {path} to append to", "leave --append out")
    try:
        manifest = json.loads(file.read_text())["attributes"]["rayvaec"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not a store that rayvaec wrote", "append to one that `prepare` wrote"
        ) from error
    return OldStore(path, Manifest.from_json(manifest, str(path)))


def append_config(
    store: Path,
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    genes: str | None = None,
    drop_empty: bool = False,
    new_labels: bool = False,
    num_workers: int = 1,
    memory: int | None = None,
) -> PrepareConfig:
    """Return how to append cells to a store: as it was written, but for what is given here.

    Parameters
    ----------
    store : Path
        Folder of the store.
    labels_key, batch_key, layer : str, optional
        Where the new inputs have labels, batches and counts; the store's own columns, and X, by
        default.
    genes : {"intersect", "union"}, optional
        Leave out genes that the store does not have; and count those that the inputs lack as zero.
    drop_empty, new_labels, num_workers, memory
        As in `PrepareConfig`.

    Returns
    -------
    PrepareConfig

    Raises
    ------
    StoreError
        If there is no such store.
    ConfigError
        If a value cannot be used.
    """
    manifest = read_old(store).manifest
    registry, options = manifest.registry, manifest.options
    if genes not in (None, "intersect", "union"):
        raise ConfigError(
            f"--genes is {genes} and the store {store} has its genes already",
            "with --append use intersect or union, or leave it out",
        )
    if batch_key is not None and registry.batch_key is None:
        raise ConfigError(
            f"--batch-key is {batch_key} and the store {store} has no batches",
            "leave it out, or write a store of all inputs anew",
        )
    return PrepareConfig(
        labels_key=labels_key or registry.labels_key,
        batch_key=batch_key or registry.batch_key,
        layer=layer,
        genes=genes,
        drop_empty=drop_empty,
        new_labels=new_labels,
        val_fraction=options.get("val_fraction", 1 - manifest.n_train / manifest.n_cells),
        seed=manifest.seed,
        codec=options.get("codec", "lz4"),
        rows_per_chunk=options.get("rows_per_chunk"),
        num_workers=num_workers,
        memory=memory,
        partition_elements=options.get("partition_elements", PARTITION_ELEMENTS),
    )


def appended_names(old: OldStore, inputs: Sequence[Input], config: PrepareConfig) -> Names:
    """Read the names of what shall be appended, in the codes of the store.

    Parameters
    ----------
    old : OldStore
        The store.
    inputs : sequence of Input
        Opened for reading.
    config : PrepareConfig
        As `append_config` gives it.

    Returns
    -------
    Names
        With the registry that the store will have: new labels and batches stand last.

    Raises
    ------
    CountsError
        If genes differ and nothing says what to do then; or for a new label, unless these are
        allowed.
    """
    for source in inputs:
        refuse_nothing(source)
    registry, rule = old.manifest.registry, old.manifest.options.get("genes")
    check_appended_genes(
        registry,
        inputs,
        absent_is_zero=(config.genes or rule) == "union",
        drop_unknown=config.genes is not None or rule in ("intersect", "list"),
    )
    labels, label_codes = read_codes(inputs, config.labels_key, "label", registry.labels)
    if labels and not config.new_labels:
        raise CountsError(
            f"{len(labels)} labels are new to the store {old.path}: {join_names(labels)}",
            f"rename them (the store has {suggest(labels[0], registry.labels)}), or add them with "
            "--new-labels: models that were trained before do not know them",
        )
    batches: tuple[str, ...] = ()
    batch_codes = None
    if registry.batch_key is not None and config.batch_key is not None:
        batches, batch_codes = read_codes(inputs, config.batch_key, "batch", registry.batches)
    for new, what in ((labels, "labels"), (batches, "batches")):
        if new:
            logger.warning("the store gets %d new %s: %s", len(new), what, join_names(new))
    grown = replace(
        registry, labels=(*registry.labels, *labels), batches=(*registry.batches, *batches)
    )
    return Names(grown, columns_of(grown, inputs), label_codes, batch_codes)


def check_counts(old: OldStore, max_count: int) -> CountsDtypes:
    """Return the store's types of counts and indices; refuse counts that do not fit.

    Raises
    ------
    CountsError
        If the largest count is above what the store's type holds.
    """
    dtypes = old.dtypes()
    largest = np.iinfo(dtypes.counts).max
    if max_count > largest:
        raise CountsError(
            f"the inputs have counts up to {max_count} and the store {old.path} holds counts up to "
            f"{largest} ({dtypes.counts})",
            "write a store of all inputs anew",
        )
    return dtypes


def joined(old: Manifest, new: Manifest) -> Manifest:
    """Return the manifest of a store with what was appended.

    Parameters
    ----------
    old : Manifest
        Of the store before.
    new : Manifest
        Of the new partitions alone, with the registry that the store will have.

    Returns
    -------
    Manifest
    """
    old_cells = np.array(old.cells_per_label)
    cells = np.array(new.cells_per_label)
    cells[: len(old_cells)] += old_cells
    totals = np.array(new.gene_totals) + np.array(old.gene_totals)
    whole = Portion(len(old.partitions), old.n_train)
    return replace(
        new,
        n_cells=old.n_cells + new.n_cells,
        nnz=old.nnz + new.nnz,
        cells_per_label=tuple(cells.tolist()),
        gene_totals=tuple(totals.tolist()),
        total_counts=old.total_counts + new.total_counts,
        n_train=old.n_train + new.n_train,
        sources=(*old.sources, *new.sources),
        partitions=(*old.partitions, *new.partitions),
        portions=(*(old.portions or (whole,)), Portion(len(new.partitions), new.n_train)),
        options=old.options,
        gene_choice=old.gene_choice,
    )


def publish_appended(work: Workspace, old: OldStore, manifest: Manifest) -> None:
    """Move new partitions into the store, and only then let its manifest name them."""
    for info in manifest.partitions[len(old.manifest.partitions) :]:
        if (work.store / info.name).exists():  # not yet moved by a process that was interrupted
            remove(old.path / info.name)
            (work.store / info.name).rename(old.path / info.name)
    write_manifest(old.path, manifest)
