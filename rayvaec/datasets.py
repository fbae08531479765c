"""Synthetic atlases: counts drawn from a random decoder of VAEC's own form.

A cell has a label y, a latent position z ~ N(0, I), a library size and a batch. A random hidden
layer h = relu(z A + B[y]) feeds every gene through a few of its units, so that labels differ
clearly and cells vary within a label. Counts are NB(total_count = library * px_scale,
logits = px_r) with px_scale = softplus(h W + b), as in VAEC's softplus form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayvaec.errors import ConfigError
from rayvaec.util.atomic import check_suffix, whole_output
from rayvaec.util.lock import WriteLock

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK_ELEMENTS = 2**22  # part of the result: every block of cells has a random stream of its own
N_LATENT = 5
N_HIDDEN = 48


@dataclass(frozen=True)
class Decoder:
    """The random decoder that all cells of an atlas are drawn from.

    Parameters
    ----------
    latent_weight : array[N_LATENT, N_HIDDEN]
        From z to the hidden layer.
    label_bias : array[n_labels, N_HIDDEN]
        What each label adds to the hidden layer.
    weight : array[N_HIDDEN, n_genes]
        From the hidden layer to the genes; most entries are zero.
    bias : array[n_batches, n_genes]
        Each gene's level, on softplus' scale, in each batch.
    px_r : array[n_genes]
        Logits of the negative binomial.
    """

    latent_weight: NDArray[np.float32]
    label_bias: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    px_r: NDArray[np.float32]

    @classmethod
    def random(
        cls, rng: np.random.Generator, n_genes: int, n_labels: int, n_batches: int
    ) -> Decoder:
        """Draw a decoder for so many genes, labels and batches."""
        level = rng.normal(-7.5, 2.6, n_genes)  # proportions span five orders of magnitude
        weight = rng.normal(0, 0.75, (N_HIDDEN, n_genes))
        weight *= rng.random((N_HIDDEN, n_genes)) < 0.12
        # Dispersion grows with expression: var = mean * (1 + exp(px_r)).
        px_r = -0.5 + 0.35 * (level - level.mean()) + rng.normal(0, 0.3, n_genes)
        return cls(
            latent_weight=rng.normal(0, 0.35, (N_LATENT, N_HIDDEN)).astype(np.float32),
            label_bias=rng.normal(0, 1.0, (n_labels, N_HIDDEN)).astype(np.float32),
            weight=weight.astype(np.float32),
            bias=(level + rng.normal(0, 0.15, (n_batches, n_genes))).astype(np.float32),
            px_r=px_r.astype(np.float32),
        )

    def px_scale(
        self, z: NDArray[np.float32], labels: NDArray[np.int64], batches: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Decode cells: array[n_cells, N_LATENT] and their codes to array[n_cells, n_genes]."""
        h = np.maximum(z @ self.latent_weight + self.label_bias[labels], 0)
        px_scale: NDArray[np.float32] = np.logaddexp(0, h @ self.weight + self.bias[batches])
        return px_scale


def simulate(
    n_cells: int = 20_000,
    n_genes: int = 2_000,
    n_labels: int = 8,
    n_batches: int = 2,
    seed: int = 0,
    mean_library: float = 2_500.0,
) -> AnnData:
    """Draw a synthetic atlas.

    Parameters
    ----------
    n_cells, n_genes : int
        Shape of the counts.
    n_labels : int
        Number of cell types, of unequal size; each has a cell at least.
    n_batches : int
        Number of experimental batches; their effect is mild.
    seed : int
        Seed of everything random.
    mean_library : float
        Mean count per cell.

    Returns
    -------
    AnnData, [n_cells, n_genes]
        Raw counts as int32 CSR, ``obs["cell_type"]`` and ``obs["batch"]``, categorical.

    Raises
    ------
    ConfigError
        If a number is not positive, the seed is negative, or there are fewer cells than labels.
    """
    import anndata
    import pandas as pd

    _check(n_cells, n_genes, n_labels, n_batches, seed, mean_library)
    rng = np.random.default_rng(seed)
    decoder = Decoder.random(rng, n_genes, n_labels, n_batches)
    labels = _draw_labels(rng, n_cells, n_labels)
    batches = rng.integers(n_batches, size=n_cells)
    blocks = list(_blocks(decoder, labels, batches, seed, mean_library))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(labels, names("type", n_labels)),
            "batch": pd.Categorical.from_codes(batches, names("batch", n_batches)),
        },
        index=pd.Index(names("cell", n_cells, width=6)),
    )
    obs["batch"] = obs["batch"].cat.remove_unused_categories()
    var = pd.DataFrame(index=pd.Index(names("gene", n_genes, width=4)))
    return anndata.AnnData(sparse.csr_matrix(sparse.vstack(blocks, format="csr")), obs, var)


def write_atlas(
    out: Path,
    *,
    n_cells: int = 20_000,
    n_genes: int = 2_000,
    n_labels: int = 8,
    n_batches: int = 2,
    seed: int = 0,
    mean_library: float = 2_500.0,
    overwrite: bool = False,
) -> None:
    """Draw a synthetic atlas and write it, whole or not at all.

    Parameters
    ----------
    out : Path
        File to write: AnnData-Zarr where the name ends in ``.zarr``, h5ad otherwise.
    n_cells, n_genes, n_labels, n_batches, seed, mean_library
        As in `simulate`.
    overwrite : bool
        Whether an existing output may be replaced.

    Raises
    ------
    ConfigError
        As in `simulate`, or if the name ends in neither ``.h5ad`` nor ``.zarr``.
    StoreError
        If `out` exists and `overwrite` is false.
    """
    import anndata
    import zarr
    from anndata.io import write_elem

    check_suffix(out, (".h5ad", ".zarr"))
    with WriteLock(out), whole_output(out, overwrite) as partial:
        adata = simulate(n_cells, n_genes, n_labels, n_batches, seed, mean_library)
        if out.suffix.lower() == ".zarr":
            with anndata.settings.override(auto_shard_zarr_v3=True):
                write_elem(zarr.open_group(partial, mode="w", zarr_format=3), "/", adata)
        else:
            adata.write_h5ad(partial)


def names(prefix: str, n: int, width: int = 0) -> list[str]:
    """Return ``prefix_0`` and so on, padded so that their order as text is their order."""
    width = max(width, len(str(n - 1)))
    return [f"{prefix}_{i:0{width}}" for i in range(n)]


def _check(
    n_cells: int, n_genes: int, n_labels: int, n_batches: int, seed: int, mean_library: float
) -> None:
    numbers = {"cells": n_cells, "genes": n_genes, "labels": n_labels, "batches": n_batches}
    for what, n in numbers.items():
        if n < 1:
            raise ConfigError(f"--n-{what} is {n}", "use 1 or more")
    if n_cells < n_labels:
        raise ConfigError(
            f"--n-cells is {n_cells} and --n-labels is {n_labels}", "use a cell per label at least"
        )
    if seed < 0:
        raise ConfigError(f"--seed is {seed}", "use 0 or more")
    if not 0 < mean_library < 1e7:
        raise ConfigError(f"the mean library is {mean_library}", "use a number from 1 to 1e7")


def _draw_labels(rng: np.random.Generator, n_cells: int, n_labels: int) -> NDArray[np.int64]:
    """Give every label one cell, and the others by proportions that differ by up to five times."""
    share = rng.uniform(0.2, 1.0, n_labels)
    others = rng.choice(n_labels, n_cells - n_labels, p=share / share.sum())
    return rng.permutation(np.concatenate([np.arange(n_labels), others]))


def _blocks(
    decoder: Decoder,
    labels: NDArray[np.int64],
    batches: NDArray[np.int64],
    seed: int,
    mean_library: float,
) -> Iterator[sparse.csr_array]:
    """Draw the counts, a block of cells at a time."""
    block_rows = max(BLOCK_ELEMENTS // decoder.weight.shape[1], 1)
    spread = 0.4  # of the log of the library
    for block, start in enumerate(range(0, len(labels), block_rows)):
        rng = np.random.default_rng([seed, 1, block])
        rows = slice(start, start + block_rows)
        n = len(labels[rows])
        z = rng.standard_normal((n, N_LATENT), dtype=np.float32)
        px_scale = decoder.px_scale(z, labels[rows], batches[rows])
        depth = mean_library * rng.lognormal(-(spread**2) / 2, spread, (n, 1))
        # The mean of a gene is library * px_scale * exp(px_r): choose library to meet the depth.
        library = depth / (px_scale @ np.exp(decoder.px_r))[:, None]
        counts = _negative_binomial(rng, library * px_scale, decoder.px_r)
        counts[counts.sum(1) == 0, 0] = 1  # a cell without counts is not a cell
        yield sparse.csr_array(counts)


def _negative_binomial(
    rng: np.random.Generator, total_count: NDArray[np.float64], logits: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Draw array[n_cells, n_genes] of counts, as Poisson numbers of logarithmic clusters.

    Quenouille (1949): NB(r, p) is the sum of M ~ Poisson(-r log(1 - p)) Logarithmic(p) draws.
    Most M are 0 here, which is much faster than a gamma and a Poisson draw for every entry.
    """
    clusters = rng.poisson(total_count * np.logaddexp(0, logits))
    cells, genes = np.nonzero(clusters)
    sizes = clusters[cells, genes]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    draws = rng.logseries(np.repeat(p[genes], sizes))
    counts = np.zeros(clusters.shape, np.int32)
    starts = np.cumsum(sizes) - sizes
    counts[cells, genes] = np.add.reduceat(draws, starts) if len(starts) else 0
    return counts
