"""Parse requests into sampling plans, with every parameter checked."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from rayvaec.errors import UnprocessableError
from rayvaec.inference.cells import Cells
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.protocol import (
    ARROW,
    RawCells,
    StreamLimits,
    decode_cells,
    name_column,
    number_column,
    read_table,
)
from rayvaec.protocol.json_body import MAX_KEYS, decode_object
from rayvaec.serving.decoding.cells import (
    Aligned,
    align_cells,
    batch_codes,
    gene_columns,
    keys_of,
    label_codes,
    raw_counts,
)
from rayvaec.serving.engine.moments import MomentsPlan
from rayvaec.serving.engine.plans import DensePlan, DrawPlan, ResponsePlan, SamplingSpec
from rayvaec.serving.http.schemas import (
    CellsParameters,
    CellsRequest,
    DrawParameters,
    ExpressionParameters,
    ExpressionRequest,
    GenerateRequest,
    LatentRequest,
    SampleParameters,
    SampleRequest,
    problem_of,
)
from rayvaec.serving.middleware.limits import Limits, check_cost, check_dense, check_quantiles

Schema = TypeVar("Schema", bound=BaseModel)
LARGEST_LIBRARY = 1e9
_JSON_SAFE_SEED = 2**53


@dataclass(frozen=True)
class Body:
    """A request's body, and the forms of request and answer.

    Parameters
    ----------
    data : bytes
        As it was sent.
    kind : str
        Its media type, JSON or Arrow.
    answer : str
        Media type of the answer; some are bounded more tightly.
    """

    data: bytes
    kind: str
    answer: str


Reader = Callable[[Body, TrainedModel, Limits], ResponsePlan]


def sample_task(body: Body, model: TrainedModel, limits: Limits) -> ResponsePlan:
    """Read a request to /v1/sample.

    Parameters
    ----------
    body : Body
        What was sent.
    model : TrainedModel
        Whose genes and labels it must fit.
    limits : Limits
        What it may cost.

    Returns
    -------
    ResponsePlan

    Raises
    ------
    RequestError
        400, 413 or 422, with the value, its place and what to do.
    """
    raw, asked = _given_cells(body, SampleRequest, SampleParameters, model, limits)
    check_cost(
        len(raw.indptr) - 1,
        model.registry.n_genes,
        asked.n_samples,
        limits=limits,
        answer=ARROW if asked.reduce else body.answer,
    )
    aligned = align_cells(raw, asked.genes, asked.allow_missing, model.registry)
    return _drawing(body, model, limits, asked, aligned, raw.cell_ids)


def generate_task(body: Body, model: TrainedModel, limits: Limits) -> ResponsePlan:
    """Read a request to /v1/generate; parameters, result and errors as in `sample_task`."""
    new = (_new_cells_arrow if body.kind == ARROW else _new_cells_json)(body, limits)
    check_cost(
        new.n_cells,
        model.registry.n_genes,
        new.asked.n_samples,
        limits=limits,
        answer=ARROW if new.asked.reduce else body.answer,
    )
    labels = list(new.labels) * new.n_cells if len(new.labels) == 1 else new.labels
    cells = Cells(
        indptr=np.zeros(new.n_cells + 1, np.int64),
        indices=np.zeros(0, np.int32),
        counts=np.zeros(0, np.int32),
        labels=label_codes(labels, new.n_cells, model.registry),
        batches=batch_codes(new.batches, new.n_cells, model.registry),
        keys=keys_of(new.cell_ids, new.n_cells),
    )
    library = _library(new.library, new.n_cells)
    aligned = Aligned(cells, (), ())
    return _drawing(body, model, limits, new.asked, aligned, new.cell_ids, library)


@dataclass(frozen=True)
class _NewCells:
    """A request for new cells; labels and library hold one entry, or one per cell."""

    n_cells: int
    labels: Sequence[str | None]
    library: NDArray[np.float64]
    batches: Sequence[str | None] | None
    cell_ids: Sequence[str | None] | None
    asked: DrawParameters


def _new_cells_json(body: Body, limits: Limits) -> _NewCells:
    asked = _validated(GenerateRequest, _decoded(body, limits))
    labels = [asked.label] if asked.labels is None else asked.labels
    n_cells = (asked.n_cells or 1) if asked.labels is None else len(asked.labels)
    library = np.asarray(asked.library, np.float64)
    return _NewCells(n_cells, labels, library, asked.batches, asked.cell_ids, asked)


def _new_cells_arrow(body: Body, limits: Limits) -> _NewCells:
    batch, parameters = read_table(
        body.data,
        _stream_limits(limits),
        required=("label", "library"),
        optional=("batch", "cell_id"),
    )
    return _NewCells(
        n_cells=batch.num_rows,
        labels=name_column(batch, "label") or [],
        library=number_column(batch, "library"),
        batches=name_column(batch, "batch"),
        cell_ids=name_column(batch, "cell_id"),
        asked=_validated(DrawParameters, parameters),
    )


def latent_task(body: Body, model: TrainedModel, limits: Limits) -> ResponsePlan:
    """Read a request to /v1/latent; parameters, result and errors as in `sample_task`."""
    raw, asked = _given_cells(body, LatentRequest, CellsParameters, model, limits)
    check_cost(len(raw.indptr) - 1, model.registry.n_genes, 1, limits)
    aligned = align_cells(raw, asked.genes, asked.allow_missing, model.registry)
    n_latent = model.module.config.n_latent
    widths = {"mean": n_latent, "variance": n_latent}
    facts = _facts(model, aligned)
    task = DensePlan(
        kind="latent",
        cells=aligned.cells,
        n_genes=model.registry.n_genes,
        widths=widths,
        columns=None,
        names=raw.cell_ids,
        facts=facts,
    )
    return _checked(task, body, limits)


def expression_task(body: Body, model: TrainedModel, limits: Limits) -> ResponsePlan:
    """Read a request to /v1/expression; parameters, result and errors as in `sample_task`."""
    raw, asked = _given_cells(body, ExpressionRequest, ExpressionParameters, model, limits)
    check_cost(len(raw.indptr) - 1, model.registry.n_genes, 1, limits)
    columns = gene_columns(asked.out_genes, model.registry)
    aligned = align_cells(raw, asked.genes, asked.allow_missing, model.registry)
    n_genes = model.registry.n_genes
    widths = {"expression": n_genes if columns is None else len(columns)}
    facts = _facts(model, aligned)
    task = DensePlan(
        kind="expression",
        cells=aligned.cells,
        n_genes=n_genes,
        widths=widths,
        columns=columns,
        names=raw.cell_ids,
        facts=facts,
    )
    return _checked(task, body, limits)


def _given_cells(
    body: Body,
    request_type: type[CellsRequest],
    parameters_type: type[Schema],
    model: TrainedModel,
    limits: Limits,
) -> tuple[RawCells, Schema]:
    """Return the cells and the parameters; for JSON, the request is its own parameters."""
    if body.kind == ARROW:
        raw, parameters = decode_cells(body.data, _stream_limits(limits))
        return raw, _validated(parameters_type, parameters)
    request: Any = _validated(request_type, _decoded(body, limits))
    n_columns = model.registry.n_genes if request.genes is None else len(request.genes)
    arrays = raw_counts(request.cells, n_columns)
    return RawCells(request.labels, *arrays, request.batches, request.cell_ids), request


def _drawing(
    body: Body,
    model: TrainedModel,
    limits: Limits,
    asked: DrawParameters,
    aligned: Aligned,
    names: Sequence[str | None] | None,
    library: NDArray[np.float32] | None = None,
) -> ResponsePlan:
    seed = secrets.randbelow(_JSON_SAFE_SEED) if asked.seed is None else asked.seed
    drawing = SamplingSpec(
        kind="draw" if library is None else "generate",
        cells=aligned.cells,
        library=library,
        n_samples=asked.n_samples,
        seed=seed,
        n_genes=model.registry.n_genes,
        columns=gene_columns(asked.out_genes, model.registry),
        names=names,
    )
    facts = {**_facts(model, aligned), "seed": seed, "n_samples": asked.n_samples}
    if not asked.reduce:
        return _checked(DrawPlan(drawing, facts), body, limits)
    quantiles = tuple(dict.fromkeys(asked.quantiles or ()))
    if quantiles:
        check_quantiles(drawing.n_out, asked.n_samples, limits)
    moments = tuple(name for name in dict.fromkeys(asked.reduce) if name != "quantiles")
    return _checked(MomentsPlan(drawing, moments, quantiles, facts), body, limits)


def _facts(model: TrainedModel, aligned: Aligned) -> dict[str, Any]:
    return {
        "model_hash": model.hash,
        "n_cells": len(aligned.cells),
        "missing_genes": list(aligned.missing),
        "extra_genes": list(aligned.extra),
    }


def _checked(task: ResponsePlan, body: Body, limits: Limits) -> ResponsePlan:
    check_dense(task.n_values, limits, body.answer)
    return task


def _library(values: NDArray[np.float64], n_cells: int) -> NDArray[np.float32]:
    if len(values) not in (1, n_cells):
        raise UnprocessableError(
            f"library has {len(values)} entries for {n_cells} cells",
            "give one number for all cells, or one per cell",
            error="ragged_arrays",
        )
    bad = np.flatnonzero(~((values > 0) & (values <= LARGEST_LIBRARY)))
    if bad.size:
        raise UnprocessableError(
            f"library[{bad[0]}] is {values[bad[0]]:g}",
            f"give total counts above 0 and up to {LARGEST_LIBRARY:g}",
            error="bad_counts",
        )
    return np.broadcast_to(values, n_cells).astype(np.float32)


def _validated(schema: type[Schema], parameters: Mapping[str, Any]) -> Schema:
    try:
        return schema.model_validate(dict(parameters))
    except ValidationError as error:
        raise problem_of(error, schema) from error


def _decoded(body: Body, limits: Limits) -> dict[str, Any]:
    # Beside some of its own, a request has one list a cell where its counts are dense.
    return decode_object(body.data, "the body", max_containers=limits.max_cells + MAX_KEYS)


def _stream_limits(limits: Limits) -> StreamLimits:
    return StreamLimits(
        max_bytes=limits.max_body_bytes,
        max_rows=limits.max_cells,
        max_metadata_bytes=limits.max_json_bytes,
    )
