"""The fused loss on the CPU: torch's products, numba for everything between them.

Per chunk of cells: one product into a buffer that is kept between calls, a sweep over each row that
turns it in place into its gradient (nb_loss_rows), and two products back.

Rows are divided among a fixed number of accumulators, so that the sums over cells do not depend on
the number of threads; those in torch's own products may.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rayvaec.errors import ConfigError
from rayvaec.kernels.csr import checked_arrays
from rayvaec.kernels.nb_loss_rows import softmax_rows, softplus_rows
from rayvaec.kernels.nb_loss_terms import Gradients, Inputs, chunk_rows
from rayvaec.kernels.threads import run_all, spans

_PIECES = 8
_KERNELS: dict[str, Callable[..., None]] = {"softplus": softplus_rows, "softmax": softmax_rows}

_workspace = threading.local()


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
        Equal, bit for bit, in every call with the same inputs and number of threads.

    Raises
    ------
    ConfigError
        If the inputs are on another device or of another dtype.
    CountsError
        If a count is negative or a gene beyond n_genes.
    """
    for name, tensor in zip(("h", "weight", "bias", "px_r"), inputs[:4], strict=True):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {tensor.dtype} on {tensor.device}",
                "the cpu version takes float32 on the CPU; choose version cuda or reference",
            )
    x, want = inputs.x, want_gradients
    height = chunk_rows(x.n_cells, x.n_genes)
    with torch.no_grad():
        buffer, sums = _buffers(height, x.n_genes)
        sweep = _Sweep(inputs, sums, want)
        grads = Gradients(*(torch.empty_like(leaf) for leaf in inputs[:4]))
        for start in range(0, x.n_cells, height):
            rows = slice(start, min(start + height, x.n_cells))
            a = buffer[: rows.stop - start]
            torch.mm(inputs.h[rows], inputs.weight.t(), out=a)
            sweep.run(a, start)
            if want:
                torch.mm(a, inputs.weight, out=grads.h[rows])
                _accumulate(grads.weight, a.t(), inputs.h[rows], start == 0)
        if not want:
            return sweep.loss, None
        if not x.n_cells:
            grads.weight.zero_()
        _finish(inputs, sums, grads)
        return sweep.loss, grads


class _Sweep:
    """Runs the row kernel over chunks of activations, on several threads."""

    def __init__(self, inputs: Inputs, sums: NDArray[np.float32], want: bool) -> None:
        self.kernel = _KERNELS[inputs.generative]
        self.indptr, self.indices, self.counts = checked_arrays(inputs.x)
        self.per_gene = _per_gene(inputs)
        self.library = inputs.library.to(torch.float32).contiguous().numpy()
        self.factor = inputs.factor.to(torch.float32).contiguous().numpy()
        self.sums, self.want = sums, want
        self.loss = torch.empty(inputs.x.n_cells)

    def run(self, a: Tensor, start: int) -> None:
        """Turn the activations of cells from `start` on into gradients."""
        activations = a.numpy()
        run_all(
            [
                partial(self._piece, activations[first:last], start + first, self.sums[piece])
                for piece, (first, last) in enumerate(spans(len(a), _PIECES))
            ]
        )

    def _piece(self, a: NDArray[np.float32], start: int, sums: NDArray[np.float32]) -> None:
        stop = start + len(a)
        self.kernel(
            a,
            *self.per_gene,
            self.library[start:stop],
            self.factor[start:stop],
            self.indptr[start : stop + 1],
            self.indices,
            self.counts,
            self.want,
            self.loss[start:stop].numpy(),
            sums,
        )


def _per_gene(inputs: Inputs) -> tuple[NDArray[np.float32], ...]:
    """Bias, and the form's terms per gene: in float32 for zeros, in float64 for the rest."""
    logits = inputs.px_r.double()
    if inputs.generative == "softplus":
        zeros, rest = functional.softplus(logits), functional.logsigmoid(logits)
    else:
        zeros = rest = torch.exp(logits)
    return inputs.bias.contiguous().numpy(), zeros.float().numpy(), rest.numpy()


def _buffers(height: int, n_genes: int) -> tuple[Tensor, NDArray[np.float32]]:
    """Return this thread's buffer of activations and its zeroed sums.

    They are kept from call to call: the first touch of fresh memory costs as much as a product.
    """
    kept = getattr(_workspace, "buffers", None)
    if kept is None or kept[0].shape != (height, n_genes):
        kept = torch.empty(height, n_genes), np.empty((_PIECES, 3, n_genes), np.float32)
        _workspace.buffers = kept
    kept[1].fill(0)
    return kept


def _accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _finish(inputs: Inputs, sums: NDArray[np.float32], grads: Gradients) -> None:
    """Turn the sums over cells into the gradients of bias and px_r."""
    bias, zeros, rest = torch.from_numpy(sums).sum(0)
    grads.bias.copy_(bias)
    if inputs.generative == "softplus":
        torch.sub(
            torch.sigmoid(inputs.px_r) * zeros,
            torch.sigmoid(-inputs.px_r) * rest,
            out=grads.px_r,
        )
    else:
        torch.sub(torch.exp(inputs.px_r) * zeros, rest, out=grads.px_r)
