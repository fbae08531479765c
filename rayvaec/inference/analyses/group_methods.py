"""Analyses of groups of cells of CondSCVI as methods of a trained model.

Arguments keep scvi-tools' names and meaning. What scvi-tools draws from its global generator is
keyed here by ``seed`` and the cells' names; ``batch_size`` and ``dataloader`` have no counterpart,
since memory is bounded anyway. Where a method of scvi-tools 1.4.2 fails or means something else,
docs/analyses.md says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayvaec.data.inputs.memory import InMemory, positions
from rayvaec.errors import ConfigError
from rayvaec.inference.analyses import correlation, vamp_prior
from rayvaec.inference.analyses.contrasts import Groups, check_size, compare_all, contrasts
from rayvaec.inference.analyses.differential import Comparison, compare, to_frame
from rayvaec.inference.analyses.group_stats import summarise
from rayvaec.inference.analyses.normalized_expression import Wanted
from rayvaec.inference.cells import Cells
from rayvaec.inference.named_model import NamedModel
from rayvaec.inference.posterior import check_draws
from rayvaec.util.messages import Names

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame


class GroupAnalyses(NamedModel):
    """What is computed of all cells or groups of them, under scvi-tools' names.

    Further arguments as in `rayvaec.inference.analyses.cell_methods.CellAnalyses`.
    """

    def get_vamp_prior(
        self, adata: AnnData, p: int = 10, *, seed: int = 0, **alignment: Any
    ) -> dict[str, NDArray[np.float64]]:
        """Return the empirical prior of every label that DestVI takes.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes; not looked at in a model with a learned mixture prior,
            which is returned instead.
        p : int
            Clusters of each label.
        seed : int
            Seed of k-means' starts.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        dict
            ``mean_vprior``, ``var_vprior`` (array[n_labels, p, n_latent]) and ``weights_vprior``
            (array[n_labels, p]), labels in the registry's order.
        """
        vamp_prior.check_clusters(p, seed)
        if self.module.config.prior == "mog":
            return vamp_prior.learned_prior(self.module)
        points = vamp_prior.gathered(
            [vamp_prior.points_of(self.module, self.cells(adata, **alignment))]
        )
        return vamp_prior.prior_of(points, self.registry.n_labels, p, seed)

    def differential_expression(
        self,
        adata: AnnData,
        groupby: str | None = None,
        group1: Names | None = None,
        group2: str | int | None = None,
        idx1: ArrayLike | None = None,
        idx2: ArrayLike | None = None,
        mode: Literal["change", "vanilla"] = "change",
        delta: float | None = 0.25,
        *,
        all_stats: bool = True,
        batch_correction: bool = False,
        fdr_target: float = 0.05,
        n_samples_overall: int = 5000,
        pseudocounts: float | None = None,
        seed: int = 0,
        **alignment: Any,
    ) -> DataFrame:
        """Compare the genes of groups of cells.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        groupby : str, optional
            Column of obs that holds the groups; the labels by default.
        group1, group2 : str or number, optional
            Groups to compare: each of `group1` (one or several) with `group2` (by default all other
            cells). Numbers are read as their text. By default every group of at least two cells is
            compared, and a warning names the others.
        idx1, idx2 : array-like of bool or int, optional
            Masks or positions of the cells to compare, instead of groups.
        mode, delta, all_stats, batch_correction, pseudocounts, seed
            As in `rayvaec.inference.analyses.differential.Comparison`.
        fdr_target : float
            Expected share of false discoveries among the genes called different.
        n_samples_overall : int
            Pairs of draws.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        DataFrame
            scvi-tools' columns, a row a gene and comparison, the most different genes first.

        Raises
        ------
        ConfigError
            If a group is unknown (valid ones are listed) or an option out of range.
        CountsError
            If there is no such column, or a group that is named has fewer than two cells.
        """
        how = Comparison(
            mode=mode,
            delta=delta,
            fdr=fdr_target,
            n_samples=n_samples_overall,
            pseudocounts=pseudocounts,
            batch_correction=batch_correction,
            all_stats=all_stats,
            seed=seed,
        )
        if idx1 is not None:
            return self._compare_chosen(self.cells(adata, **alignment), idx1, idx2, how)
        key = groupby or alignment.get("labels_key") or self.registry.labels_key
        groups = _groups(
            InMemory(adata, alignment.get("layer"), rows=alignment.get("indices")), key
        )
        wanted = contrasts(groups.key, groups.names, group1, group2)
        cells = self.cells(adata, **alignment)
        populations = summarise(
            self.module, cells, groups.codes, len(groups.names), how.n_samples, seed
        )
        genes, names = self.registry.genes, groups.names
        return compare_all(self.module, genes, populations, names, wanted, how)

    def _compare_chosen(
        self, cells: Cells, idx1: ArrayLike, idx2: ArrayLike | None, how: Comparison
    ) -> DataFrame:
        """Compare the cells of one mask with those of another, or with all others."""
        masks = [_mask(idx1, len(cells), "idx1")]
        masks.append(~masks[0] if idx2 is None else _mask(idx2, len(cells), "idx2"))
        sides = [
            summarise(self.module, cells, mask.astype(np.int64) - 1, 1, how.n_samples, how.seed)
            for mask in masks
        ]
        for name, side in zip(("idx1", "idx2"), sides, strict=True):
            check_size(name, side)
        table = compare(self.module, sides[0], sides[1], how)
        return to_frame(table, self.registry.genes, None, how)

    def get_feature_correlation_matrix(
        self,
        adata: AnnData,
        *,
        n_samples: int = 10,
        rna_size_factor: float = 1000.0,
        transform_batch: Names | None = None,
        correlation_type: Literal["spearman", "pearson"] = "spearman",
        seed: int = 0,
        **alignment: Any,
    ) -> DataFrame:
        """Return the correlations of genes over denoised draws of the cells.

        Parameters
        ----------
        adata : AnnData
            Raw counts of cells x genes.
        n_samples : int
            Draws a cell.
        rna_size_factor : float
            Expected total of a draw: the smaller, the more dispersion there is.
        transform_batch : str, number or sequence of them, optional
            Batch to decode every cell as if from; the mean of the matrices of several. Numbers are
            read as their text.
        correlation_type : {"spearman", "pearson"}
            Of ranks, for which all draws are held in memory (4 bytes a value), or of values.
        seed : int
            Seed of the draws.
        **alignment
            As in `TrainedModel.cells`.

        Returns
        -------
        DataFrame[n_genes, n_genes]

        Raises
        ------
        ConfigError
            If a batch is unknown (valid ones are listed) or an option out of range.
        """
        check_draws(n_samples, seed)
        kinds = {"spearman": correlation.spearman, "pearson": correlation.pearson}
        if correlation_type not in kinds:
            raise ConfigError(
                f"there is no correlation_type {correlation_type!r}",
                f"choose from {', '.join(kinds)}",
            )
        if not rna_size_factor > 0:
            raise ConfigError(f"rna_size_factor={rna_size_factor}", "give a number > 0")
        cells = self.cells(adata, **alignment)
        matrices = []
        for code in self.batch_codes(transform_batch):
            wanted = Wanted(n_samples, seed, rna_size_factor, (code,), average=False)
            draws = correlation.denoised_draws(self.module, cells, wanted)
            matrices.append(kinds[correlation_type](draws))
        from pandas import DataFrame

        genes = list(self.registry.genes)
        return DataFrame(np.mean(matrices, axis=0), index=genes, columns=genes)


def _groups(source: InMemory, key: str) -> Groups:
    """Return the groups that an obs column makes; cells without a value are in none."""
    values = source.column(key)
    names = sorted({value for value in values if value is not None})
    code: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return Groups(key, names, np.array([code.get(value, -1) for value in values], np.int64))


def _mask(which: ArrayLike, n_cells: int, name: str) -> NDArray[np.bool_]:
    """Return a mask, or the mask of positions."""
    mask = np.zeros(n_cells, bool)
    mask[positions(which, n_cells, name)] = True
    return mask
