"""Contents of `/v1/summary`: training-data summary of a few genes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rayvaec.errors import NotFoundError, UnprocessableError
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.model.training_summary import COUNT_EDGES, TrainingSummary
from rayvaec.util.messages import suggest

MOST_GENES = 50
_TELLING_GENES = 12


class LabelSummary(BaseModel):
    """Training cells of one label."""

    label: str
    n_cells: int = Field(description="Cells in the sample")
    library: list[float] | None = Field(
        description="Quantiles of total counts a cell, 0 to 100 %; null without cells"
    )


class GeneSummary(BaseModel):
    """A gene's counts, label by label in the order of `labels`."""

    gene: str
    mean: list[float]
    zero_fraction: list[float]
    histogram: list[list[int]] = Field(description="Cells between two `count_edges`")


class ProfileSummary(BaseModel):
    """Every gene of one label, in the order of the model's genes."""

    label: str
    mean: list[float]
    zero_fraction: list[float]


class SummaryAnswer(BaseModel):
    """A random sample of a model's training cells, in numbers."""

    model_config = ConfigDict(protected_namespaces=())

    model_hash: str
    n_cells: int = Field(description="Cells in the sample")
    count_edges: list[int] = Field(
        description="Where each bin of a gene's counts begins; the last has no end"
    )
    telling_genes: list[str] = Field(description="Genes that differ most between labels")
    labels: list[LabelSummary]
    genes: list[GeneSummary]
    profile: ProfileSummary | None


def summary_answer(
    model: TrainedModel, genes: Sequence[str] = (), profile: str | None = None
) -> SummaryAnswer:
    """Answer a request for the summary of the training data.

    Parameters
    ----------
    model : TrainedModel
        The model.
    genes : sequence of str
        Genes whose counts are told, up to `MOST_GENES`.
    profile : str, optional
        A label of which mean and share of zeros of every gene are told.

    Returns
    -------
    SummaryAnswer

    Raises
    ------
    RequestError
        404 if the model has no summary; 422 for an unknown gene or label, or too many genes.
    """
    summary, registry = model.summary, model.registry
    if summary is None:
        raise NotFoundError(
            "the model has no summary of its training data",
            "models that this version's `rayvaec train` finished have one",
            error="no_summary",
        )
    if len(genes) > MOST_GENES:
        raise UnprocessableError(
            f"{len(genes)} genes are above the most a request, {MOST_GENES}",
            "ask for fewer at a time",
        )
    columns = [_position("gene", gene, registry.genes) for gene in genes]
    return SummaryAnswer(
        model_hash=model.hash,
        n_cells=int(summary.cells.sum()),
        count_edges=list(COUNT_EDGES),
        telling_genes=[registry.genes[i] for i in summary.telling_genes(_TELLING_GENES)],
        labels=[
            LabelSummary(
                label=label, n_cells=int(n_cells), library=_rounded(library) if n_cells else None
            )
            for label, n_cells, library in zip(
                registry.labels, summary.cells, summary.library, strict=True
            )
        ],
        genes=[
            GeneSummary(
                gene=gene,
                mean=_rounded(summary.mean[column]),
                zero_fraction=_rounded(summary.zero_fraction[column]),
                histogram=summary.histogram[column].tolist(),
            )
            for gene, column in zip(genes, columns, strict=True)
        ],
        profile=None if profile is None else _profile(summary, profile, registry.labels),
    )


def _profile(summary: TrainingSummary, label: str, labels: Sequence[str]) -> ProfileSummary:
    code = _position("label", label, labels)
    return ProfileSummary(
        label=label,
        mean=_rounded(summary.mean[:, code]),
        zero_fraction=_rounded(summary.zero_fraction[:, code]),
    )


def _position(what: str, name: str, known: Sequence[str]) -> int:
    if name not in known:
        raise UnprocessableError(
            f"the model has no {what} {name[:60]!r}",
            f"its {what}s are {suggest(name[:60], known)}",
            error=f"unknown_{what}",
        )
    return known.index(name)


def _rounded(values: NDArray[Any]) -> list[float]:
    """Return numbers with the digits that a figure can show: an answer is a third as long."""
    return [float(f"{value:.5g}") for value in values]
