"""What a store says about itself: the group attribute ``rayvaec``, written last of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rayvaec.data.registry import Registry
from rayvaec.errors import CountsError, StoreError

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
        Rows ``[0, n_train)`` are for training, ``[n_train, n_cells)`` for validation.
    seed : int
        Seed of the global shuffle.
    sources : tuple of dict
        Where the cells came from; as `rayvaec.data.build` describes its inputs.
    partitions : tuple of PartitionInfo
        In row order.
    created : str
        Time of writing, ISO 8601.
    rayvaec_version : str
        Version that wrote the store.
    format_version : int
        Version of this layout.
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

    def hash(self) -> str:
        """Return 64 hexadecimal digits that are equal for stores giving the same minibatches.

        When, from which paths and by which version the store was written does not enter.
        """
        content = self.to_json()
        for key in ("created", "rayvaec_version", "sources"):
            del content[key]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_json` reads."""
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
            "partitions": [partition.to_json() for partition in self.partitions],
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Read what `to_json` gave.

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
        return manifest

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
        )
