"""Memory planning of `prepare`: block and partition sizes from one byte budget.

The costs below were measured as growth of the resident set, and rounded up; what numpy frees it
gives back late, so they are more than the arrays' own sizes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayvaec.data.inputs.reader import CSC_BLOCKS, Input
from rayvaec.data.inputs.writer import SHARD_BYTES
from rayvaec.data.prepare.config import PrepareConfig
from rayvaec.data.prepare.gene_selection import distinct_genes
from rayvaec.data.prepare.partitions import CountsDtypes
from rayvaec.errors import ConfigError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
USABLE = 0.9
"""Part of the budget to plan with; the rest is for what no plan foresees."""

IMPORTS = 64 * 2**20  # what is loaded only later: codecs, Ray's client
WORKER = 320 * 2**20  # a Ray worker's interpreter and imports
CELL = 110  # codes, hashes, places and their sorting, for every cell of all inputs
OLD_CELL = 40  # for every cell of a store that is appended to: its name's hash, and sorting it
GENE = 400  # a gene name: in lists and sets, its place, its totals
LISTED = 24  # a name in a list of genes that an input has and no other: a reference, its column
READ = 96  # a value of a block: read, checked, aligned, dealt
WAIT = 16  # a value that waits to be dealt: with its share of its cell's name
SORT = 40  # a value of a CSC matrix that is sorted by row
PARTITION_CELL = 200  # a cell of a partition: its name, twice, and its codes
MOST_BLOCK, LEAST_BLOCK = 4_000_000, 16_384
WAITING_BLOCKS = 4  # blocks that are dealt to the partitions together
LEAST_PARTITION = 1_000_000


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as ``4G``, ``512M`` or ``2.5 GiB`` means.

    Raises
    ------
    ConfigError
        If it means nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--memory is {text!r}", "give a size such as 4G or 512M")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show_bytes(size: float) -> str:
    """Return a size in the form that `parse_bytes` reads, rounded up."""
    mebibytes = -(-int(size) // 2**20)
    return f"{mebibytes}M" if mebibytes < 10_240 else f"{-(-mebibytes // 1024)}G"


def machine_memory() -> int:
    """Return the bytes of memory that this process may have: the machine's, or its cgroup's."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _cgroup_limits():
        try:
            text = limit.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            least = min(least, int(text))
    return least


def _cgroup_limits() -> list[Path]:
    """Return the files that may limit this process's memory: its cgroup's and those above it."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = top / group.lstrip("/")
        files += [
            parent / name
            for parent in [folder, *folder.parents]
            if top in (parent, *parent.parents)
        ]
    return files


def resident() -> int:
    """Return the bytes of memory that this process has now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Budget:
    """What may be in memory.

    Parameters
    ----------
    free : int
        Bytes beside the interpreter and what is held for every cell and gene.
    block_elements : int
        Stored values to read at a time.
    partition_elements : int
        Stored values of a partition, at most, as the configuration has it.
    """

    free: int
    block_elements: int
    partition_elements: int

    @property
    def waiting_elements(self) -> int:
        """How many values may wait to be dealt to the partitions."""
        return WAITING_BLOCKS * self.block_elements

    def partition_size(self, dtypes: CountsDtypes, n_cells: int, nnz: int) -> int:
        """Return how many values to give a partition, whatever the number of workers.

        Parameters
        ----------
        dtypes : CountsDtypes
            Types of counts and indices.
        n_cells, nnz : int
            Cells and stored values of the whole store.

        Returns
        -------
        int
            `partition_elements`, halved until a partition fits into memory.
        """
        size, mean = self.partition_elements, nnz / max(n_cells, 1)
        while size > LEAST_PARTITION and partition_bytes(min(size, nnz), dtypes, mean) > self.free:
            size //= 2
        return size

    def workers(self, wanted: int, size: int, dtypes: CountsDtypes, mean: float) -> int:
        """Return how many partitions may be written at once; 1 means within this process.

        Parameters
        ----------
        wanted : int
            How many the user allows.
        size, dtypes, mean
            As in `partition_bytes`.
        """
        each = WORKER + partition_bytes(size, dtypes, mean)
        return max(min(wanted, int(self.free // each)), 1)


def partition_bytes(size: int, dtypes: CountsDtypes, mean: float) -> int:
    """Return what sorting and writing a partition takes.

    Parameters
    ----------
    size : int
        Stored values of the partition.
    dtypes : CountsDtypes
        Their types.
    mean : float
        Values of a cell.

    Returns
    -------
    int
        Bytes.
    """
    values = size * (dtypes.counts.itemsize + dtypes.indices.itemsize)
    itemsize = max(dtypes.counts.itemsize, dtypes.indices.itemsize)
    shard = min(size * itemsize, SHARD_BYTES)
    return int(values + 3 * shard + PARTITION_CELL * size / max(mean, 1))


def plan_memory(
    config: PrepareConfig, inputs: Sequence[Input], n_genes: int, n_old_cells: int = 0
) -> Budget:
    """Decide how much to hold in memory at a time.

    Parameters
    ----------
    config : PrepareConfig
        With the budget.
    inputs : sequence of Input
        What will be read.
    n_genes : int
        Different gene names of all of them.
    n_old_cells : int
        Cells of the store that is appended to.

    Returns
    -------
    Budget

    Raises
    ------
    ConfigError
        If the budget is too small; the message says the least that works.
    """
    total = config.memory or machine_memory() // 4
    n_cells = sum(source.n_cells for source in inputs)
    n_listed = sum(source.n_genes for source in distinct_genes(inputs))
    genes = GENE * n_genes + LISTED * n_listed
    held = resident() + IMPORTS + CELL * n_cells + OLD_CELL * n_old_cells + genes
    free = int(USABLE * total) - held
    each = READ + WAIT * WAITING_BLOCKS
    if any(source.encoding == "csc" for source in inputs):
        each += SORT * CSC_BLOCKS
    widest = max(source.longest_row for source in inputs)
    least = max(widest, LEAST_BLOCK)
    if config.block_elements is None and free < least * each:
        needed = show_bytes((held + least * each) / USABLE)
        how = "--memory is" if config.memory else "a quarter of this machine's memory is"
        raise ConfigError(
            f"{how} {show_bytes(total)}, too little for {n_cells:,} cells with up to {widest:,} "
            "values each",
            f"use --memory {needed} or more",
        )
    elements = config.block_elements or min(free // each, MOST_BLOCK)
    return Budget(max(free, 0), elements, config.partition_elements)
