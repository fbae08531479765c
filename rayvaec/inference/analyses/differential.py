"""Differential expression from posterior draws: modes ``change`` and ``vanilla``.

Lopez et al. 2018 (Nature Methods, "Deep generative modeling...") and Boyeau et al. 2019 (bioRxiv
794289). Of each population the model's normalised expression is drawn, draws are paired, and the
log fold change of the pairs is looked at gene by gene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.inference.analyses.group_stats import Populations
from rayvaec.kernels import transfer
from rayvaec.kernels.rng import normal_noise
from rayvaec.model.draws import BLOCK_ROWS
from rayvaec.model.inputs import code_column
from rayvaec.model.precision import in_working_precision
from rayvaec.model.vaec import VAEC

if TYPE_CHECKING:
    from pandas import DataFrame

MODES = ("change", "vanilla")
REST = "Rest"
"""What scvi-tools calls all cells that are not in group 1."""

UNEXPRESSED = 0.01
"""Mean count below which a gene counts as not expressed where the pseudocount is estimated."""

_GENES = 512
_EPSILON = 1e-8
_LEAST_PSEUDOCOUNT = 1e-10


@dataclass(frozen=True)
class Comparison:
    """How two populations are compared.

    Parameters
    ----------
    mode : {"change", "vanilla"}
        Whether the log fold change exceeds `delta`, or which population expresses a gene more.
    delta : float, optional
        Log2 fold change from which on a gene counts as different; None estimates it from the
        genes' mean log fold changes (three Gaussians, as in scvi-tools).
    fdr : float
        Expected share of false discoveries among the genes called different.
    n_samples : int
        Pairs of draws.
    pseudocounts : float, optional
        Added to both expressions before the logarithm; None estimates it from the genes that are
        not expressed.
    batch_correction : bool
        Whether both draws of a pair are decoded as if from the same batch, in turn from each.
    all_stats : bool
        Whether the statistics of the counts are among the columns.
    seed : int
        Seed of the choice of cells and of z's noise.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    mode: Literal["change", "vanilla"] = "change"
    delta: float | None = 0.25
    fdr: float = 0.05
    n_samples: int = 5000
    pseudocounts: float | None = None
    batch_correction: bool = False
    all_stats: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"there is no mode {self.mode!r}", f"choose from {', '.join(MODES)}")
        for name, value, low, fits in (
            ("delta", self.delta, "a number >= 0", self.delta is None or self.delta >= 0),
            ("fdr", self.fdr, "a number between 0 and 1", 0 < self.fdr < 1),
            ("n_samples", self.n_samples, "a whole number >= 2", self.n_samples >= 2),
            (
                *("pseudocounts", self.pseudocounts, "a number > 0"),
                self.pseudocounts is None or self.pseudocounts > 0,
            ),
            ("seed", self.seed, "a whole number from 0 to 2**63 - 1", 0 <= self.seed < 2**63),
        ):
            if not fits:
                raise ConfigError(f"{name}={value} is out of range", f"give {low}")


class Shares:
    """Normalised expression at given z, gene after gene: never n_rows x n_genes at once.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    z : Tensor[n_rows, n_latent]
    y, batch_index : Tensor[n_rows, 1]
        Label and batch codes.
    """

    @torch.no_grad()
    def __init__(self, module: VAEC, z: Tensor, y: Tensor, batch_index: Tensor | None) -> None:
        module = in_working_precision(module)
        self._module, self._label = module, y.reshape(-1)
        self._hidden = module.decoder_hidden(z, y, batch_index, BLOCK_ROWS)
        parts = [torch.logsumexp(self._log_mass(genes), 1) for genes in gene_blocks(module)]
        self._log_total = torch.logsumexp(torch.stack(parts), 0)[:, None]

    @torch.no_grad()
    def of(self, genes: slice) -> NDArray[np.float64]:
        """Return the shares of some genes, array[n_rows, n_chosen]."""
        return transfer.to_host(torch.exp(self._log_mass(genes) - self._log_total))

    def _log_mass(self, genes: slice) -> Tensor:
        """Return the logarithm of what the shares are proportional to, in float64."""
        output, biases = self._module.output, self._module.row_biases
        a = functional.linear(self._hidden, output.weight[genes], output.bias[genes]).double()
        if not self._module.is_softplus:
            return a if biases is None else a + biases[self._label, genes]
        # log(softplus(a)) is a itself where softplus underflows.
        softplus = functional.softplus(a)
        return torch.where(a < -30, a, softplus.log()) + self._module.px_r[genes]


def gene_blocks(module: VAEC) -> Iterator[slice]:
    """Cut the genes into runs."""
    n_genes = module.config.n_input
    for start in range(0, n_genes, _GENES):
        yield slice(start, min(start + _GENES, n_genes))


def compare(
    module: VAEC, one: Populations, two: Populations, how: Comparison
) -> dict[str, NDArray[Any]]:
    """Compare two populations gene by gene.

    Parameters
    ----------
    module : VAEC
        The model, in evaluation mode.
    one, two : Populations
        A single group each.
    how : Comparison
        Options.

    Returns
    -------
    dict of str to array[n_genes]
        scvi-tools' columns, without the names of the groups.

    Raises
    ------
    ConfigError
        If batches are to be corrected for and the model has none.
    """
    if how.batch_correction and module.config.n_batch < 2:
        raise ConfigError("batch_correction=True and the model has no batches", "leave it out")
    # Populations that share cells must not pair a cell with itself.
    mixed = np.random.default_rng(how.seed).permutation(how.n_samples)
    first = _drawn(module, one, how, np.arange(how.n_samples))
    second = _drawn(module, two, how, mixed)
    statistics = _counts_statistics(one, two) if how.all_stats else {}
    if how.mode == "vanilla":
        found = _by_gene(module, lambda genes: _vanilla(first.of(genes), second.of(genes)))
        return found | statistics
    pseudocounts = how.pseudocounts
    if pseudocounts is None:
        sides = (first, one), (second, two)
        pseudocounts = max(_pseudocounts(module, *side) for side in sides)
    return _changes(module, first, second, pseudocounts, how) | statistics


def _changes(
    module: VAEC, first: Shares, second: Shares, pseudocounts: float, how: Comparison
) -> dict[str, NDArray[Any]]:
    """Return what mode change says of every gene, from paired draws of two populations."""

    def change(genes: slice, offset: float) -> NDArray[np.float64]:
        return np.log2(first.of(genes) + offset) - np.log2(second.of(genes) + offset)

    delta = how.delta
    if delta is None:
        means = [change(genes, pseudocounts).mean(0) for genes in gene_blocks(module)]
        delta = _estimated_delta(np.concatenate(means), how.seed)

    def statistics_of(genes: slice) -> dict[str, NDArray[np.float64]]:
        lfc = change(genes, pseudocounts)
        probability = np.maximum((lfc >= delta).mean(0), (lfc < -delta).mean(0))
        return {
            "proba_de": probability,
            "proba_not_de": 1 - probability,
            "bayes_factor": _log_odds(probability),
            "scale1": first.of(genes).mean(0),
            "scale2": second.of(genes).mean(0),
            "pseudocounts": np.full(lfc.shape[1], pseudocounts),
            "delta": np.full(lfc.shape[1], delta),
            # As scvi-tools: almost without the offset, which would shrink what is described.
            **_described(change(genes, 1e-3 * pseudocounts)),
        }

    return _by_gene(module, statistics_of)


def to_frame(
    table: Mapping[str, NDArray[Any]],
    genes: tuple[str, ...],
    names: tuple[str, str] | None,
    how: Comparison,
) -> DataFrame:
    """Return a comparison as scvi-tools does: best genes first, with the calls and the names.

    Parameters
    ----------
    table : mapping of str to array[n_genes]
        From `compare`.
    genes : tuple of str
        Names of the genes.
    names : (str, str), optional
        Names of the populations; without them, there are no columns for them.
    how : Comparison
        As in `compare`.

    Returns
    -------
    DataFrame
        A row a gene, sorted by ``proba_de`` (``bayes_factor`` in mode vanilla).
    """
    from pandas import DataFrame

    change = how.mode == "change"
    frame = DataFrame(dict(table), index=list(genes))
    frame = frame.sort_values("proba_de" if change else "bayes_factor", ascending=False)
    if change:
        frame[f"is_de_fdr_{how.fdr}"] = discoveries(frame["proba_de"].to_numpy(), how.fdr)
    if names is not None:
        frame["comparison"] = f"{names[0]} vs {names[1]}"
        frame["group1"], frame["group2"] = names
    return frame


def discoveries(probability: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """Call as many genes different as keep the expected share of false calls within `fdr`.

    Parameters
    ----------
    probability : array[n_genes]
        Posterior probability that a gene is different, largest first.
    fdr : float
        Largest expected share of false discoveries.

    Returns
    -------
    array[n_genes] of bool
    """
    expected = np.cumsum(1 - probability) / np.arange(1, len(probability) + 1)
    return np.arange(len(probability)) < (expected <= fdr).sum()


def _drawn(
    module: VAEC, population: Populations, how: Comparison, order: NDArray[np.int64]
) -> Shares:
    """Draw z `n_samples` times, from every chosen cell equally often."""
    n_chosen = len(population.keys)
    cell, sample = order % n_chosen, order // n_chosen
    noise = normal_noise(how.seed, population.keys[cell], sample, module.config.n_latent)
    z = population.loc[cell] + population.scale[cell] * noise
    device = module.px_r.device
    batches = population.batches[cell]
    if how.batch_correction:
        batches = np.arange(how.n_samples) % module.config.n_batch
    batch_index = code_column(batches, device) if module.config.n_batch else None
    y = code_column(population.labels[cell], device)
    return Shares(module, transfer.to_device(z, device), y, batch_index)


def _pseudocounts(module: VAEC, shares: Shares, population: Populations) -> float:
    """Return what shrinks the log fold changes of unexpressed genes, as scvi-tools finds it."""
    absent = population.raw[0] / population.n_cells[0] < UNEXPRESSED
    if not absent.any():
        return _LEAST_PSEUDOCOUNT
    largest = np.concatenate([shares.of(genes).max(0) for genes in gene_blocks(module)])
    return max(float(np.quantile(largest[absent], 0.9)) / len(largest), _LEAST_PSEUDOCOUNT)


def _estimated_delta(means: NDArray[np.float64], seed: int) -> float:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(n_components=3, random_state=seed).fit(means[:, None])
    ends = np.sort(mixture.means_.ravel())[[0, -1]]
    return max(0.1, 0.6 * float(np.abs(ends).mean()))


def _vanilla(one: NDArray[np.float64], two: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    probability = (one > two).mean(0)
    return {
        "proba_m1": probability,
        "proba_m2": 1 - probability,
        "bayes_factor": _log_odds(probability),
        "scale1": one.mean(0),
        "scale2": two.mean(0),
    }


def _log_odds(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(probability + _EPSILON) - np.log(1 - probability + _EPSILON)


def _described(change: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {
        "lfc_mean": change.mean(0),
        "lfc_median": np.median(change, 0),
        "lfc_std": change.std(0),
        "lfc_min": change.min(0),
        "lfc_max": change.max(0),
    }


def _by_gene(
    module: VAEC, compute: Callable[[slice], dict[str, NDArray[np.float64]]]
) -> dict[str, NDArray[Any]]:
    parts = [compute(genes) for genes in gene_blocks(module)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _counts_statistics(one: Populations, two: Populations) -> dict[str, NDArray[np.float64]]:
    return {
        f"{name}{number}": sums[0] / population.n_cells[0]
        for name, field in (
            ("raw_mean", "raw"),
            ("non_zeros_proportion", "nonzero"),
            ("raw_normalized_mean", "normalized"),
        )
        for number, population in ((1, one), (2, two))
        for sums in (getattr(population, field),)
    }
