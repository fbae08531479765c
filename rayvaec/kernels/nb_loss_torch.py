"""The fused loss in plain torch operations, for GPUs and for other dtypes than float32.

Chunk by chunk: one product, a few elementwise passes, the non-zeros gathered and worked on in
float64 (lgamma(x+r) - lgamma(r) cancels where r is large), and two products back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rayvaec.kernels.nb_loss_terms import RATE_FLOOR, Gradients, Inputs, chunk_rows


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


class _Entries:
    """The counts above zero of one chunk, in float64 where they are computed with."""

    def __init__(self, cells: Tensor, genes: Tensor, counts: Tensor) -> None:
        above = counts > 0
        self.cells = cells[above]
        self.genes = genes[above]
        self.counts = counts[above].double()


def _chunks(inputs: Inputs) -> Iterator[tuple[slice, _Entries]]:
    """Yield the rows of every chunk and its non-zeros, with cells counted from the first row."""
    x = inputs.x
    cells, genes, counts = x.cells(), x.indices.to(torch.int64), x.counts.to(torch.int64)
    height = chunk_rows(x)
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
    library, factor, logits = inputs.library[rows], inputs.factor[rows], inputs.px_r
    scale, slope = functional.softplus(a), torch.sigmoid(a)
    log_q = functional.softplus(logits)  # -log(1-p)
    loss = library * (scale @ log_q)
    weighted = (factor * library)[:, None]
    grad_a = weighted * slope * log_q
    grad_px_r = torch.sigmoid(logits) * (weighted * scale).sum(0)

    c, g, x = entries.cells, entries.genes, entries.counts
    r = (library[c].double() * scale[c, g].double()).clamp_min(RATE_FLOOR)
    value, ratio = _bracket(r, x)
    value += x * functional.logsigmoid(logits.double())[g]
    loss = loss.double().index_add_(0, c, -value).to(a.dtype)
    grad_a[c, g] -= ((weighted[c, 0] * slope[c, g]).double() * ratio).to(a.dtype)
    outer = -factor[c].double() * x * torch.sigmoid(-logits.double())[g]
    return loss, grad_a, grad_px_r.double().index_add_(0, g, outer).to(a.dtype)


def _softmax_terms(
    inputs: Inputs, rows: slice, entries: _Entries, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss[n], gradient of the sum with respect to a[n, n_genes] and px_r[n_genes]."""
    library, factor = inputs.library[rows], inputs.factor[rows][:, None]
    theta = torch.exp(inputs.px_r)
    share = torch.softmax(a, 1)
    mu = library[:, None] * share
    odds = mu / theta
    log_odds, p = torch.log1p(odds), odds / (1 + odds)
    loss = log_odds @ theta
    # With respect to log mu first; softmax's own derivative comes last.
    grad = factor * theta * p
    # log1p(t) - t/(1+t) cancels where t is small.
    small = odds * odds * (0.5 - odds * (2 / 3 - 0.75 * odds))
    grad_px_r = theta * (factor * torch.where(odds < 0.01, small, log_odds - p)).sum(0)

    c, g, x = entries.cells, entries.genes, entries.counts
    t, m = theta.double()[g], mu[c, g].double().clamp_min(RATE_FLOOR)
    value, ratio = _bracket(t, x)
    value += x * torch.log(m / (t + m))
    loss = loss.double().index_add_(0, c, -value).to(a.dtype)
    part = t * x / (t + m)
    weight = factor[c, 0].double()
    grad[c, g] -= (weight * part).to(a.dtype)
    outer = -weight * (t * ratio - part)
    grad_px_r = grad_px_r.double().index_add_(0, g, outer).to(a.dtype)
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
