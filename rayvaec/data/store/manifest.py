"""Manifest of a store: the group attribute ``rayvaec``, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from rayvaec.data.io.byte_reader import ByteReader
from rayvaec.data.registry import Registry
from rayvaec.errors import CountsError, StoreError

COLLECTION = "annbatch-preshuffled"


def group_attributes(blobs: ByteReader, prefix: str = "") -> dict[str, Any] | None:
    """Read the attributes of a group.

    Parameters
    ----------
    blobs : ByteReader
        Where it lies.
    prefix : str
        Its path with a slash at the end; empty for the root.

    Returns
    -------
    dict or None
        None where there is no group.

    Raises
    ------
    StoreError
        If its metadata is damaged.
    """
    key = f"{prefix}zarr.json"
    text = blobs.text(key)
    if text is None and blobs.text(f"{prefix}.zgroup") is not None:  # Zarr v2
        key = f"{prefix}.zattrs"
        text = f'{{"attributes": {blobs.text(key) or "{}"}}}'
    if text is None:
        return None
    try:
        group = json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"the file {blobs.locate(key)} is damaged ({error})", "copy the store again"
        ) from error
    attributes = group.get("attributes") if isinstance(group, dict) else None
    return attributes if isinstance(attributes, dict) else {}


FORMAT_VERSION = 1


@dataclass(frozen=True)
class PartitionInfo:
    """One partition: a member of the store that is a complete AnnData.

    Parameters
    ----------
    name : str
        Name of the member group, ``dataset_<k>``.
    n_cells, nnz : int
        Rows and stored values.
    files : mapping of str to str
        Every file's path inside the partition, in sorted order, and ``sha256:`` with the SHA-256
        of its bytes in hexadecimal digits.
    checksum : str
        ``sha256:`` with the SHA-256 over all of `files`, as `checksums.joint_checksum` computes it.
    """

    name: str
    n_cells: int
    nnz: int
    files: Mapping[str, str]
    checksum: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_json` reads."""
        return {
            "name": self.name,
            "n_cells": self.n_cells,
            "nnz": self.nnz,
            "checksum": self.checksum,
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave; KeyError, TypeError or ValueError where it is not that."""
        files = {str(name): str(digest) for name, digest in value["files"].items()}
        return cls(
            name=str(value["name"]),
            n_cells=int(value["n_cells"]),
            nnz=int(value["nnz"]),
            files=files,
            checksum=str(value["checksum"]),
        )


class Portion(NamedTuple):
    """Consecutive partitions that were shuffled together: by `prepare`, or by one ``--append``.

    Parameters
    ----------
    n_partitions : int
        How many.
    n_train : int
        How many of their cells, the first ones, are for training.
    """

    n_partitions: int
    n_train: int


class RowRange(NamedTuple):
    """Rows of one partition that follow one another in the store.

    Parameters
    ----------
    partition : int
        Its position in the manifest.
    start, stop : int
        Rows of the partition.
    """

    partition: int
    start: int
    stop: int


@dataclass(frozen=True)
class ScanResult:
    """What a survey of an external store found, beyond the manifest.

    Parameters
    ----------
    largest : int
        The largest count.
    digest : str
        Of the arrays' shapes, types and layouts, to notice another store in its place.
    """

    largest: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a finished store holds.

    Parameters
    ----------
    registry : Registry
        Genes, labels and batches.
    n_cells, nnz : int
        Rows and stored values of all partitions.
    cells_per_label : tuple of int
        Number of cells of each label.
    gene_totals : tuple of int
        Sum of each gene's counts over all cells.
    total_counts : int
        Sum of all counts.
    n_train : int
        Rows ``[0, n_train)``, in the order of `segments`, are for training, and
        ``[n_train, n_cells)`` for validation.
    seed : int
        Seed of the global shuffle.
    sources : tuple of dict
        Where the cells came from; as `rayvaec.data.prepare.pipeline` describes its inputs.
    partitions : tuple of PartitionInfo
        In row order.
    created : str
        Time of writing, ISO 8601.
    rayvaec_version : str
        Version that wrote the store.
    format_version : int
        Version of this layout.
    portions : tuple of Portion
        What was shuffled together, in the order of the partitions; empty where all was.
    options : mapping of str to JSON-able
        How `prepare` was told to write, for what is appended later.
    gene_choice : mapping of str to JSON-able
        Where the most variable genes were kept: `flavour`, `n_top_genes`, `n_genes` (out of how
        many) and `batch_key`; else empty.
    """

    registry: Registry
    n_cells: int
    nnz: int
    cells_per_label: tuple[int, ...]
    gene_totals: tuple[int, ...]
    total_counts: int
    n_train: int
    seed: int
    sources: tuple[dict[str, Any], ...]
    partitions: tuple[PartitionInfo, ...]
    created: str
    rayvaec_version: str
    format_version: int = FORMAT_VERSION
    portions: tuple[Portion, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    gene_choice: Mapping[str, Any] = field(default_factory=dict)

    def segments(self) -> tuple[RowRange, ...]:
        """Return the store's rows in order: every portion's training cells, then what is left.

        A store that nothing was appended to has its partitions' rows in the order they lie in.
        """
        train: list[RowRange] = []
        validation: list[RowRange] = []
        number = 0
        for portion in self.portions or (Portion(len(self.partitions), self.n_train),):
            left = portion.n_train
            for partition in self.partitions[number : number + portion.n_partitions]:
                cut = min(left, partition.n_cells)
                train.append(RowRange(number, 0, cut))
                validation.append(RowRange(number, cut, partition.n_cells))
                number, left = number + 1, left - cut
        return tuple(segment for segment in train + validation if segment.start < segment.stop)

    def continues(self, old: Manifest) -> bool:
        """Return whether this is another manifest with cells appended."""
        portions = old.portions or (Portion(len(old.partitions), old.n_train),)
        ours, theirs = self.registry, old.registry
        return (
            (ours.genes, ours.labels_key, ours.batch_key)
            == (theirs.genes, theirs.labels_key, theirs.batch_key)
            and ours.labels[: len(theirs.labels)] == theirs.labels
            and ours.batches[: len(theirs.batches)] == theirs.batches
            and self.portions[: len(portions)] == portions
            and self.partitions[: len(old.partitions)] == old.partitions
        )

    def hash(self) -> str:
        """Return 64 hexadecimal digits that are equal for stores giving the same minibatches.

        When, from which paths, with which options and by which version the store was written
        does not enter.
        """
        content = self.to_json()
        for key in ("created", "rayvaec_version", "sources", "options", "gene_choice"):
            content.pop(key, None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_json` reads."""
        optional = {
            "portions": [portion._asdict() for portion in self.portions],
            "options": dict(self.options),
            "gene_choice": dict(self.gene_choice),
        }
        return {
            "format_version": self.format_version,
            "rayvaec_version": self.rayvaec_version,
            "created": self.created,
            "registry": self.registry.to_json(),
            "n_cells": self.n_cells,
            "nnz": self.nnz,
            "cells_per_label": list(self.cells_per_label),
            "gene_totals": list(self.gene_totals),
            "total_counts": self.total_counts,
            "splits": {"train": [0, self.n_train], "validation": [self.n_train, self.n_cells]},
            "seed": self.seed,
            "sources": list(self.sources),
            **{key: value for key, value in optional.items() if value},
            "partitions": [partition.to_json() for partition in self.partitions],
        }

    def sealed(self) -> dict[str, Any]:
        """Return what `to_json` gives and a checksum of it, which `from_json` compares."""
        value = self.to_json()
        return {**value, "checksum": _checksum(value)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Read what `to_json` or `sealed` gave.

        Parameters
        ----------
        value : dict
            Decoded JSON.
        where : str
            Path of the store, for messages.

        Returns
        -------
        Manifest

        Raises
        ------
        StoreError
            If the layout is newer than this version, or the manifest is damaged.
        """
        damaged = "copy the store again, or write it again with `rayvaec prepare ... --overwrite`"
        version = value.get("format_version") if isinstance(value, dict) else None
        if not isinstance(version, int):
            raise StoreError(f"the manifest of the store {where} has no format version", damaged)
        if version > FORMAT_VERSION:
            raise StoreError(
                f"the store {where} has format version {version} and this rayvaec reads up to "
                f"{FORMAT_VERSION}",
                "upgrade rayvaec",
            )
        if "checksum" in value and value["checksum"] != _checksum(value):
            raise StoreError(
                f"the manifest of the store {where} does not match its checksum: its zarr.json was "
                "changed or damaged",
                damaged,
            )
        try:
            manifest = cls._from_fields(value)
        except (KeyError, TypeError, ValueError, AttributeError, CountsError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
            raise StoreError(f"the manifest of the store {where} {problem}", damaged) from error
        cells = sum(partition.n_cells for partition in manifest.partitions)
        if cells == 0 or cells != manifest.n_cells or not 0 <= manifest.n_train <= cells:
            raise StoreError(
                f"the manifest of the store {where} speaks of {manifest.n_cells} cells, "
                f"{manifest.n_train} of them for training, and its partitions of {cells}",
                damaged,
            )
        if manifest.portions and not manifest._portions_fit():
            raise StoreError(
                f"the portions in the manifest of the store {where} do not fit its partitions",
                damaged,
            )
        return manifest

    def _portions_fit(self) -> bool:
        number = 0
        for portion in self.portions:
            partitions = self.partitions[number : number + portion.n_partitions]
            cells = sum(partition.n_cells for partition in partitions)
            if not (partitions and 0 <= portion.n_train <= cells):
                return False
            number += portion.n_partitions
        n_train = sum(portion.n_train for portion in self.portions)
        return number == len(self.partitions) and n_train == self.n_train

    @classmethod
    def _from_fields(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            format_version=value["format_version"],
            rayvaec_version=str(value["rayvaec_version"]),
            created=str(value["created"]),
            registry=Registry.from_json(value["registry"]),
            n_cells=int(value["n_cells"]),
            nnz=int(value["nnz"]),
            cells_per_label=tuple(int(n) for n in value["cells_per_label"]),
            gene_totals=tuple(int(n) for n in value["gene_totals"]),
            total_counts=int(value["total_counts"]),
            n_train=int(value["splits"]["train"][1]),
            seed=int(value["seed"]),
            sources=tuple(dict(source) for source in value["sources"]),
            partitions=tuple(PartitionInfo.from_json(item) for item in value["partitions"]),
            portions=tuple(
                Portion(int(item["n_partitions"]), int(item["n_train"]))
                for item in value.get("portions", ())
            ),
            options=dict(value.get("options", {})),
            gene_choice=dict(value.get("gene_choice", {})),
        )


def _checksum(value: Mapping[str, Any]) -> str:
    """Return ``sha256:`` and the SHA-256 of a manifest's canonical JSON, without its checksum."""
    content = {key: item for key, item in value.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
