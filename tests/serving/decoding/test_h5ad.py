"""h5ad bodies: those that anndata writes are read, and no file does any harm."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from rayvaec.errors import RequestError
from rayvaec.protocol import ARROW, H5AD, StreamLimits, decode_cells
from rayvaec.serving.decoding.bodies import query_parameters
from rayvaec.serving.decoding.h5ad.reader import Columns, read_cells
from rayvaec.serving.decoding.h5ad.sandbox import Sandbox, _refusal, receive, send
from rayvaec.serving.deployment import ServeArgs
from rayvaec.serving.engine.engine import Engine
from rayvaec.serving.middleware.limits import Limits

MEGABYTE = 2**20
COLUMNS = Columns("cell_type")
WORKER = "rayvaec.serving.decoding.h5ad.sandbox_worker"


def written(adata: anndata.AnnData, **options: Any) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        anndata.io.write_elem(h5, "/", adata, dataset_kwargs=options)
    return file.getvalue()


def changed(body: bytes, change: Callable[[h5py.File], None]) -> bytes:
    """Do something to a file."""
    file = io.BytesIO(body)
    with h5py.File(file, "r+") as h5:
        change(h5)
    return file.getvalue()


@pytest.fixture(scope="module")
def few(adata: anndata.AnnData) -> anndata.AnnData:
    return adata[:5].copy()


@pytest.fixture(scope="module")
def whole(few: anndata.AnnData) -> bytes:
    return written(few)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(4 * MEGABYTE)
    yield box
    box.close()


def opened(tmp_path: Path, body: bytes) -> anndata.AnnData:
    path = tmp_path / "answer.h5ad"
    path.write_bytes(body)
    return anndata.read_h5ad(path)


def test_draws_are_those_of_the_model(http, whole, few, trained, tmp_path):
    path = "/v1/sample?n_samples=3&seed=7&labels_key=cell_type"
    headers = {"Content-Type": H5AD, "Accept": H5AD}
    response = http.post(path, content=whole, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == H5AD
    answer = opened(tmp_path, response.content)
    expected = trained.sample(few, 3, seed=7)
    assert list(answer.layers) == ["sample_0", "sample_1", "sample_2"]
    for i in range(3):
        assert np.array_equal(answer.layers[f"sample_{i}"].toarray(), expected[:, :, i])
    assert answer.obs_names.tolist() == few.obs_names.tolist()
    assert answer.obs["cell_type"].tolist() == few.obs["cell_type"].tolist()
    assert answer.var_names.tolist() == list(trained.registry.genes)
    assert answer.uns["rayvaec"]["seed"] == 7
    assert answer.uns["rayvaec"]["model_hash"] == trained.hash


def test_genes_are_aligned_and_chosen(http, few, trained, tmp_path):
    genes = list(trained.registry.genes)
    body = written(few[:, [*genes[:0:-1], genes[0]]].copy())
    wanted = [genes[7], genes[2]]
    path = f"/v1/sample?n_samples=50&seed=1&out_genes={wanted[0]}&out_genes={wanted[1]}"
    headers = {"Content-Type": H5AD, "Accept": H5AD}
    moments = f"{path}&reduce=mean&reduce=quantiles&quantiles=0.5&quantiles=1"
    answer = opened(tmp_path, http.post(moments, content=body, headers=headers).content)
    draws = trained.sample(few, 50, seed=1)[:, [7, 2]]
    assert answer.var_names.tolist() == wanted
    np.testing.assert_allclose(answer.layers["mean"], draws.mean(2), rtol=1e-6)
    assert np.array_equal(answer.layers["quantile_0.5"], np.median(draws, axis=2))
    assert np.array_equal(answer.layers["quantile_1.0"], draws.max(2))


def test_latent_and_expression_are_those_of_the_model(http, whole, few, trained, tmp_path):
    headers = {"Content-Type": H5AD, "Accept": H5AD}
    mean, variance = trained.latent(few, return_dist=True)
    answer = opened(tmp_path, http.post("/v1/latent", content=whole, headers=headers).content)
    assert np.array_equal(answer.obsm["X_rayvaec"], mean)
    assert np.array_equal(answer.obsm["X_rayvaec_var"], variance)
    answer = opened(tmp_path, http.post("/v1/expression", content=whole, headers=headers).content)
    assert np.array_equal(answer.layers["expression"], trained.expression(few))


def test_new_cells_come_as_h5ad(http, trained, tmp_path):
    new = {"label": "type_1", "n_cells": 2, "library": 300, "seed": 3}
    answers = [http.post("/v1/generate", json=new, headers={"Accept": a}) for a in (H5AD, "*/*")]
    answer = opened(tmp_path, answers[0].content)
    assert answer.obs["cell_type"].tolist() == ["type_1", "type_1"]
    assert answer.layers["sample_0"].data.tolist() == answers[1].json()["draws"]["counts"]
    refused = http.post("/v1/generate", content=b"", headers={"Content-Type": H5AD})
    assert refused.status_code == 415


def relabelled(adata: anndata.AnnData, kind: Any) -> None:
    adata.obs = adata.obs.assign(cell_type=adata.obs["cell_type"].astype(kind))


FORMS: dict[str, Callable[[anndata.AnnData], None]] = {
    "csr": lambda a: None,
    "csc": lambda a: setattr(a, "X", sparse.csc_matrix(a.X)),
    "dense": lambda a: setattr(a, "X", a.X.toarray().astype(np.float32)),
    "strings": lambda a: relabelled(a, str),
    "nullable": lambda a: relabelled(a, "string"),
    "layer": lambda a: (a.layers.__setitem__("counts", a.X), setattr(a, "X", None)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_what_anndata_writes_is_read(few, form, compression):
    adata = few.copy()
    FORMS[form](adata)
    options = {} if compression is None else {"compression": compression}
    with anndata.settings.override(allow_write_nullable_strings=True):
        body = written(adata, **options)
    columns = Columns("cell_type", None, "counts" if form == "layer" else None)
    cells, genes = read_cells(body, columns, 4 * MEGABYTE)
    assert genes == few.var_names.tolist()
    assert cells.labels == few.obs["cell_type"].tolist()
    assert cells.cell_ids == few.obs_names.tolist()
    x = sparse.csr_matrix((cells.counts, cells.indices, cells.indptr), shape=few.shape)
    assert np.array_equal(x.toarray(), few.X.toarray())


def test_uploads_are_off_by_default(serve_with, trained, whole):
    off = serve_with(h5ad_uploads=False)
    response = off.post("/v1/latent", content=whole, headers={"Content-Type": H5AD})
    assert response.status_code == 415
    assert "unless the server is started with `--enable-h5ad-uploads`" in response.json()["fix"]
    taken = off.get("/openapi.json").json()["paths"]["/v1/latent"]["post"]
    assert H5AD not in taken["requestBody"]["content"]
    assert "parameters" not in taken
    asked = {"label": trained.registry.labels[0], "library": 100}
    answer = off.post("/v1/generate", json=asked, headers={"Accept": H5AD})
    assert answer.headers["content-type"] == H5AD
    service = Engine(trained, Limits())
    assert not service.h5ad_uploads
    service.close()
    assert not ServeArgs(model="model").enable_h5ad_uploads


def test_the_sandbox_gives_what_reading_gives(sandbox, whole, few):
    stream = sandbox.read(whole, COLUMNS, {"n_samples": 2})
    cells, said = decode_cells(stream, StreamLimits(max_bytes=MEGABYTE))
    assert said == {"n_samples": 2, "genes": few.var_names.tolist()}
    assert cells.labels == few.obs["cell_type"].tolist()


def refused(box: Sandbox, body: bytes, columns: Columns = COLUMNS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        box.read(body, columns, {})
    assert caught.value.detail
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            Columns("cell_typ"),
            "the file has no obs column 'cell_typ'; the columns are cell_type",
        ),
        (Columns("cell_type", "donor"), "the file has no obs column 'donor'; the columns are"),
        (
            Columns("cell_type", None, "raw"),
            "the file has no layer 'raw'; leave out layer to read X",
        ),
        (Columns("../X/data"), "the file has no obs column"),
        (Columns("."), "the file has no obs column"),
    ],
)
def test_what_is_not_there_is_named(sandbox, whole, columns, words):
    error = refused(sandbox, whole, columns)
    assert error.status == 422
    assert re.search(words, str(error))


def put(path: str, value: Any) -> Callable[[h5py.File], None]:
    """Replace what stands at a path."""

    def change(h5: h5py.File) -> None:
        del h5[path]
        if callable(value):
            value(h5, path)
        else:
            h5[path] = value

    return change


NOT_H5AD = {
    "no obs": lambda h5: h5.__delitem__("obs"),
    "obs is no group": put("obs", [1, 2]),
    "no index": lambda h5: h5["obs"].attrs.__delitem__("_index"),
    "odd index": lambda h5: h5["obs"].attrs.__setitem__("_index", 5),
    "no X/data": lambda h5: h5["X"].__delitem__("data"),
    "other encoding": lambda h5: h5["X"].attrs.__setitem__("encoding-type", "magic"),
    "other shape": lambda h5: h5["X"].attrs.__setitem__("shape", [5, 5]),
    "no shape": lambda h5: h5["X"].attrs.__setitem__("shape", 5),
    "codes": put("obs/cell_type/codes", np.array([0, 1, 2, 3, 99], np.int8)),
    "too few codes": put("obs/cell_type/codes", np.array([0], np.int8)),
    "X/indptr": put("X/indptr", np.array([0, 1])),
    "X/data of another length": put("X/data", np.ones(3)),
    "odd column": lambda h5: h5["obs/cell_type"].attrs.__setitem__("encoding-type", "awkward"),
}


@pytest.mark.parametrize("name", NOT_H5AD)
def test_another_hdf5_is_undecodable(sandbox, whole, name):
    error = refused(sandbox, changed(whole, NOT_H5AD[name]))
    assert (error.status, error.error) == (400, "undecodable")


WRONG_VALUES = {
    "X/indices": lambda h5, path: h5.create_dataset(path, data=np.full(len(h5["X/data"]), 7000)),
    "X/data": lambda h5, path: h5.create_dataset(path, data=[b"x"] * len(h5["X/indices"])),
}


@pytest.mark.parametrize("path", WRONG_VALUES)
def test_wrong_values_are_named(sandbox, whole, path):
    error = refused(sandbox, changed(whole, put(path, WRONG_VALUES[path])))
    assert error.status == 422


def soft(h5: h5py.File, path: str) -> None:
    h5[path] = h5py.SoftLink("/var")


def external(h5: h5py.File, path: str) -> None:
    h5[path] = h5py.ExternalLink("secret.h5", "/")


def virtual(h5: h5py.File, path: str) -> None:
    layout = h5py.VirtualLayout((5,), np.int64)
    layout[:] = h5py.VirtualSource("secret.h5", "data", (5,))
    h5.create_virtual_dataset(path, layout)


def stored_elsewhere(h5: h5py.File, path: str) -> None:
    h5.create_dataset(path, (8,), np.uint8, external=[("/etc/passwd", 0, 8)])


@pytest.mark.parametrize("link", [soft, external, virtual, stored_elsewhere])
@pytest.mark.parametrize("path", ["obs", "obs/cell_type/codes", "X/data", "X/indptr"])
def test_no_file_reads_another(sandbox, whole, link, path, tmp_path, monkeypatch):
    if link in (virtual, stored_elsewhere) and path == "obs":
        return  # obs is a group
    monkeypatch.chdir(tmp_path)
    with h5py.File("secret.h5", "w") as h5:
        h5["data"] = np.arange(5)
    error = refused(sandbox, changed(whole, put(path, link)))
    assert error.status == 400
    assert "is a link, or its values stand in another file" in error.detail


def test_the_sandbox_can_open_no_file(sandbox, whole, monkeypatch, tmp_path):
    """Were a link followed all the same, there would be nothing behind it."""
    sandbox.read(whole, COLUMNS, {})
    limits = Path(f"/proc/{sandbox._process.pid}/limits").read_text()
    (files,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert files.split()[3:5] == ["0", "0"]
    environment = Path(f"/proc/{sandbox._process.pid}/environ").read_text()
    assert "TOKEN" not in environment
    status = Path(f"/proc/{sandbox._process.pid}/status").read_text()
    said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert said["NoNewPrivs"] == "1"
    assert {int(said[name], 16) for name in ("CapEff", "CapPrm", "CapInh")} == {0}


def test_the_sandbox_reaches_no_network():
    script = (
        f"import {WORKER} as w, resource, socket; w._confine(2**20)\n"
        "try: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)); print('raised')\n"
        "except (OSError, ValueError): print('held')\n"
        "try: socket.socket(); print('open')\n"
        "except OSError: print('closed')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.stdout.split() == [b"held", b"closed"], done.stderr


def test_no_more_is_read_of_the_sandbox_than_may_come():
    pipe = io.BytesIO()
    send(pipe, {"a": "b" * 50}, b"body")
    for bounds in ((40, None), (None, 3)):
        pipe.seek(0)
        with pytest.raises(ValueError, match="above (40|3)"):
            receive(pipe, *bounds)
    pipe.seek(0)
    assert receive(pipe, 100, 4) == ({"a": "b" * 50}, b"body")


@pytest.mark.parametrize("said", [None, [], "x" * 4, ["a", "b", 200, "ok"], ["a", "b", "413", "c"]])
def test_an_odd_refusal_of_the_sandbox_is_undecodable(said):
    assert _refusal(said).status == 400


def test_a_refusal_of_the_sandbox_is_bounded():
    error = _refusal(["a" * 10**6, "b" * 10**6, 413, "c" * 10**6])
    assert (error.status, len(error.detail), len(error.fix)) == (413, 2000, 2000)


def huge(h5: h5py.File, path: str) -> None:
    for name in ("data", "indices", "indptr"):
        h5[path].pop(name, None)
    for name in ("data", "indices"):
        h5[path].create_dataset(name, (2**40,), np.int32, chunks=(1024,))
    h5[path]["indptr"] = np.array([0, 0, 0, 0, 0, 2**40])


def huge_chunk(h5: h5py.File, path: str) -> None:
    del h5[path]
    h5.create_dataset(path, (5,), np.int32, maxshape=(None,), chunks=(2**28,), compression="gzip")


def deflated(h5: h5py.File, path: str) -> None:
    """A chunk of some KiB that decompresses to 256 MiB."""
    shape = (5, len(h5["var/_index"]))
    del h5[path]
    data = h5.create_dataset(path, shape, np.int32, chunks=shape, compression="gzip")
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(256)) + packer.flush()
    data.id.write_direct_chunk((0, 0), packed)


def repeated(h5: h5py.File, path: str) -> None:
    """Many references to one long string."""
    del h5[path]
    plain = h5.create_dataset(path, (5,), h5py.string_dtype())
    plain[0] = "x" * MEGABYTE
    file_id = h5.id
    h5.flush()
    body = bytearray(file_id.get_file_image())
    offset = plain.id.get_offset()
    body[offset : offset + 16 * 5] = bytes(body[offset : offset + 16]) * 5
    raise ReplacedError(bytes(body))


class ReplacedError(Exception):
    """Carries a file that h5py would not write."""


@pytest.mark.parametrize(
    ("path", "bomb"),
    [
        ("X", huge),
        ("X/data", huge_chunk),
        ("X", deflated),
        ("obs/_index", repeated),
    ],
)
def test_a_bomb_is_refused_and_the_next_file_is_read(sandbox, whole, path, bomb):
    try:
        body = changed(whole, lambda h5: bomb(h5, path))
    except ReplacedError as replaced:
        body = replaced.args[0]
    assert len(body) < 4 * MEGABYTE
    error = refused(sandbox, body)
    assert (error.status, error.error) == (413, "body_too_large"), error
    assert sandbox.read(whole, COLUMNS, {})


@pytest.mark.parametrize("cut", [8, 100, 2000, -1000, -1])
def test_a_cut_file_is_undecodable(sandbox, whole, cut):
    assert refused(sandbox, whole[:cut]).status in (400, 422)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(sandbox, whole, data):
    damage = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))
    body = bytearray(whole)
    for position, value in data.draw(st.lists(damage, min_size=1, max_size=8)):
        body[position] = value
    try:
        stream = sandbox.read(bytes(body), COLUMNS, {})
    except RequestError as error:
        status = error.status
    else:
        status, _ = 200, decode_cells(stream, StreamLimits(max_bytes=4 * MEGABYTE))
    assert status in (200, 400, 413, 422)


def test_a_file_that_leads_the_sandbox_in_circles_is_given_up():
    script = f"import {WORKER} as w; w._allow_seconds(0.1)\nwhile True: pass"
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_a_file_that_kills_the_sandbox_costs_its_sender_alone(sandbox, whole):
    sandbox.read(whole, COLUMNS, {})
    sandbox._process.kill()
    sandbox._process.wait()
    error = refused(sandbox, whole)
    assert (error.status, error.error) == (400, "undecodable")
    assert sandbox.read(whole, COLUMNS, {})


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("n_samples=x", 422, "n_samples is 'x'"),
        ("n_samples=0", 422, "n_samples is 0"),
        ("", 422, "n_samples is missing"),
        ("n_samples=1&n_samples=2", 422, "'n_samples' is given twice"),
        ("n_samples=1&genes=a", 422, "unknown query parameter 'genes'"),
        ("n_samples=1&nonsense=1", 422, "unknown field nonsense"),
        ("n_samples=1&allow_missing=yes", 422, "allow_missing is 'yes'"),
        ("n_samples=1&reduce=quantiles&quantiles=half", 422, "quantiles[0] is 'half'"),
        ("n_samples=1&labels_key=nothing", 422, "the file has no obs column 'nothing'"),
        ("n_samples=1000000", 413, "above the largest"),
    ],
)
def test_parameters_in_the_address_are_checked(http, whole, query, status, words):
    response = http.post(f"/v1/sample?{query}", content=whole, headers={"Content-Type": H5AD})
    assert response.status_code == status
    assert words in response.json()["detail"]


def test_parameters_are_read_as_what_they_are():
    asked = [("seed", "5"), ("reduce", "mean"), ("quantiles", "1e-3"), ("allow_missing", "true")]
    assert query_parameters(asked) == {
        "seed": 5,
        "reduce": ["mean"],
        "quantiles": [0.001],
        "allow_missing": True,
    }


def test_other_bodies_have_no_parameters_in_the_address(http):
    response = http.post("/v1/sample?seed=1", json={})
    assert response.status_code == 422
    assert "query parameter 'seed'" in response.json()["detail"]


def test_other_files_are_undecodable(http):
    for content in (b"", b"{}", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"):
        response = http.post(
            "/v1/sample?n_samples=1", content=content, headers={"Content-Type": H5AD}
        )
        assert response.status_code == 400
        assert response.json()["error"] == "undecodable"


def test_an_h5ad_answer_is_bounded(http, whole):
    headers = {"Content-Type": H5AD, "Accept": H5AD}
    response = http.post("/v1/sample?n_samples=1001", content=whole, headers=headers)
    assert response.status_code == 413
    assert "1,001 draws a cell would be as many layers" in response.json()["detail"]
    assert ARROW in json.loads(response.text)["fix"]
