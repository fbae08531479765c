"""Fused negative-binomial loss in torch operations, for GPUs and other dtypes than float32.

Chunk by chunk: one product, a few elementwise passes, the non-zeros gathered and worked on in
float64 (lgamma(x+r) - lgamma(r) cancels where r is large), and two products back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rayvaec.kernels.nb_loss_types import RATE_FLOOR, Gradients, Inputs, chunk_rows


def evaluate(inputs: Inputs, want_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Compute the loss of every cell and, if wanted, the gradients of the weighted sum.

    Parameters
    ----------
    inputs : Inputs
        On any one device, of any one floating dtype.
    want_gradients : bool
        Whether to compute gradients.

    Returns
    -------
    reconstruction : Tensor[n_cells]
        Negative log-likelihood of each cell.
    gradients : Gradients or None
        Of the same dtype as the inputs.
    """
    with torch.no_grad():
        terms = _softplus_terms if inputs.generative == "softplus" else _softmax_terms
        reconstruction = torch.empty_like(inputs.library, dtype=inputs.h.dtype)
        grads = Gradients(*(torch.zeros_like(leaf) for leaf in inputs[:4]))
        for rows, entries in _chunks(inputs):
            a = torch.addmm(inputs.bias, inputs.h[rows], inputs.weight.t())
            reconstruction[rows], grad_a, grad_px_r = terms(inputs, rows, entries, a)
            if want_gradients:
                torch.mm(grad_a, inputs.weight, out=grads.h[rows])
                grads.weight.addmm_(grad_a.t(), inputs.h[rows])
                grads.bias.add_(grad_a.sum(0))
                grads.px_r.add_(grad_px_r)
        return reconstruction, grads if want_gradients else None


class _Entries(NamedTuple):
    """The stored counts of one chunk, in float64 where they are computed with.

    Stored zeros stay: all that is computed of one is 0, and to leave them out the host would have
    to know how many there are, for which it would wait for the GPU.
    """

    cells: Tensor
    genes: Tensor
    counts: Tensor

    def dense(self, values: Tensor, like: Tensor) -> Tensor:
        """Return a value an entry as a matrix, 0 elsewhere.

        Sums of its rows and columns have the same bits each time. Adding values up where they
        belong would not: on a GPU they arrive in any order.
        """
        matrix = torch.zeros_like(like)
        matrix[self.cells, self.genes] = values.to(like.dtype)
        return matrix


def _chunks(inputs: Inputs) -> Iterator[tuple[slice, _Entries]]:
    """Yield the rows of every chunk and its entries, with cells counted from the first row."""
    x = inputs.x
    cells, genes, counts = x.cells(), x.indices.to(torch.int64), x.counts.double()
    height = chunk_rows(x)
    if height >= x.n_cells:  # nothing to look up on the device, and so no wait for it
        yield slice(0, x.n_cells), _Entries(cells, genes, counts)
        return
    starts = [*range(0, x.n_cells, height), x.n_cells]
    bounds = x.indptr[torch.tensor(starts, device=x.device)].tolist()
    for i, start in enumerate(starts[:-1]):
        part = slice(bounds[i], bounds[i + 1])
        yield (
            slice(start, starts[i + 1]),
            _Entries(cells[part] - start, genes[part], counts[part]),
        )


def _softplus_terms(
    inputs: Inputs, rows: slice, entries: _Entries, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss[n], gradient of the sum with respect to a[n, n_genes] and px_r[n_genes]."""
    library, factor = inputs.library[rows].to(a), inputs.factor[rows]
    logits = inputs.px_r
    scale, slope = functional.softplus(a), torch.sigmoid(a)
    log_q = functional.softplus(logits)  # -log(1-p)
    weighted = factor * library
    grad_a = weighted[:, None] * slope * log_q

    c, g, x = entries
    r = (library[c].double() * scale[c, g].double()).clamp_min(RATE_FLOOR)
    value, ratio = _bracket(r, x)
    value += x * functional.logsigmoid(logits.double())[g]
    grad_a[c, g] -= ((weighted[c] * slope[c, g]).double() * ratio).to(a.dtype)
    loss = library * (scale @ log_q) - entries.dense(value, a).sum(1)
    grad_px_r = torch.sigmoid(logits) * (weighted @ scale)
    grad_px_r -= torch.sigmoid(-logits) * (factor @ entries.dense(x, a))
    return loss, grad_a, grad_px_r


def _softmax_terms(
    inputs: Inputs, rows: slice, entries: _Entries, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss[n], gradient of the sum with respect to a[n, n_genes] and px_r[n_genes]."""
    library, factor = inputs.library[rows].to(a), inputs.factor[rows]
    theta = torch.exp(inputs.px_r)
    share = torch.softmax(a, 1)
    mu = library[:, None] * share
    odds = mu / theta
    log_odds, p = torch.log1p(odds), odds / (1 + odds)
    # With respect to log mu first; softmax's own derivative comes last.
    grad = factor[:, None] * theta * p
    # log1p(t) - t/(1+t) cancels where t is small.
    small = odds * odds * (0.5 - odds * (2 / 3 - 0.75 * odds))
    from_theta = theta * torch.where(odds < 0.01, small, log_odds - p)

    c, g, x = entries
    t, m = theta.double()[g], mu[c, g].double().clamp_min(RATE_FLOOR)
    value, ratio = _bracket(t, x)
    value += x * torch.log(m / (t + m))
    part = t * x / (t + m)
    grad[c, g] -= (factor[c].double() * part).to(a.dtype)
    loss = log_odds @ theta - entries.dense(value, a).sum(1)
    grad_px_r = factor @ (from_theta - entries.dense(t * ratio - part, a))
    return loss, grad - share * grad.sum(1, keepdim=True), grad_px_r


def _bracket(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """lgamma(x+r) - lgamma(r) - lgamma(x+1) and digamma(x+r) - digamma(r), in float64."""
    z = r + x
    big = r.clamp_min(16.0)  # Stirling's series, subtracted term by term, from r = 16 on
    far = big + x
    value = (big - 0.5) * torch.log1p(x / big) + x * (torch.log(far) - 1)
    value += (1 / far - 1 / big) / 12 - (far**-3 - big**-3) / 360 + (far**-5 - big**-5) / 1260
    ratio = torch.log1p(x / big) + _digamma_tail(far) - _digamma_tail(big)
    near = r < 16.0
    value = torch.where(near, torch.lgamma(z) - torch.lgamma(r), value)
    ratio = torch.where(near, torch.digamma(z) - torch.digamma(r), ratio)
    return value - torch.lgamma(x + 1), ratio


def _digamma_tail(z: Tensor) -> Tensor:
    """digamma(z) - log(z) for z >= 16, to 1e-13."""
    w = 1 / (z * z)
    return -0.5 / z - w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w / 240)))
