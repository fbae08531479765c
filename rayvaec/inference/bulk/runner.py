"""Bulk runner: validate, split into regions, compute in actors, publish."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rayvaec
from rayvaec.cluster import (
    check_cpus,
    check_gpus,
    check_job_paths,
    check_seen,
    ray_session,
)
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.store.open import open_store, share
from rayvaec.errors import ConfigError
from rayvaec.inference.bulk.actors import Crew, actors, explained
from rayvaec.inference.bulk.formats import convert
from rayvaec.inference.bulk.job import Inputs, Job
from rayvaec.inference.bulk.run_state import RunState
from rayvaec.inference.bulk.worker import RegionWorker, Task, Work
from rayvaec.inference.store_cells import StoreCells, repeated_names
from rayvaec.inference.trained_model import load_model
from rayvaec.util.atomic import check_free, check_suffix
from rayvaec.util.location import location
from rayvaec.util.lock import WriteLock
from rayvaec.util.messages import join_names

logger = logging.getLogger("rayvaec")


@contextmanager
def open_inputs(
    task: type[Task],
    models: Sequence[str | Path],
    store: str | Path,
    out: str | Path,
    *,
    num_workers: int,
    use_gpu: bool,
    overwrite: bool,
) -> Iterator[Inputs]:
    """Open models and store, see that they fit and that the output may be written, and lock it.

    Parameters
    ----------
    task : type of Task
        What will be computed.
    models : sequence of str or Path
        Saved models.
    store, out, num_workers, use_gpu, overwrite
        As in `rayvaec.inference.bulk.api.sample_store`.

    Yields
    ------
    Inputs

    Raises
    ------
    ConfigError, StoreError, ModelError
        As `rayvaec.inference.bulk.api.sample_store`.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does nothing", "give a whole number >= 1")
    paths, where, out = tuple(Path(path) for path in models), location(store), Path(out)
    check_job_paths([*paths, out], [where])
    check_suffix(out, task.formats)
    with WriteLock(out):
        check_free(out, overwrite)
        opened = tuple(load_model(path) for path in paths)
        # Of its own stores rayvaec knows the columns; of others, those that the model was
        # trained on.
        registry = opened[0].registry
        cells = open_store(where, ObsKeys(registry.labels_key, registry.batch_key))
        if task.as_stored:
            cells = cells.as_stored()
        for model in opened:
            extra = StoreCells(cells, model.registry).extra_genes
            if extra:
                logger.info(
                    "%d genes of the store are not in the model and are left out: %s",
                    len(extra),
                    join_names(extra),
                )
        yield Inputs(paths, opened, cells, out, num_workers, use_gpu, overwrite)


def run(inputs: Inputs, task: Task) -> Any:
    """Compute a task of every region and publish its output.

    Parameters
    ----------
    inputs : Inputs
        From `open_inputs`, which is not left before this ends.
    task : Task
        What to compute.

    Returns
    -------
    object
        What `Task.finish` returned.

    Raises
    ------
    ConfigError
        If Ray has fewer CPUs or GPUs than the workers need, or a node does not see a path.
    StoreError
        If unfinished work of other options is in the way.
    RayvaecError
        If the work failed; finished regions are kept for a rerun.
    """
    with ray_session():
        n_workers = inputs.num_workers
        who = f"{n_workers} worker{'s' * (n_workers > 1)}"
        check_cpus(n_workers, who)
        check_gpus(n_workers * inputs.use_gpu, who)
        check_seen([*inputs.paths, inputs.store.path], [inputs.out])
        job = _begin(inputs, task)
        try:
            result = _compute(job, task)
        except Exception as error:
            raise explained(error, job.state.folder) from error
        job.state.publish()
    return result


def _begin(inputs: Inputs, task: Task) -> Job:
    regions = task.regions(inputs)
    plan = {
        **task.identity(),
        "model": inputs.model.hash,
        "store": inputs.store.hash,
        "rayvaec_version": rayvaec.__version__,
        "device": inputs.device,
        "region": regions.size,
    }
    if len(inputs.models) > 1:
        plan["against"] = inputs.models[1].hash
    plan = json.loads(json.dumps(plan))  # as it will be read again: tuples are lists
    return Job(inputs, regions, RunState(inputs.out.absolute(), plan, inputs.overwrite), plan)


def _compute(job: Job, task: Task) -> Any:
    inputs, state = job.inputs, job.state
    if not state.is_resuming:
        task.begin(job)
        state.commit()
    work = Work(
        models=tuple(
            (os.path.abspath(path), model.hash)
            for path, model in zip(inputs.paths, inputs.models, strict=True)
        ),
        store=share(inputs.store, state.work),
        store_hash=inputs.store.hash,
        task=task,
        regions=job.regions,
        output=str(state.output),
        parts=str(state.parts),
        device=inputs.device,
        repetitions=repeated_names(inputs.store) if task.keyed else None,
    )
    with actors(RegionWorker, work, inputs.num_workers, inputs.use_gpu) as workers:
        crew = Crew(workers, state)
        calls = {region.number: ("region", region.number) for region in job.regions}
        sizes = {region.number: len(region) for region in job.regions}
        records = crew.run("regions", calls, sizes, "cells")
        result = task.finish(job, crew, records)
    if ".zarr" in task.formats:
        convert(state.output, state.result)
    return result
