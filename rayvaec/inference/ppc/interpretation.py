"""Interpretation of the metrics in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayvaec.inference.ppc.metrics import INTERVALS, Figure

GOOD, FAIR, POOR, UNCLEAR, SHOWN = "good", "fair", "poor", "unclear", "shown"


def judge(figure: Figure, value: float, shortfall: float, error: float) -> str:
    """Judge a figure by its shortfall from what the model would reach if it were right.

    The shortfall decides, whatever its error, with two exceptions. If two errors to either side
    reach from good to poor, there are too few cells to tell. If they reach zero, a shortfall that
    is fair may be nothing but chance and is called good. With many cells neither happens.

    Parameters
    ----------
    figure : Figure
        What is judged.
    value, shortfall, error : float
        The figure, its shortfall from the reference and the standard error of that.

    Returns
    -------
    {"good", "fair", "poor", "unclear", "shown"}
        ``shown`` where nothing can be said without another model.
    """
    if figure.good is None or figure.fair is None:
        return SHOWN
    if math.isnan(value) or math.isnan(shortfall) or math.isnan(error):
        return UNCLEAR
    least, most = shortfall - 2 * error, shortfall + 2 * error
    if least <= figure.good and most > figure.fair:
        return UNCLEAR
    if shortfall <= figure.good or least <= 0:
        return GOOD
    return FAIR if shortfall <= figure.fair else POOR


def _fold(value: float) -> str:
    """Say a typical fold error of an agreement: ``3 %`` or ``1.6-fold``."""
    error = 1 / max(value, 1e-9) - 1
    return f"{error:.1%}".replace("%", " %") if error < 0.5 else f"{1 + error:.2g}-fold"


_SUBJECTS = {
    "gene_mean": "The typical gene's mean in the draws is off by {off} (by {chance} if the model "
    "were right).",
    "gene_variance": "The typical gene's variance over all cells is off by {off} (by {chance} if "
    "the model were right).",
    "gene_nonzero": "The share of cells in which the typical gene is found at all is off by {off} "
    "(by {chance} if the model were right).",
    "dispersion": "Around what the model expects of each cell, the typical gene's noise is off by "
    "{off} (by {chance} if the model were right).",
    "library": "Drawn cells have {off} more or fewer counts than observed ones.",
    "label_means": "Within a cell type, the typical gene's mean is off by {off} (by {chance} if "
    "the model were right).",
}


def sentence(name: str, figure: Mapping[str, Any]) -> str:
    """Say one figure that is judged, but not of an interval, in a sentence.

    Parameters
    ----------
    name : str
        Of `FIGURES`.
    figure : mapping
        Its entry in the report, not rounded yet.

    Returns
    -------
    str
    """
    value, reference = figure["value"], figure["reference"]
    if math.isnan(value):
        return "There are too few cells, or too few genes with counts, to tell."
    if name in _SUBJECTS:
        return _SUBJECTS[name].format(off=_fold(value), chance=_fold(reference))
    if name == "correlation":
        return (
            f"Correlations of genes within a cell type are off by {1 - value:.3f} "
            f"(by {1 - reference:.3f} if the model were right)."
        )
    nats, chance = -math.log(max(value, 1e-9)), -math.log(reference)
    return (
        "Where the cells lie in latent space and where the model generates new cells differ by "
        f"{nats:.2f} nats a dimension ({chance:.2f} by chance)."
    )


def _calibration_sentence(covered: Sequence[float]) -> str:
    if any(math.isnan(share) for share in covered):
        return "No gene has an expected count of 1 or more, so intervals cannot be judged."
    expected = " %, ".join(f"{100 * interval:g}" for interval in INTERVALS)
    found = ", ".join(f"{100 * share:.1f}" for share in covered)
    return (
        f"Of the counts that should be inside its {expected} % intervals, the model has {found} % "
        "inside, in genes with an expected count of 1 or more."
    )


def summarise(figures: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdict on a model.

    Parameters
    ----------
    figures : dict
        The report's figures.
    found : mapping
        The report's ``genes``, ``labels`` and ``calibration``.

    Returns
    -------
    dict
        ``judged``; ``headline``; ``findings``, a list of ``judged`` and ``sentence``; and
        ``advice``, a list of sentences.
    """
    intervals = [name for name in figures if name.startswith("calibration")]
    findings = [
        {"judged": figure["judged"], "sentence": sentence(name, figure)}
        for name, figure in figures.items()
        if name not in intervals and figure["judged"] != SHOWN
    ]
    worst = max((figures[name]["judged"] for name in intervals), key=_ORDER.index)
    covered = _calibration_sentence(found["calibration"]["coverage"])
    findings.append({"judged": worst, "sentence": covered})
    weak = [name for name, figure in figures.items() if figure["judged"] in (FAIR, POOR)]
    judged = [finding["judged"] for finding in findings]
    if POOR in judged:
        overall = POOR
    elif FAIR in judged:
        overall = FAIR
    else:
        overall = UNCLEAR if judged.count(UNCLEAR) > judged.count(GOOD) else GOOD
    return {
        "judged": overall,
        "headline": _HEADLINES[overall],
        "findings": findings,
        "advice": _advice(figures, weak, found),
    }


_ORDER = (GOOD, UNCLEAR, FAIR, POOR)
_HEADLINES = {
    GOOD: "Cells drawn from this model are like real ones in all that was checked.",
    FAIR: "Cells drawn from this model are like real ones, with reservations.",
    POOR: "Cells drawn from this model differ clearly from real ones.",
    UNCLEAR: "There are too few cells to judge this model.",
}


def _advice(figures: Mapping[str, Any], weak: list[str], found: Mapping[str, Any]) -> list[str]:
    """Say what the weak figures are likely to come from."""
    advice = []
    intervals = [name for name in weak if name.startswith("calibration")]
    if "dispersion" in weak or intervals:
        advice.append(_advice_on_noise(found))
    means = [figures[name]["judged"] for name in ("library", "gene_mean") if name in weak]
    if POOR in means:
        advice.append(
            "Means are off: do not compare expression between drawn and real cells yet. Training "
            "longer is the first thing to try."
        )
    elif means:
        advice.append(
            "Means are a little off: where drawn and real cells are compared, do not read small "
            "differences as biology."
        )
    if "label_means" in weak:
        worst = [label for label in found["labels"] if not math.isnan(label["agreement"])]
        worst.sort(key=lambda label: label["agreement"] - label["agreement_reference"])
        names = ", ".join(label["label"] for label in worst[:3])
        advice.append(
            f"Cell types are not equally well learned: the weakest are {names}. If their genes "
            "look like those of another type, look for mislabelled cells."
        )
    if "correlation" in weak:
        advice.append(
            "Genes vary together less, or more, than they should: more latent dimensions, or "
            "longer training, may help; do not infer gene networks from the draws."
        )
    if "prior_fit" in weak:
        advice.append(
            "New cells, which are generated from the prior, will be less like real ones than draws "
            "for given cells: latent space is not filled as the prior says."
        )
    return advice


def _advice_on_noise(found: Mapping[str, Any]) -> str:
    genes = found["genes"]
    ratios = [
        ratio
        for ratio, mean in zip(genes["noise_ratio"], genes["observed_mean"], strict=True)
        if mean > 0.1
    ]
    above = sum(ratio > 1 for ratio in ratios)
    if 2 * above >= len(ratios):
        return (
            "Real cells vary more around the model's expectation than the model says, in most "
            "genes: its intervals are too narrow. It has not learned all the structure in the "
            "data, or its dispersions are not trained to the end."
        )
    return (
        "Real cells vary less around the model's expectation than the model says, in most genes: "
        "its intervals are too wide, and draws are noisier than data."
    )
