"""Write partitions one by one, or several at a time as Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayvaec.data.prepare.job import Workspace, sync_files
from rayvaec.data.prepare.partitions import CountsDtypes, write_partition
from rayvaec.data.prepare.spill import gather
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import PartitionInfo
from rayvaec.errors import RayvaecError
from rayvaec.util.atomic import remove
from rayvaec.util.progress import Progress


@dataclass(frozen=True)
class PartitionJob:
    """What it takes to write one partition, on any node that sees the folders.

    Parameters
    ----------
    folder : Path
        Folder of the store.
    number : int
        Which partition.
    scratch : Path
        Its file of `Scatter`.
    registry : Registry
        Genes, labels and batches of the store.
    dtypes : CountsDtypes
        Types of counts and indices.
    codec : str
        As in `write_partition`.
    rows_per_chunk : int, optional
        As in `write_partition`.
    """

    folder: Path
    number: int
    scratch: Path
    registry: Registry
    dtypes: CountsDtypes
    codec: str
    rows_per_chunk: int | None

    def run(self) -> PartitionInfo:
        """Put the cells in order and write them."""
        name = f"dataset_{self.number}"
        remove(self.folder / name)  # what a task that died may have left
        cells = gather(self.scratch, self.dtypes, self.registry.batch_key is not None)
        info = write_partition(
            self.folder,
            name,
            cells,
            self.registry,
            self.dtypes,
            codec=self.codec,
            rows_per_chunk=self.rows_per_chunk,
        )
        sync_files(self.folder / name)
        return info


def write_partitions(
    jobs: Sequence[PartitionJob], num_workers: int, work: Workspace
) -> list[PartitionInfo]:
    """Write all partitions, removing each one's scratch file when it is done.

    Parameters
    ----------
    jobs : sequence of PartitionJob
        In row order.
    num_workers : int
        How many to write at once: Ray tasks where more than one.
    work : Workspace
        Where to note what is written; what is noted there already is not written again.

    Returns
    -------
    list of PartitionInfo
        In the order of `jobs`.

    Raises
    ------
    ConfigError
        If Ray has fewer CPUs than `num_workers`.
    """
    infos = {
        number: PartitionInfo.from_json(record)
        for number, record in work.records("partition").items()
    }
    left = [job for job in jobs if job.number not in infos]
    runs = _run_here(left) if num_workers == 1 else _run_on_ray(left, num_workers)
    with Progress(len(jobs), "partitions", "writing", done=len(infos)) as progress:
        for job, info in runs:
            work.write(f"partition-{job.number}", info.to_json())
            remove(job.scratch)
            infos[job.number] = info
            progress.advance(1)
    return [infos[job.number] for job in jobs]


def _run_here(jobs: Sequence[PartitionJob]) -> Iterator[tuple[PartitionJob, PartitionInfo]]:
    for job in jobs:
        yield job, job.run()


def _run_on_ray(
    jobs: Sequence[PartitionJob], num_workers: int
) -> Iterator[tuple[PartitionJob, PartitionInfo]]:
    """Run jobs as tasks of the connected Ray, `num_workers` at a time; yield each as it ends."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(PartitionJob.run)
    waiting = list(reversed(jobs))
    running: dict[Any, PartitionJob] = {}
    while waiting or running:
        while waiting and len(running) < num_workers:
            job = waiting.pop()
            running[task.remote(job)] = job
        done, _ = ray.wait(list(running))
        for reference in done:
            yield running.pop(reference), _result(reference)


def _result(reference: Any) -> PartitionInfo:
    """Return a task's result, or raise its own error instead of Ray's wrapping of it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise RayvaecError(
            f"a worker that wrote a partition was lost ({type(error).__name__})",
            "go on with --resume, with fewer --num-workers where memory was short",
        ) from error
