"""The odd inputs of tests/odd_inputs.py, given in memory: in process, by the client, over HTTP.

They have the verdict that files have (tests/test_doors.py): same value named, same counts read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from odd_inputs import GENES, KEY, N_CELLS, ODD, Odd, make_cells, make_counts, write_odd
from scipy import sparse

from rayvaec.client.anndata_io import cells_of
from rayvaec.data.registry import Registry
from rayvaec.errors import RayvaecError
from rayvaec.inference.trained_model import TrainedModel
from rayvaec.model.saved import read_model, save_model
from rayvaec.model.vaec import VAEC
from rayvaec.protocol import ARROW, H5AD, JSON, RawCells, encode_cells
from rayvaec.serving.decoding.bodies import Sent, unpack
from rayvaec.serving.decoding.h5ad.sandbox import Sandbox
from rayvaec.serving.decoding.parsing import sample_task
from rayvaec.serving.middleware.limits import Limits

Found = dict[str, tuple[str, tuple[int, ...]]]
"""Label and counts of each cell, by its name."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(4 * 2**20)
    yield box
    box.close()


@pytest.fixture
def post(tmp_path: Path, sandbox: Sandbox) -> Callable[..., Found]:
    """Send a body through all that the endpoint does with it before it draws."""

    def send(data: bytes, kind: str, odd: Odd, query: Sequence[tuple[str, str]] = ()) -> Found:
        registry = Registry(tuple(GENES), tuple(dict.fromkeys(odd.labels)), KEY)
        module = VAEC(len(GENES), registry.n_labels, n_hidden=8)
        save_model(tmp_path / "model", module, registry.to_json(), {})
        model = TrainedModel(read_model(tmp_path / "model"))
        body = unpack(Sent(data, kind, False, query, JSON), registry, Limits(), sandbox)
        drawing = sample_task(body, model, Limits()).drawing
        return found(drawing.cells, drawing.names, registry)

    return send


def found(cells: Any, names: Sequence[str], registry: Registry) -> Found:
    """Return cells as the model would take them."""
    x = sparse.csr_array((cells.counts, cells.indices, cells.indptr), (len(names), len(GENES)))
    labels = [registry.labels[code] for code in cells.labels]
    rows = map(tuple, x.toarray().tolist())
    return dict(zip(names, zip(labels, rows, strict=True), strict=True))


def in_process(adata: anndata.AnnData, odd: Odd, post: Any) -> Found:
    registry = Registry(tuple(GENES), tuple(dict.fromkeys(odd.labels)), KEY)
    cells = registry.align(adata, layer=odd.layer)
    return found(cells, cells.names, registry)


def by_client(adata: anndata.AnnData, odd: Odd, post: Any) -> Found:
    cells, genes = cells_of(adata, KEY, None, odd.layer)
    return post(encode_cells(cells, {"genes": genes, "n_samples": 1}), ARROW, odd)


def stated(adata: anndata.AnnData, odd: Odd) -> tuple[dict[str, Any], list[str | None], list[str]]:
    """State counts, labels and genes as somebody does who writes requests by hand, unchecked."""
    source = adata.raw if odd.layer == "raw" else adata
    matrix = adata.layers["counts"] if odd.layer == "counts" else source.X
    if not sparse.issparse(matrix):
        matrix = np.asarray(matrix, np.float64)
    x = sparse.csr_matrix(matrix)
    values = adata.obs[KEY]
    labels = [None if no else str(v) for v, no in zip(values, values.isna(), strict=True)]
    counts = {"indptr": x.indptr, "indices": x.indices, "counts": x.data}
    return counts, labels, source.var_names.astype(str).tolist()


def by_json(adata: anndata.AnnData, odd: Odd, post: Any) -> Found:
    counts, labels, genes = stated(adata, odd)
    body = {
        "cells": {name: values.tolist() for name, values in counts.items()},
        **{"labels": labels, "genes": genes, "n_samples": 1},
        "cell_ids": adata.obs_names.astype(str).tolist(),
    }
    return post(json.dumps(body).encode(), JSON, odd)


def by_arrow(adata: anndata.AnnData, odd: Odd, post: Any) -> Found:
    counts, labels, genes = stated(adata, odd)
    names = adata.obs_names.astype(str).tolist()
    ends, indices = (counts[name].astype(np.int64) for name in ("indptr", "indices"))
    cells = RawCells(labels, ends, indices, counts["counts"], None, names)
    return post(encode_cells(cells, {"genes": genes, "n_samples": 1}), ARROW, odd)


WAYS = {
    "in process": in_process,
    "client": by_client,
    "HTTP JSON": by_json,
    "HTTP Arrow": by_arrow,
}

NOT_IN_MEMORY = {
    "one code too many",
    "one code too few",
    "one label too few",
    "a code too large",
    "a code below -1",
    "codes that are floats",
    "a category twice",
    "a column that column-order names alone",
    "categories of anndata 0.7 that are gone",
    "marks of another length",
    "no index",
    "counts that are text",
    "another shape",
    "no column-order",
    "categories and codes by hand",
    "anndata 0.6",
    "raw of anndata 0.6",
    "float16",
    "float16 in csc",
    "big-endian floats",
    "big-endian integers",
}
"""What anndata itself does not read, so that nobody can have it in memory."""

NOT_IN_REQUESTS = {
    "no such column": "a request has labels, and no columns",
    "no such layer": "a request has counts, and no layers",
    "indptr too short": "scipy builds no such matrix; see test_what_a_request_may_get_wrong",
    "values without a gene": "scipy builds no such matrix; see test_what_a_request_may_get_wrong",
}

SAID = {
    # anndata knows the file's columns, a request has none; each names the cell.
    "a label is missing": "no (label|value) for 1 of 12 cells, the first c3",
    "no such column": "no (obs )?column 'label'",
    "indptr too short": "(indptr|row offsets)",
    "values without a gene": "(indptr|fit together)",
    "a negative count": r"-1(\.0)? at cell c2, gene g0 is negative",
    "a count too large": r"2147483648(\.0)? at cell c2, gene g0 is above the largest count",
    "no number": "(nan at cell c2, gene g0 is not finite|the body has NaN)",
    "infinity": "(inf at cell c2, gene g0 is not finite|the body has Infinity)",
}
"""What a refusal says where it has other words than a file's."""


@pytest.mark.filterwarnings("ignore:Element '/obs.*written without encoding metadata")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_in_memory_have_the_verdict_of_files(tmp_path, post, name, way):
    odd = ODD[name]
    path = write_odd(odd, tmp_path / "odd.h5ad")
    if name in NOT_IN_MEMORY:
        with pytest.raises(Exception):  # noqa: B017, PT011 - each in its own way
            anndata.read_h5ad(path)
        pytest.skip("anndata does not read it")
    adata = anndata.read_h5ad(path)
    if way.startswith("HTTP") and name in NOT_IN_REQUESTS:
        pytest.skip(NOT_IN_REQUESTS[name])
    if odd.refused is not None:
        with pytest.raises(RayvaecError, match=SAID.get(name, odd.refused)) as caught:
            WAYS[way](adata, odd, post)
        assert caught.value.fix
        return
    labels = [odd.labels[cell % 3] for cell in range(N_CELLS)]
    rows = zip(labels, map(tuple, make_counts().tolist()), strict=True)
    assert WAYS[way](adata, odd, post) == {f"c{cell}": row for cell, row in enumerate(rows)}


@pytest.mark.parametrize("name", ODD)
def test_odd_uploads_have_the_verdict_of_files(tmp_path, post, name):
    odd = ODD[name]
    data = write_odd(odd, tmp_path / "odd.h5ad").read_bytes()
    query = [("n_samples", "1"), *([] if odd.layer is None else [("layer", odd.layer)])]
    if odd.refused is not None:
        with pytest.raises(RayvaecError, match=SAID.get(name, odd.refused)):
            post(data, H5AD, odd, query)
        return
    labels = [odd.labels[cell % 3] for cell in range(N_CELLS)]
    rows = zip(labels, map(tuple, make_counts().tolist()), strict=True)
    assert post(data, H5AD, odd, query) == {f"c{cell}": row for cell, row in enumerate(rows)}


@pytest.mark.parametrize("way", WAYS)
def test_duplicates_add_up_beyond_their_own_type(post, way):
    adata = make_cells()
    data, ends = np.full(2 * N_CELLS, 200, np.uint8), np.arange(N_CELLS + 1) * 2
    adata.X = sparse.csr_matrix((data, np.zeros(2 * N_CELLS, np.int32), ends), adata.shape)
    read = WAYS[way](adata, ODD["a plain one"], post)
    assert [row for _, row in read.values()] == [(400, 0, 0, 0, 0, 0)] * N_CELLS
    assert adata.X.nnz == 2 * N_CELLS


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_label_is_named_with_its_cell(post, way):
    adata = make_cells(labels=("a", "b", "d"))
    with pytest.raises(RayvaecError, match=r"unknown label 'd' .*the first c2"):
        WAYS[way](adata, ODD["a plain one"], post)


BROKEN = {
    "labels for 11 of 12": ({"labels": ["a"] * 11}, "labels has 11 entries for 12 cells"),
    "ends that fall": ({"indptr": [0, 2, 1, *[2] * 10]}, r"indptr\[2\] is 1, below the 2"),
    "too few ends": ({"indptr": [0, 2]}, "labels has 12 entries for 1 cells"),
    "more counts than genes": ({"counts": [1, 1, 1]}, "indices has 2 entries and .* has 3"),
    "a gene that is not there": ({"indices": [0, 6]}, "gene index 6 of cell c0 .* 6 genes"),
}


@pytest.mark.parametrize("way", ["HTTP JSON", "HTTP Arrow"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_a_request_may_get_wrong(post, name, way):
    change, message = BROKEN[name]
    if way == "HTTP Arrow" and name not in ("a gene that is not there",):
        pytest.skip("the rows of a table have one length, and its lists their ends")
    said: dict[str, Any] = {
        **{"indptr": [0, *[2] * 12], "indices": [0, 1], "counts": [1, 1], "labels": ["a"] * 12},
        **change,
    }
    names = [f"c{cell}" for cell in range(N_CELLS)]
    parts = [said[part] for part in ("indptr", "indices", "counts")]
    if way == "HTTP JSON":
        cells = dict(zip(("indptr", "indices", "counts"), parts, strict=True))
        body = {"cells": cells, "labels": said["labels"], "cell_ids": names, "n_samples": 1}
        sent = json.dumps(body).encode(), JSON
    else:
        raw = RawCells(said["labels"], *map(np.array, parts), None, names)
        sent = encode_cells(raw, {"n_samples": 1}), ARROW
    with pytest.raises(RayvaecError, match=message):
        post(*sent, ODD["a plain one"])
