"""Inference on a GPU gives what it gives on CPUs: in process, over a store, and over HTTP.

Draws are equal except where a rate, rounded otherwise, falls on the other side of a number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "inference"))  # every_function

from every_function import FORMS, Case, World, cases, outline

from rayvaec.client import Client
from rayvaec.errors import ConfigError, ModelError
from rayvaec.inference import posterior
from rayvaec.inference.analyses import marginal_likelihood, normalized_expression
from rayvaec.inference.trained_model import load_model
from rayvaec.kernels.rng import position_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
MOSTLY = 0.99
"""Share of drawn counts that are equal at least."""


def run(case: Case, world: World) -> object:
    try:
        return case.run(world)
    except (ConfigError, ModelError) as error:
        return str(error)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.removeprefix("rayvaec."))
def test_every_function_computes_on_a_gpu(case: Case, form: str, tmp_path: Path) -> None:
    if case.name.endswith("learned_prior") and form != "mog":
        pytest.skip("is of models with a mixture prior alone")
    world = World(tmp_path, form)
    expected = outline(run(case, world))
    world.module.to("cuda")
    assert outline(run(case, world)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_results_in_process_are_those_of_a_cpu(form: str, tmp_path: Path) -> None:
    world = World(tmp_path, form)
    module, cells = world.module, world.cells
    wanted = normalized_expression.Wanted(
        2, 1, library_size="latent", genes=np.array([5, 2]), average=False
    )

    def results() -> list[np.ndarray]:
        return [
            *posterior.latent(module, cells),
            posterior.expression(module, cells),
            *posterior.bound_terms(module, cells, 1),
            marginal_likelihood.marginal_ll(module, cells, 40, 1),
            normalized_expression.normalized_expression(module, cells, wanted),
            world.model.get_latent_representation(world.adata, give_mean=False),
        ]

    def drawn() -> list[np.ndarray]:
        library = np.full(len(cells), 60, np.float32)
        batches = {"batches": cells.batches}
        draws = (
            posterior.draw(module, cells, 3, 1),
            posterior.generate(module, cells.labels, library, cells.keys, 3, 1, **batches),
        )
        return [dense(rows, module.config.n_input) for rows in draws]

    expected, expected_draws = results(), drawn()
    module.to("cuda")
    for found, on_cpu in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, on_cpu, **CLOSE)
    for found, on_cpu in zip(drawn(), expected_draws, strict=True):
        assert on_cpu.any()
        assert (found == on_cpu).mean() > MOSTLY


def dense(draws: Any, n_genes: int) -> np.ndarray:
    counts = np.zeros((len(draws.indptr) - 1, n_genes), np.int64)
    counts[np.repeat(np.arange(len(counts)), np.diff(draws.indptr)), draws.indices] = draws.counts
    return counts


VERBS = {
    "sample": ("--n-samples", "2"),
    "embed": (),
    "expression": (),
    "elbo": (),
    "marginal-ll": ("--n-mc-samples", "32"),
    "de": ("--n-samples", "64"),
    "vamp-prior": ("--p", "1"),
    "check": ("--split", "all", "--n-samples", "3"),
}
SUFFIXES = {"de": ".csv", "vamp-prior": ".npz", "check": ""}


@pytest.mark.ray
@pytest.mark.parametrize("verb", VERBS)
def test_bulk_results_are_those_of_a_cpu(
    verb: str, model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    outs = []
    for device, option in (("cpu", ()), ("gpu", ("--use-gpu",))):
        outs.append(tmp_path / f"{device}{SUFFIXES.get(verb, '.zarr')}")
        command = [verb, str(model_path), str(store_path), "--out", str(outs[-1]), *VERBS[verb]]
        ended = subprocess.run(
            [sys.executable, "-m", "rayvaec", *command, *option],
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ended.returncode == 0, ended.stderr
    same(verb, *outs)


def same(verb: str, on_cpu: Path, on_gpu: Path) -> None:
    """Compare two outputs of a command."""
    if verb == "de":
        tables = [pd.read_csv(path).set_index(["comparison", "gene"]) for path in (on_cpu, on_gpu)]
        expected, found = (table.sort_index() for table in tables)
        assert list(found.index) == list(expected.index)
        np.testing.assert_array_equal(found["raw_mean1"], expected["raw_mean1"])
        np.testing.assert_allclose(found["scale1"], expected["scale1"], **CLOSE)
        np.testing.assert_allclose(found["proba_de"], expected["proba_de"], atol=0.05)
    elif verb == "vamp-prior":
        expected, found = np.load(on_cpu), np.load(on_gpu)
        assert set(found) == set(expected)
        for name in ("mean_vprior", "var_vprior", "weights_vprior"):
            np.testing.assert_allclose(found[name], expected[name], **CLOSE)
    elif verb == "check":
        reports = [json.loads((path / "report.json").read_text()) for path in (on_cpu, on_gpu)]
        expected, found = (report["models"][0]["figures"] for report in reports)
        assert set(found) == set(expected)
        for name, figure in expected.items():
            assert found[name]["value"] == pytest.approx(figure["value"], rel=0.02, abs=0.02), name
    else:
        same_adata(anndata.read_zarr(on_cpu), anndata.read_zarr(on_gpu))


def same_adata(expected: anndata.AnnData, found: anndata.AnnData) -> None:
    assert list(found.obs_names) == list(expected.obs_names)
    for name, layer in expected.layers.items():
        if name.startswith("sample_"):
            unequal = (found.layers[name] != layer).nnz
            assert unequal < (1 - MOSTLY) * layer.nnz
        else:
            np.testing.assert_allclose(found.layers[name], layer, **CLOSE)
    for name, values in expected.obsm.items():
        np.testing.assert_allclose(found.obsm[name], values, **CLOSE)
    for name in set(expected.obs) - {"cell_type"}:
        np.testing.assert_allclose(found.obs[name], expected.obs[name], **CLOSE)


@pytest.fixture(scope="module")
def url(model_path: Path) -> Iterator[str]:
    """An endpoint whose replica has a GPU."""
    from rayvaec.serving.deployment import check_port

    port = check_port("127.0.0.1", 0)
    environment = {name: value for name, value in os.environ.items() if name != "RAYVAEC_TOKEN"}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "rayvaec", "serve", str(model_path)),
            *("--port", str(port), "--use-gpu"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or []), daemon=True)
    reader.start()
    try:
        until = time.monotonic() + 250
        while not any(line.startswith("ready:") for line in said):
            assert process.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        reader.join(5)
        if process.stdout:
            process.stdout.close()


@pytest.mark.ray
def test_answers_are_those_of_a_cpu(url: str, model_path: Path, atlas_h5ad: Path) -> None:
    adata = anndata.read_h5ad(atlas_h5ad)[:40].copy()
    model = load_model(model_path)
    with Client(url) as client:
        drawn = client.sample(adata, n_samples=3, seed=2, as_="array")
        found = *client.latent(adata), client.expression(adata)
        new = client.generate(model.registry.labels[0], 200, n_cells=4, seed=1, as_="array")
    assert (drawn == model.sample(adata, 3, 2)).mean() > MOSTLY
    expected = *model.latent(adata, return_dist=True), model.expression(adata)
    for values, on_cpu in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, on_cpu, **CLOSE)
    library, label = np.full(4, 200, np.float32), np.zeros(4, np.int64)
    draws = posterior.generate(model.module, label, library, position_keys(0, 4), 1, 1)
    assert (new[:, :, 0] == dense(draws, model.registry.n_genes)).mean() > MOSTLY
