"""The decoder's last product and the draws from it, in one function.

Rows go in blocks of a fixed number, padded with zeros, each in one thread: a product into a buffer
that is kept between calls, then row by row the rates (vectorised) and the sweep of nb_sample. So a
row's rates do not depend on how many rows come beside it, nor on the number of threads.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.kernels.keys import DRAWS, check_row_keys, check_seed, stream_keys
from rayvaec.kernels.nb_sample import (
    Draws,
    GeneTables,
    gene_tables,
    join_rows,
    refusal,
    softmax_lambdas,
    softplus_lambdas,
    sweep_row,
)
from rayvaec.kernels.special import FAST, SUMS, block_sum, exp_negative, log1p_unit
from rayvaec.kernels.threads import run_all

BLOCK_ROWS = 64
"""Rows of every product; a shorter block is padded."""

_F = np.float32
_workspace = threading.local()


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _softplus_rates(a: NDArray[Any], bias: NDArray[Any], library: np.float32) -> None:
    """Turn activations into library * softplus(a + bias)."""
    for g in range(len(a)):
        v = a[g] + bias[g]
        a[g] = library * (max(v, _F(0.0)) + log1p_unit(exp_negative(-abs(v))))


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def _largest(a: NDArray[Any], bias: NDArray[Any]) -> np.float32:
    largest = _F(-np.inf)
    for g in range(len(a)):
        largest = max(largest, a[g] + bias[g])
    return largest


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _exp_shifted(a: NDArray[Any], bias: NDArray[Any], shift: np.float32) -> None:
    for g in range(len(a)):
        a[g] = exp_negative(a[g] + bias[g] - shift)


@njit(nogil=True, error_model="numpy")
def _softmax_means(a: NDArray[Any], bias: NDArray[Any], library: np.float32) -> None:
    """Turn activations into library * softmax(a + bias)."""
    _exp_shifted(a, bias, _largest(a, bias))
    ratio = _F(library / block_sum(a))
    for g in range(len(a)):
        a[g] *= ratio


@njit(nogil=True, cache=True)
def _draw_rows(
    a: NDArray[Any],
    bias: NDArray[Any],
    library: NDArray[Any],
    odds_or_size: NDArray[Any],
    limit: NDArray[Any],
    cluster: NDArray[Any],
    softmax: bool,
    seed: np.uint64,
    keys: NDArray[Any],
    samples: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    counts: NDArray[Any],
) -> int:
    """Turn activations into rates and draw; return -1, or the first row that is out of bounds."""
    lambdas = np.empty(a.shape[1], _F)
    end = 0
    for row in range(len(library)):
        if softmax:
            _softmax_means(a[row], bias, library[row])
            good = softmax_lambdas(a[row], limit, cluster, lambdas)
        else:
            _softplus_rates(a[row], bias, library[row])
            good = softplus_lambdas(a[row], limit, cluster, lambdas)
        if not good:
            return row
        k0, k1 = stream_keys(DRAWS, seed, keys[row], samples[row])
        end = sweep_row(a[row], odds_or_size, softmax, lambdas, k0, k1, indices, counts, end)
        indptr[row] = end
    return -1


def draw_decoded(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    px_r: Tensor,
    library: Tensor,
    seed: int,
    keys: ArrayLike,
    samples: ArrayLike,
    *,
    generative: str = "softplus",
    row_bias: tuple[Tensor, Tensor] | None = None,
) -> Draws:
    """Decode hidden layers and draw counts, exactly, each row from its own random stream.

    Parameters
    ----------
    h : Tensor[n_rows, n_hidden]
        The decoder's last hidden layer, one row a draw.
    weight, bias : Tensor[n_genes, n_hidden], Tensor[n_genes]
        Its output product.
    px_r : Tensor[n_genes]
        Logits (softplus form) or log theta (softmax form).
    library : Tensor[n_rows, 1] or Tensor[n_rows]
        What px_scale is multiplied with.
    seed : int
        From 0 to 2**64 - 1.
    keys, samples : ndarray[n_rows], uint64
        Cell key and sample number of every row.
    generative : {"softplus", "softmax"}
        Form of the model.
    row_bias : (Tensor[n_kinds, n_genes], int64 Tensor[n_rows]), optional
        As in `nb_loss.nb_reconstruction`.

    Returns
    -------
    Draws
        Row i depends on (h[i], library[i], row_bias[1][i], seed, keys[i], samples[i]) and the
        weights alone: neither the other rows nor the number of threads change it.

    Raises
    ------
    ConfigError
        If shapes, keys, samples, seed or `generative` do not fit.
    CountsError
        As in `nb_sample.draw_counts`.
    """
    if row_bias is not None:
        table, kind = row_bias
        h = torch.cat((h, functional.one_hot(kind, len(table)).to(h.dtype)), 1)
        weight = torch.cat((weight, table.t().to(weight.dtype)), 1)
    if h.ndim != 2 or weight.shape != (len(bias), h.shape[1]) or px_r.shape != bias.shape:
        raise ConfigError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)}, px_r {tuple(px_r.shape)}",
            "pass h[n_rows, n_hidden], weight[n_genes, n_hidden] and px_r[n_genes]",
        )
    words = check_seed(seed), *check_row_keys(len(h), keys, samples)
    tensors = [_on_cpu(tensor) for tensor in (h, weight, bias, library.reshape(-1))]
    tables = gene_tables(px_r.detach().double().cpu().numpy(), generative)
    work = _Work(tensors, tables, words)
    return join_rows(run_all([partial(work.block, i) for i in range(0, len(h), BLOCK_ROWS)]))


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


class _Work:
    """What the blocks of one call share."""

    def __init__(
        self,
        tensors: list[Tensor],
        tables: GeneTables,
        words: tuple[np.uint64, NDArray[np.uint64], NDArray[np.uint64]],
    ) -> None:
        self.h, self.weight, self.bias, self.library = tensors
        self.tables = tables
        self.seed, self.keys, self.samples = words

    def block(self, start: int) -> Draws:
        """Draw the rows of one block."""
        n_genes = len(self.bias)
        stop = min(start + BLOCK_ROWS, len(self.h))
        a, indices, counts = _buffers(n_genes)
        h = self.h[start:stop]
        if len(h) < BLOCK_ROWS:
            h = torch.cat((h, h.new_zeros(BLOCK_ROWS - len(h), h.shape[1])))
        torch.mm(h, self.weight.t(), out=a)
        rates = a.numpy()
        indptr = np.zeros(stop - start + 1, np.int64)
        bad = _draw_rows(
            rates,
            self.bias.numpy(),
            self.library[start:stop].numpy(),
            self.tables.odds_or_size,
            self.tables.limit,
            self.tables.cluster,
            self.tables.softmax,
            self.seed,
            self.keys[start:stop],
            self.samples[start:stop],
            indptr[1:],
            indices,
            counts,
        )
        if bad >= 0:
            raise refusal(rates[bad], self.tables, start + bad)
        return Draws(indptr, indices[: indptr[-1]].copy(), counts[: indptr[-1]].copy())


def _buffers(n_genes: int) -> tuple[Tensor, NDArray[np.int32], NDArray[np.int32]]:
    """Return memory that this thread keeps: activations and the most entries that can come out."""
    kept = getattr(_workspace, "buffers", None)
    if kept is None or kept[0].shape[1] != n_genes:
        room = BLOCK_ROWS * n_genes
        kept = (
            torch.empty(BLOCK_ROWS, n_genes),
            np.empty(room, np.int32),
            np.empty(room, np.int32),
        )
        _workspace.buffers = kept
    return kept
