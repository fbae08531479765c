"""CPU loss of the softmax form: mu = library * softmax(a), theta = exp(px_r).

The softmax needs a whole row before any gene of it, so cells go in chunks, held in a buffer that is
kept between calls. First by pieces of the chunk's rows, each in one thread: a product into the
buffer, a sweep over each row that turns it in place into its gradient, and the product with the
weight. Then by tiles of genes: the product that adds to the weight's gradient.

Within a row the zeros are dealt with by vectorised float32 loops, and the non-zeros after them, one
by one, in float64. The number of pieces is fixed: no bit depends on the number of threads.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.kernels.counts import checked_arrays
from rayvaec.kernels.math32 import (
    FAST,
    SUMS,
    block_sum,
    bracket,
    dot,
    exp_negative,
    log1p_positive,
    product_into,
)
from rayvaec.kernels.nb_loss_types import RATE_FLOOR, Gradients, Inputs, chunk_rows
from rayvaec.kernels.threads import run_all, spans, threads_for
from rayvaec.util.numba_cache import compiled

_F = np.float32
_PIECES = 8
_TILE_GENES = 1024

_workspace = threading.local()


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def _add_bias_max(a: NDArray[Any], bias: NDArray[Any]) -> float:
    """Add the bias in place; return the largest sum."""
    largest = _F(-np.inf)
    for g in range(len(a)):
        v = a[g] + bias[g]
        a[g] = v
        largest = max(largest, v)
    return float(largest)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _exp_shifted(a: NDArray[Any], shift: np.float32, out: NDArray[Any]) -> None:
    for g in range(len(a)):
        out[g] = exp_negative(a[g] - shift)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _log_odds(
    mu: NDArray[Any], inverse_theta: NDArray[Any], log_odds: NDArray[Any], p: NDArray[Any]
) -> None:
    """Set log1p(mu/theta) and mu/(mu+theta)."""
    for g in range(len(mu)):
        odds = min(mu[g] * inverse_theta[g], _F(1e37))
        log_odds[g] = log1p_positive(odds)
        p[g] = odds / (_F(1.0) + odds)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _add_dispersion_slope(
    total: NDArray[Any], log_odds: NDArray[Any], p: NDArray[Any], factor: np.float32
) -> None:
    """Add factor * (log1p(odds) - odds/(1+odds)), by its series where that cancels."""
    for g in range(len(total)):
        q = p[g]
        # In p = odds/(1+odds): -log(1-p) - p = p**2/2 + p**3/3 + ...
        series = q * q * (_F(0.5) + q * (_F(1 / 3) + q * _F(0.25)))
        total[g] += factor * (series if q < _F(0.01) else log_odds[g] - q)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _project(grad: NDArray[Any], mu: NDArray[Any], factor: np.float32, sums: NDArray[Any]) -> None:
    """Set grad = grad - factor * mu, softmax's derivative, and add it to `sums`."""
    for g in range(len(grad)):
        value = grad[g] - factor * mu[g]
        grad[g] = value
        sums[g] += value


@njit(nogil=True, error_model="numpy")
def _softmax_counts(
    indices: NDArray[Any],
    counts: NDArray[Any],
    mu: NDArray[Any],
    theta: NDArray[Any],
    factor: float,
    want: bool,
    grad: NDArray[Any],
    sum_theta: NDArray[Any],
) -> float:
    """Add one row's non-zeros to the gradients with respect to log mu and log theta."""
    value, product = 0.0, 1.0
    for i in range(len(indices)):
        g, x = np.uint32(indices[i]), counts[i]
        if x <= 0:
            continue
        m, t = max(float(mu[g]), RATE_FLOOR), theta[g]
        p, v, ratio = bracket(t, x)
        value += v + x * math.log(m / (t + m))
        product *= p
        if product < 1e-100 or product > 1e100:
            value += math.log(product)
            product = 1.0
        if want:
            part = t * x / (t + m)
            grad[g] -= _F(factor * part)
            sum_theta[g] += factor * (t * ratio - part)
    return value + math.log(product)


@compiled(error_model="numpy")
def _rows(
    a: NDArray[Any],
    bias: NDArray[Any],
    theta_32: NDArray[Any],
    theta: NDArray[Any],
    library: NDArray[Any],
    factor: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
    want: bool,
    loss: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Compute the loss of each row, and turn `a` into its gradient.

    `sums` gathers over rows: the gradient of the bias, the zeros' part of the
    gradient with respect to log theta (by theta), and the non-zeros' part, negated.
    """
    n_genes = a.shape[1]
    inverse = (1.0 / theta).astype(_F)
    mu, log_odds, p = np.empty(n_genes, _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    unused = np.empty(n_genes, _F)
    sum_theta = np.zeros(n_genes)
    for c in range(len(a)):
        shift = _add_bias_max(a[c], bias)
        _exp_shifted(a[c], _F(shift), mu)
        ratio = _F(library[c] / block_sum(mu))
        for g in range(n_genes):
            mu[g] *= ratio
        _log_odds(mu, inverse, log_odds, p)
        dense = dot(log_odds, theta_32)
        if want:
            product_into(a[c], p, theta_32, factor[c], unused)
            _add_dispersion_slope(sums[1], log_odds, p, factor[c])
        start, stop = indptr[c], indptr[c + 1]
        loss[c] = dense - _softmax_counts(
            indices[start:stop],
            counts[start:stop],
            mu,
            theta,
            float(factor[c]),
            want,
            a[c],
            sum_theta,
        )
        if want:
            # softmax's derivative: every gene gives up its share of the gradients' sum.
            share = _F(block_sum(a[c]) / max(float(library[c]), RATE_FLOOR))
            _project(a[c], mu, share, sums[0])
    for g in range(n_genes):
        sums[2, g] += sum_theta[g]


def evaluate(inputs: Inputs, want_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Compute the loss of every cell and, if wanted, the gradients of the weighted sum.

    Parameters
    ----------
    inputs : Inputs
        On the CPU, in float32.
    want_gradients : bool
        Whether to compute gradients.

    Returns
    -------
    reconstruction : Tensor[n_cells]
        Negative log-likelihood of each cell.
    gradients : Gradients or None
    """
    work = _Work(inputs, want_gradients)
    for start in range(0, inputs.x.n_cells, len(work.buffer)):
        work.run(slice(start, min(start + len(work.buffer), inputs.x.n_cells)))
    if not want_gradients:
        return work.loss, None
    if not inputs.x.n_cells:
        work.grads.weight.zero_()
    bias, zeros, rest = torch.from_numpy(work.sums).sum(0)
    work.grads.bias.copy_(bias)
    torch.sub(torch.exp(inputs.px_r) * zeros, rest, out=work.grads.px_r)
    return work.loss, work.grads


class _Work:
    """What the pieces of one call share."""

    def __init__(self, inputs: Inputs, want: bool) -> None:
        self.indptr, self.indices, self.counts = checked_arrays(inputs.x)
        theta = torch.exp(inputs.px_r.double())
        self.h, self.weight = inputs.h, inputs.weight
        self.per_gene = (
            inputs.bias.contiguous().numpy(),
            theta.float().numpy(),
            theta.numpy(),
        )
        self.library = inputs.library.float().contiguous().numpy()
        self.factor = inputs.factor.float().contiguous().numpy()
        self.loss = torch.empty(inputs.x.n_cells, dtype=torch.float32)
        self.grads = Gradients(*(torch.empty_like(leaf) for leaf in inputs[:4]))
        self.buffer, self.sums = _buffers(chunk_rows(inputs.x), inputs.x.n_genes)
        self.want = want

    def run(self, rows: slice) -> None:
        """Work through one chunk of cells."""
        n_rows, n_genes = rows.stop - rows.start, len(self.weight)
        run_all(
            [
                partial(self._rows, rows.start, slice(*span), self.sums[piece])
                for piece, span in enumerate(spans(n_rows, _PIECES))
            ],
            threads_for(n_rows * n_genes),
        )
        if self.want:
            run_all(
                [
                    partial(self._genes, rows, slice(start, min(start + _TILE_GENES, n_genes)))
                    for start in range(0, n_genes, _TILE_GENES)
                ],
                threads_for(n_rows * n_genes),
            )

    def _rows(self, origin: int, piece: slice, sums: NDArray[np.float32]) -> None:
        """Turn some rows' activations into gradients; the chunk begins at cell `origin`."""
        rows = slice(origin + piece.start, origin + piece.stop)
        with torch.no_grad():  # which is a setting per thread
            a = self.buffer[piece]
            torch.mm(self.h[rows], self.weight.t(), out=a)
            _rows(
                a.numpy(),
                *self.per_gene,
                self.library[rows],
                self.factor[rows],
                self.indptr[rows.start : rows.stop + 1],
                self.indices,
                self.counts,
                self.want,
                self.loss[rows].numpy(),
                sums,
            )
            if self.want:
                torch.mm(a, self.weight, out=self.grads.h[rows])

    def _genes(self, rows: slice, genes: slice) -> None:
        """Add a chunk's part to some genes' rows of the weight's gradient."""
        with torch.no_grad():
            a = self.buffer[: rows.stop - rows.start, genes]
            total = self.grads.weight[genes]
            total.addmm_(a.t(), self.h[rows], beta=float(rows.start > 0))


def _buffers(height: int, n_genes: int) -> tuple[Tensor, NDArray[np.float32]]:
    """Return this thread's buffer of activations and its zeroed sums.

    They are kept from call to call: the first touch of fresh memory costs as much as a product.
    """
    kept = getattr(_workspace, "buffers", None)
    if kept is None or kept[0].shape != (height, n_genes):
        rows = torch.empty(height, n_genes, dtype=torch.float32)
        kept = rows, np.empty((_PIECES, 3, n_genes), np.float32)
        _workspace.buffers = kept
    kept[1].fill(0)
    return kept
