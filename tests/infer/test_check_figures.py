"""A model's own draws come out right; every way of breaking it is seen by the figure it belongs to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rayvaec.infer import posterior
from rayvaec.infer.check.figures import FIGURES, Estimates, coverage
from rayvaec.infer.check.kernels import _interval, _spread
from rayvaec.infer.check.measure import measure
from rayvaec.infer.check.parts import genes_of, labels_of
from rayvaec.infer.check.tally import (
    DRAWN,
    OBSERVED,
    PIT_BINS,
    REPLICATE,
    Panel,
    Tally,
    panel_of,
)
from rayvaec.infer.check.verdict import judge
from rayvaec.infer.posterior import Cells
from rayvaec.kernels.keys import position_keys
from rayvaec.model.vaec import VAEC

N_CELLS, N_GENES, N_LABELS, N_SAMPLES = 2000, 200, 3, 4
GENES = [f"g{i}" for i in range(N_GENES)]
LABELS = ["a", "b", "c"]


@torch.no_grad()
def truth(latent_effect: float = 0.0) -> VAEC:
    """A model whose q(z | x, y) is its prior: the posterior itself where z has no effect."""
    torch.manual_seed(0)
    module = VAEC(
        *(N_GENES, N_LABELS), n_hidden=32, n_latent=2, n_layers=1, generative="softmax", n_batch=1
    ).eval()
    encoder = module.z_encoder
    for head in (encoder.mean_encoder, encoder.var_encoder):
        head.weight.zero_()
        head.bias.zero_()
    encoder.var_encoder.bias.fill_(math.log(1 - 1e-4))
    module.decoder.fc_layers[0][0].weight[:, :2] *= latent_effect
    module.output.weight.mul_(3)
    module.output.bias.copy_(torch.linspace(0, -4, N_GENES))
    module.per_ct_bias.normal_(0, 0.7)
    module.px_r.normal_(1.0, 0.5)
    return module


def drawn_cells(module: VAEC, seed: int = 1) -> Cells:
    """Cells drawn from a model."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(N_LABELS, size=N_CELLS)
    library = rng.lognormal(7.5, 0.3, N_CELLS).astype(np.float32)
    keys = position_keys(0, N_CELLS)
    drawn = posterior.generate(module, labels, library, keys, 1, seed)
    return Cells(drawn.indptr, drawn.indices, drawn.counts, labels, None, keys)


def panel() -> Panel:
    return panel_of(dict.fromkeys(GENES, 1), GENES, N_LABELS, 1800.0)


def checked(module: VAEC, cells: Cells, n_groups: int = 10) -> tuple[Estimates, dict[str, str]]:
    groups = []
    for group in range(n_groups):
        start, stop = (N_CELLS * at // n_groups for at in (group, group + 1))
        tally = Tally.empty(N_GENES, N_LABELS, 2, panel())
        part = cells.part(start, stop)
        measure(module, part, part.labels, panel(), N_SAMPLES, 3, tally)
        groups.append(tally)
    estimates = Estimates(groups)
    shortfalls = zip(estimates.values, *estimates.shortfalls, strict=True)
    return estimates, {
        name: judge(figure, *map(float, row))
        for (name, figure), row in zip(FIGURES.items(), shortfalls, strict=True)
    }
