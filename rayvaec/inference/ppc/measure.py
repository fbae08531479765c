"""Measure some cells with one model and add the results to an accumulator."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.inference.ppc.accumulator import (
    DRAWN,
    LIBRARY_BINS,
    LIBRARY_STEP,
    OBSERVED,
    REPLICATE,
    Panel,
    Tally,
)
from rayvaec.inference.ppc.kernels import add_counts, add_expected, fill_pairs
from rayvaec.kernels import transfer
from rayvaec.kernels.nb_sample import Draws
from rayvaec.kernels.rng import normal_noise
from rayvaec.model.draws import BLOCK_ROWS, decode_block
from rayvaec.model.inputs import code_column
from rayvaec.model.vaec import VAEC

DRAWN_ROWS = 8192
"""Most rows drawn at a time, unless BLOCK_ROWS cells have more."""


def measure(
    module: VAEC,
    cells: Cells,
    labels: NDArray[np.integer],
    panel: Panel,
    n_samples: int,
    seed: int,
    tally: Tally,
) -> NDArray[np.float32]:
    """Add cells to a tally.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    cells : Cells
        The cells, as the model sees them.
    labels : NDArray[n_cells] of int
        The tally's label code of each of them.
    panel : Panel
        The panel that the tally was made for.
    n_samples, seed : int
        Draws a cell, at least 2, and the seed of all of them: the draws of `posterior.draw`.
    tally : Tally
        What to add to.

    Returns
    -------
    NDArray[n_cells, n_latent]
        Mean of q(z | x, y) of each cell.
    """
    step = max(DRAWN_ROWS // n_samples // BLOCK_ROWS, 1) * BLOCK_ROWS
    means = [np.zeros((0, module.config.n_latent), np.float32)]
    for start in range(0, len(cells), step):
        rows = slice(start, min(start + step, len(cells)))
        part = cells.part(rows.start, rows.stop)
        codes = labels[rows].astype(np.int64)
        means.append(_measure_part(module, part, codes, panel, n_samples, seed, tally))
    return np.concatenate(means)


def _measure_part(
    module: VAEC,
    cells: Cells,
    labels: NDArray[np.int64],
    panel: Panel,
    n_samples: int,
    seed: int,
    tally: Tally,
) -> NDArray[np.float32]:
    tally.cells += np.bincount(labels, minlength=len(tally.cells))
    tally.draws += len(cells) * (n_samples - 1)
    observed = Draws(cells.indptr, cells.indices, cells.counts)  # type: ignore[arg-type]
    drawn = posterior.draw(module, cells, n_samples, seed)
    library = _add_rows(observed, np.full(len(cells), OBSERVED), labels, panel, tally)
    which = np.full((len(cells), n_samples), DRAWN)
    which[:, 0] = REPLICATE
    _add_rows(drawn, which.ravel(), np.repeat(labels, n_samples), panel, tally)

    mean, variance = posterior.latent(module, cells)
    _add_latent(mean, variance, labels, tally)
    _add_prior(module, cells, labels, tally)
    _add_bound(*posterior.bound_terms(module, cells, seed), labels, tally)
    # z of the first draw, so that what is known given z holds for the replicate as well.
    noise = normal_noise(seed, cells.keys, np.zeros(len(cells), np.uint64), mean.shape[1])
    z = (mean + np.sqrt(variance) * noise).astype(np.float32)
    replicate = _every(drawn, n_samples)
    for start in range(0, len(cells), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(cells)))
        rates = _decoded(module, z[rows], library[rows], cells.part(rows.start, rows.stop))
        counts = np.stack([_dense(data, rows, rates.shape[1]) for data in (observed, replicate)])
        add_expected(
            rates,
            transfer.to_host(module.px_r.double()),
            module.is_softplus,
            counts,
            labels[rows],
            panel.label_column,
            tally.expected,
            tally.residual,
            tally.label_expected,
            tally.pit,
        )
    return mean


def _add_rows(
    rows: Draws,
    datasets: NDArray[np.int64],
    labels: NDArray[np.int64],
    panel: Panel,
    tally: Tally,
) -> NDArray[np.float64]:
    """Add rows of counts; return the library of each."""
    library = np.empty(len(labels))
    add_counts(
        rows.indptr,
        rows.indices,
        rows.counts,
        datasets,
        labels,
        panel.label_column,
        tally.genes,
        tally.label_genes,
        library,
    )
    place = datasets, labels
    at_least_one = np.maximum(library, 1)
    bins = np.minimum(np.log10(at_least_one) / LIBRARY_STEP, LIBRARY_BINS - 1).astype(np.int64)
    np.add.at(tally.library, (*place, bins), 1)
    np.add.at(tally.log_library, place, np.log(at_least_one))
    values = np.zeros((len(labels), tally.pair_sums.shape[-1]))
    fill_pairs(*rows, library, panel.typical_library, panel.pair_column, values)
    # Rows of one data set and label together, so that their products are one matrix product.
    group = datasets * len(tally.cells) + labels
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    for first, last in zip(starts, np.append(starts, len(order))[1:], strict=False):
        some = values[order[first:last]]
        where = np.unravel_index(group[order[first]], tally.log_library.shape)
        tally.pair_sums[where] += some.sum(0)
        tally.pair_products[where] += some.T @ some
    return library


def _add_latent(
    mean: NDArray[np.float32],
    variance: NDArray[np.float32],
    labels: NDArray[np.int64],
    tally: Tally,
) -> None:
    wide = mean.astype(np.float64)
    np.add.at(tally.latent_mean, labels, wide)
    np.add.at(tally.latent_variance, labels, variance)
    np.add.at(tally.latent_products, labels, wide[:, :, None] * wide[:, None, :])


@torch.no_grad()
def _add_prior(module: VAEC, cells: Cells, labels: NDArray[np.int64], tally: Tally) -> None:
    moments = module.prior_moments(code_column(cells.labels, module.px_r.device))
    mean, covariance = (transfer.to_host(moment.double()) for moment in moments)
    np.add.at(tally.prior_mean, labels, mean)
    np.add.at(tally.prior_products, labels, covariance + mean[:, :, None] * mean[:, None, :])


def _add_bound(
    reconstruction: NDArray[np.float64],
    divergence: NDArray[np.float64],
    labels: NDArray[np.int64],
    tally: Tally,
) -> None:
    elbo = -(reconstruction + divergence)
    for row, values in enumerate((elbo, elbo**2, -reconstruction)):
        tally.bound[row] += np.bincount(labels, values, len(tally.cells))


def _decoded(
    module: VAEC, z: NDArray[np.float32], library: NDArray[np.float64], cells: Cells
) -> NDArray[np.float32]:
    device = module.px_r.device
    rates = decode_block(
        module,
        transfer.to_device(z, device),
        module.library_of(transfer.to_device(library, device, torch.float32)[:, None]),
        code_column(cells.labels, device),
        None if cells.batches is None else code_column(cells.batches, device),
    )
    return transfer.to_host(rates)


def _every(drawn: Draws, n_samples: int) -> Draws:
    """Return the first of every `n_samples` rows."""
    starts, stops = drawn.indptr[:-1:n_samples], drawn.indptr[1::n_samples]
    keep = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    indptr = np.concatenate([[0], np.cumsum(stops - starts)])
    return Draws(indptr, drawn.indices[keep], drawn.counts[keep])


def _dense(rows: Draws, which: slice, n_genes: int) -> NDArray[np.int32]:
    lengths = np.diff(rows.indptr[which.start : which.stop + 1])
    entries = slice(rows.indptr[which.start], rows.indptr[which.stop])
    dense = np.zeros((len(lengths), n_genes), np.int32)
    dense[np.repeat(np.arange(len(lengths)), lengths), rows.indices[entries]] = rows.counts[entries]
    return dense
