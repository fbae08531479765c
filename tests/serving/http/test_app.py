from __future__ import annotations

import asyncio
import gzip
import json
import logging
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayvaec import protocol
from rayvaec.data.registry import Registry
from rayvaec.errors import CountsError
from rayvaec.inference import posterior
from rayvaec.protocol import ARROW, JSON, AnswerStream
from rayvaec.serving.decoding import parsing as requests
from rayvaec.serving.decoding.parsing import Body
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.limits import Limits

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def body(adata, trained) -> dict[str, Any]:
    """Five cells as JSON, in the model's gene order."""
    cells = trained.registry.align(adata[:5].copy())
    return {
        "cells": {
            "indptr": cells.indptr.tolist(),
            "indices": cells.indices.tolist(),
            "counts": cells.counts.tolist(),
        },
        "labels": adata.obs["cell_type"][:5].tolist(),
        "cell_ids": adata.obs_names[:5].tolist(),
        "n_samples": 3,
        "seed": 7,
    }


@pytest.fixture(scope="module")
def expected(adata, trained) -> np.ndarray:
    """What the model itself draws for `body`: array[5, n_genes, 3]."""
    return trained.sample(adata[:5].copy(), 3, seed=7)


def changed(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Copy `body` with other fields; ``cells`` changes its arrays, None takes a field away."""
    new = {**body, **changes}
    if isinstance(changes.get("cells"), dict):
        new["cells"] = {**body["cells"], **changes["cells"]}
    return {name: value for name, value in new.items() if value is not None}


def without_draws(body: dict[str, Any]) -> dict[str, Any]:
    return changed(body, n_samples=None, seed=None)


def arrow_body(body: dict[str, Any]) -> bytes:
    cells = protocol.RawCells(
        body["labels"],
        *(np.array(body["cells"][name]) for name in ("indptr", "indices", "counts")),
        cell_ids=body.get("cell_ids"),
    )
    known = ("n_samples", "seed", "reduce", "out_genes", "genes", "allow_missing")
    return protocol.encode_cells(cells, {name: body[name] for name in known if name in body})


def counts_of(response: httpx.Response, n_genes: int) -> np.ndarray:
    """Return the draws of an answer, JSON or Arrow, as array[n_cells, n_genes, n_samples]."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == JSON:
        said = response.json()
        indptr, indices, counts = (said["draws"][n] for n in ("indptr", "indices", "counts"))
    else:
        stream = AnswerStream([response.content])
        rows, said = stream.draws(), stream.parameters
        indptr, indices, counts = rows.indptr, rows.indices, rows.counts
        assert rows.cells.tolist() == np.repeat(range(said["n_cells"]), said["n_samples"]).tolist()
        assert rows.samples.tolist() == list(range(said["n_samples"])) * said["n_cells"]
    for first, last in pairwise(indptr):
        assert all(a < b for a, b in pairwise(indices[first:last])), "ascending in every row"
    dense = np.zeros((said["n_cells"] * said["n_samples"], n_genes), np.int64)
    dense[np.repeat(np.arange(len(dense)), np.diff(indptr)), indices] = counts
    return dense.reshape(said["n_cells"], said["n_samples"], n_genes).transpose(0, 2, 1)


def problem(response: httpx.Response, status: int) -> dict[str, str]:
    """Check that a refusal has the body that every refusal has; return it."""
    assert response.status_code == status, response.text
    said = response.json()
    assert set(said) == {"error", "detail", "fix", "request_id"}
    assert all(isinstance(value, str) and value for value in said.values()), said
    assert said["request_id"] == response.headers["X-Request-ID"]
    assert not said["detail"].removesuffix("...").endswith(".")
    assert "Traceback" not in response.text
    return said


@pytest.mark.parametrize("sent", ["json", "arrow"])
@pytest.mark.parametrize("accept", [JSON, ARROW])
def test_draws_are_those_of_the_model_in_every_format(http, body, expected, trained, sent, accept):
    if sent == "json":
        response = http.post("/v1/sample", json=body, headers={"Accept": accept})
    else:
        headers = {"Accept": accept, "Content-Type": ARROW}
        response = http.post("/v1/sample", content=arrow_body(body), headers=headers)
    assert np.array_equal(counts_of(response, trained.registry.n_genes), expected)
    assert response.headers["content-type"] == accept
    assert response.headers["X-Rayvaec-Seed"] == "7"
    assert response.headers["X-Rayvaec-Model"] == trained.hash
    assert response.headers["X-Request-ID"]


def test_dense_counts_are_the_same_cells(http, body, expected, adata, trained):
    dense = adata[:5, list(trained.registry.genes)].X.toarray().tolist()
    for cells in ({"cells": {"dense": dense}}, {"dense": dense}):
        request = {**changed(body, cells=None), **cells}
        response = http.post("/v1/sample", json=request)
        assert np.array_equal(counts_of(response, trained.registry.n_genes), expected)


def test_a_cell_is_drawn_alike_alone_and_in_any_order(http, body, expected, trained):
    n = trained.registry.n_genes
    for cell in (3, 0):
        first, last = body["cells"]["indptr"][cell : cell + 2]
        one = changed(
            body,
            labels=[body["labels"][cell]],
            cell_ids=[body["cell_ids"][cell]],
            cells={
                "indptr": [0, last - first],
                "indices": body["cells"]["indices"][first:last],
                "counts": body["cells"]["counts"][first:last],
            },
        )
        assert np.array_equal(counts_of(http.post("/v1/sample", json=one), n)[0], expected[cell])


def test_without_names_the_position_is_the_key(http, body, expected, trained):
    unnamed = changed(body, cell_ids=None)
    first, again = (http.post("/v1/sample", json=unnamed) for _ in range(2))
    assert first.content == again.content
    assert not np.array_equal(counts_of(first, trained.registry.n_genes), expected)


def test_a_seed_is_chosen_and_told(http, body):
    unseeded = changed(body, seed=None)
    answers = [http.post("/v1/sample", json=unseeded).json() for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    assert answers[0]["draws"] != answers[1]["draws"]
    again = http.post("/v1/sample", json=changed(body, seed=answers[0]["seed"])).json()
    assert again["draws"] == answers[0]["draws"]


def test_the_largest_seed_is_taken(http, body):
    assert http.post("/v1/sample", json=changed(body, seed=2**63 - 1)).json()["seed"] == 2**63 - 1


def test_requests_at_the_same_time_do_not_change_each_other(http, body, hold_sampler):
    requests = [
        changed(body, seed=seed, n_samples=n, labels=labels)
        for seed in (7, 8)
        for n in (1, 3)
        for labels in (body["labels"], body["labels"][::-1])
    ] * 3
    alone = [http.post("/v1/sample", json=request) for request in requests]
    held = hold_sampler(http)

    async def meanwhile() -> None:
        await held.until_reached(len(requests))
        held.go.set()

    asked = [("POST", "/v1/sample", {"json": request}) for request in requests]
    together = http.together(*asked, meanwhile=meanwhile)
    # Whatever waited when the sampler began, and then all that came while it worked.
    assert sum(held.calls) == len(requests)
    assert max(held.calls) >= len(requests) // 2
    for one, other in zip(alone, together, strict=True):
        assert one.status_code == other.status_code == 200
        assert one.content == other.content


def test_large_requests_are_cut_into_jobs_of_the_same_draws(http, body, trained, monkeypatch):
    whole = http.post("/v1/sample", json=changed(body, n_samples=150))
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    for accept in (JSON, ARROW):
        cut = http.post("/v1/sample", json=changed(body, n_samples=150), headers={"Accept": accept})
        n = trained.registry.n_genes
        assert np.array_equal(counts_of(cut, n), counts_of(whole, n))


@pytest.mark.parametrize("job_values", [1, 2**21])
@pytest.mark.parametrize("accept", [JSON, ARROW])
def test_moments_are_those_of_the_draws(
    http, body, adata, trained, monkeypatch, accept, job_values
):
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", job_values)
    draws = trained.sample(adata[:5].copy(), 100, seed=7)
    names = ["zero_fraction", "mean", "var"]
    columns = [*names, "quantile_0.05", "quantile_0.5", "quantile_1.0"]
    response = http.post(
        "/v1/sample",
        json=changed(
            body, n_samples=100, reduce=["quantiles", *names], quantiles=[0.05, 0.5, 1, 0.5]
        ),
        headers={"Accept": accept},
    )
    moments = (
        {name: np.array(rows) for name, rows in response.json()["moments"].items()}
        if accept == JSON
        else AnswerStream([response.content]).dense()
    )
    assert list(moments) == columns
    for name in columns[3:]:
        expected = np.quantile(draws, float(name.removeprefix("quantile_")), axis=2)
        np.testing.assert_allclose(moments[name], expected, rtol=1e-6)
    np.testing.assert_allclose(moments["mean"], draws.mean(2), rtol=1e-6)
    np.testing.assert_allclose(moments["var"], draws.var(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments["zero_fraction"], (draws == 0).mean(2), atol=1e-6)


@pytest.mark.parametrize("accept", [JSON, ARROW])
def test_chosen_genes_come_in_the_order_asked_for(http, body, expected, trained, accept):
    genes = list(trained.registry.genes)
    wanted = [genes[-1], genes[3], genes[50], genes[0]]
    columns = [genes.index(gene) for gene in wanted]
    request = changed(body, out_genes=wanted)
    response = http.post("/v1/sample", json=request, headers={"Accept": accept})
    assert np.array_equal(counts_of(response, 4), expected[:, columns])
    reduced = http.post("/v1/sample", json={**request, "reduce": ["mean"]}).json()
    np.testing.assert_allclose(reduced["moments"]["mean"], expected[:, columns].mean(2), rtol=1e-6)


def test_genes_are_aligned_by_name(http, body, expected, trained):
    names = list(trained.registry.genes)
    order = np.random.default_rng(0).permutation(len(names) + 1)
    shuffled = [[*names, "not in the model"][i] for i in order]
    place = {name: position for position, name in enumerate(shuffled)}
    indices = [place[names[i]] for i in body["cells"]["indices"]]
    request = changed(body, genes=shuffled, cells={"indices": indices})
    response = http.post("/v1/sample", json=request)
    assert np.array_equal(counts_of(response, len(names)), expected)
    assert response.json()["extra_genes"] == ["not in the model"]
    assert response.json()["missing_genes"] == []


def test_missing_genes_are_refused_unless_allowed(http, body, trained):
    genes = trained.registry.genes[:-2]
    kept = changed(
        body, genes=genes, cells={"indptr": [0, 1, 1, 1, 1, 1], "indices": [0], "counts": [1]}
    )
    said = problem(http.post("/v1/sample", json=kept), 422)
    assert f"lacks 2 of 120 genes: {', '.join(trained.registry.genes[-2:])}" in said["detail"]
    assert "set allow_missing to true" in said["fix"]
    allowed = http.post("/v1/sample", json={**kept, "allow_missing": True})
    assert allowed.json()["missing_genes"] == list(trained.registry.genes[-2:])


def test_genes_of_another_kind_are_refused_even_then(http, body):
    other = {"genes": ["ENSG1", "ENSG2"], "cells": {"dense": [[1, 2]] * 5}, "allow_missing": True}
    said = problem(http.post("/v1/sample", json={**changed(body, cells=None), **other}), 422)
    assert "has none of the 120 genes" in said["detail"]


def test_a_cell_without_counts_is_drawn(http, body):
    empty = changed(body, cells={"indptr": [0] * 6, "indices": [], "counts": []})
    assert http.post("/v1/sample", json=empty).json()["draws"]["indptr"] == [0] * 16


@pytest.mark.parametrize("accept", [JSON, ARROW])
def test_latent_and_expression_are_those_of_the_model(http, body, adata, trained, accept):
    cells, headers = without_draws(body), {"Accept": accept}
    mean, variance = trained.latent(adata[:5].copy(), return_dist=True)
    answers = {
        "/v1/latent": {"mean": mean, "variance": variance},
        "/v1/expression": {"expression": trained.expression(adata[:5].copy())},
    }
    for path, columns in answers.items():
        response = http.post(path, json=cells, headers=headers)
        assert response.status_code == 200, response.text
        json_answer = accept == JSON
        got = response.json() if json_answer else AnswerStream([response.content]).dense()
        for name, values in columns.items():
            assert np.array_equal(np.array(got[name], np.float32), values)


def test_expression_of_chosen_genes(http, body, adata, trained):
    wanted = [trained.registry.genes[5], trained.registry.genes[1]]
    response = http.post("/v1/expression", json={**without_draws(body), "out_genes": wanted})
    whole = trained.expression(adata[:5].copy())
    assert np.array_equal(np.array(response.json()["expression"], np.float32), whole[:, [5, 1]])


def test_new_cells_are_those_of_the_model(http, trained):
    from rayvaec.kernels.rng import cell_keys, position_keys

    labels = list(trained.registry.labels)
    codes = np.array([0, 0, 0])
    draws = posterior.generate(
        trained.module, codes, np.full(3, 500, np.float32), position_keys(0, 3), 2, 5
    )
    one = {"label": labels[0], "n_cells": 3, "library": 500, "n_samples": 2, "seed": 5}
    each = {"labels": labels[:1] * 3, "library": [500.0] * 3, "n_samples": 2, "seed": 5}
    for request in (one, each):
        got = http.post("/v1/generate", json=request).json()["draws"]
        assert got["indptr"] == draws.indptr.tolist()
        assert got["indices"] == draws.indices.tolist()
        assert got["counts"] == draws.counts.tolist()
    named = protocol.encode_new_cells(
        labels[:2], np.array([10, 1e4]), None, ["x", "y"], {"seed": 5}
    )
    response = http.post("/v1/generate", content=named, headers={"Content-Type": ARROW})
    keys = cell_keys(["x", "y"])
    library = np.array([10, 1e4], np.float32)
    draws = posterior.generate(trained.module, np.array([0, 1]), library, keys, 1, 5)
    assert response.json()["draws"]["counts"] == draws.counts.tolist()


def test_the_model_is_described(http, trained):
    response = http.get("/v1/model")
    said = response.json()
    assert said["genes"] == list(trained.registry.genes)
    assert said["labels"] == list(trained.registry.labels)
    assert said["model_hash"] == response.headers["X-Rayvaec-Model"] == trained.hash
    assert said["registry_hash"] == trained.registry.hash()
    assert said["config"]["n_input"] == len(said["genes"])
    assert said["limits"]["max_cost"] > 10**9


def test_health_needs_no_token(serve_with):
    http = serve_with(digest(TOKEN))
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}


CELLS_REFUSED = [
    ({"cells": {"indptr": [0, 1, 2]}}, "ends at 2, and there are", "ragged_arrays"),
    ({"cells": {"indptr": []}}, "no cells", "no_cells"),
    ({"cells": {"indptr": [0]}}, "no cells", "no_cells"),
    ({"cells": {"indptr": [0, 3, 2, 2, 2, 3], "indices": [0, 1, 2], "counts": [1, 1, 1]}},
     "cells.indptr[2] is 2, below the 3 before it", "ragged_arrays"),
    ({"cells": {"indptr": [1, 1, 1, 1, 1, 3], "indices": [0, 1, 2], "counts": [1, 1, 1]}},
     "starts at 1", "ragged_arrays"),
    ({"cells": {"counts": [1, 2]}}, "and cells.counts has 2", "ragged_arrays"),
    ({"labels": ["type_0"]}, "labels has 1 entries for 5 cells", "ragged_arrays"),
    ({"cell_ids": ["a", "b"]}, "cell_ids has 2 entries for 5 cells", "ragged_arrays"),
    ({"cell_ids": ["a", "b", "a", "c", "d"]}, "cell_ids has 'a' more than once", "invalid_request"),
    ({"labels": ["type_0", "type_O", "type_0", "type_0", "type_0"]},
     "unknown label 'type_O'", "unknown_label"),
    ({"genes": [f"ENSG{i}" for i in range(120)]}, "has none of the 120 genes", "unknown_gene"),
    ({"labels": ["type_0", None] + ["type_0"] * 3},
     "labels has no label for 1 of 5 cells, the first ", "unknown_label"),
    ({"labels": ["type_0"] * 4 + [["type_0"]]}, "labels[4] is ['type_0']", "invalid_request"),
    ({"labels": "type_0"}, "labels is 'type_0'", "invalid_request"),
    ({"labels": ["type_0"] * 4 + ["x" * 1001]}, "labels[4] is a name of 1,001 characters",
     "invalid_request"),
    ({"genes": [None] * 120}, "genes[0] is None", "invalid_request"),
    ({"cells": {"indices": ["0"]}}, "cells.indices[0] is '0'", "invalid_request"),
    ({"cells": {"indices": [0, True]}}, "cells.indices[1] is True", "invalid_request"),
    ({"cells": {"indptr": [0, 2**63]}}, "cells.indptr[1] is 9223372036854775808",
     "invalid_request"),
    ({"cells": {"counts": [1, 2, None]}}, "cells.counts[2] is None", "invalid_request"),
    ({"cells": {"dense": [[1, 2], [3, 4]]}}, "cells has dense beside", "invalid_request"),
    ({"cells": {"counts": "many"}}, "cells.counts is 'many'", "invalid_request"),
    ({"surprise": 1}, "unknown field surprise", "invalid_request"),
    ({"labels": None}, "labels is missing", "invalid_request"),
]  # fmt: skip
DRAWS_REFUSED = [
    ({"n_samples": 0}, "n_samples is 0", "invalid_request"),
    ({"n_samples": [1] * 1000}, "n_samples is [1, 1, 1, 1, 1, 1, ...]", "invalid_request"),
    ({"out_genes": []}, "out_genes is []", "invalid_request"),
    ({"n_samples": -3}, "n_samples is -3", "invalid_request"),
    ({"n_samples": 1.5}, "n_samples is 1.5", "invalid_request"),
    ({"n_samples": "3"}, "n_samples is '3'", "invalid_request"),
    ({"n_samples": None}, "n_samples is missing", "invalid_request"),
    ({"seed": -1}, "seed is -1", "invalid_request"),
    ({"seed": 2**63}, "seed is 9223372036854775808", "invalid_request"),
    ({"reduce": ["median"]}, "reduce[0] is 'median'", "invalid_request"),
    ({"reduce": []}, "reduce is []", "invalid_request"),
    (
        {"reduce": ["quantiles"]},
        'needs both "quantiles" in reduce and quantiles',
        "invalid_request",
    ),
    ({"quantiles": [0.5]}, 'needs both "quantiles" in', "invalid_request"),
    ({"reduce": ["quantiles"], "quantiles": [1.5]}, "quantiles[0] is 1.5", "invalid_request"),
    ({"reduce": ["quantiles"], "quantiles": [0.5] * 33}, "quantiles is [0.5", "invalid_request"),
    ({"out_genes": ["gene_0001", "nope"]}, "1 genes that the model lacks: nope", "unknown_gene"),
    ({"out_genes": ["gene_0001"] * 2}, "names a gene twice", "unknown_gene"),
]


@pytest.mark.parametrize(("changes", "words", "error"), CELLS_REFUSED + DRAWS_REFUSED)
def test_a_request_that_does_not_fit_is_refused(http, body, changes, words, error):
    request = changed(body, **changes)
    if "labels" in changes and changes["labels"] is None:
        request.pop("labels", None)
    said = problem(http.post("/v1/sample", json=request), 422)
    assert words in said["detail"]
    assert said["error"] == error


@pytest.mark.parametrize(("changes", "words", "error"), CELLS_REFUSED)
@pytest.mark.parametrize("path", ["/v1/latent", "/v1/expression"])
def test_the_other_routes_refuse_the_same_cells(http, body, path, changes, words, error):
    request = without_draws(changed(body, **changes))
    said = problem(http.post(path, json=request), 422)
    assert words in said["detail"]
    assert said["error"] == error


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, "-1 at cell {cell}, gene {gene} is negative"),
        (0.5, "0.5 at cell {cell}, gene {gene} is not a whole number"),
        (2**31, "at cell {cell}, gene {gene} is above the largest count"),
        (1e400, "inf at cell {cell}, gene {gene} is not finite"),
        (float("nan"), "nan at cell {cell}, gene {gene} is not finite"),
    ],
)
@pytest.mark.parametrize("sent", ["json", "dense", "arrow"])
def test_values_that_are_no_counts_are_named(http, body, trained, sent, value, words):
    position = body["cells"]["indptr"][2] + 1
    counts = [*body["cells"]["counts"]]
    counts[position] = value
    request = changed(body, cells={"counts": counts})
    if sent == "arrow":
        content, kind = arrow_body(request), ARROW
    else:
        if sent == "dense":
            request = changed(body, cells=None) | {"dense": dense_rows(request)}
        content, kind = json.dumps(request).encode(), JSON
    response = http.post("/v1/sample", content=content, headers={"Content-Type": kind})
    if kind == JSON and not np.isfinite(value):
        said = problem(response, 400)
        assert f"has {json.dumps(value)} at character " in said["detail"]
        assert said["error"] == "undecodable"
    else:
        said = problem(response, 422)
        gene = trained.registry.genes[body["cells"]["indices"][position]]
        assert words.format(cell=body["cell_ids"][2], gene=gene) in said["detail"]
        assert said["error"] == "bad_counts"
    assert "raw counts" in said["fix"]


def dense_rows(request: dict[str, Any]) -> list[list[Any]]:
    """Return a request's counts as one list of 120 a cell."""
    indptr, indices, counts = (request["cells"][name] for name in ("indptr", "indices", "counts"))
    rows = [[0] * 120 for _ in indptr[1:]]
    for row, (first, last) in zip(rows, pairwise(indptr), strict=True):
        for index, count in zip(indices[first:last], counts[first:last], strict=True):
            row[index] = count
    return rows


@pytest.mark.parametrize(
    ("sent", "index"), [("json", -1), ("json", 2**40), ("arrow", -1), ("arrow", 120)]
)
def test_a_gene_index_out_of_range_is_named(http, body, sent, index):
    indices = [*body["cells"]["indices"]]
    indices[body["cells"]["indptr"][3]] = index
    request = changed(body, cells={"indices": indices})
    if sent == "json":
        response = http.post("/v1/sample", json=request)
    else:
        response = http.post(
            "/v1/sample", content=arrow_body(request), headers={"Content-Type": ARROW}
        )
    said = problem(response, 422)
    assert f"gene index {index} of cell {body['cell_ids'][3]}" in said["detail"]
    assert "from 0 to 119" in said["fix"]


@pytest.mark.parametrize("sent", ["json", "arrow"])
def test_entries_of_the_same_gene_are_summed(http, body, sent):
    def answer(cells: dict[str, Any]) -> httpx.Response:
        request = changed(body, cells=cells)
        content = json.dumps(request).encode() if sent == "json" else arrow_body(request)
        kind = JSON if sent == "json" else ARROW
        return http.post("/v1/sample", content=content, headers={"Content-Type": kind})

    twice = {"indptr": [0, 1, 4, 4, 4, 4], "indices": [9, 4, 7, 4], "counts": [1, 200, 1, 200]}
    once = {"indptr": [0, 1, 3, 3, 3, 3], "indices": [9, 4, 7], "counts": [1, 400, 1]}
    assert answer(twice).content == answer(once).content
    said = problem(answer({**twice, "counts": [1, 2**30, 1, 2**30]}), 422)
    assert "2147483648" in said["detail"]
    assert said["error"] == "bad_counts"


def test_scalars_stand_for_their_text_as_names(trained):
    registry = trained.registry
    numbered = Registry(registry.genes, ("0", "1", "True"), "leiden", ("0", "1.5"), "batch")
    cells = {"indptr": [0, 1, 1, 1], "indices": [0], "counts": [1]}
    given = {"cells": cells, "labels": [0, "1", True], "batches": [0, 1.5, "0"]}
    model: Any = SimpleNamespace(registry=numbered, hash="")
    given |= {"cell_ids": [7, "8", 9], "n_samples": 1}
    task = requests.sample_task(Body(json.dumps(given).encode(), JSON, JSON), model, Limits())
    assert task.about.cells.labels.tolist() == [0, 1, 2]
    assert task.about.cells.batches.tolist() == [0, 1, 0]
    assert task.about.names == ["7", "8", "9"]


def test_dense_rows_must_hold_numbers(http, body):
    request = changed(body, cells=None)
    dense = {"dense": [[1] * 120] * 4 + [[1] * 119 + ["2"]]}
    said = problem(http.post("/v1/sample", json={**request, "cells": dense}), 422)
    assert "cells.dense[4][119] is '2'" in said["detail"]


def test_dense_rows_must_hold_every_gene(http, body):
    request = changed(body, cells=None)
    dense = {"dense": [[1] * 120] * 4 + [[1] * 119]}
    said = problem(http.post("/v1/sample", json={**request, "cells": dense}), 422)
    assert "cells.dense[4] has 119 counts for 120 genes" in said["detail"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"library": 100}, "needs label (of all cells) or labels"),
        ({"label": "type_0", "labels": ["type_0"], "library": 100}, "one of the two"),
        ({"label": "type_0"}, "library is missing"),
        ({"label": "type_0", "library": 0}, "library[0] is 0"),
        ({"label": "type_0", "library": -5}, "library[0] is -5"),
        ({"label": "type_0", "library": [100, 100]}, "library has 2 entries for 1 cells"),
        ({"labels": ["type_0"] * 2, "library": [100, 1e30]}, "library[1] is 1e+30"),
        ({"labels": ["type_0"] * 2, "n_cells": 3, "library": 1}, "has n_cells 3 and 2 labels"),
        ({"labels": [], "library": 1}, "no cells"),
        ({"label": "type_0", "library": True}, "library is True"),
        ({"label": "type_0", "n_cells": 0, "library": 1}, "n_cells is 0"),
        ({"label": "Type_0", "n_cells": 2, "library": 1}, "unknown label 'Type_0'"),
        ({"label": "type_0", "library": 1, "cell_ids": ["a", "b"]}, "cell_ids has 2 entries"),
    ],
)
def test_new_cells_that_cannot_be_are_refused(http, request_, words):
    assert words in problem(http.post("/v1/generate", json=request_), 422)["detail"]


def test_an_unknown_label_is_answered_with_the_nearest(http, body):
    labels = ["tipe_1", *body["labels"][1:]]
    said = problem(http.post("/v1/sample", json=changed(body, labels=labels)), 422)
    assert said["fix"].startswith("valid ones are type_1, ")


def test_json_is_given_up_at_its_own_limit(serve_with, body):
    http = serve_with(max_json_bytes=1000)
    said = problem(http.post("/v1/sample", json=body), 413)
    assert said["error"] == "body_too_large"
    assert "the largest allowed is 1,000" in said["detail"]
    packed = gzip.compress(json.dumps(body).encode())
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    said = problem(http.post("/v1/sample", content=packed, headers=headers), 413)
    assert "more than 1,000 bytes decompressed" in said["detail"]
    arrow = http.post("/v1/sample", content=arrow_body(body), headers={"Content-Type": ARROW})
    assert arrow.status_code == 200


@pytest.mark.parametrize("data", [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 10_000])
def test_what_is_no_json_is_undecodable(http, data):
    response = http.post("/v1/sample", content=data, headers={"Content-Type": JSON})
    assert problem(response, 400)["error"] == "undecodable"


@pytest.mark.parametrize("data", [b"", b"{", b"ARROW1\0\0", b"\xff" * 64])
def test_what_is_no_arrow_is_undecodable(http, data):
    for path in ("/v1/sample", "/v1/generate", "/v1/latent"):
        response = http.post(path, content=data, headers={"Content-Type": ARROW})
        assert problem(response, 400)["error"] == "undecodable"


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Content-Type": "text/plain"}, 415, "Content-Type 'text/plain'"),
        ({"Content-Type": ""}, 415, "Content-Type ''"),
        ({"Content-Type": JSON, "Content-Encoding": "br"}, 415, "Content-Encoding 'br'"),
        ({"Content-Type": JSON, "Content-Encoding": "gzip, gzip"}, 415, "'gzip, gzip'"),
        ({"Content-Type": JSON, "Accept": "image/png"}, 406, "Accept 'image/png'"),
        ({"Content-Type": JSON, "Accept": f"{JSON};q=0"}, 406, "Accept"),
    ],
)
def test_media_types_that_are_not_understood(http, body, headers, status, words):
    response = http.post("/v1/sample", content=json.dumps(body), headers=headers)
    assert words in problem(response, status)["detail"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", JSON),
        ("", JSON),
        ("text/html, application/*;q=0.8", JSON),
        (f"{JSON};q=0.5, {ARROW}", ARROW),
        (f"{ARROW};q=0.2, */*;q=0.1", ARROW),
    ],
)
def test_accept_chooses_the_answer(http, body, accept, kind):
    response = http.post("/v1/sample", json=body, headers={"Accept": accept})
    assert response.headers["content-type"] == kind


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/sample/", 404),
        ("GET", "/v1/sample", 405),
        ("DELETE", "/v1/model", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_unknown_routes_have_the_same_body(http, method, path, status):
    response = http.together((method, path, {}))[0]
    assert path in problem(response, status)["detail"]
    assert ("Allow" in response.headers) == (status == 405)


def test_too_much_is_refused_before_it_is_done(serve_with, body, monkeypatch):
    http = serve_with(max_cost=5 * 120 * 3, max_json_cost=5 * 120 * 2)
    monkeypatch.setattr(posterior, "draw", None)
    said = problem(http.post("/v1/sample", json=body), 413)
    assert "5 * 120 * 3 = 1,800, above the largest allowed, 1,200" in said["detail"]
    more = http.post("/v1/sample", json=changed(body, n_samples=4), headers={"Accept": ARROW})
    assert "above the largest allowed, 1,800" in problem(more, 413)["detail"]
    new = {"label": "type_0", "n_cells": 2_000_000_000, "library": 1}
    assert "2,000,000,000 cells" in problem(http.post("/v1/generate", json=new), 413)["detail"]


def test_dense_json_answers_are_bounded(serve_with, body):
    http = serve_with(max_json_values=599)
    for path, request in (
        ("/v1/sample", changed(body, reduce=["mean"])),
        ("/v1/expression", without_draws(body)),
    ):
        assert "600 numbers" in problem(http.post(path, json=request), 413)["detail"]
        accepted = http.post(path, json=request, headers={"Accept": ARROW})
        assert accepted.status_code == 200
        few = {**request, "out_genes": ["gene_0001"]}
        assert http.post(path, json=few).status_code == 200


def test_a_body_above_the_limit_is_refused(serve_with, body):
    http = serve_with(max_body_bytes=1000)
    assert problem(http.post("/v1/sample", json=body), 413)["error"] == "body_too_large"


def test_a_wrong_or_no_token_is_refused(serve_with, body):
    http = serve_with(digest(TOKEN))
    for path in ("/v1/model", "/v1/sample", "/nowhere"):
        response = http.post(path, json=body)
        assert problem(response, 401)["error"] == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    wrong = http.post("/v1/sample", json=body, headers={"Authorization": f"Bearer {TOKEN}x"})
    assert "wrong token" in problem(wrong, 401)["detail"]
    assert TOKEN not in wrong.text
    right = http.post("/v1/sample", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert right.status_code == 200


def test_without_a_token_only_this_machine_is_answered(serve_with, body):
    http = serve_with()
    http.base_url = "http://192.0.2.1:8000"
    assert "loopback" in problem(http.post("/v1/sample", json=body), 401)["detail"]
    assert http.get("/healthz").status_code == 200


def test_who_finds_no_place_is_told_when_to_come_back(serve_with, body, hold_sampler):
    http = serve_with(max_requests=2)
    held, late = hold_sampler(http), []

    async def meanwhile() -> None:
        await held.until_reached(2)
        async with http.client() as client:
            late.extend([await client.post("/v1/sample", json=body) for _ in range(2)])
            late.append(await client.get("/healthz"))
        held.go.set()

    work = ("POST", "/v1/sample", {"json": body})
    answers = http.together(work, work, meanwhile=meanwhile)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert late.pop().status_code == 200
    for answer in late:
        assert problem(answer, 429)["error"] == "queue_full"
        assert int(answer.headers["Retry-After"]) >= 1
    assert http.post("/v1/sample", json=body).status_code == 200


@pytest.mark.parametrize("accept", [JSON, ARROW])
def test_work_that_takes_too_long_is_given_up(serve_with, body, hold_sampler, clock, accept):
    http = serve_with(timeout_s=60)
    held = hold_sampler(http)

    async def meanwhile() -> None:
        await held.until_reached(1)
        clock(61)

    work = ("POST", "/v1/sample", {"json": body, "headers": {"Accept": accept}})
    (response,) = http.together(work, meanwhile=meanwhile)
    held.go.set()
    assert problem(response, 504)["error"] == "timeout"


def test_an_answer_that_has_begun_is_not_timed(serve_with, body, monkeypatch, clock):
    http = serve_with(timeout_s=60)
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    request = changed(body, n_samples=640)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if message["type"] == "http.response.start":
            clock(61)

    coming = [{"type": "http.request", "body": json.dumps(request).encode()}]

    async def receive() -> Any:
        return coming.pop() if coming else await asyncio.Event().wait()

    headers = {"host": "localhost", "content-type": JSON, "accept": ARROW}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/sample", "headers": raw}
    scope |= {"query_string": b"", "server": ("127.0.0.1", 8000)}
    asyncio.run(http.app(scope, receive, send))
    assert len(AnswerStream([b"".join(sent)]).draws().cells) == 5 * 640


def test_cells_that_cannot_be_drawn_are_refused_alone(http, body, monkeypatch, hold_sampler):
    draw = posterior.draw

    def fails_for_large(module: Any, cells: Any, *args: Any, **kwargs: Any) -> Any:
        if cells.counts.max() > 10**9:
            raise CountsError("a rate is too large", "send raw counts")
        return draw(module, cells, *args, **kwargs)

    monkeypatch.setattr(posterior, "draw", fails_for_large)
    held = hold_sampler(http)

    async def meanwhile() -> None:
        await held.until_reached(5)
        held.go.set()

    huge = changed(body, cells={"counts": [2**31 - 1] * len(body["cells"]["counts"])})
    requests = [("POST", "/v1/sample", {"json": r}) for r in (body, huge, body, huge, body)]
    answers = http.together(*requests, meanwhile=meanwhile)
    assert [answer.status_code for answer in answers] == [200, 422, 200, 422, 200]
    assert sum(held.calls) == 5
    assert max(held.calls) >= 3


def test_a_failure_of_the_server_tells_nothing(serve_with, body, monkeypatch, caplog):
    http = serve_with()

    number = 12344 + 1

    def broken(*_: Any) -> None:
        raise ZeroDivisionError(f"secret {number}")

    monkeypatch.setattr(http.app.state.services["model"]._merger, "_work", broken)
    with caplog.at_level(logging.ERROR, "rayvaec"):
        response = http.post("/v1/sample", json=body)
    said = problem(response, 500)
    assert said["error"] == "internal"
    assert "12345" not in response.text
    assert "ZeroDivisionError" in caplog.text
    assert said["request_id"] in caplog.text
    assert "12345" not in caplog.text


def test_the_clients_request_id_is_kept_if_it_is_fit(http):
    assert http.get("/nowhere", headers={"X-Request-ID": "abc-1"}).json()["request_id"] == "abc-1"
    odd = http.get("/nowhere", headers={"X-Request-ID": "x" * 500}).json()["request_id"]
    assert odd != "x" * 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dense", "indptr", "indices", "counts"]), inner)
    ),
    max_leaves=10,
)
FIELDS = (
    *("cells", "dense", "genes", "labels", "batches", "cell_ids", "n_samples", "seed"),
    *("reduce", "out_genes", "allow_missing", "label", "n_cells", "library"),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["/v1/sample", "/v1/generate", "/v1/latent", "/v1/expression"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    st.booleans(),
)
def test_no_body_breaks_the_server(http, path, changes, small):
    cells = {"indptr": [0, 1], "indices": [0], "counts": [1]}
    base = {"labels": ["type_0"], "cells": cells, "n_samples": 1} if small else {}
    if path == "/v1/generate" and small:
        base = {"label": "type_0", "library": 10}
    content = json.dumps({**base, **changes})
    response = http.post(path, content=content, headers={"Content-Type": JSON})
    assert response.status_code in (200, 400, 413, 422), response.text
    if response.status_code != 200:
        problem(response, response.status_code)
