"""Text description of a store, as printed by `rayvaec inspect`."""

from __future__ import annotations

from typing import Any

from rayvaec.data.io.object_store import open_reader
from rayvaec.data.store.manifest import Manifest
from rayvaec.data.store.open import Store
from rayvaec.util.location import Location, Url
from rayvaec.util.messages import join_names


def describe_store(store: Store) -> str:
    """Describe a store: cells, genes, labels, batches, size, and where it comes from.

    Parameters
    ----------
    store : Store
        An opened store.

    Returns
    -------
    str
        Some ten lines.
    """
    manifest, registry = store.manifest, store.registry
    rows = [
        ("cells", _cells(manifest)),
        ("genes", _genes(manifest)),
        ("counts", _counts(manifest)),
        ("labels", _labels(manifest)),
    ]
    if registry.batch_key is not None:
        batches = f"{registry.n_batches:,} in {registry.batch_key}: {join_names(registry.batches)}"
        rows.append(("batches", batches))
    rows += [
        ("stored", _stored(store)),
        (
            "written" if manifest.partitions[0].files else "surveyed",
            f"{manifest.created} by rayvaec {manifest.rayvaec_version}",
        ),
    ]
    rows += [("from", _source(source)) for source in manifest.sources[:10]]
    if len(manifest.sources) > 10:
        rows.append(("", f"and {len(manifest.sources) - 10:,} more"))
    return "\n".join([f"store {store.path}", *(f"  {key:8} {text}" for key, text in rows)])


def describe_external(where: Location) -> str:
    """Describe an AnnData Zarr or a collection that rayvaec did not write, without reading it all.

    Parameters
    ----------
    where : Path or Url
        Where it lies.

    Returns
    -------
    str
        Some lines, the last one with the command that trains on it.

    Raises
    ------
    StoreError, CountsError
        If it cannot be read, or could not be trained on.
    """
    from rayvaec.data.inputs.zarr_reader import open_members  # brings zarr

    members = open_members(where, open_reader(where))
    first, n_cells = members[0], sum(member.n_cells for member in members)
    values = first.matrix_part("data")
    shared = [key for key in first.columns if all(key in member.columns for member in members)]
    rows = [
        ("cells", f"{n_cells:,} in {len(members):,} AnnData"),
        ("genes", f"{first.n_genes:,}: {join_names(first.genes, 3)}"),
        ("counts", f"CSR of {values.dtype}, not checked yet"),
        ("columns", join_names(shared, 30)),
        ("next", f"rayvaec train {where} --out RUN --labels-key KEY"),
    ]
    title = f"AnnData that rayvaec did not write: {where}"
    return "\n".join([title, *(f"  {key:8} {text}" for key, text in rows)])


def _cells(manifest: Manifest) -> str:
    own = bool(manifest.partitions[0].files)
    return (
        f"{manifest.n_cells:,}: {manifest.n_train:,} for training, "
        f"{manifest.n_cells - manifest.n_train:,} for validation, "
        f"{'shuffled' if own else 'drawn'} with seed {manifest.seed}{_appended(manifest)}"
    )


def _appended(manifest: Manifest) -> str:
    """Say how many cells were shuffled apart from the others."""
    if not manifest.portions:
        return ""
    first = manifest.partitions[: manifest.portions[0].n_partitions]
    n = manifest.n_cells - sum(partition.n_cells for partition in first)
    return f"; {n:,} of them appended and shuffled apart"


def _genes(manifest: Manifest) -> str:
    registry, choice = manifest.registry, manifest.gene_choice
    named = f"{registry.n_genes:,}: {join_names(registry.genes, 3)}"
    if not choice:
        return named
    per_batch = f", ranked per {choice['batch_key']}" if choice["batch_key"] else ""
    return (
        f"{named}; the {choice['n_top_genes']:,} of {choice['n_genes']:,} that vary most "
        f"({choice['flavour']}{per_batch})"
    )


def _counts(manifest: Manifest) -> str:
    entries = max(manifest.n_cells * manifest.registry.n_genes, 1)
    return (
        f"{manifest.total_counts:,}: {manifest.total_counts / max(manifest.n_cells, 1):,.0f} a "
        f"cell, {1 - manifest.nnz / entries:.1%} zeros"
    )


def _labels(manifest: Manifest) -> str:
    labels = zip(manifest.registry.labels, manifest.cells_per_label, strict=True)
    named = join_names(f"{label} ({n:,})" for label, n in labels)
    return f"{manifest.registry.n_labels:,} in {manifest.registry.labels_key}: {named}"


def _stored(store: Store) -> str:
    partitions = store.manifest.partitions
    named = f"{len(partitions):,} partition{'s' * (len(partitions) > 1)}"
    if not partitions[0].files:
        return f"as {named} of AnnData, not by rayvaec"
    if isinstance(store.path, Url):  # their sizes would take a request each
        return f"{sum(len(partition.files) for partition in partitions):,} files in {named}"
    n_bytes = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    return f"{_size(n_bytes)} in {named}, {n_bytes / max(store.n_cells, 1):,.0f} bytes a cell"


def _source(source: dict[str, Any]) -> str:
    layer = f", layer {source['layer']}" if source.get("layer") else ""
    size = f"{source['n_cells']:,} cells, {source['n_genes']:,} genes"
    return f"{source['path']} ({size}{layer})"


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
