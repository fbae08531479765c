"""Configuration of `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayvaec.data.inputs.writer import check_codec
from rayvaec.errors import ConfigError

PARTITION_ELEMENTS = 64_000_000


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
    n_top_genes : int, optional
        How many of these genes to keep: those that vary most.
    drop_empty : bool
        Whether to leave out cells without any counts, which otherwise are an error.
    new_labels : bool
        Whether appended cells may have labels that the store does not know.
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
    memory : int, optional
        Bytes that all processes together may take; a quarter of the machine's by default.
    block_elements : int, optional
        How many stored values to hold while reading; by default as many as `memory` allows.
    partition_elements : int
        How many stored values to give a partition, at most: fewer where `memory` demands it.
        This shapes the store; nothing else here but inputs, genes, codec, chunks and seed does.

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
    new_labels: bool = False
    val_fraction: float = 0.1
    seed: int = 0
    codec: str = "lz4"
    rows_per_chunk: int | None = None
    num_workers: int = 1
    memory: int | None = None
    block_elements: int | None = None
    partition_elements: int = PARTITION_ELEMENTS

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
            *("n_top_genes", "rows_per_chunk", "num_workers"),
            *("memory", "block_elements", "partition_elements"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {value}", "use 1 or more")
