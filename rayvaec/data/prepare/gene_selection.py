"""Gene selection for a store: intersection, union, a list, or the genes of an existing store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.inputs.reader import Input
from rayvaec.data.registry import Registry, inverse
from rayvaec.errors import ConfigError, CountsError
from rayvaec.util.messages import join_names, refuse_duplicates, suggest

logger = logging.getLogger("rayvaec")


def share_gene_names(inputs: Sequence[Input]) -> int:
    """Hold every name once, and equal lists of names once, whatever the number of inputs.

    Parameters
    ----------
    inputs : sequence of Input
        Their `genes` are replaced by equal ones.

    Returns
    -------
    int
        How many different names there are.
    """
    names: dict[str, str] = {}
    lists: dict[tuple[int, str, str], list[list[str]]] = {}
    for source in inputs:
        genes = source.genes
        alike = lists.setdefault((len(genes), *genes[:1], *genes[-1:]), [])  # type: ignore[arg-type]
        same = next((known for known in alike if known == genes), None)
        if same is None:
            same = [names.setdefault(gene, gene) for gene in genes]
            alike.append(same)
        source.genes = same
    return len(names)


def distinct_genes(inputs: Sequence[Input]) -> list[Input]:
    """Return the first input of every list of genes that `share_gene_names` made one."""
    return list({id(source.genes): source for source in reversed(inputs)}.values())[::-1]


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
    inputs = distinct_genes(inputs)
    for source in inputs:
        refuse_duplicates(source.genes, "gene", str(source.path))
    if isinstance(genes, tuple):
        return genes
    if genes not in (None, "intersect", "union"):
        return _genes_of_file(inputs, Path(genes))
    if genes is None:
        _refuse_difference(inputs)
    first = inputs[0].genes
    common = set(first).intersection(*(source.genes for source in inputs[1:]))
    if genes == "union":
        _refuse_strangers(inputs)
        chosen = tuple(dict.fromkeys(gene for source in inputs for gene in source.genes))
        _warn_of_few(inputs, len(common), len(chosen), "the others count as zero where absent")
        return chosen
    if not common:
        starts = "; ".join(f"{source.path}: {join_names(source.genes, 3)}" for source in inputs)
        raise CountsError(f"no gene is in all inputs ({starts})", "use one kind of gene names")
    fewest = min(source.n_genes for source in inputs)
    _warn_of_few(inputs, len(common), fewest, "the others are left out")
    return tuple(gene for gene in first if gene in common)


def _refuse_strangers(inputs: Sequence[Input]) -> None:
    """Refuse inputs that fall into groups without a gene in common.

    Each group's genes would be zero in all cells of the others, which a model then takes for a
    difference between cells.
    """
    first, *others = inputs
    known = set(first.genes)
    while others:
        linked = [source for source in others if not known.isdisjoint(source.genes)]
        if not linked:
            raise CountsError(
                f"{others[0].path} shares no gene with {first.path} "
                f"({join_names(others[0].genes, 3)}; {join_names(first.genes, 3)})",
                "use one kind of gene names: genes that other inputs lack would count as zero in "
                "all of their cells",
            )
        known.update(*(source.genes for source in linked))
        others = [source for source in others if source not in linked]


def _warn_of_few(inputs: Sequence[Input], n_common: int, n_genes: int, else_: str) -> None:
    """Warn where less than half of the genes are shared; `else_` says what becomes of the rest."""
    if 2 * n_common < n_genes:
        fewest = min(inputs, key=lambda source: source.n_genes)
        logger.warning(
            "the inputs share %d of %d genes, %s: check that all use one kind of gene names "
            "(%s has %d genes: %s)",
            n_common,
            n_genes,
            else_,
            fewest.path,
            fewest.n_genes,
            join_names(fewest.genes, 3),
        )


def _genes_of_file(inputs: Sequence[Input], path: Path) -> tuple[str, ...]:
    fix = "--genes takes intersect, union, or a text file with one gene a line"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
                f"{join_names(missing)}",
                f"remove them from the list (genes like {missing[0]}: "
                f"{suggest(missing[0], source.genes, 3)})",
            )
    return tuple(genes)


def _refuse_difference(inputs: Sequence[Input]) -> None:
    """Refuse inputs that do not all have the same genes."""
    first, *others = inputs
    ours = set(first.genes)
    for other in others:
        theirs = set(other.genes)
        if ours != theirs:
            only_first = [gene for gene in first.genes if gene not in theirs]
            only_other = [gene for gene in other.genes if gene not in ours]
            raise CountsError(
                f"genes differ: {len(only_first)} only in {first.path} "
                f"({join_names(only_first, 3)}), {len(only_other)} only in {other.path} "
                f"({join_names(only_other, 3)})",
                "use --genes=intersect (shared ones), union (absent ones count as zero) or FILE",
            )


def columns_of(registry: Registry, inputs: Sequence[Input]) -> tuple[NDArray[np.int64], ...]:
    """Return for each input the store's column of each of its columns, -1 for none.

    Inputs that share their names share the array too.
    """
    columns = {
        id(source.genes): inverse(
            registry.align_genes(source.genes, str(source.path)).columns, source.n_genes
        )
        for source in distinct_genes(inputs)
    }
    return tuple(columns[id(source.genes)] for source in inputs)


def check_appended_genes(
    registry: Registry, inputs: Sequence[Input], absent_is_zero: bool, drop_unknown: bool
) -> None:
    """Refuse inputs whose genes do not fit a store that cells are appended to.

    Parameters
    ----------
    registry : Registry
        The store's.
    inputs : sequence of Input
        What shall be appended.
    absent_is_zero : bool
        Whether genes of the store that an input lacks count as zero; never all.
    drop_unknown : bool
        Whether genes that the store does not have are left out.

    Raises
    ------
    CountsError
        If there is an absent or unknown gene and it is not said that it may be so.
    """
    for source in distinct_genes(inputs):
        found = registry.align_genes(source.genes, str(source.path))
        n_shared = registry.n_genes - len(found.missing)
        if found.missing and not (absent_is_zero and n_shared):
            raise CountsError(
                f"{source.path} lacks {len(found.missing)} of the store's {registry.n_genes} "
                f"genes: {join_names(found.missing)}",
                "count them as zero with --genes=union, or write a store of all inputs anew",
            )
        if found.extra and not drop_unknown:
            raise CountsError(
                f"{source.path} has {len(found.extra)} genes that the store does not have: "
                f"{join_names(found.extra)}",
                "leave them out with --genes=intersect (or union, where others are absent), or "
                "write a store of all inputs anew",
            )
        if 2 * n_shared < registry.n_genes:
            logger.warning(
                "%s has %d of the store's %d genes, the others count as zero: check that both use "
                "one kind of gene names",
                source.path,
                n_shared,
                registry.n_genes,
            )
