"""AnnData files in every form that `prepare` reads, and random stores."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Condition, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

import anndata
import httpx
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from scipy import sparse

from rayvaec.data.prepare.partitions import (
    CountsDtypes,
    PartitionCells,
    write_manifest,
    write_partition,
)
from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import Manifest

FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "dense": lambda x: x.toarray() if sparse.issparse(x) else np.asarray(x),
}


@pytest.fixture
def counts() -> np.ndarray:
    """Counts of 30 cells and 12 genes, mostly zeros; no cell is empty."""
    rng = np.random.default_rng(3)
    x = rng.poisson(0.4, (30, 12)) * rng.integers(1, 40, (30, 12))
    x[np.arange(30), rng.integers(12, size=30)] += 1
    return x


@pytest.fixture
def write_input(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an AnnData file and returns its path."""

    def write(
        x: np.ndarray,
        name: str = "a.h5ad",
        form: str = "csr",
        labels: object = None,
        obs: dict[str, object] | None = None,
        genes: list[str] | None = None,
        cells: list[str] | None = None,
        layers: dict[str, np.ndarray] | None = None,
        raw: np.ndarray | None = None,
    ) -> Path:
        n_cells, n_genes = x.shape
        labels = [f"type {row % 3}" for row in range(n_cells)] if labels is None else labels
        frame = pd.DataFrame(
            {"cell_type": labels, **(obs or {})},
            index=cells or [f"{Path(name).stem}_{row}" for row in range(n_cells)],
        )
        var = pd.DataFrame(index=genes or [f"g{column}" for column in range(n_genes)])
        adata = anndata.AnnData(FORMS[form](x), frame, var, layers=layers)
        if raw is not None:
            names = pd.DataFrame(index=[f"g{column}" for column in range(raw.shape[1])])
            adata.raw = anndata.AnnData(FORMS[form](raw), frame, names)
        path = tmp_path / name
        if path.suffix == ".zarr":
            version = 2 if ".v2" in path.suffixes else 3
            with anndata.settings.override(auto_shard_zarr_v3=True):
                write_elem(zarr.open_group(path, mode="w", zarr_format=version), "/", adata)
        else:
            adata.write_h5ad(path)
        return path

    return write


class RandomStore(NamedTuple):
    """A store of random cells, and what was written into it."""

    path: Path
    matrix: np.ndarray
    labels: np.ndarray
    batches: np.ndarray | None
    names: list[str]
    registry: Registry


def write_random_store(
    path: Path,
    n_cells: int = 300,
    n_genes: int = 40,
    n_partitions: int = 2,
    n_train: int | None = None,
    n_batches: int = 0,
    largest: int = 300,
    density: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> RandomStore:
    """Write a store of `n_partitions` partitions of unequal size."""
    rng = np.random.default_rng(seed)
    matrix = rng.integers(1, largest + 1, (n_cells, n_genes)) * (
        rng.random((n_cells, n_genes)) < density
    )
    matrix[0, 0] = largest if density else 0
    labels = rng.integers(0, 3, n_cells)
    batches = rng.integers(0, n_batches, n_cells) if n_batches else None
    names = [f"cell {row}" for row in range(n_cells)]
    registry = Registry(
        genes=tuple(f"gene {column}" for column in range(n_genes)),
        labels=("T", "B", "NK"),
        labels_key="cell_type",
        batches=tuple(f"batch {k}" for k in range(n_batches)),
        batch_key="batch" if n_batches else None,
    )
    borders = np.linspace(0, 1, n_partitions + 1) ** 1.5 * n_cells
    partitions = []
    for k, (start, stop) in enumerate(pairwise(borders.round().astype(int))):
        csr = sparse.csr_matrix(matrix[start:stop])
        cells = PartitionCells(
            indptr=csr.indptr,
            indices=csr.indices,
            counts=csr.data,
            names=names[start:stop],
            labels=labels[start:stop],
            batches=None if batches is None else batches[start:stop],
        )
        dtypes = CountsDtypes.smallest(largest, n_genes)
        partitions.append(write_partition(path, f"dataset_{k}", cells, registry, dtypes, **options))
    manifest = Manifest(
        registry=registry,
        n_cells=n_cells,
        nnz=int((matrix > 0).sum()),
        cells_per_label=tuple(np.bincount(labels, minlength=3).tolist()),
        gene_totals=tuple(matrix.sum(axis=0).tolist()),
        total_counts=int(matrix.sum()),
        n_train=n_cells if n_train is None else n_train,
        seed=seed,
        sources=({"path": "random"},),
        partitions=tuple(partitions),
        created="2026-01-01T00:00:00+00:00",
        rayvaec_version="0",
    )
    write_manifest(path, manifest)
    return RandomStore(path, matrix, labels, batches, names, registry)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., RandomStore]:
    """Return a function that writes a random store; see `write_random_store`."""

    def make(name: str = "store", **options: Any) -> RandomStore:
        return write_random_store(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> RandomStore:
    """40 cells in two partitions; who changes a file puts it back."""
    path = tmp_path_factory.mktemp("tiny") / "store"
    return write_random_store(path, n_cells=40, n_genes=9, n_batches=2)


@pytest.fixture(scope="session")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> RandomStore:
    """2,345 cells in three partitions, 2,100 of them for training; not to be changed."""
    path = tmp_path_factory.mktemp("random") / "store"
    return write_random_store(
        path, n_cells=2345, n_partitions=3, n_train=2100, n_batches=2, rows_per_chunk=1
    )


@pytest.fixture(scope="session")
def smaller_store(tmp_path_factory: pytest.TempPathFactory) -> RandomStore:
    """600 cells in three partitions, 540 of them for training; not to be changed."""
    path = tmp_path_factory.mktemp("smaller") / "store"
    return write_random_store(path, n_cells=600, n_partitions=3, n_train=540, rows_per_chunk=1)


class FileServer:
    """Files of a folder over HTTP on loopback, with the faults that it is told to show.

    Attributes
    ----------
    faults : list of str
        What to do with the next requests, first to last: ``"503"`` or another status, ``"drop"``
        (hang up), ``"cut"`` (hang up halfway through the body).
    requests : list of str
        The paths that were asked for.
    etags, ranges : bool
        Whether answers carry an ETag, and whether parts of files can be asked for.
    gather : int
        Requests that are answered only once so many are there at the same time, or a minute later.
    most_at_once : int
        The most requests that were being answered at the same time.
    """

    def __init__(self, root: Path) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.etags = self.ranges = True
        self.gather, self.at_once, self.most_at_once = 1, 0, 0
        server, counting = self, Condition()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or an answer would wait for the ack of its head

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                with counting:
                    server.requests.append(self.path)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    counting.notify_all()
                    counting.wait_for(lambda: server.most_at_once >= server.gather, timeout=60)
                try:
                    self._serve()
                finally:
                    with counting:
                        server.at_once -= 1

            def _serve(self) -> None:
                fault = server.faults.pop(0) if server.faults else ""
                file = root / unquote(self.path).lstrip("/")
                if fault == "drop":
                    self.close_connection = True
                elif fault.isdigit() or not file.is_file():
                    self._answer(int(fault or 404), b"")
                else:
                    self._file(file.read_bytes(), fault == "cut")

            def do_HEAD(self) -> None:
                self.do_GET()

            def _file(self, content: bytes, cut: bool) -> None:
                span = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if span is None or not server.ranges:
                    self._answer(200, content, cut)
                    return
                start, end = int(span[1]), min(int(span[2]) + 1, len(content))
                if start >= len(content):
                    self._answer(416, b"")
                else:
                    place = f"bytes {start}-{end - 1}/{len(content)}"
                    self._answer(206, content[start:end], cut, **{"Content-Range": place})

            def _answer(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                if server.etags:
                    self.send_header("ETag", '"1"')
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def serve_files() -> Iterator[Callable[[Path], FileServer]]:
    """Return a function that serves a folder over HTTP until the end of the test."""
    servers = []

    def serve(root: Path) -> FileServer:
        server = FileServer(root)
        servers.append(server.server)
        Thread(target=server.server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], str]:
    """Return a function that copies a folder into a bucket and returns its URL."""
    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example-secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)

    def upload(folder: Path, name: str) -> str:
        with httpx.Client(base_url=object_store, timeout=60) as client:
            client.put("/atlases").raise_for_status()
            for file in folder.rglob("*"):
                if file.is_file():
                    key = f"/atlases/{name}/{file.relative_to(folder)}"
                    client.put(key, content=file.read_bytes()).raise_for_status()
        return f"s3://atlases/{name}"

    return upload
