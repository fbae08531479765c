"""A model's own draws come out right; every way of breaking it is seen by its own figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rayvaec.errors import ConfigError
from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.inference.ppc.accumulator import (
    COUNT,
    DRAWN,
    NONZERO,
    OBSERVED,
    PIT_BINS,
    REPLICATE,
    SQUARE,
    Panel,
    Tally,
    panel_of,
)
from rayvaec.inference.ppc.config import CheckConfig, parse_thresholds
from rayvaec.inference.ppc.interpretation import judge, summarise
from rayvaec.inference.ppc.kernels import _interval, _spread
from rayvaec.inference.ppc.measure import measure
from rayvaec.inference.ppc.metrics import (
    EXPRESSED,
    FIGURES,
    INTERVALS,
    Estimates,
    Figure,
    agreement,
    coverage,
    jackknife_error,
)
from rayvaec.inference.ppc.report.sections import genes_of, labels_of
from rayvaec.kernels.rng import position_keys
from rayvaec.model.vaec import VAEC

N_CELLS, N_GENES, N_LABELS, N_SAMPLES, N_GROUPS = 2000, 200, 3, 4, 10
GENES = [f"g{i}" for i in range(N_GENES)]
LABELS = ["a", "b", "c"]
CALIBRATION = {f"calibration_{100 * interval:g}" for interval in INTERVALS}
BOUND = {"elbo", "reconstruction"}


@torch.no_grad()
def truth(latent_effect: float = 0.0, **options: object) -> VAEC:
    """A model whose q(z | x, y) is its prior: the posterior itself where z has no effect."""
    torch.manual_seed(0)
    module = VAEC(
        n_input=N_GENES,
        n_labels=N_LABELS,
        **{
            "n_hidden": 32,
            "n_latent": 2,
            "n_layers": 1,
            "n_batch": 1,
            "generative": "softmax",
            **options,
        },
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


def measured(module: VAEC, cells: Cells) -> Tally:
    tally = Tally.empty(N_GENES, N_LABELS, 2, panel())
    measure(module, cells, cells.labels, panel(), N_SAMPLES, 3, tally)
    return tally


def estimated(module: VAEC, cells: Cells) -> Estimates:
    edges = [N_CELLS * at // N_GROUPS for at in range(N_GROUPS + 1)]
    return Estimates([measured(module, cells.part(*part)) for part in pairwise(edges)])


def judged(estimates: Estimates) -> dict[str, str]:
    rows = zip(estimates.values, *estimates.shortfalls, strict=True)
    return {
        name: judge(figure, *map(float, row))
        for (name, figure), row in zip(FIGURES.items(), rows, strict=True)
    }


@pytest.fixture(scope="module")
def right() -> Estimates:
    """Of a model and cells that were drawn from it."""
    return estimated(truth(), drawn_cells(truth()))


def test_a_right_model_is_good_in_everything(right: Estimates) -> None:
    assert judged(right) == {name: "shown" if name in BOUND else "good" for name in FIGURES}


def test_a_right_model_is_calibrated_at_every_level_and_label(right: Estimates) -> None:
    without = [right.total - group for group in right.groups]
    for axes in ((0, 1), 0, 1):  # all together, by level, by label
        found = coverage(right.total.pit[OBSERVED].sum(axes))
        error = jackknife_error(np.array([coverage(t.pit[OBSERVED].sum(axes)) for t in without]))
        assert (np.abs(found - INTERVALS) < 4.5 * error).all()
        assert (error < 0.02).all()


def test_of_a_right_model_deviations_are_standard_normal(right: Estimates) -> None:
    found = genes_of(right.total, GENES)
    for name in ("z_mean", "z_noise", "z_zero_fraction"):
        assert abs(np.mean(found[name])) < 0.3
        assert 0.8 < np.std(found[name]) < 1.2
    assert max(len(genes) for genes in found["worst"].values()) <= 3
    labels = labels_of(right, LABELS, GENES, panel())
    assert sum(len(label["worst_genes"]) for label in labels) <= 3
    assert sum(label["n_cells"] for label in labels) == N_CELLS


def _library(module: VAEC) -> None:
    module.library_of = lambda total: 1.3 * total  # type: ignore[method-assign]


@torch.no_grad()
def _noisier(module: VAEC) -> None:
    module.px_r -= math.log(4)


@torch.no_grad()
def _surer(module: VAEC) -> None:
    module.px_r += math.log(4)


@torch.no_grad()
def _labels(module: VAEC) -> None:
    module.per_ct_bias.copy_(module.per_ct_bias.roll(1, 1))


@torch.no_grad()
def _encoder(module: VAEC) -> None:
    module.z_encoder.mean_encoder.bias += 1


@pytest.mark.parametrize(
    ("spoil", "poor", "good"),
    [
        (_library, {"library", "gene_mean", "label_means"}, {"correlation", "prior_fit"}),
        (_noisier, {"dispersion", "gene_variance", "calibration_50"}, {"gene_mean", "label_means"}),
        (_surer, {"dispersion", "gene_variance", *CALIBRATION}, {"gene_mean", "library"}),
        (_labels, {"label_means", "dispersion", *CALIBRATION}, {"library", "prior_fit"}),
        (_encoder, {"prior_fit"}, set(FIGURES) - BOUND - {"prior_fit"}),
    ],
)
def test_a_wrong_model_is_poor_in_what_is_wrong(
    spoil: Callable[[VAEC], None], poor: set[str], good: set[str]
) -> None:
    wrong = truth()
    spoil(wrong)
    found = judged(estimated(wrong, drawn_cells(truth())))
    assert {name for name in poor | good if found[name] == "poor"} == poor
    assert {name for name in poor | good if found[name] == "good"} == good


def test_a_model_that_has_not_learned_what_varies_within_labels_is_poor() -> None:
    found = judged(estimated(truth(), drawn_cells(truth(latent_effect=1.0))))
    assert {found[name] for name in ("correlation", "dispersion", *CALIBRATION)} == {"poor"}
    assert found["prior_fit"] == "good"


def test_a_replicate_is_held_against_the_z_that_it_was_drawn_at() -> None:
    module = truth(latent_effect=1.0)
    tally = measured(module, drawn_cells(module).part(0, 600))
    found = coverage(tally.pit[REPLICATE].sum((0, 1)))
    np.testing.assert_allclose(found, INTERVALS, atol=0.01)


def test_intervals_are_too_wide_or_too_narrow(right: Estimates) -> None:
    covered = []
    for spoil in (_noisier, _surer):
        wrong = truth()
        spoil(wrong)
        tally = measured(wrong, drawn_cells(truth()).part(0, 500))
        covered.append(coverage(tally.pit[OBSERVED, :, EXPRESSED:].sum((0, 1))))
    assert (covered[0] > np.add(INTERVALS, 0.01)).all()
    assert (covered[1] < np.subtract(INTERVALS, 0.05)).all()


def test_a_model_is_better_than_a_wrong_one_on_the_same_cells(right: Estimates) -> None:
    wrong = truth()
    _surer(wrong)
    other = estimated(wrong, drawn_cells(truth()))
    differences, errors = right.better_than(other)
    for name in ("elbo", "reconstruction", "dispersion", *CALIBRATION):
        at = list(FIGURES).index(name)
        assert differences[at] > 4 * errors[at] > 0, name
    bounds, bound_errors = right.label_bounds_over(other)
    assert (bounds > 4 * bound_errors).all()
    total = np.average(bounds, weights=right.total.cells)
    np.testing.assert_allclose(total, differences[list(FIGURES).index("elbo")])


def test_a_mixture_prior_is_held_against_the_cells_of_its_label() -> None:
    module = truth(prior="mog", num_classes_mog=3)
    with torch.no_grad():
        module.prior_means.mul_(0).add_(0.5)
        module.prior_log_std.fill_(math.log(0.7))
        module.z_encoder.mean_encoder.bias.fill_(0.5)
        module.z_encoder.var_encoder.bias.fill_(2 * math.log(0.7))
    cells = drawn_cells(module).part(0, 400)
    at = list(FIGURES).index("prior_fit")
    assert Estimates([measured(module, cells)]).values[at] > 0.99
    with torch.no_grad():
        module.prior_means[:, 0] += 6
    assert Estimates([measured(module, cells)]).values[at] < 0.8


def test_moments_of_a_mixture_are_those_of_its_draws() -> None:
    module = truth(prior="mog", num_classes_mog=3)
    with torch.no_grad():
        module.prior_logits.normal_()
        module.prior_log_std.normal_()
        n = 40_000
        y = torch.full((n, 1), 1)
        loc, scale = module.prior_of(y, torch.rand(n, dtype=torch.float64))
        drawn = (loc + scale * torch.randn(n, 2)).double().numpy()
        mean, covariance = (moment[0].numpy() for moment in module.prior_moments(y[:1]))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=5 * drawn.std() / math.sqrt(n))
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.03 * covariance.max())


def test_sums_are_those_of_the_cells_and_their_draws() -> None:
    module, cells = truth(), drawn_cells(truth()).part(0, 300)
    found = Tally.total(
        [measured(module, cells.part(0, 110)), measured(module, cells.part(110, 300))]
    )
    whole = measured(module, cells)
    for name, array in vars(whole).items():
        np.testing.assert_allclose(vars(found)[name], array, rtol=1e-9, atol=1e-6, err_msg=name)

    drawn = posterior.draw(module, cells, N_SAMPLES, 3)
    dense = np.zeros((2, 300 * N_SAMPLES, N_GENES))
    for data, rows in enumerate((cells, drawn)):
        dense[
            data, np.repeat(np.arange(len(rows.indptr) - 1), np.diff(rows.indptr)), rows.indices
        ] = rows.counts
    draws = dense[1].reshape(300, N_SAMPLES, N_GENES)
    counts = {
        OBSERVED: dense[0, :300],
        REPLICATE: draws[:, 0],
        DRAWN: draws[:, 1:].reshape(-1, N_GENES),
    }
    labels = {which: np.repeat(cells.labels, len(x) // 300) for which, x in counts.items()}
    for which, x in counts.items():
        np.testing.assert_array_equal(found.genes[which, COUNT], x.sum(0))
        np.testing.assert_array_equal(found.genes[which, SQUARE], (x**2).sum(0))
        np.testing.assert_array_equal(found.genes[which, NONZERO], (x > 0).sum(0))
        for label in range(N_LABELS):
            mine = x[labels[which] == label]
            assert found.n_rows(which)[label] == len(mine)
            ordered = found.label_genes[which, label, panel().label_column]
            np.testing.assert_array_equal(ordered, mine.sum(0))
            normal = np.log1p(mine * 1800 / mine.sum(1, keepdims=True))[:, panel().pair_genes]
            np.testing.assert_allclose(found.pair_products[which, label], normal.T @ normal)
    np.testing.assert_allclose(
        found.bound[0].sum(), posterior.elbo(module, cells, 3).sum(), rtol=1e-9
    )


def test_the_errors_are_those_that_other_cells_show(right: Estimates) -> None:
    """Ten further sets of cells scatter as much as the jackknife says, within a factor of 2."""
    module = truth()
    values = []
    for seed in range(10, 20):
        cells = replace(
            drawn_cells(module, seed).part(0, 500),
            keys=position_keys(seed * 10_000, seed * 10_000 + 500),
        )
        values.append(Estimates([measured(module, cells)]).values)
    scatter = np.std(values, axis=0, ddof=1) / math.sqrt(N_CELLS / 500)
    for name in ("elbo", "reconstruction", "library", "calibration_50"):
        at = list(FIGURES).index(name)
        assert 0.4 < right.errors[at] / scatter[at] < 2.5, name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.floats(0.01, 200), st.floats(1e-4, 50))
def test_the_distribution_function_is_scipys(count: int, r: float, odds: float) -> None:
    below, here = _interval(count, r, odds, -r * math.log1p(odds))
    distribution = stats.nbinom(r, 1 / (1 + odds))
    np.testing.assert_allclose(below, distribution.cdf(count - 1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(here, distribution.pmf(count), rtol=1e-6, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_count_is_spread_over_where_it_lies(low: float, share: float) -> None:
    width = share * (1 - low)
    histogram = np.zeros(PIT_BINS)
    _spread(histogram, low, width)
    assert histogram.sum() == pytest.approx(1)
    if width > 1e-9:
        edges = np.linspace(0, 1, PIT_BINS + 1)
        inside = np.minimum(edges[1:], low + width) - np.maximum(edges[:-1], low)
        np.testing.assert_allclose(histogram, np.maximum(inside, 0) / width, atol=1e-6)


def test_an_agreement_is_one_over_the_typical_fold_error() -> None:
    enough = np.ones(11, bool)
    data = np.arange(1, 12.0)
    assert agreement(data, data, enough) == 1
    assert agreement(data, data * 1.25, enough) == pytest.approx(0.8)
    assert agreement(data * 1.25, data, enough) == pytest.approx(0.8)
    assert agreement(data, 0 * data, enough) == 0
    assert math.isnan(agreement(data[:9], data[:9], enough[:9]))
    assert math.isnan(agreement(0 * data, 0 * data, enough))


def test_the_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    without = (values.sum() - values) / 49
    assert jackknife_error(without) == pytest.approx(stats.sem(values))
    assert math.isnan(jackknife_error(np.zeros(1)))


@pytest.mark.parametrize(
    ("shortfall", "error", "expected"),
    [
        (0.0, 0.0, "good"),
        (0.05, 0.0, "good"),
        (0.051, 0.0, "fair"),
        (0.149, 0.001, "fair"),
        (0.151, 0.001, "poor"),
        (-0.3, 0.01, "good"),
        # Chance alone may do that.
        (0.06, 0.04, "good"),
        # No chance, though it may be good after all.
        (0.06, 0.02, "fair"),
        # From good to poor, all is possible.
        (0.02, 0.07, "unclear"),
        (0.16, 0.06, "unclear"),
        (0.16, 0.04, "poor"),
        (0.0, math.nan, "unclear"),
        (math.nan, 0.0, "unclear"),
    ],
)
def test_the_verdict_knows_what_chance_can_do(
    shortfall: float, error: float, expected: str
) -> None:
    figure = Figure(lambda *_: 0.0, "", good=0.05, fair=0.15)
    assert judge(figure, 0.9, shortfall, error) == expected


@pytest.mark.parametrize(
    ("exceptions", "overall", "advice"),
    [
        ({}, "good", None),
        ({"library": "fair"}, "fair", "Means are a little off"),
        ({"library": "fair", "gene_mean": "poor"}, "poor", "do not compare expression"),
        ({"calibration_80": "fair"}, "fair", "its intervals are too narrow"),
        ({"dispersion": "poor"}, "poor", "its intervals are too narrow"),
        ({"label_means": "poor"}, "poor", "the weakest are b, a."),
        ({"correlation": "poor"}, "poor", "do not infer gene networks"),
        ({"prior_fit": "fair"}, "fair", "latent space is not filled"),
        (dict.fromkeys(list(FIGURES)[2:9], "unclear"), "unclear", None),
    ],
)
def test_the_verdict_is_that_of_the_weakest_figure(
    exceptions: dict[str, str], overall: str, advice: str | None
) -> None:
    usual = {name: "shown" if name in BOUND else "good" for name in FIGURES}
    figures = {
        name: {"value": 0.8, "reference": 0.9, "judged": judged}
        for name, judged in (usual | exceptions).items()
    }
    labels = [
        {"label": label, "agreement": value, "agreement_reference": 0.9}
        for label, value in (("a", 0.7), ("b", 0.6), ("empty", math.nan))
    ]
    found = {
        "labels": labels,
        "genes": {"noise_ratio": [1.5, 1.2, 0.1], "observed_mean": [1, 2, 0.01]},
        "calibration": {"coverage": INTERVALS},
    }
    verdict = summarise(figures, found)
    assert verdict["judged"] == overall
    assert len(verdict["findings"]) == len(FIGURES) - len(BOUND) - len(INTERVALS) + 1
    said = " ".join(verdict["advice"])
    assert (advice or "") in said
    assert len(verdict["advice"]) == (advice is not None)


def test_thresholds_are_read() -> None:
    found = parse_thresholds(["gene_mean=0.9", "elbo=-450"], FIGURES)
    assert found == {"gene_mean": 0.9, "elbo": -450}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gene_men=0.9"], "there is no figure 'gene_men'; choose from gene_mean, "),
        (["gene_mean"], "has no number; write it as gene_mean=0.9"),
        (["gene_mean=high"], "has no number"),
        (["gene_mean=nan"], "has no number"),
        (["library=1", "library=0.9"], "library.* is given twice"),
    ],
)
def test_thresholds_that_say_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_thresholds(words, FIGURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "n_samples=1 leaves nothing to compare draws with"),
        ({"seed": -1}, "seed=-1"),
        ({"split": "test"}, "there is no split 'test'; choose one of"),
        ({"max_cells": 0}, "max_cells=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckConfig(**options)
