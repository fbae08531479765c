"""Specification of a bulk job: its inputs and its split into regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayvaec.data.store.open import Store
from rayvaec.inference.bulk.run_state import RunState
from rayvaec.inference.trained_model import TrainedModel


@dataclass(frozen=True)
class Region:
    """Consecutive cells that are computed together.

    Parameters
    ----------
    number : int
        Position among the regions.
    start, stop : int
        First and one-past-last row of the store, or of the task's own choice of rows.
    """

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Regions:
    """Rows of a store, cut into regions.

    Parameters
    ----------
    rows : range
        The rows.
    size : int
        Cells of a region; the last may have fewer.
    """

    rows: range
    size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, number: int) -> Region:
        some = self.rows[number * self.size : (number + 1) * self.size]
        if not some:
            raise IndexError(number)
        return Region(number, some.start, some.stop)

    def __iter__(self) -> Iterator[Region]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True)
class Inputs:
    """Models, a store that fits them, and where the result goes; all of it checked.

    Parameters
    ----------
    paths : tuple of Path
        Where the models lie.
    models : tuple of TrainedModel
        What lies there: one, or two that are compared.
    store : Store
        The cells.
    out : Path
        What to write.
    num_workers : int
        Ray actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.
    overwrite : bool
        Whether unfinished work of other options may be removed.
    """

    paths: tuple[Path, ...]
    models: tuple[TrainedModel, ...]
    store: Store
    out: Path
    num_workers: int
    use_gpu: bool
    overwrite: bool

    @property
    def model(self) -> TrainedModel:
        """The first model."""
        return self.models[0]

    @property
    def device(self) -> str:
        """Where the models compute."""
        return "cuda" if self.use_gpu else "cpu"


@dataclass(frozen=True)
class Job:
    """A task at work on its inputs.

    Parameters
    ----------
    inputs : Inputs
        What it reads.
    regions : Regions
        How the cells are cut.
    state : RunState
        What is finished, and where the output is made.
    plan : dict
        JSON-able identity of the work.
    """

    inputs: Inputs
    regions: Regions
    state: RunState
    plan: dict[str, Any]
