"""Decoder output layer fused with negative-binomial sampling.

Rows go in blocks of a fixed number, each in one thread: a product into a buffer that is kept
between calls, a row a lane; then the rates, vectorised; then the draws.

A library's product may round a row otherwise where fewer rows come beside it, and it rearranges the
weight at every call, which for a few dozen rows takes a fifth of the time. Here an element is a
chain of fused multiply-adds from the first hidden unit to the last, on every machine and however
many rows there are. So a row's rates do not depend on those beside it, and a block that is not full
costs less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rayvaec.errors import ConfigError
from rayvaec.kernels.cpu.gene_tables import gene_tables
from rayvaec.kernels.cpu.nb_walk import LANES, whole_vectors
from rayvaec.kernels.math32 import FAST, exp_negative, log1p_unit
from rayvaec.kernels.nb_loss_types import with_row_bias
from rayvaec.kernels.nb_sample import TILE_GENES, Draws, draw_blocks, lane_buffer
from rayvaec.kernels.rng import check_streams
from rayvaec.kernels.simd import PRODUCT_WIDTH, Distinct, address, chains, prefetch
from rayvaec.util.numba_cache import compiled

_F = np.float32
_SUMMED_GENES = 256
_GENES = 8  # so many sums hide how long a multiply-add takes, and their addresses fit registers
_LINE = 16  # float32 of a cache line
_many_genes, _one_gene = chains(_GENES), chains(1)


@njit(nogil=True, error_model="numpy")
def _product(weight: NDArray[Any], lanes: NDArray[Any], n_rows: int, out: NDArray[Any]) -> None:
    """Set `out` to weight @ lanes in the vectors that hold rows."""
    n_genes, n_hidden = weight.shape
    whole = n_genes - n_genes % _GENES
    for gene in range(0, whole, _GENES):
        first, after = gene * n_hidden, (gene + _GENES) * n_hidden
        for element in range(after, after + _GENES * n_hidden, _LINE):
            prefetch(address(weight, element))
        for lane in range(0, n_rows, PRODUCT_WIDTH):
            of_lane, into = address(lanes, lane), address(out, gene * LANES + lane)
            _many_genes(address(weight, first), n_hidden, of_lane, LANES, into)
    for gene in range(whole, n_genes):
        for lane in range(0, n_rows, PRODUCT_WIDTH):
            of_lane, into = address(lanes, lane), address(out, gene * LANES + lane)
            _one_gene(address(weight, gene * n_hidden), n_hidden, of_lane, LANES, into)


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def _softplus(a: NDArray[Any], width: int, bias: NDArray[Any], library: NDArray[Any]) -> None:
    """Turn products, in `width` lanes, into library * softplus(a + bias)."""
    for gene in range(len(a)):
        b = bias[gene]
        for lane in range(width):
            v = a[gene, lane] + b
            a[gene, lane] = library[lane] * (max(v, _F(0.0)) + log1p_unit(exp_negative(-abs(v))))


@njit(nogil=True, error_model="numpy", fastmath=FAST, pipeline_class=Distinct)
def _softmax(a: NDArray[Any], width: int, bias: NDArray[Any], library: NDArray[Any]) -> None:
    """Turn products, in `width` lanes, into library * softmax(a + bias)."""
    largest = np.full(LANES, -np.inf, np.float32)
    for gene in range(len(a)):
        for lane in range(width):
            a[gene, lane] += bias[gene]
            largest[lane] = max(largest[lane], a[gene, lane])
    total = np.zeros(LANES, np.float64)
    for start in range(0, len(a), _SUMMED_GENES):
        part = np.zeros(LANES, np.float32)
        for gene in range(start, min(start + _SUMMED_GENES, len(a))):
            for lane in range(width):
                a[gene, lane] = exp_negative(a[gene, lane] - largest[lane])
                part[lane] += a[gene, lane]
        for lane in range(width):
            total[lane] += part[lane]
    ratio = np.empty(LANES, np.float32)
    for lane in range(width):
        ratio[lane] = library[lane] / total[lane]
    for gene in range(len(a)):
        for lane in range(width):
            a[gene, lane] *= ratio[lane]


@compiled(error_model="numpy")
def _softplus_rates(
    weight: NDArray[Any],
    lanes: NDArray[Any],
    n_rows: int,
    bias: NDArray[Any],
    library: NDArray[Any],
    rates: NDArray[Any],
) -> None:
    _product(weight, lanes, n_rows, rates)
    _softplus(rates, whole_vectors(n_rows), bias, library)


@compiled(error_model="numpy")
def _softmax_rates(
    weight: NDArray[Any],
    lanes: NDArray[Any],
    n_rows: int,
    bias: NDArray[Any],
    library: NDArray[Any],
    rates: NDArray[Any],
) -> None:
    _product(weight, lanes, n_rows, rates)
    _softmax(rates, whole_vectors(n_rows), bias, library)


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
) -> list[Draws]:
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
    list of Draws
        One a block of rows, for `join_rows`. Row i depends on (h[i], library[i], row_bias[1][i],
        seed, keys[i], samples[i]) and the weights alone: neither the other rows nor the number of
        threads change it.

    Raises
    ------
    ConfigError
        If shapes, keys, samples, seed or `generative` do not fit.
    CountsError
        As in `nb_sample.draw_counts`.
    """
    h, weight = with_row_bias(h, weight, row_bias)
    if h.ndim != 2 or weight.shape != (len(bias), h.shape[1]) or px_r.shape != bias.shape:
        raise ConfigError(
            f"h has shape {tuple(h.shape)}, weight {tuple(weight.shape)}, px_r {tuple(px_r.shape)}",
            "pass h[n_rows, n_hidden], weight[n_genes, n_hidden] and px_r[n_genes]",
        )
    streams = check_streams(len(h), seed, keys, samples)
    tables = gene_tables(px_r.detach().double().cpu().numpy(), generative)
    to_rates = _softmax_rates if tables.softmax else _softplus_rates
    inputs = tuple(_on_cpu(tensor) for tensor in (h, weight, bias, library.reshape(-1)))
    # A softmax needs all genes before the first rate is known.
    tile_genes = len(bias) if tables.softmax else TILE_GENES
    return draw_blocks(partial(_Decoder, inputs, to_rates), tables, streams, tile_genes)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


class _Decoder:
    """Makes the rates of a block of rows."""

    def __init__(
        self, inputs: tuple[Tensor, ...], to_rates: Callable[..., None], rows: slice
    ) -> None:
        h, weight, bias, library = inputs
        # With numpy: threads that call torch for such small things wait for each other's GIL.
        self.weight, self.bias, self.to_rates = weight.numpy(), bias.numpy(), to_rates
        lanes, self.library = np.zeros((h.shape[1], LANES), _F), np.zeros(LANES, _F)
        n_rows = rows.stop - rows.start
        lanes[:, :n_rows], self.library[:n_rows] = h.numpy()[rows].T, library.numpy()[rows]
        self.lanes, self.n_rows = lanes, n_rows

    def __call__(self, genes: slice) -> NDArray[np.float32]:
        """Return the rates of a tile of genes, a row a lane."""
        rates = lane_buffer(genes.stop - genes.start)
        of_genes = self.weight[genes], self.lanes, self.n_rows, self.bias[genes]
        self.to_rates(*of_genes, self.library, rates)
        return rates
