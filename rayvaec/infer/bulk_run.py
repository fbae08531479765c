"""Bulk work from end to end: check, cut into regions, have actors compute them, publish."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

import rayvaec
from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.names import listing
from rayvaec.data.store import Store, open_store
from rayvaec.errors import ConfigError
from rayvaec.files import bring_back, check_free, remove
from rayvaec.infer.actors import actors, explained, run_stage
from rayvaec.infer.ledger import Ledger
from rayvaec.infer.output import array_at, create_layer, create_output, shards_of
from rayvaec.infer.quantities import Draws, Quantity
from rayvaec.infer.reductions import Arrays, Names, Reduction
from rayvaec.infer.regions import RegionWorker, Work, part_path
from rayvaec.infer.store_cells import StoreCells
from rayvaec.infer.trained import TrainedModel, load_model
from rayvaec.location import location
from rayvaec.runtime import check_cpus, check_gpus, check_job_paths, check_seen, ray_session

logger = logging.getLogger("rayvaec")

REGION_BYTES = 64 * 2**20
MIN_REGION, MAX_REGION = 64, 16384

_BYTES_A_VALUE = 16
"""An index and a count: as stored or drawn, and as kept."""


@dataclass(frozen=True)
class Job:
    """A model, a store that fits it, and where the result goes; all of it checked.

    Parameters
    ----------
    model_path : str or Path
        Where the model lies.
    model : TrainedModel
    store : Store
        In the order in which its rows lie.
    out : Path
        What to write.
    num_workers : int
        Ray actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.
    """

    model_path: str | Path
    model: TrainedModel
    store: Store
    out: Path
    num_workers: int
    use_gpu: bool

    def run(self, quantity: Quantity | Draws | Reduction) -> None:
        """Compute a quantity of every region and publish the result.

        Parameters
        ----------
        quantity : Quantity, Draws or Reduction
            What to compute.

        Raises
        ------
        ConfigError
            If Ray has fewer CPUs or GPUs than the workers need, or a node does not see a path.
        RayvaecError
            If the work failed; finished regions are kept for a rerun.
        """
        with ray_session():
            who = f"{self.num_workers} worker{'s' * (self.num_workers > 1)}"
            check_cpus(self.num_workers, who)
            check_gpus(self.num_workers * self.use_gpu, who)
            check_seen([Path(self.model_path), self.store.path], [self.out])
            region = _region_rows(quantity, self.model, self.store)
            plan = self._plan(quantity, region)
            ledger = Ledger(self.out.absolute(), plan)
            try:
                if not ledger.goes_on:
                    self._create(quantity, ledger, region, plan)
                self._compute(quantity, ledger, region)
            except Exception as error:
                raise explained(error, ledger.folder) from error
            ledger.publish()

    def _plan(self, quantity: Quantity | Draws | Reduction, region: int) -> dict[str, Any]:
        plan = {
            "quantity": type(quantity).__name__.lower(),
            **asdict(cast(Any, quantity)),
            "model": self.model.hash,
            "store": self.store.hash,
            "rayvaec_version": rayvaec.__version__,
            "device": self._device,
            "region": region,
        }
        return json.loads(json.dumps(plan))  # as it will be read again: tuples are lists

    @property
    def _device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"

    def _create(
        self,
        quantity: Quantity | Draws | Reduction,
        ledger: Ledger,
        region: int,
        plan: dict[str, Any],
    ) -> None:
        """Create the output to be filled; a reduction writes its own at the end."""
        if not isinstance(quantity, Reduction):
            widths = {} if isinstance(quantity, Draws) else quantity.widths(self.model.module)
            names = self.store.registry, self.model.registry.genes
            create_output(ledger.output, *names, widths, self.store.n_cells, region, plan)
        ledger.begin()

    def _compute(self, quantity: Quantity | Draws | Reduction, ledger: Ledger, region: int) -> None:
        work = Work(
            model=os.path.abspath(self.model_path),
            store=self.store.share(ledger.folder),
            model_hash=self.model.hash,
            store_hash=self.store.hash,
            quantity=quantity,
            output=str(ledger.output),
            parts=str(ledger.parts),
            region=region,
            device=self._device,
        )
        with actors(RegionWorker, work, self.num_workers, self.use_gpu) as workers:
            _fill(workers, work, ledger, self.store.n_cells, self.model.registry.n_genes)
        if isinstance(quantity, Reduction):
            remove(ledger.output)  # what an earlier run may have begun
            names = Names(self.store.registry, self.model.registry)
            parts = _parts(ledger.parts, -(-self.store.n_cells // region))
            quantity.write(self.model.module, parts, names, ledger.output)


def open_job(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    num_workers: int,
    use_gpu: bool,
    overwrite: bool,
) -> Job:
    """Open model and store, and see that they fit and that the output may be written.

    Parameters
    ----------
    model_path, store_path, out, num_workers, use_gpu, overwrite
        As in `rayvaec.infer.bulk.sample_store`.

    Returns
    -------
    Job

    Raises
    ------
    ConfigError, StoreError, ModelError
        As `rayvaec.infer.bulk.sample_store`.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does nothing", "give a whole number >= 1")
    where, out = location(store_path), Path(out)
    check_job_paths([Path(model_path), out], [where])
    bring_back(out)
    check_free(out, overwrite)
    model = load_model(model_path)
    # Of its own stores rayvaec knows the columns; of others, those that the model was trained on.
    keys = ObsKeys(model.registry.labels_key, model.registry.batch_key)
    store = open_store(where, keys).as_stored()
    cells = StoreCells(store, model.registry)
    if cells.extra_genes:
        logger.info(
            "%d genes of the store are not in the model and are left out: %s",
            *(len(cells.extra_genes), listing(cells.extra_genes)),
        )
    return Job(model_path, model, store, out, num_workers, use_gpu)


def _region_rows(quantity: Quantity | Draws | Reduction, model: TrainedModel, store: Store) -> int:
    """Return how many cells' counts and results take about REGION_BYTES, as a power of two."""
    nnz = store.manifest.nnz / max(store.n_cells, 1)
    a_cell = nnz * _BYTES_A_VALUE
    if isinstance(quantity, Draws):
        a_cell += quantity.n_samples * nnz * _BYTES_A_VALUE
    elif not isinstance(quantity, Reduction):
        a_cell += sum(width.nbytes for width in quantity.widths(model.module).values())
    rows = 2 ** int(np.log2(max(REGION_BYTES / max(a_cell, 1), 1)))
    return int(np.clip(rows, MIN_REGION, MAX_REGION))


def _parts(folder: Path, n_regions: int) -> Iterator[Arrays]:
    for number in range(n_regions):
        with np.load(part_path(folder, number), allow_pickle=False) as part:
            yield dict(part)


def _fill(workers: list[Any], work: Work, ledger: Ledger, n_cells: int, n_genes: int) -> None:
    starts = range(0, n_cells, work.region)
    calls = {number: ("region", (number,)) for number in range(len(starts))}
    sizes = {number: min(work.region, n_cells - start) for number, start in enumerate(starts)}
    records = run_stage(workers, ledger, "regions", calls, sizes, "cells")
    if not isinstance(work.quantity, Draws):
        return
    nnz = np.array([records[number]["nnz"] for number in calls], np.int64)
    root = zarr.open_group(work.output, mode="r+", use_consolidated=False)
    if not ledger.finished("layers", [0]):
        for sample, values in enumerate(nnz.sum(axis=0).tolist()):
            create_layer(root, f"sample_{sample}", n_cells, n_genes, values, work.region)
        ledger.finish("layers", 0, {})
    _assemble(workers, ledger, root, nnz)


def _assemble(workers: list[Any], ledger: Ledger, root: zarr.Group, nnz: np.ndarray) -> None:
    """Move what was drawn from the regions' parts to the layers' files."""
    import ray

    reference = ray.put(nnz)
    calls: dict[int, tuple[str, tuple[Any, ...]]] = {}
    sizes: dict[int, int] = {}
    for sample in range(nnz.shape[1]):
        for method, key in (("values", "data"), ("pointers", "indptr")):
            for span in shards_of(array_at(root, f"layers/sample_{sample}/{key}")):
                calls[len(calls)] = (method, (sample, span, reference))
                sizes[len(sizes)] = span[1] - span[0] if method == "values" else 0
    run_stage(workers, ledger, "files", calls, sizes, "values")
