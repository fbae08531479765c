"""The same cells, names and seed: the same draws from every format, and from the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from rayvaec import protocol
from rayvaec.cli import main
from rayvaec.client import anndata_io
from rayvaec.protocol import ARROW, H5AD, JSON, AnswerStream

N_SAMPLES, SEED = 3, 11


@pytest.fixture(scope="module")
def drawn_by_command(
    ray_local: None, model_path: Path, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> anndata.AnnData:
    """What ``rayvaec sample`` writes for every cell of the store."""
    out = tmp_path_factory.mktemp("drawn") / "out.zarr"
    options = ["--n-samples", str(N_SAMPLES), "--seed", str(SEED)]
    assert main(["sample", str(model_path), str(store_path), "--out", str(out), *options]) == 0
    return anndata.read_zarr(out)


def body(cells: anndata.AnnData, kind: str) -> dict[str, Any]:
    """Return address and body of a request for draws, as the arguments of httpx."""
    raw, genes = anndata_io.cells_of(cells, "cell_type", None, None)
    asked = {"n_samples": N_SAMPLES, "seed": SEED, "genes": genes}
    if kind == ARROW:
        return {"url": "/v1/sample", "content": protocol.encode_cells(raw, asked)}
    if kind == H5AD:
        file = io.BytesIO()
        with h5py.File(file, "w") as h5:
            anndata.io.write_elem(h5, "/", cells)
        url = f"/v1/sample?n_samples={N_SAMPLES}&seed={SEED}"
        return {"url": url, "content": file.getvalue()}
    columns = {"indptr": raw.indptr, "indices": raw.indices, "counts": raw.counts}
    csr = {name: values.tolist() for name, values in columns.items()}
    named = {"labels": list(raw.labels), "cell_ids": list(raw.cell_ids or ())}
    return {"url": "/v1/sample", "json": {"cells": csr, **named, **asked}}


def draws(answer: bytes, kind: str, n_genes: int, tmp_path: Path) -> np.ndarray:
    """Return an answer's draws: array[n_cells, n_samples, n_genes]."""
    if kind == H5AD:
        path = tmp_path / "answer.h5ad"
        path.write_bytes(answer)
        layers = anndata.read_h5ad(path).layers
        return np.stack([layers[f"sample_{i}"].toarray() for i in range(N_SAMPLES)], axis=1)
    if kind == ARROW:
        rows = AnswerStream([answer]).draws()
        parts = rows.counts, rows.indices, rows.indptr
    else:
        said = json.loads(answer)["draws"]
        parts = said["counts"], said["indices"], said["indptr"]
    matrix = sparse.csr_matrix(parts, shape=(len(parts[2]) - 1, n_genes))
    return matrix.toarray().reshape(-1, N_SAMPLES, n_genes)


@pytest.mark.ray
@pytest.mark.parametrize("sent", [JSON, ARROW, H5AD])
@pytest.mark.parametrize("accept", [JSON, ARROW, H5AD])
def test_every_format_gives_the_draws_of_the_command(
    http, adata, drawn_by_command, tmp_path, sent, accept
):
    cells = adata[3:9].copy()
    at = drawn_by_command.obs_names.get_indexer(cells.obs_names)
    assert (at >= 0).all()
    layers = [drawn_by_command.layers[f"sample_{i}"][at].toarray() for i in range(N_SAMPLES)]
    asked = body(cells, sent)
    headers = {"Content-Type": sent, "Accept": accept}
    response = http.post(asked.pop("url"), headers=headers, **asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == accept
    answered = draws(response.content, accept, drawn_by_command.n_vars, tmp_path)
    assert np.array_equal(answered, np.stack(layers, axis=1))
    assert answered.any()
