"""The whole path on a synthetic atlas: the commands a user would type, run one after the other."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rayvaec.client import Client
from rayvaec.errors import RayvaecError
from rayvaec.util.atomic import check_free, check_suffix, remove
from rayvaec.util.lock import WriteLock

SERVER_STOP_S = 120


def demo(out: Path, n_cells: int = 20_000, overwrite: bool = False) -> None:
    """Simulate, prepare, train, sample, serve and ask the served model.

    Parameters
    ----------
    out : Path
        Folder for everything that is made.
    n_cells : int
        Cells of the atlas.
    overwrite : bool
        Whether an existing folder is replaced.

    Raises
    ------
    StoreError
        If `out` exists and may not be replaced.
    RayvaecError
        If a step fails.
    """
    check_suffix(out)
    with WriteLock(out):
        check_free(out, overwrite)
        remove(out)
        out.mkdir()
        _demo(out, n_cells)


def _demo(out: Path, n_cells: int) -> None:
    """Make everything in an empty folder."""
    started = time.monotonic()
    atlas, store, run, drawn = (
        str(out / name) for name in ("atlas.h5ad", "store", "run", "drawn.zarr")
    )
    workers = str(min(2, os.cpu_count() or 1))
    _step("1. a synthetic atlas: raw counts, 8 cell types")
    _rayvaec("simulate", "--out", atlas, "--n-cells", str(n_cells))
    _step("2. a shuffled, sharded store of it")
    _rayvaec("prepare", atlas, "--out", store, "--labels-key", "cell_type")
    _step(f"3. VAEC, trained by {workers} workers")
    _rayvaec("train", store, "--out", run, "--max-epochs", "8", "--num-workers", workers)
    _step("4. five posterior-predictive draws of every cell")
    _rayvaec(
        "sample",
        f"{run}/model",
        store,
        "--out",
        drawn,
        "--n-samples",
        "5",
        "--num-workers",
        workers,
    )
    _compare(store, drawn)
    _step("5. the model behind HTTP")
    _served(f"{run}/model", atlas)
    print(f"\nAll of it took {time.monotonic() - started:.0f} s and lies in {out}:")
    print(f"  {atlas}: the atlas, for anndata.read_h5ad")
    print(f"  {store}: the training store")
    print(f"  {run}/model: the best model, for rayvaec.load_model")
    print(f"  {run}/metrics.jsonl: how training went")
    print(f"  {drawn}: the draws, for anndata.read_zarr")


def _step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _rayvaec(*words: str) -> None:
    print(f"$ rayvaec {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rayvaec", *words], check=False)  # noqa: S603
    if done.returncode:
        raise RayvaecError(
            f"the command above ended with exit code {done.returncode}", "see what it says"
        )


def _compare(store: str, drawn: str) -> None:
    """Say how well the draws' mean of each label and gene follows the data's."""
    import anndata

    from rayvaec.data.store.open import open_store

    opened = open_store(store)
    observed = np.zeros((len(opened.registry.labels), len(opened.registry.genes)))
    predicted = np.zeros_like(observed)
    draws = anndata.read_zarr(drawn)
    mean = sum(draws.layers[name] for name in draws.layers) / len(draws.layers)
    start = 0
    while start < opened.n_cells:
        rows = opened.read(start, min(start + 4096, opened.n_cells))
        n_rows = len(rows.labels)
        cell = np.repeat(np.arange(n_rows), np.diff(rows.indptr))
        np.add.at(observed, (rows.labels[cell], rows.indices), rows.counts)
        np.add.at(predicted, rows.labels, mean[start : start + n_rows].toarray())
        start += n_rows
    shared = np.corrcoef(observed.ravel(), predicted.ravel())[0, 1]
    print(f"label-wise mean counts, data against draws: correlation {shared:.4f}")


def _served(model: str, atlas: str) -> None:
    import anndata

    words = ("serve", model, "--port", "0")
    print(f"$ rayvaec {shlex.join(words)} &", flush=True)
    server = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "rayvaec", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        url = _url_when_ready(server)
        cells = anndata.read_h5ad(atlas)[:64].copy()
        print(f'>>> Client("{url}").sample(adata[:64], n_samples=10, seed=0)')
        with Client(url) as client:
            print(client.sample(cells, labels_key="cell_type", n_samples=10, seed=0))
    finally:
        server.send_signal(signal.SIGINT)
        for line in server.stdout or ():
            print(line, end="")
        server.wait(timeout=SERVER_STOP_S)


def _url_when_ready(server: subprocess.Popen[str]) -> str:
    """Repeat what the server says until it is ready; return the address it names."""
    url = ""
    for line in server.stdout or ():
        print(line, end="", flush=True)
        if line.startswith("ready: "):
            url = line.split()[1]
        if line.startswith("try: "):
            return url
    raise RayvaecError("the server ended before it was ready", "see what it says above")
