"""A trained model over a whole store, as Ray tasks, into an AnnData in Zarr.

Cells keep the store's order and names. The work is cut into regions; a finished region is recorded
beside the output, a worker that dies is started again, and a command that was stopped goes on where
it was when it is given again. What comes out does not depend on any of that.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import rayvaec
from rayvaec.data.names import listing
from rayvaec.data.obs_keys import ObsKeys
from rayvaec.data.store import Store, open_store
from rayvaec.errors import ConfigError
from rayvaec.files import check_free
from rayvaec.infer.actors import actors, explained, run_stage
from rayvaec.infer.ledger import Ledger
from rayvaec.infer.output import array_at, create_layer, create_output, shards_of
from rayvaec.infer.posterior import check_draws
from rayvaec.infer.quantities import (
    Draws,
    Elbo,
    Expression,
    Latent,
    Moments,
    Quantity,
    check_reductions,
)
from rayvaec.infer.regions import RegionWorker, Work
from rayvaec.infer.store_cells import StoreCells
from rayvaec.infer.trained import TrainedModel, load_model
from rayvaec.location import location
from rayvaec.runtime import check_cpus, check_gpus, check_job_paths, check_seen, ray_session

logger = logging.getLogger("rayvaec")

REGION_BYTES = 64 * 2**20
MIN_REGION, MAX_REGION = 64, 16384


def sample_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    n_samples: int,
    *,
    seed: int = 0,
    reduce: tuple[str, ...] = (),
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Draw from the posterior predictive distribution of every cell of a store.

    Parameters
    ----------
    model_path, store_path : str or Path
        A saved model, and a store (path or URL) that has the model's genes and labels.
    out : str or Path
        AnnData Zarr to write: layers ``sample_0``, ``sample_1``, ... of int32 counts, [n_cells,
        n_genes] in CSR, equal to those of `TrainedModel.sample` on the same cells.
    n_samples : int
        Draws a cell, at least 1.
    seed : int
        Seed of all draws.
    reduce : tuple of str
        Which of ``mean``, ``var`` and ``zero_fraction`` over the draws to write, float32, as layers
        of these names, instead of the draws.
    num_workers : int
        Ray actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.
    overwrite : bool
        Whether an existing output may be replaced.

    Raises
    ------
    ConfigError
        If an option is out of range, or Ray has fewer CPUs or GPUs than the workers need.
    StoreError
        If there is no such store, or `out` exists.
    ModelError
        If there is no such model, or it does not fit the store.
    RayvaecError
        If the work failed; finished regions are kept for a rerun.
    """
    check_draws(n_samples, seed)
    check_reductions(reduce)
    quantity = Moments(n_samples, seed, reduce) if reduce else Draws(n_samples, seed)
    _run(quantity, model_path, store_path, out, num_workers, use_gpu, overwrite)


def embed_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write mean and variance of every cell's latent variables.

    Parameters and errors as in `sample_store`; the output has ``obsm["X_rayvaec"]`` and
    ``obsm["X_rayvaec_var"]``, [n_cells, n_latent], float32.
    """
    _run(Latent(), model_path, store_path, out, num_workers, use_gpu, overwrite)


def expression_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write every cell's denoised expression.

    Parameters and errors as in `sample_store`; the output has ``layers["expression"]``, [n_cells,
    n_genes], float32, whose rows sum to 1.
    """
    _run(Expression(), model_path, store_path, out, num_workers, use_gpu, overwrite)


def elbo_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write every cell's evidence lower bound.

    Parameters and errors as in `sample_store`; the output has ``obs["elbo"]``, in nats.
    """
    check_draws(1, seed)
    _run(Elbo(seed), model_path, store_path, out, num_workers, use_gpu, overwrite)


def _run(
    quantity: Quantity | Draws,
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    num_workers: int,
    use_gpu: bool,
    overwrite: bool,
) -> None:
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} does nothing", "give a whole number >= 1")
    where, out = location(store_path), Path(out)
    check_job_paths([Path(model_path), out], [where])
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
    with ray_session():
        who = f"{num_workers} worker{'s' * (num_workers > 1)}"
        check_cpus(num_workers, who)
        check_gpus(num_workers * use_gpu, who)
        check_seen([Path(model_path), where], [out])
        region = _region_rows(quantity, model, store)
        ledger = _begin(quantity, model, store, out.absolute(), region, use_gpu)
        work = Work(
            *(
                os.path.abspath(model_path),
                store.share(ledger.folder),
                model.hash,
                store.hash,
                quantity,
            ),
            *(str(ledger.output), str(ledger.parts), region, _device(use_gpu)),
        )
        try:
            with actors(RegionWorker, work, num_workers, use_gpu) as workers:
                _fill(workers, work, ledger, store.n_cells, model.registry.n_genes)
        except Exception as error:
            raise explained(error, ledger.folder) from error
        ledger.publish()


def _begin(
    quantity: Quantity | Draws,
    model: TrainedModel,
    store: Store,
    out: Path,
    region: int,
    use_gpu: bool,
) -> Ledger:
    """Open the folder of unfinished work; create the output in it unless it is there."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(quantity).items()
    }
    plan = {
        "quantity": type(quantity).__name__.lower(),
        **options,
        "model": model.hash,
        "store": store.hash,
        "rayvaec_version": rayvaec.__version__,
        "device": _device(use_gpu),
        "region": region,
    }
    ledger = Ledger(out, plan)
    if not ledger.goes_on:
        widths = {} if isinstance(quantity, Draws) else quantity.widths(model.module)
        create_output(
            *(ledger.output, store.registry, model.registry.genes, widths, store.n_cells, region),
            plan,
        )
        ledger.begin()
    return ledger


def _device(use_gpu: bool) -> str:
    return "cuda" if use_gpu else "cpu"


def _region_rows(quantity: Quantity | Draws, model: TrainedModel, store: Store) -> int:
    """Return how many cells' results take about REGION_BYTES, as a power of two."""
    if isinstance(quantity, Draws):
        nnz = store.manifest.nnz / max(store.n_cells, 1)
        a_cell = quantity.n_samples * nnz * 16  # an index and a count, as drawn and as kept
    else:
        a_cell = sum(width.nbytes for width in quantity.widths(model.module).values())
    rows = 2 ** int(np.log2(max(REGION_BYTES / max(a_cell, 1), 1)))
    return int(np.clip(rows, MIN_REGION, MAX_REGION))


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
