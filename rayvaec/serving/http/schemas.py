"""JSON schemas of requests and responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from rayvaec.errors import RequestError, UnprocessableError
from rayvaec.protocol.entries import (
    BadEntryError,
    Rows,
    read_chosen_genes,
    read_genes,
    read_integers,
    read_names,
    read_numbers,
    read_rows,
    shown,
)
from rayvaec.util.messages import suggest


def _one_or_more(value: Any) -> NDArray[Any]:
    return read_numbers([value] if type(value) in (int, float) else value)


def _list_schema(item: dict[str, Any], **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "array", "items": item, **more})


# Lists are checked as a whole; pydantic sees one value each.
_NAME = {"type": ["string", "number", "boolean"]}
_NUMBER = {"type": "number"}
Names = Annotated[list[str | None], PlainValidator(read_names), _list_schema(_NAME)]
Genes = Annotated[list[str], PlainValidator(read_genes), _list_schema(_NAME)]
ChosenGenes = Annotated[
    list[str], PlainValidator(read_chosen_genes), _list_schema(_NAME, minItems=1)
]
Integers = Annotated[
    NDArray[np.int64], PlainValidator(read_integers), _list_schema({"type": "integer"})
]
Numbers = Annotated[NDArray[Any], PlainValidator(read_numbers), _list_schema(_NUMBER)]
NumberRows = Annotated[
    Rows, PlainValidator(read_rows), _list_schema({"type": "array", "items": _NUMBER})
]
OneOrMore = Annotated[
    NDArray[Any],
    PlainValidator(_one_or_more),
    WithJsonSchema({"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER}]}),
]
Text = Annotated[str, Field(strict=True)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Reduction = Literal["mean", "var", "zero_fraction", "quantiles"]
Quantile = Annotated[float, Field(strict=True, ge=0, le=1)]
MOST_QUANTILES = 32
NSamples = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
OUT_GENES = Field(None, description="Names of the genes to return, in this order")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Counts(_Strict):
    """Raw counts of the cells: a CSR matrix, or rows of all genes."""

    indptr: Integers | None = Field(
        None, description="Where each cell's values begin, and one last end: n_cells + 1 numbers"
    )
    indices: Integers | None = Field(None, description="The gene of each value, from 0")
    counts: Numbers | None = Field(None, description="The values: whole numbers, 0 or more")
    dense: NumberRows | None = Field(
        None, description="In place of the other three: one list of counts per cell"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        csr = [self.indptr, self.indices, self.counts]
        if self.dense is None and any(part is None for part in csr):
            raise ValueError("needs indptr, indices and counts, or dense")
        if self.dense is not None and any(part is not None for part in csr):
            raise ValueError("has dense beside indptr, indices or counts; give one form")
        return self


class CellsParameters(_Strict):
    """What a request says about its cells as a whole."""

    genes: Genes | None = Field(
        None, description="Names of the columns; without them, the columns are the model's genes"
    )
    allow_missing: Annotated[bool, Field(strict=True)] = Field(
        False, description="Whether genes of the model that `genes` lacks count as zero"
    )


class DrawParameters(_Strict):
    """What a request says about its draws."""

    n_samples: NSamples = Field(1, description="Draws a cell")
    seed: Seed | None = Field(
        None, description="Seed of all draws; a random one, reported in the answer, by default"
    )
    reduce: list[Reduction] | None = Field(
        None,
        min_length=1,
        fail_fast=True,
        description="Return these moments of the draws instead of the draws",
    )
    quantiles: list[Quantile] | None = Field(
        None,
        min_length=1,
        max_length=MOST_QUANTILES,
        fail_fast=True,
        description="Which quantiles, from 0 to 1, where `reduce` asks for quantiles",
    )
    out_genes: ChosenGenes | None = OUT_GENES

    @model_validator(mode="after")
    def _quantiles_if_asked_for(self) -> Self:
        if ("quantiles" in (self.reduce or ())) != (self.quantiles is not None):
            raise ValueError('needs both "quantiles" in reduce and quantiles, or neither')
        return self


class SampleParameters(CellsParameters, DrawParameters):
    """Parameters of /v1/sample; as JSON beside the cells, in Arrow in the schema's metadata."""

    n_samples: NSamples = Field(description="Draws a cell")


class ExpressionParameters(CellsParameters):
    """Parameters of /v1/expression."""

    out_genes: ChosenGenes | None = OUT_GENES


class _PerCell(_Strict):
    cell_ids: Names | None = Field(
        None,
        description="Names of the cells: a cell's random numbers are keyed by its name, so the "
        "same name, counts and seed give the same draws in any request. The position in the "
        "request stands in where there are none",
    )
    batches: Names | None = Field(
        None, description="Experimental batch of each cell, for models with batches"
    )


class CellsRequest(_PerCell):
    """Given cells."""

    cells: Counts
    labels: Names = Field(description="Cell type of each cell")

    @model_validator(mode="before")
    @classmethod
    def _dense_beside(cls, value: Any) -> Any:
        """Read ``{"dense": ...}`` as ``{"cells": {"dense": ...}}``."""
        if isinstance(value, dict) and "dense" in value and "cells" not in value:
            rest = {key: entry for key, entry in value.items() if key != "dense"}
            return {**rest, "cells": {"dense": value["dense"]}}
        return value


class SampleRequest(CellsRequest, SampleParameters):
    """Posterior-predictive draws of given cells."""


class LatentRequest(CellsRequest, CellsParameters):
    """Mean and variance of q(z | x, y) of given cells."""


class ExpressionRequest(CellsRequest, ExpressionParameters):
    """Denoised expression of given cells."""


class GenerateRequest(_PerCell, DrawParameters):
    """New cells from the prior: ``label`` and ``n_cells``, or ``labels``, one per cell."""

    label: Text | None = Field(None, description="Cell type of all cells")
    n_cells: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = Field(
        None, description="Number of cells, beside `label`; 1 by default"
    )
    labels: Names | None = Field(None, description="Cell type of each cell")
    library: OneOrMore = Field(
        description="Total counts a cell is expected to have: one number, or one per cell"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.label is None) == (self.labels is None):
            raise ValueError("needs label (of all cells) or labels (one per cell), one of the two")
        if self.labels is not None and self.n_cells not in (None, len(self.labels)):
            raise ValueError(f"has n_cells {self.n_cells} and {len(self.labels)} labels")
        return self


class Problem(BaseModel):
    """Body of every answer with a status of 400 or above."""

    error: str = Field(description="Short name, such as unknown_label")
    detail: str = Field(description="What is wrong, the value, and where it stands")
    fix: str = Field(description="What to do about it")
    request_id: str = Field(description="The same as in X-Request-ID")


class CsrRows(BaseModel):
    """Draws: row ``cell * n_samples + sample``."""

    indptr: list[int]
    indices: list[int] = Field(description="Positions in out_genes, or in the model's genes")
    counts: list[int]


class _Answer(BaseModel):
    model_hash: str
    n_cells: int
    missing_genes: list[str] = Field(description="Genes of the model that the request lacks")
    extra_genes: list[str] = Field(description="Genes of the request that the model lacks")


class DrawsAnswer(_Answer):
    """Draws, or with `reduce` their moments."""

    seed: int
    n_samples: int
    draws: CsrRows | None = None
    moments: dict[str, list[list[float]]] | None = Field(
        None, description="One matrix, cells x genes, each of mean, ..., quantile_0.5, ..."
    )


class LatentAnswer(_Answer):
    """Mean and variance of q(z | x, y)."""

    mean: list[list[float]]
    variance: list[list[float]]


class ExpressionAnswer(_Answer):
    """Each gene's share of a cell's expected counts."""

    expression: list[list[float]]


class ModelAnswer(BaseModel):
    """The model that answers."""

    model_config = ConfigDict(protected_namespaces=())

    model_hash: str
    registry_hash: str
    version: str = Field(description="Version of rayvaec")
    genes: list[str]
    labels: list[str]
    labels_key: str
    batches: list[str]
    batch_key: str | None
    config: dict[str, Any] = Field(description="Arguments of VAEC")
    limits: dict[str, float]


class ModelEntry(BaseModel):
    """One of the models that are served."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    path: str = Field(description="What the addresses of its routes begin with")
    model_hash: str
    n_genes: int
    n_labels: int


class ModelsAnswer(BaseModel):
    """The models that are served."""

    models: list[ModelEntry]


class StatusAnswer(BaseModel):
    """Whether the server lives, or is ready."""

    status: str


def problem_of(error: ValidationError, model: type[BaseModel]) -> RequestError:
    """Turn pydantic's errors into one that names place, value and fix.

    Parameters
    ----------
    error : ValidationError
        What validating a request raised.
    model : type
        The request.

    Returns
    -------
    RequestError
    """
    first = error.errors(include_url=False, include_context=True)[0]
    kind, message = first["type"], first["msg"]
    place, cause = _place(first["loc"]), first.get("ctx", {}).get("error")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if isinstance(cause, BadEntryError):
        entry = "".join(f"[{index}]" for index in cause.position)
        detail, fix = f"{place}{entry} {cause.problem}", cause.fix
    elif kind == "extra_forbidden":
        known = [name for name in model.model_fields if len(first["loc"]) == 1] or list(
            Counts.model_fields
        )
        detail, fix = f"unknown field {place}", f"fields are {suggest(place, known)}"
    elif kind == "missing":
        detail, fix = f"{place} is missing", "add it; /docs shows the whole request"
    elif kind == "value_error":
        detail, fix = f"{place} {message.removeprefix('Value error, ')}", "see /docs"
    else:
        wanted = message.replace("Input should", "it should")
        detail, fix = f"{place} is {shown(first['input'])}", wanted[:1].lower() + wanted[1:]
    return UnprocessableError(detail + more, fix)


def _place(location: tuple[int | str, ...]) -> str:
    """Write a location as it would be indexed: ``cells.counts[5]``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:60]}" if text else part[:60]
    return text or "the request"
