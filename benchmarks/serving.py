"""Draws per second and latency through HTTP, against the same draws in process.

A model of 2,000 genes (7 % non-zeros) is served by ``rayvaec serve`` in processes of its own.
Requests come from this process over plain sockets, in one thread, and answers are counted and
thrown away: the load generator's CPU time is reported beside the server's, since both share the
machine. Rounds in process and through HTTP alternate; medians are reported.

    python benchmarks/serving.py                      # small, medium, large; JSON and Arrow
    python benchmarks/serving.py --overload           # ten times what it can do
    python benchmarks/serving.py --memory             # a billion draws in one request
    python benchmarks/serving.py --soak 600           # full load: errors, and memory over time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from sampling import N_LABELS, build
from scipy import sparse

from rayvaec.client import Client
from rayvaec.client.anndata_io import cells_of
from rayvaec.data.registry import Registry
from rayvaec.inference import posterior
from rayvaec.inference.cells import Cells
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.kernels.rng import cell_keys
from rayvaec.model.saved import save_model
from rayvaec.protocol import ARROW, JSON, AnswerStream, encode_cells
from rayvaec.serving.engine.jobs import windows

N_GENES, DENSITY = 2000, 0.07
CASES = {"small": (1, 1), "medium": (64, 10), "large": (1000, 100)}
TICK = os.sysconf("SC_CLK_TCK")


def make_model(folder: Path) -> anndata.AnnData:
    """Save a model in `folder`; return 1,000 cells that it can be asked about."""
    module, library = build(N_GENES, DENSITY)
    genes = [f"gene_{i}" for i in range(N_GENES)]
    labels = [f"type_{i}" for i in range(N_LABELS)]
    registry = Registry(tuple(genes), tuple(labels), "cell_type", (), None)
    save_model(folder, module, registry.to_json(), {})
    rng = np.random.default_rng(0)
    n, codes = 1000, rng.integers(N_LABELS, size=1000)
    keys = cell_keys([f"cell {i}" for i in range(n)])
    libraries = np.full(n, library, np.float32)
    new = posterior.generate(module, codes, libraries, keys, 1, 0)
    x = sparse.csr_matrix((new.counts, new.indices, new.indptr), shape=(n, N_GENES))
    obs = pd.DataFrame({"cell_type": [labels[code] for code in codes]})
    obs.index = [f"cell {i}" for i in range(n)]
    return anndata.AnnData(x, obs, pd.DataFrame(index=genes))


@dataclass
class Server:
    """A served model: where it is, and what its processes take."""

    port: int
    process: subprocess.Popen[str]

    def pids(self, name: str = "ray::") -> list[int]:
        """Return the processes below the command whose title begins with `name`."""
        found = []
        for pid in _below(self.process.pid):
            with suppress(OSError):  # processes come and go
                title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                if title.startswith(name):
                    found.append(pid)
        return found

    def cpu_seconds(self) -> float:
        """Return the CPU time that proxy and replicas have taken."""
        return sum(_cpu_seconds(pid) for pid in self.pids())

    def resident(self) -> dict[str, float]:
        """Return the MiB that proxy and replicas hold, and those of Ray's object store once."""
        held, store = {}, [0.0]
        for name in ("ray::ProxyActor", "ray::ServeReplica"):
            shared = {pid: _mapped(pid) for pid in self.pids(name)}
            held[name] = sum(_resident(pid) - shared[pid] for pid in shared) / 2**20
            store += shared.values()
        return {**held, "store": max(store) / 2**20}


def _below(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from _below(child)


def _cpu_seconds(pid: int) -> float:
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / TICK


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _mapped(pid: int) -> float:
    """Return the bytes of shared memory, all of it Ray's object store, that a process has used."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssShmem:")[2].split()[0]) * 1024


@contextmanager
def served(model: Path, *options: str) -> Iterator[Server]:
    """Run a block with the model served."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rayvaec", "serve", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout or ():
            if line.startswith("ready: "):
                break
        else:
            raise SystemExit("the server did not start")
        yield Server(int(line.split()[1].rpartition(":")[2]), process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)


def request_bytes(
    adata: anndata.AnnData, n_cells: int, n_samples: int, kind: str, seed: int = 0
) -> bytes:
    """Return a whole HTTP request for draws."""
    cells, _ = cells_of(adata[:n_cells], "cell_type", None, None)
    asked = {"n_samples": n_samples, "seed": seed}
    if kind == ARROW:
        body = encode_cells(cells, asked)
    else:
        columns = {"indptr": cells.indptr, "indices": cells.indices, "counts": cells.counts}
        csr = {name: values.tolist() for name, values in columns.items()}
        names = {"labels": cells.labels, "cell_ids": cells.cell_ids}
        body = json.dumps({"cells": csr, **names, **asked}).encode()
    head = (
        f"POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        f"Accept: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Connection:
    """A kept-alive connection that throws away what it reads, or keeps it where that is asked."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, keep: list[bytes] | None = None) -> tuple[int, dict]:
        """Send a request; return status and headers once the whole answer has come."""
        if self._ends is None:
            self._ends = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._ends
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (h.partition(":") for h in head[1:])}
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                if keep is not None:
                    keep.append(chunk[:-2])
            await reader.readline()
        else:
            body = await reader.readexactly(int(headers["content-length"]))
            if keep is not None:
                keep.append(body)
        return int(head[0].split()[1]), headers

    def close(self) -> None:
        """Close it."""
        if self._ends is not None:
            self._ends[1].close()


@dataclass
class Load:
    """What a load came to."""

    seconds: float = 0.0
    client_cpu: float = 0.0
    server_cpu: float = 0.0
    latencies: dict[int, list[float]] = field(default_factory=dict)
    retry_after: bool = True
    health: list[float] = field(default_factory=list)

    def note(self, status: int, headers: Mapping[str, str], latency: float) -> None:
        """Take in one answer."""
        self.latencies.setdefault(status, []).append(latency)
        self.retry_after &= status != 429 or "retry-after" in headers

    def summary(self) -> dict[str, object]:
        """Return requests, latencies and CPU time."""
        good = sorted(self.latencies.get(200, [np.nan]))
        every = sum(map(len, self.latencies.values()))
        return {
            "answers": {str(status): len(found) for status, found in self.latencies.items()},
            **{
                f"p{p}_ms": round(1e3 * good[min(int(len(good) * p / 100), len(good) - 1)], 1)
                for p in (50, 90, 99)
            },
            "client_cpu_ms": round(1e3 * self.client_cpu / max(every, 1), 2),
            "server_cpu_ms": round(1e3 * self.server_cpu / max(every, 1), 2),
        }


@contextmanager
def _accounted(load: Load, server: Server) -> Iterator[None]:
    began, client, cpu = time.perf_counter(), time.process_time(), server.cpu_seconds()
    yield
    load.seconds = time.perf_counter() - began
    load.client_cpu += time.process_time() - client
    load.server_cpu += server.cpu_seconds() - cpu


async def _running(seconds: float) -> None:
    """Wait until this process has run for so long; it may be stopped and continued meanwhile."""
    while seconds > 0:
        before = time.perf_counter()
        await asyncio.sleep(0.05)
        seconds -= min(time.perf_counter() - before, 1.0)


def closed_loop(server: Server, request: bytes, clients: int, seconds: float) -> Load:
    """Have so many clients each send the request again as soon as its answer has come."""
    load = Load()

    async def client(timer: asyncio.Task[None]) -> None:
        connection = Connection(server.port)
        while not timer.done():
            sent = time.perf_counter()
            status, headers = await connection.ask(request)
            load.note(status, headers, time.perf_counter() - sent)
        connection.close()

    async def go() -> None:
        timer = asyncio.create_task(_running(seconds))
        await asyncio.gather(*(client(timer) for _ in range(clients)))

    with _accounted(load, server):
        asyncio.run(go())
    return load


def open_loop(server: Server, request: bytes, rate: float, seconds: float) -> Load:
    """Send requests at a rate, whether or not answers come, and ask for the server's health."""
    load = Load()
    idle: list[Connection] = []

    async def one() -> None:
        connection = idle.pop() if idle else Connection(server.port)
        sent = time.perf_counter()
        status, headers = await connection.ask(request)
        load.note(status, headers, time.perf_counter() - sent)
        idle.append(connection)

    async def health(until: float) -> None:
        connection = Connection(server.port)
        while time.perf_counter() < until:
            sent = time.perf_counter()
            status, _ = await connection.ask(HEALTH)
            load.health.append(time.perf_counter() - sent if status == 200 else np.inf)
            await asyncio.sleep(0.05)
        connection.close()

    async def go() -> None:
        began = time.perf_counter()
        watch = asyncio.create_task(health(began + seconds))
        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(began + number / rate - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(watch, *tasks)
        for connection in idle:
            connection.close()

    with _accounted(load, server):
        asyncio.run(go())
    return load


def in_process(model: TrainedModel, adata: anndata.AnnData, n_cells: int, n_samples: int) -> float:
    """Draw what a request asks for; return the seconds, its cells being at hand already."""
    x = adata.X[:n_cells].astype(np.int32)
    codes = [model.registry.labels.index(label) for label in adata.obs["cell_type"][:n_cells]]
    keys = cell_keys(list(adata.obs_names[:n_cells]))
    indptr = x.indptr.astype(np.int64)
    cells = Cells(indptr, x.indices, x.data, np.asarray(codes, np.int64), None, keys)
    began = time.perf_counter()
    for start, stop, first, last in windows(n_cells, n_samples, N_GENES):
        part = cells.part(start, stop)
        posterior.draw(model.module, part, last - first, 0, first_sample=first)
    return time.perf_counter() - began


def check_answer(server: Server, model: TrainedModel, adata: anndata.AnnData) -> None:
    """Hold one answer to the model's own draws before anything is timed."""
    kept: list[bytes] = []
    request = request_bytes(adata, 64, 10, ARROW)
    asyncio.run(Connection(server.port).ask(request, kept))
    stream = AnswerStream(kept)
    stream.finish()
    rows = stream.draws()
    expected = model.sample(adata[:64], 10, 0).transpose(0, 2, 1).reshape(640, N_GENES)
    got = sparse.csr_matrix((rows.counts, rows.indices, rows.indptr), expected.shape).toarray()
    if not np.array_equal(got, expected):
        raise SystemExit("the endpoint's draws are not the model's")


def throughput(
    server: Server, model: TrainedModel, adata: anndata.AnnData, options: argparse.Namespace
) -> None:
    """Print a line for each size, format and number of clients."""
    for name in options.cases:
        n_cells, n_samples = CASES[name]
        draws = n_cells * n_samples * N_GENES
        for kind in (ARROW, JSON) if name != "large" else (ARROW,):
            request = request_bytes(adata, n_cells, n_samples, kind)
            for clients in options.clients if name != "large" else [1, 2]:
                alone, loads = [], []
                for _ in range(options.rounds):
                    alone.append(_repeated(lambda: in_process(model, adata, n_cells, n_samples)))  # noqa: B023
                    loads.append(closed_loop(server, request, clients, options.seconds))
                rates = [len(load.latencies.get(200, [])) / load.seconds for load in loads]
                load = loads[int(np.argsort(rates)[len(rates) // 2])]
                ours = statistics.median(rates) * draws / 1e6
                peer = draws / statistics.median(alone) / 1e6
                setup = {"clients": clients, "format": "arrow" if kind == ARROW else "json"}
                _print(
                    f"serving_{name}", ours, peer, "million draws/s", {**setup, **load.summary()}
                )


def _repeated(work: Callable[[], float], seconds: float = 0.5) -> float:
    times = [work()]
    while sum(times) < seconds:
        times.append(work())
    return statistics.median(times)


def overload(server: Server, adata: anndata.AnnData, options: argparse.Namespace) -> None:
    """Print how accepted requests fare at ten times the rate that can be answered."""
    request = request_bytes(adata, *CASES["medium"], ARROW)
    with Client(f"http://127.0.0.1:{server.port}") as client:
        places = int(client.model()["limits"]["max_requests"])
    full = closed_loop(server, request, places, options.seconds)
    capacity = len(full.latencies[200]) / full.seconds
    over = open_loop(server, request, 10 * capacity, options.seconds)
    at, above = (statistics.median(load.latencies[200]) for load in (full, over))
    setup = {
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(10 * capacity, 1),
        "took_s": round(over.seconds, 1),
        "accepted_per_s": round(len(over.latencies[200]) / over.seconds, 1),
        "every_429_has_retry_after": over.retry_after,
        "slowest_health_ms": round(1e3 * max(over.health), 1),
        "at_capacity": full.summary(),
        "over": over.summary(),
    }
    _print("serving_overload", above, at, "s, median of accepted requests", setup)


def memory(server: Server, adata: anndata.AnnData, n_samples: int) -> None:
    """Print how much memory an answer of a billion draws takes on both sides."""
    peak = {**server.resident(), "client": 0.0}
    idle = {**peak, "client": _resident(os.getpid()) / 2**20}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            now = {**server.resident(), "client": _resident(os.getpid()) / 2**20}
            peak.update({name: max(value, peak[name]) for name, value in now.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, total = time.perf_counter(), 0
    with Client(f"http://127.0.0.1:{server.port}") as client:
        for part in client.iter_sample(adata, n_samples=n_samples, seed=0, as_="csr"):
            total += sum(draw.nnz for draw in part)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    above = {name: round(peak[name] - idle[name]) for name in peak}
    setup = {
        "draws": adata.n_obs * N_GENES * n_samples,
        "non_zeros": total,
        "seconds": round(seconds, 1),
        "idle_mib": {name: round(value) for name, value in idle.items()},
        "above_idle_mib": above,
    }
    server_side = sum(above.values()) - above["client"]
    _print("serving_memory", server_side, above["client"], "MiB above idle", setup)


def soak(server: Server, adata: anndata.AnnData, seconds: float) -> None:
    """Print errors and memory over a long time of full load, in ten stretches."""
    request = request_bytes(adata, *CASES["medium"], ARROW)
    stretches = []
    for _ in range(10):
        load = closed_loop(server, request, 16, seconds / 10)
        held = {name.removeprefix("ray::"): round(m) for name, m in server.resident().items()}
        stretches.append({**load.summary(), "mib": held})
        print(json.dumps(stretches[-1]), file=sys.stderr, flush=True)
    statuses = {status for stretch in stretches for status in stretch["answers"]}
    first, last = (sum(stretches[at]["mib"].values()) for at in (1, -1))
    setup = {"seconds": seconds, "statuses": sorted(statuses), "stretches": stretches}
    _print("serving_soak", last, first, "MiB, last and second tenth", setup)


def _print(name: str, ours: float, peer: float, unit: str, setup: dict[str, object]) -> None:
    setup |= {"load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads()}
    line = {"name": name, "ours": round(ours, 3), "peer": round(peer, 3)}
    line |= {"ratio": round(ours / max(peer, 1e-9), 3), "unit": unit, "setup": setup}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--num-replicas", default="1")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round through HTTP")
    parser.add_argument("--rounds", type=int, default=3)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--overload", action="store_true")
    mode.add_argument("--memory", action="store_true")
    mode.add_argument("--soak", type=float, metavar="SECONDS")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the replicas
    with tempfile.TemporaryDirectory(prefix="rayvaec-") as folder:
        adata = make_model(Path(folder) / "model")
        model = load_model(Path(folder) / "model")
        with served(Path(folder) / "model", "--num-replicas", options.num_replicas) as server:
            check_answer(server, model, adata)
            if options.overload:
                overload(server, adata, options)
            elif options.memory:
                memory(server, adata, 500)
            elif options.soak:
                soak(server, adata, options.soak)
            else:
                throughput(server, model, adata, options)


if __name__ == "__main__":
    main()
