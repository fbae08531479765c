"""The first pass of `prepare`: read every input once, check all of it, and decide what to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.data.align import align_columns, place_in_csr
from rayvaec.data.cell_names import name_hashes
from rayvaec.data.counts import as_counts
from rayvaec.data.inputs import Column, Input
from rayvaec.data.names import choices, listing
from rayvaec.data.registry import Registry, inverse, refuse_duplicates
from rayvaec.errors import ConfigError, CountsError
from rayvaec.progress import Progress


@dataclass(frozen=True)
class Names:
    """The inputs' genes, labels and batches; arrays run over the cells of all inputs.

    Parameters
    ----------
    registry, targets, labels, batches
        As in `Survey`.
    """

    registry: Registry
    targets: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64]
    batches: NDArray[np.int64] | None


@dataclass(frozen=True)
class Survey:
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


def survey(
    inputs: Sequence[Input],
    labels_key: str,
    batch_key: str | None,
    genes: str | Path | tuple[str, ...] | None,
    block_elements: int,
    scratch: Path,
) -> Survey:
    """Check every value, label and name of the inputs.

    Parameters
    ----------
    inputs : sequence of Input
        Opened for reading.
    labels_key, batch_key, genes
        As in `rayvaec.data.build.PrepareConfig`; or the genes themselves.
    block_elements : int
        About how many stored values to hold in memory.
    scratch : Path
        Folder for temporary files.

    Returns
    -------
    Survey

    Raises
    ------
    CountsError
        For whatever cannot be trained on; the message names value and place.
    ConfigError
        If `genes` names a file that cannot be read.
    """
    names = read_names(inputs, labels_key, batch_key, genes)
    registry, targets = names.registry, names.targets
    n_cells = len(names.labels)
    empty, hashes = np.empty(n_cells, bool), np.empty(n_cells, np.uint64)
    gene_totals, nnz, max_count = np.zeros(registry.n_genes, np.int64), 0, 0
    with Progress(n_cells, "cells", "checking") as progress:
        for start, cells, x in aligned_blocks(inputs, targets, registry, block_elements, scratch):
            rows = slice(start, start + x.shape[0])
            empty[rows] = np.diff(x.indptr) == 0
            hashes[rows] = name_hashes(cells)
            # Sums of whole numbers below 2**53 are exact in bincount's float64.
            gene_totals += np.bincount(x.indices, x.data, registry.n_genes).astype(np.int64)
            nnz, max_count = nnz + x.nnz, max(max_count, int(x.data.max(initial=0)))
            progress.advance(x.shape[0])
    return Survey(
        registry,
        targets,
        labels=names.labels,
        batches=names.batches,
        empty=empty,
        hashes=hashes,
        gene_totals=gene_totals,
        nnz=nnz,
        max_count=max_count,
    )


def read_names(
    inputs: Sequence[Input],
    labels_key: str,
    batch_key: str | None,
    genes: str | Path | tuple[str, ...] | None,
) -> Names:
    """Read and check all names but those of the cells; parameters and errors as in `survey`."""
    for source in inputs:
        _refuse_nothing(source)
    kept_genes = choose_genes(inputs, genes)
    labels, label_codes = _labels(inputs, labels_key)
    batches, batch_codes = ((), None) if batch_key is None else _batches(inputs, batch_key)
    registry = Registry(kept_genes, labels, labels_key, batches, batch_key)
    targets = tuple(
        inverse(registry.align_genes(source.genes).columns, source.n_genes) for source in inputs
    )
    return Names(registry, targets, label_codes, batch_codes)


def aligned_blocks(
    inputs: Sequence[Input],
    targets: Sequence[NDArray[np.int64]],
    registry: Registry,
    elements: int,
    scratch: Path,
) -> Iterator[tuple[int, list[str], sparse.csr_array]]:
    """Read all inputs in blocks, every value checked, columns in the registry's order.

    Parameters
    ----------
    inputs, targets, registry
        As in `Survey`.
    elements : int
        About how many stored values a block shall hold.
    scratch : Path
        Folder for temporary files.

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
        for start, raw in source.blocks(elements, scratch / f"input_{number}"):
            names = source.names(start, start + raw.shape[0])
            locate = place_in_csr(raw.indptr, raw.indices, names.__getitem__, source.genes)
            counts = as_counts(raw.data, locate, where=source.where, layers=source.layers)
            x = sparse.csr_array((counts, raw.indices, raw.indptr), shape=raw.shape)
            yield offset + start, names, align_columns(x, target, registry.n_genes)
        offset += source.n_cells


def choose_genes(
    inputs: Sequence[Input], genes: str | Path | tuple[str, ...] | None
) -> tuple[str, ...]:
    """Choose and order the store's genes.

    Parameters
    ----------
    inputs : sequence of Input
        At least one.
    genes : {"intersect", "union"}, path or tuple of str, optional
        Genes that all inputs have; genes that any has; the genes that a file names, one a line;
        these. By default all inputs must have the same genes.

    Returns
    -------
    tuple of str
        In the order of the file, or that of the first input (which genes of later ones follow).

    Raises
    ------
    CountsError
        If a name occurs twice, genes differ between inputs, or none would be left.
    ConfigError
        If the file cannot be read.
    """
    for source in inputs:
        refuse_duplicates(source.genes, "gene", str(source.path))
    if isinstance(genes, tuple):
        return genes
    if genes not in (None, "intersect", "union"):
        return _genes_of_file(inputs, Path(genes))
    first = inputs[0].genes
    if genes == "union":
        return tuple(dict.fromkeys(gene for source in inputs for gene in source.genes))
    common = set(first).intersection(*(source.genes for source in inputs[1:]))
    if genes is None:
        _refuse_difference(inputs)
    if not common:
        starts = "; ".join(f"{source.path}: {listing(source.genes, 3)}" for source in inputs)
        raise CountsError(f"no gene is in all inputs ({starts})", "use one kind of gene names")
    return tuple(gene for gene in first if gene in common)


def _genes_of_file(inputs: Sequence[Input], path: Path) -> tuple[str, ...]:
    fix = "--genes takes intersect, union, or a text file with one gene a line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the gene list {path} cannot be read ({error})", fix) from error
    genes = [line.strip() for line in lines if line.strip()]
    if not genes:
        raise ConfigError(f"the gene list {path} is empty", fix)
    refuse_duplicates(genes, "gene", str(path))
    for source in inputs:
        known = set(source.genes)
        missing = [gene for gene in genes if gene not in known]
        if missing:
            raise CountsError(
                f"{source.path} lacks {len(missing)} of the {len(genes)} genes in {path}: "
                f"{listing(missing)}",
                f"remove them from the list (genes like {missing[0]}: "
                f"{choices(missing[0], source.genes, 3)})",
            )
    return tuple(genes)


def _refuse_difference(inputs: Sequence[Input]) -> None:
    """Refuse inputs that do not all have the same genes."""
    first = inputs[0]
    for other in inputs[1:]:
        ours, theirs = set(first.genes), set(other.genes)
        if ours != theirs:
            only_first = [gene for gene in first.genes if gene not in theirs]
            only_other = [gene for gene in other.genes if gene not in ours]
            raise CountsError(
                f"genes differ: {len(only_first)} only in {first.path} "
                f"({listing(only_first, 3)}), {len(only_other)} only in {other.path} "
                f"({listing(only_other, 3)})",
                "use --genes intersect (shared ones), union (absent ones count as zero) or FILE",
            )


def _refuse_nothing(source: Input) -> None:
    for n, what in ((source.n_cells, "cells"), (source.n_genes, "genes")):
        if n == 0:
            raise CountsError(f"{source.path} has no {what}", "leave this input out")


def _labels(inputs: Sequence[Input], key: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the sorted labels of all inputs, each of which must have cells, and the codes."""
    columns = _columns(inputs, key, "label")
    used = _used(columns)
    for source, column in zip(inputs, columns, strict=True):
        unused = [name for name in column.categories if name not in used]
        if unused:
            raise CountsError(
                f"{source.path}: {len(unused)} of {len(column.categories)} categories of obs "
                f"column {key!r} have no cells: {listing(unused)}",
                f"drop them: adata.obs[{key!r}] = "
                f"adata.obs[{key!r}].cat.remove_unused_categories()",
            )
    return used, _recode(columns, used)


def _batches(inputs: Sequence[Input], key: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the sorted batches that have cells, and the codes."""
    columns = _columns(inputs, key, "batch")
    used = _used(columns)
    return used, _recode(columns, used)


def _columns(inputs: Sequence[Input], key: str, what: str) -> list[Column]:
    """Read an obs column of every input; a cell without a value is an error."""
    columns = []
    for source in inputs:
        column = source.column(key)
        missing = np.flatnonzero(column.codes < 0)
        if missing.size:
            first = int(missing[0])
            raise CountsError(
                f"{source.path}: obs column {key!r} has no value for {missing.size} of "
                f"{source.n_cells} cells, the first {source.names(first, first + 1)[0]}",
                f"remove these cells or give each a {what}",
            )
        columns.append(column)
    return columns


def _used(columns: Sequence[Column]) -> tuple[str, ...]:
    used = {column.categories[code] for column in columns for code in np.unique(column.codes)}
    return tuple(sorted(used))


def _recode(columns: Sequence[Column], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Turn each input's codes into positions in `names`, end to end."""
    code = {name: position for position, name in enumerate(names)}
    parts = []
    for column in columns:
        target = np.array([code.get(name, -1) for name in column.categories], np.int64)
        parts.append(target[column.codes])
    return np.concatenate(parts)
