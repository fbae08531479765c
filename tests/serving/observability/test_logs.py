"""Logs hold ids and kinds of failures, whatever fails and wherever: nothing that was sent."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import httpx
import numpy as np
import pytest

from rayvaec import protocol
from rayvaec.errors import CountsError
from rayvaec.protocol import ARROW, H5AD, JSON
from rayvaec.serving.observability import logs

MARK = "Zq7Marked"
COUNT = 76543219
"""Stands in requests as a name, and as a count; neither may be in a log."""

CELLS = {"indptr": [0, 1], "indices": [0], "counts": [1]}
SAMPLE = {"cells": CELLS, "labels": ["type_0"], "n_samples": 1, "seed": 1}
NEW = {"label": "type_0", "library": 50, "seed": 1}


def arrow(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"labels": ["type_0"], "cell_ids": [MARK], "counts": np.array([1])}
    fields.update(changes)
    cells = protocol.RawCells(
        fields["labels"],
        np.array([0, 1]),
        np.array([0]),
        fields["counts"],
        cell_ids=fields["cell_ids"],
    )
    return protocol.encode_cells(cells, {"n_samples": 1, "seed": 1, **fields.get("parameters", {})})


def marked_h5ad(adata: anndata.AnnData) -> bytes:
    """A file whose names are marked, and whose labels the model does not know."""
    few = adata[:3].copy()
    few.obs_names = [f"{MARK}{i}" for i in range(3)]
    few.obs["cell_type"] = MARK
    few.uns = {MARK: MARK}
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        anndata.io.write_elem(h5, "/", few)
    return file.getvalue()


def late_failure() -> dict[str, Any]:
    """A request whose answer has begun when its last cell turns out not to be drawable."""
    n = 90_000
    names = [f"{MARK}{i}" for i in range(n)]
    library = [1000.0] * (n - 1) + [987_654_321.0]
    return {"labels": ["type_0"] * n, "library": library, "cell_ids": names, "seed": 1}


def requests(adata: anndata.AnnData) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return requests by what is wrong with them; each has a mark in what it sends."""

    def post(path: str, body: Any, kind: str = JSON, **headers: str) -> tuple[str, str, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return "POST", path, {"content": content, "headers": {"Content-Type": kind, **headers}}

    def sample(**changes: Any) -> tuple[str, str, Any]:
        return post("/v1/sample", {**SAMPLE, "cell_ids": [MARK], **changes})

    wild = {"indptr": [0, 1], "indices": [0], "counts": [-COUNT]}
    return {
        "nothing": sample(),
        "an unknown label": sample(labels=[MARK]),
        "a bad count": sample(cells=wild),
        "a gene index out of range": sample(cells={**wild, "indices": [COUNT], "counts": [1]}),
        "unknown genes": sample(genes=[MARK]),
        "unknown genes of the answer": sample(out_genes=[MARK]),
        "a name given twice": sample(
            labels=["type_0"] * 2, cell_ids=[MARK] * 2, cells={**CELLS, "indptr": [0, 1, 1]}
        ),
        "an unknown field": sample(**{MARK: MARK}),
        "a field of another type": sample(n_samples=MARK),
        "a body that breaks off": post("/v1/sample", b'{"labels": ["%s' % MARK.encode()),
        "no JSON": post("/v1/sample", MARK.encode()),
        "no Arrow": post("/v1/sample", MARK.encode() * 9, ARROW),
        "Arrow": post("/v1/sample", arrow(), ARROW),
        "an unknown label in Arrow": post("/v1/sample", arrow(labels=[MARK]), ARROW),
        "a bad count in Arrow": post("/v1/sample", arrow(counts=np.array([-COUNT])), ARROW),
        "an unknown parameter in Arrow": post("/v1/latent", arrow(parameters={MARK: MARK}), ARROW),
        "no HDF5": post("/v1/sample?n_samples=1", MARK.encode() * 9, H5AD),
        "labels of an h5ad": post("/v1/sample?n_samples=1", marked_h5ad(adata), H5AD),
        "a broken h5ad": post(
            f"/v1/sample?n_samples=1&layer={MARK}",
            marked_h5ad(adata)[:2000] + MARK.encode() * 99,
            H5AD,
        ),
        "a column of an h5ad": post(
            f"/v1/sample?n_samples=1&labels_key={MARK}", marked_h5ad(adata), H5AD
        ),
        "an unknown query parameter": post(f"/v1/sample?{MARK}={MARK}", SAMPLE),
        "no gzip": post("/v1/sample", MARK.encode(), **{"Content-Encoding": "gzip"}),
        "an unknown encoding": post("/v1/sample", b"", **{"Content-Encoding": MARK}),
        "an unknown media type": post("/v1/sample", b"", MARK),
        "no answer that is accepted": post("/v1/sample", b"", Accept=f"x/{MARK}"),
        "an unknown path": ("GET", f"/{MARK}/{MARK}?{MARK}", {}),
        "an unknown model": ("GET", f"/v1/models/{MARK}/model", {}),
        "an unknown gene of the summary": ("GET", f"/v1/summary?gene={MARK}&profile={MARK}", {}),
        "a method": (MARK, "/v1/sample", {}),
        "another host": ("GET", "/v1/model", {"headers": {"Host": MARK}}),
        "another origin": ("GET", "/v1/model", {"headers": {"Origin": f"http://{MARK}"}}),
        "a token": ("GET", "/v1/model", {"headers": {"Authorization": f"Bearer {MARK}"}}),
        "a library that cannot be": post("/v1/generate", {**NEW, "library": -COUNT}),
        "a rate that cannot be drawn": post(
            "/v1/generate", {**NEW, "library": 987_654_321, "cell_ids": [MARK]}
        ),
        "a rate late in the answer": post("/v1/generate", late_failure(), Accept=ARROW),
    }


VALUES = (MARK, str(COUNT), "987654321", "9.87654e+08", "rate of row")


def found_in(text: str) -> list[str]:
    """Return the lines that hold a value of a request."""
    values = [value.lower() for value in VALUES]
    return [line for line in text.splitlines() if any(value in line.lower() for value in values)]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Have failures logged as in a replica; give what has been logged, by anything."""
    for module, name in ((warnings, "showwarning"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    levels = {"": 1, "rayvaec": 1, "rayvaec.access": 1, "httpx": logging.WARNING}  # the client's
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = [(logger, logger.level) for logger in loggers]
    for logger, level in loggers.items():
        logger.setLevel(level)
        monkeypatch.setattr(logger, "propagate", True)
    logs.hide_values()
    yield stream.getvalue
    logging.getLogger().removeHandler(handler)
    for logger, level in before:
        logger.setLevel(level)


def test_refusals_leave_no_values_in_logs(
    serve_with: Callable[..., Any],
    adata: anndata.AnnData,
    logged: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    http = serve_with()
    statuses = {}
    for what, request in requests(adata).items():
        if what != "a rate late in the answer":
            statuses[what] = http.together(request)[0].status_code
    assert {what for what, status in statuses.items() if status < 400} == {
        *("nothing", "Arrow", "a token")
    }
    assert 500 not in statuses.values()
    gc.collect()
    assert logged().count("rayvaec.access") == len(statuses)
    out, err = capfd.readouterr()
    assert found_in(logged() + out + err) == []


class Fails:
    """Work that goes well for some jobs and then fails for all that follow."""

    def __init__(self, work: Callable[[Any], Any], error: Exception, after: int) -> None:
        self.work, self.error, self.left = work, error, after

    def __call__(self, jobs: list[Any]) -> list[Any]:
        done = []
        for job in jobs:
            self.left -= 1
            done.append(self.error if self.left < 0 else self.work([job])[0])
        if self.left < 0 and not isinstance(self.error, CountsError):
            raise self.error
        return done


def failed(http: Any, monkeypatch: Any, error: Exception, after: int, accept: str) -> str:
    """Ask for much and have the work fail after some jobs; return what the client is told."""
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    merger = http.app.state.services["model"]._merger
    monkeypatch.setattr(merger, "_work", Fails(merger._work, error, after))

    async def ask() -> str:
        logs.hide_values_of_tasks(asyncio.get_running_loop())
        transport = httpx.ASGITransport(http.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=http.base_url) as client:
            body = {**NEW, "n_cells": 500, "n_samples": 10}
            reply = await client.post("/v1/generate", json=body, headers={"Accept": accept})
            for _ in range(20):  # the jobs ahead fail as well
                await asyncio.sleep(0.01)
            gc.collect()
            await asyncio.sleep(0)
            return f"{reply.status_code} {reply.text}" if reply.status_code != 200 else ""

    return asyncio.run(ask())


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("accept", [ARROW, JSON])
@pytest.mark.parametrize("kind", [CountsError, ZeroDivisionError, KeyError, OSError])
def test_failures_leave_their_kind_and_no_values(
    serve_with: Any, monkeypatch: Any, logged: Any, capfd: Any, kind: Any, accept: str, after: int
) -> None:
    http = serve_with()
    told = failed(http, monkeypatch, kind(f"{MARK} is {COUNT}"), after, accept)
    begun = accept == ARROW and after > 0
    assert ("500" in told) == (not begun and kind is not CountsError)
    if kind is not CountsError:
        assert MARK not in told
    text = logged()
    out, err = capfd.readouterr()
    assert found_in(text + out + err) == []
    assert ("broke off after its answer had begun" in text) == begun
    assert (kind.__name__ in text) == (kind is not CountsError)
    assert "Task exception was never retrieved" not in text


def test_jobs_that_fail_behind_one_that_failed_say_nothing(
    serve_with: Any, monkeypatch: Any, logged: Any, hold_sampler: Any
) -> None:
    http = serve_with()
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    merger = http.app.state.services["model"]._merger
    monkeypatch.setattr(merger, "_work", Fails(merger._work, CountsError(MARK), 0))
    held = hold_sampler(http)

    async def meanwhile() -> None:
        logs.hide_values_of_tasks(asyncio.get_running_loop())
        await held.until_reached(4)
        held.go.set()
        while merger._at_work:  # all have failed before the event loop hears of the first
            time.sleep(0.001)

    body = {**NEW, "n_cells": 500, "n_samples": 10}
    (reply,) = http.together(("POST", "/v1/generate", {"json": body}), meanwhile=meanwhile)
    gc.collect()
    assert reply.status_code == 422
    assert sum(held.calls) == 4
    assert "CountsError" not in logged()


def test_what_breaks_an_answer_off_carries_nothing(serve_with: Any, monkeypatch: Any) -> None:
    http = serve_with()
    monkeypatch.setattr("rayvaec.serving.engine.jobs.JOB_VALUES", 1)
    merger = http.app.state.services["model"]._merger
    monkeypatch.setattr(merger, "_work", Fails(merger._work, KeyError(MARK), 2))

    async def ask() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(http.app), base_url=http.base_url
        ) as client:
            body = {**NEW, "n_cells": 500, "n_samples": 10}
            await client.post("/v1/generate", json=body, headers={"Accept": ARROW})

    with pytest.raises(Exception, match="broke off") as caught:
        asyncio.run(ask())
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert MARK not in str(caught.value)


def test_what_nobody_handles_is_logged_by_kind_and_place(logged: Any, capfd: Any) -> None:
    def fail() -> None:
        raise KeyError(MARK)

    class Odd:
        def __del__(self) -> None:
            raise IndexError(MARK)

    async def forgotten() -> None:
        loop = asyncio.get_running_loop()
        logs.hide_values_of_tasks(loop)
        task = asyncio.create_task(asyncio.to_thread(fail))
        await asyncio.wait([task])
        del task
        gc.collect()
        loop.call_soon(lambda value: value / 0, COUNT)
        await asyncio.sleep(0)

    thread = threading.Thread(target=fail, name=MARK)
    thread.start()
    thread.join()
    Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"{MARK} is {COUNT}", RuntimeWarning, stacklevel=1)
    asyncio.run(forgotten())
    gc.collect()
    text = logged()
    out, err = capfd.readouterr()
    assert found_in(text + out + err) == []
    assert text.count(": KeyError\n") == 2
    for kind in ("IndexError", "RuntimeWarning at ", "ZeroDivisionError"):
        assert kind in text


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_no_log_of_the_command_holds_what_was_sent(
    serve_command: Callable[..., Any], model_path: Path, adata: anndata.AnnData
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rv", dir="/tmp"))  # Ray's sockets need a short path
    try:
        arguments = (str(model_path), "--enable-h5ad-uploads")
        with serve_command(*arguments, RAY_TMPDIR=str(folder)) as server:
            statuses = {}
            for what, (method, path, rest) in requests(adata).items():
                with httpx.Client(base_url=server.url, timeout=120) as client:
                    try:
                        statuses[what] = client.request(method, path, **rest).status_code
                    except httpx.RemoteProtocolError:
                        statuses[what] = 0
        said = "".join(server.said)
        files = [path for path in folder.rglob("*") if path.is_file() and "log" in path.parts[-2:]]
        files += [path for path in folder.rglob("*") if path.suffix in (".log", ".err", ".out")]
        texts = {path: path.read_text(errors="replace") for path in set(files)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert statuses["a rate late in the answer"] == 0
    assert statuses["labels of an h5ad"] == 422
    everything = "\n".join(texts.values())
    assert "POST /v1/generate 499" in everything
    assert "broke off after its answer had begun: bad_counts" in everything
    assert found_in(said) == []
    assert {path.name: found_in(text) for path, text in texts.items() if found_in(text)} == {}
