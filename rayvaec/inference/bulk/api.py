"""Bulk inference: a trained model over a whole store, to AnnData Zarr or a table.

Cells keep the store's order and names. The work is cut into regions; a finished region is recorded
beside the output, a worker that dies is started again, and a command that was stopped goes on where
it was when it is given again. What comes out does not depend on any of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayvaec.data.store.open import Store
from rayvaec.errors import ConfigError
from rayvaec.inference.analyses.contrasts import contrasts, large_enough
from rayvaec.inference.analyses.differential import Comparison
from rayvaec.inference.analyses.vamp_prior import check_clusters
from rayvaec.inference.bulk.aggregates import DifferentialExpression, LabelMeans, VampPrior
from rayvaec.inference.bulk.draw_layers import Draws
from rayvaec.inference.bulk.per_cell import Elbo, Expression, Latent, MarginalLL, Moments
from rayvaec.inference.bulk.runner import open_inputs, run
from rayvaec.inference.bulk.worker import Task
from rayvaec.inference.moments import QUANTILES, check_reductions
from rayvaec.inference.posterior import check_draws
from rayvaec.util.messages import Names


def sample_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    n_samples: int,
    *,
    seed: int = 0,
    reduce: Sequence[str] = (),
    quantiles: Sequence[float] = (),
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
        AnnData to write, ``.zarr`` or ``.h5ad``: layers ``sample_0``, ``sample_1``, ... of int32
        counts, [n_cells, n_genes] in CSR, equal to those of `TrainedModel.sample` on the same
        cells.
    n_samples : int
        Draws a cell, at least 1.
    seed : int
        Seed of all draws.
    reduce : sequence of str
        Which of ``mean``, ``var``, ``zero_fraction`` and ``quantiles`` over the draws to write,
        float32, as layers of these names, instead of the draws.
    quantiles : sequence of float
        With ``quantiles`` in `reduce`, which of them: numbers from 0 to 1; 0.5 comes as layer
        ``quantile_0.5``.
    num_workers : int
        Ray actors, one CPU each.
    use_gpu : bool
        Whether each of them gets a GPU as well.
    overwrite : bool
        Whether an existing output, and unfinished work of other options, may be replaced.

    Raises
    ------
    ConfigError
        If an option is out of range, `out` does not end in a format that can be written, or Ray
        has fewer CPUs or GPUs than the workers need.
    StoreError
        If there is no such store, `out` exists, another process writes it, or there is unfinished
        work of other options on it.
    ModelError
        If there is no such model, or it does not fit the store.
    RayvaecError
        If the work failed; finished regions are kept for a rerun.
    """
    check_draws(n_samples, seed)
    check_reductions(reduce, quantiles)
    task: Task = Draws(n_samples, seed)
    if reduce:
        moments = tuple(name for name in reduce if name != QUANTILES)
        task = Moments(n_samples, seed, moments, tuple(map(float, quantiles)))
    with open_inputs(
        type(task),
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        run(inputs, task)


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
    with open_inputs(
        Latent,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        run(inputs, Latent())


def expression_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    by_label: bool = False,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write every cell's denoised expression, or each label's.

    Parameters and errors as in `sample_store`; the output has ``layers["expression"]``, [n_cells,
    n_genes], float32, whose rows sum to 1. With `by_label` it has a row a label of the store
    instead, the mean over its cells, in ``X``, and their number in ``obs["n_cells"]``.
    """
    with open_inputs(
        LabelMeans if by_label else Expression,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        n_labels = inputs.store.registry.n_labels
        run(inputs, LabelMeans(n_labels) if by_label else Expression())


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
    """Write every cell's evidence lower bound and reconstruction error.

    Parameters and errors as in `sample_store`; the output has ``obs["elbo"]`` and
    ``obs["reconstruction_error"]``, in nats, from the same draw of z.
    """
    check_draws(1, seed)
    with open_inputs(
        Elbo,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        run(inputs, Elbo(seed))


def marginal_ll_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    n_mc_samples: int = 1000,
    seed: int = 0,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write every cell's marginal log-likelihood, estimated from `n_mc_samples` draws of z.

    Parameters and errors as in `sample_store`; the output has ``obs["marginal_ll"]``, in nats.
    """
    check_draws(n_mc_samples, seed)
    with open_inputs(
        MarginalLL,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        run(inputs, MarginalLL(n_mc_samples, seed))


def vamp_prior_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    p: int = 10,
    seed: int = 0,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the empirical prior of every label: `p` clusters of its cells.

    Parameters and errors as in `sample_store`; the output is an npz file of what
    `TrainedModel.get_vamp_prior` returns, and ``labels``.
    """
    check_clusters(p, seed)
    with open_inputs(
        VampPrior,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        if inputs.model.module.config.prior == "mog":
            raise ConfigError(
                "the model has learned a mixture prior, which DestVI takes instead of an "
                "empirical one",
                "use `rayvaec export`, which takes it along",
            )
        run(inputs, VampPrior(p, seed))


def differential_expression_store(
    model_path: str | Path,
    store_path: str | Path,
    out: str | Path,
    *,
    how: Comparison | None = None,
    groupby: str | None = None,
    group1: Names | None = None,
    group2: str | int | None = None,
    num_workers: int = 1,
    use_gpu: bool = False,
    overwrite: bool = False,
) -> None:
    """Compare the genes of groups of a store's cells.

    Parameters
    ----------
    model_path, store_path, num_workers, use_gpu, overwrite
        As in `sample_store`.
    out : str or Path
        File to write, ``.csv`` or ``.parquet``: the table of
        `TrainedModel.differential_expression`.
    how : Comparison, optional
        Options of the comparison.
    groupby : str, optional
        The store's column of labels, which is the default, or of batches.
    group1, group2 : str or number, optional
        Groups to compare: each of `group1` (one or several) with `group2` (by default all other
        cells). By default every group of at least two cells is compared, and a warning names the
        others.

    Raises
    ------
    ConfigError
        If a column or group is unknown (valid ones are listed), or as in `sample_store`.
    CountsError
        If a group that is named has fewer than two cells.
    StoreError, ModelError, RayvaecError
        As in `sample_store`.
    """
    with open_inputs(
        DifferentialExpression,
        [model_path],
        store_path,
        out,
        num_workers=num_workers,
        use_gpu=use_gpu,
        overwrite=overwrite,
    ) as inputs:
        run(inputs, _comparisons(inputs.store, how or Comparison(), groupby, group1, group2))


def _comparisons(
    store: Store,
    how: Comparison,
    groupby: str | None,
    group1: Names | None,
    group2: str | int | None,
) -> DifferentialExpression:
    """Return the comparisons of the groups of a store that are asked for."""
    registry = store.registry
    key = groupby or registry.labels_key
    columns = {registry.labels_key: registry.labels}
    if registry.batch_key is not None:
        columns[registry.batch_key] = registry.batches
    if key not in columns:
        raise ConfigError(
            f"the store has no column {key!r} of groups", f"choose from {', '.join(columns)}"
        )
    names = columns[key]
    wanted = contrasts(key, names, group1, group2)
    groups = list(range(len(names)))
    if group2 is not None:  # the others need not be looked at
        groups = sorted({code for one, two, _ in wanted for code in (one, two) if code is not None})
    if key == registry.labels_key:  # before anything is computed
        wanted = large_enough(names, np.array(store.manifest.cells_per_label), wanted)
    place = {code: position for position, code in enumerate(groups)}
    return DifferentialExpression(
        by_batch=key == registry.batch_key,
        groups=tuple(groups),
        names=tuple(names[code] for code in groups),
        contrasts=tuple(
            contrast._replace(
                one=place[contrast.one],
                two=None if contrast.two is None else place[contrast.two],
            )
            for contrast in wanted
        ),
        how=how,
    )
