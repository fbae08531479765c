"""Fully connected layers with covariates, under scvi-tools' parameter names.

Follows `scvi.nn.FCLayers` and `scvi.nn.Encoder` as VAEC uses them: per layer Linear, LayerNorm
without affine parameters, ReLU and Dropout, with one-hot covariates joined to every layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from rayvaec.kernels.counts import CsrCounts
from rayvaec.kernels.cpu.hidden_layers import Layer, hidden_layers
from rayvaec.kernels.cpu.latent import Heads, draw_latent
from rayvaec.kernels.cpu.sparse_linear import sparse_linear

VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance, as in scvi-tools' ``Encoder(var_eps=1e-4)``."""


class FCLayers(nn.Module):
    """A stack of Linear, LayerNorm, ReLU and Dropout.

    Parameters
    ----------
    n_in, n_out : int
        Widths of input and output.
    n_cat_list : Sequence[int]
        Number of categories of each covariate; one of size 0 or 1 adds nothing.
    n_layers, n_hidden : int
        Number of layers, and the width between them.
    dropout_rate : float
        Share of outputs set to zero while training.
    batch_norm : bool
        Whether outputs are normalised over the minibatch before the LayerNorm.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_cat_list: Sequence[int],
        n_layers: int,
        n_hidden: int,
        dropout_rate: float,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        self.n_cat_list = [n_cat if n_cat > 1 else 0 for n_cat in n_cat_list]
        widths = [n_in, *[n_hidden] * (n_layers - 1), n_out]
        self.fc_layers = nn.Sequential()
        for i in range(n_layers):
            n_out = widths[i + 1]
            steps = [
                nn.Linear(widths[i] + sum(self.n_cat_list), n_out),
                # scvi-tools' own constants, from its first implementation in TensorFlow.
                *([nn.BatchNorm1d(n_out, momentum=0.01, eps=0.001)] if batch_norm else []),
                nn.LayerNorm(n_out, elementwise_affine=False),
                nn.ReLU(),
                nn.Dropout(dropout_rate),
            ]
            self.fc_layers.add_module(f"Layer {i}", nn.Sequential(*steps))

    @property
    def _first(self) -> nn.Linear:
        return cast(nn.Linear, cast(nn.Sequential, self.fc_layers[0])[0])

    def covariates(self, *categories: Tensor | None) -> Tensor | None:
        """Join the one-hot codes of all covariates.

        Parameters
        ----------
        *categories : Tensor[n_cells, 1] or None
            Codes of each covariate of `n_cat_list`; None where it has no categories.

        Returns
        -------
        Tensor[n_cells, n_categories] or None
            None where no covariate has more than one category.
        """
        codes = [
            functional.one_hot(category.reshape(-1).long(), n_cat).to(self._first.weight.dtype)
            for n_cat, category in zip(self.n_cat_list, categories, strict=True)
            if n_cat and category is not None
        ]
        return torch.cat(codes, dim=1) if codes else None

    def forward(
        self, x: Tensor, *categories: Tensor | None, rows_per_product: int | None = None
    ) -> Tensor:
        """Run the stack.

        Parameters
        ----------
        x : Tensor[..., n_cells, n_in]
            Input; leading dimensions (posterior draws) share the covariates.
        *categories : Tensor[n_cells, 1] or None
            Codes of each covariate.
        rows_per_product : int, optional
            Cut products into as many rows each. The rounding of a product may depend on how many
            rows it has: with this, a cell's output does not depend on those beside it.

        Returns
        -------
        Tensor[..., n_cells, n_out]
        """
        if rows_per_product is None and x.ndim == 2 and self._is_fused(x):
            return hidden_layers(x, self._codes(*categories), self._layers(x), eps=self._eps)
        covariates = self.covariates(*categories)
        product = partial(_product, rows_per_product)
        a = product(self._first, _joined(x, covariates))
        return self._after_first_linear(a, covariates, product)

    def forward_csr(
        self,
        x: CsrCounts,
        *categories: Tensor | None,
        log1p: bool,
        beside: Tensor | None = None,
        rows_per_product: int | None = None,
    ) -> Tensor:
        """Run the stack on sparse counts, without making them dense.

        Parameters
        ----------
        x : CsrCounts
            Raw counts of n_cells x n_genes.
        *categories : Tensor[n_cells, 1] or None
            Codes of each covariate.
        log1p : bool
            Whether the stack reads log(1 + x).
        beside : Tensor[n_cells, n_in - n_genes], optional
            Further input, joined to the genes.
        rows_per_product : int, optional
            As in `forward`.

        Returns
        -------
        Tensor[n_cells, n_out]
        """
        first = self._first
        if beside is None and self._is_fused(first.weight):
            layers = self._layers(first.weight.new_empty(x.n_cells, 0))
            return hidden_layers(x, self._codes(*categories), layers, log1p=log1p, eps=self._eps)
        covariates = self.covariates(*categories)
        dense_inputs = [part for part in (beside, covariates) if part is not None]
        joined = torch.cat(dense_inputs, dim=1) if dense_inputs else None
        if rows_per_product is None or joined is None:
            a = sparse_linear(x, first.weight, first.bias, log1p=log1p, beside=joined)
        else:
            columns = first.weight[:, x.n_genes : x.n_genes + joined.shape[1]]
            a = sparse_linear(x, first.weight, None, log1p=log1p)
            a += _cut_product(rows_per_product, columns, first.bias, joined)
        return self._after_first_linear(a, covariates, partial(_product, rows_per_product))

    def _after_first_linear(
        self, a: Tensor, covariates: Tensor | None, product: Callable[[nn.Linear, Tensor], Tensor]
    ) -> Tensor:
        for i, layer in enumerate(self.fc_layers):
            linear, *rest = cast(nn.Sequential, layer)
            if i:
                a = product(cast(nn.Linear, linear), _joined(a, covariates))
            *batch_norm, norm, _, dropout = rest
            for step in batch_norm:
                a = step(a)
            a = functional.relu(norm(a))
            mask = dropout_mask(dropout, a)
            a = a if mask is None else a * mask
        return a

    def _is_fused(self, x: Tensor) -> bool:
        """Whether gradients are wanted where `hidden_layers` computes them."""
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        return on_cpu and torch.is_grad_enabled() and not self.batch_norm

    @property
    def _eps(self) -> float:
        return cast(nn.LayerNorm, cast(nn.Sequential, self.fc_layers[0])[1]).eps

    def _codes(self, *categories: Tensor | None) -> list[Tensor]:
        """Return which one-hot column each covariate picks, counted over all covariates."""
        codes, first = [], 0
        for n_cat, category in zip(self.n_cat_list, categories, strict=True):
            if n_cat and category is not None:
                codes.append(category.reshape(-1).long() + first)
            first += n_cat
        return codes

    def _layers(self, x: Tensor) -> list[Layer]:
        """Return the layers, with dropout drawn for the rows of `x`."""
        layers = []
        for layer in self.fc_layers:
            linear, *_, dropout = cast(nn.Sequential, layer)
            weight, bias = cast(nn.Linear, linear).weight, cast(nn.Linear, linear).bias
            mask = dropout_mask(dropout, x.new_empty(1).expand(len(x), len(bias)))
            layers.append(Layer(weight, bias, mask))
        return layers


def dropout_mask(dropout: nn.Module, x: Tensor) -> Tensor | None:
    """Return what a dropout layer multiplies its input by, Tensor like `x`, or None for nothing.

    Parameters
    ----------
    dropout : nn.Module
        nn.Dropout, or a layer with its own method ``mask``.
    x : Tensor[..., n]
        Its input.

    Returns
    -------
    Tensor like `x`, or None
    """
    if not dropout.training:
        return None
    if isinstance(dropout, nn.Dropout):
        if not dropout.p:
            return None
        kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - dropout.p)
        return kept.div_(1 - dropout.p)
    return cast(Tensor, cast(Any, dropout).mask(x))


def _product(rows_per_product: int | None, linear: nn.Linear, x: Tensor) -> Tensor:
    """Run a linear layer, in products of a given number of rows where one is given."""
    if rows_per_product is None:
        return linear(x)
    return _cut_product(rows_per_product, linear.weight, linear.bias, x)


def _cut_product(rows_per_product: int, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    missing = -len(x) % rows_per_product
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
    out = padded.new_empty(len(padded), len(weight))
    for part, into in zip(padded.split(rows_per_product), out.split(rows_per_product), strict=True):
        torch.addmm(bias, part, weight.t(), out=into)
    return out[: len(x)]


def _joined(x: Tensor, covariates: Tensor | None) -> Tensor:
    if covariates is None:
        return x
    return torch.cat((x, covariates.expand(*x.shape[:-1], -1)), dim=-1)


class Encoder(nn.Module):
    """The amortised posterior q(z | x, y): FCLayers with one head for mean and one for variance.

    Parameters
    ----------
    n_input, n_output : int
        Number of genes and of latent dimensions.
    n_cat_list, n_layers, n_hidden, dropout_rate
        As in `FCLayers`.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Sequence[int],
        n_layers: int,
        n_hidden: int,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.encoder = FCLayers(n_input, n_hidden, n_cat_list, n_layers, n_hidden, dropout_rate)
        self.mean_encoder = nn.Linear(n_hidden, n_output)
        self.var_encoder = nn.Linear(n_hidden, n_output)

    def forward(self, x: Tensor, *categories: Tensor | None) -> Normal:
        """Return q(z | x, y) for dense input, Tensor[n_cells, n_input]."""
        return self._heads(self.encoder(x, *categories), None)

    def forward_csr(
        self,
        x: CsrCounts,
        *categories: Tensor | None,
        log1p: bool,
        beside: Tensor | None = None,
        rows_per_product: int | None = None,
    ) -> Normal:
        """Return q(z | x, y) for sparse raw counts; arguments as in `FCLayers.forward_csr`."""
        hidden = self.encoder.forward_csr(
            x, *categories, log1p=log1p, beside=beside, rows_per_product=rows_per_product
        )
        return self._heads(hidden, rows_per_product)

    def draw_csr(
        self,
        x: CsrCounts,
        *categories: Tensor | None,
        noise: Tensor,
        factor: Tensor,
        log1p: bool,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw z of sparse raw counts, and its divergence from N(0, I), on the CPU in float32.

        Parameters
        ----------
        x, *categories, log1p, beside
            As in `FCLayers.forward_csr`.
        noise, factor
            As in `rayvaec.kernels.cpu.latent.draw_latent`.

        Returns
        -------
        tuple of Tensor[n_cells, n_latent], Tensor[] and Tensor[n_cells]
            z, the weighted sum of the divergences, and each cell's without gradient.
        """
        hidden = self.encoder.forward_csr(x, *categories, log1p=log1p, beside=beside)
        mean, variance = self.mean_encoder, self.var_encoder
        heads = Heads(mean.weight, mean.bias, variance.weight, variance.bias)
        return draw_latent(hidden, heads, noise, factor, floor=VARIANCE_FLOOR)

    def _heads(self, hidden: Tensor, rows_per_product: int | None) -> Normal:
        product = partial(_product, rows_per_product)
        variance = torch.exp(product(self.var_encoder, hidden)) + VARIANCE_FLOOR
        # Checking the arguments would cost a pass over them at every step.
        return Normal(product(self.mean_encoder, hidden), variance.sqrt(), validate_args=False)
