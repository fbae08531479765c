"""Exact negative-binomial draws in CSR, one counter-based random stream a row.

Rows go in blocks of a fixed number, each in one thread; `rayvaec.kernels.cpu.nb_sweep` says how a
block is drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayvaec.errors import ConfigError
from rayvaec.kernels.cpu.gene_tables import GeneTables, gene_tables, refusal
from rayvaec.kernels.cpu.nb_sweep import SPAN, Walk, copy_entries, draw_genes, new_walk, start_rows
from rayvaec.kernels.cpu.nb_walk import LANES
from rayvaec.kernels.rng import Streams, check_streams
from rayvaec.kernels.threads import run_all, spans, threads_for

TILE_GENES = 4 * SPAN
"""Genes of a tile: its rates, 1 MiB, stay in the core's own cache until they are drawn from."""

RatesOf = Callable[[slice], NDArray[np.float32]]

_workspace = threading.local()


class Draws(NamedTuple):
    """Drawn counts in compressed sparse rows.

    Parameters
    ----------
    indptr : ndarray[n_rows + 1], int64
        Where each row's entries start and end.
    indices : ndarray[nnz], int32
        Genes, ascending within a row.
    counts : ndarray[nnz], int32
        Counts, all above 0.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    counts: NDArray[np.int32]


def draw_counts(
    rate: ArrayLike,
    px_r: ArrayLike,
    seed: int,
    keys: ArrayLike,
    samples: ArrayLike,
    *,
    generative: str = "softplus",
) -> Draws:
    """Draw counts from negative binomials, exactly, each row from its own random stream.

    Parameters
    ----------
    rate : ndarray[n_rows, n_genes], float32
        Softplus form: total count, library * px_scale. Softmax form: mean mu.
    px_r : ndarray[n_genes], float32
        Softplus form: logits. Softmax form: log theta.
    seed : int
        From 0 to 2**64 - 1.
    keys, samples : ndarray[n_rows], uint64
        Cell key and sample number of every row.
    generative : {"softplus", "softmax"}
        Which form of the model the rates come from.

    Returns
    -------
    Draws
        Row i depends, bit for bit, on (rate[i], px_r, seed, keys[i], samples[i]) alone: neither
        the other rows nor the number of threads change it.

    Raises
    ------
    ConfigError
        If shapes, keys, samples, seed or `generative` do not fit.
    CountsError
        If a rate is negative or not finite, a mean is above `MAX_MEAN`, or log odds (px_r in the
        softplus form) are above `MAX_LOG_ODDS` at a rate above 0.
    """
    rates = np.ascontiguousarray(rate, dtype=np.float32)
    logits = np.asarray(px_r, dtype=np.float64)
    if rates.ndim != 2 or logits.shape != (rates.shape[1],):
        raise ConfigError(
            f"rate has shape {rates.shape} and px_r {logits.shape}",
            "pass rate[n_rows, n_genes] and px_r[n_genes]",
        )
    streams = check_streams(len(rates), seed, keys, samples)
    tables = gene_tables(logits, generative)
    return join_rows(draw_blocks(partial(_transposed, rates), tables, streams, TILE_GENES))


def _transposed(rates: NDArray[np.float32], rows: slice) -> RatesOf:
    """Return what gives some rows' rates with a row a lane."""
    of_rows = rates[rows]

    def of_genes(genes: slice) -> NDArray[np.float32]:
        lanes = lane_buffer(genes.stop - genes.start)
        lanes[:, : len(of_rows)] = of_rows[:, genes].T
        lanes[:, len(of_rows) :] = 0
        return lanes

    return of_genes


def draw_blocks(
    rates_of: Callable[[slice], RatesOf], tables: GeneTables, streams: Streams, tile_genes: int
) -> list[Draws]:
    """Draw rows whose rates are made piece by piece, in the threads that draw them.

    Parameters
    ----------
    rates_of : callable
        From the rows of a block to a function that makes the rates of a tile of genes,
        float32[n_genes, LANES], a row a lane, 0 in the lanes beyond the rows.
    tables : GeneTables
        The genes.
    streams : Streams
        Of the rows.
    tile_genes : int
        Genes whose rates are made at once, a multiple of `SPAN` or all of them. They are drawn from
        while they are in the core's own cache.

    Returns
    -------
    list of Draws
        One a block, for `join_rows`.

    Raises
    ------
    CountsError
        If a rate is out of bounds.
    """
    n_rows, n_genes = len(streams.keys), len(tables.limit)
    tiles = [slice(a, min(a + tile_genes, n_genes)) for a in range(0, n_genes, tile_genes)]

    def block(start: int) -> Draws:
        rows = slice(start, min(start + LANES, n_rows))
        walk, make_rates = _own_walk(n_genes), rates_of(rows)
        start_rows(walk, *streams.of(rows))
        for genes in tiles:
            rate = make_rates(genes)
            of_genes = tables.of(genes)
            if not draw_genes(
                walk,
                rows.stop - start,
                rate,
                genes.start,
                of_genes.odds_or_size,
                of_genes.limit,
                of_genes.cluster,
                of_genes.softmax,
            ):
                raise refusal(rate[:, : rows.stop - start].T, of_genes, start, genes.start)
        indptr = np.zeros(rows.stop - start + 1, np.int64)
        np.cumsum(walk.ends[: rows.stop - start], out=indptr[1:])
        draws = Draws(indptr, np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.int32))
        copy_entries(walk, *draws)
        return draws

    return run_all([partial(block, start) for start in range(0, n_rows, LANES)])


def lane_buffer(n_genes: int) -> NDArray[np.float32]:
    """Return memory for a tile's rates that this thread keeps, float32[n_genes, LANES]."""
    kept = getattr(_workspace, "rates", None)
    if kept is None or len(kept) < n_genes:
        kept = _workspace.rates = np.empty((n_genes, LANES), np.float32)
    return kept[:n_genes]


def _own_walk(n_genes: int) -> Walk:
    """Return this thread's walk."""
    kept = getattr(_workspace, "walk", None)
    if kept is None or kept.indices.shape[1] != n_genes:
        kept = _workspace.walk = new_walk(n_genes)
    return kept


def join_rows(pieces: list[Draws]) -> Draws:
    """Put the rows of several draws, one after another, into one.

    Parameters
    ----------
    pieces : list of Draws
        Of the same genes; may be empty.

    Returns
    -------
    Draws
    """
    if not pieces:
        return Draws(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    if len(pieces) == 1:
        return pieces[0]
    lengths = np.concatenate([np.diff(piece.indptr) for piece in pieces])
    indptr = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=indptr[1:])
    draws = Draws(indptr, np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.int32))
    edges = np.cumsum([0, *(len(piece.indices) for piece in pieces)])

    def copy(first: int, stop: int) -> None:
        for number in range(first, stop):
            into = slice(edges[number], edges[number + 1])
            draws.indices[into] = pieces[number].indices
            draws.counts[into] = pieces[number].counts

    run_all([partial(copy, *span) for span in spans(len(pieces), threads_for(int(indptr[-1])))])
    return draws
