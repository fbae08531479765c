"""Seconds of training to the held-out ELBO of scvi-tools' CondSCVI.

Counts are drawn from a published CondSCVI (`--model`, a folder that scvi-tools saved; simulated
where none is given) and prepared once. scvi-tools trains on the training cells for `--epochs`
epochs, then `rayvaec train` from the store on the same cells, once for every number in
`--our-epochs`, since the course of the learning rate depends on it; 0 is the default number. All
models are judged by one evaluator on the same held-out cells: the dense loss of `VAEC.loss` in
float64, averaged over `--draws` draws of z that are keyed by cell, the same for all.

A run of rayvaec counts where its *last* model reaches what scvi-tools had after `--epochs`, and
with all of its training seconds (validation and saving included). Ray's start-up is printed beside
them.

    python benchmarks/time_to_elbo.py --model ../shared/data/condscvi_lymph_node
        [--scvi-python PYTHON] [--n-cells 20000] [--n-genes 2886] [--epochs 50]
        [--our-epochs 2 4 6 8 12] [--presets default scvi] [--threads N] [--work FOLDER]
        [--peer FOLDER] [--timed-epochs 2]

`--peer` takes what scvi-tools saved in an earlier call (FOLDER/epoch_N, as `train_condscvi.py`
writes; of the same data, for which `--work` must be that call's) instead of training it for
hours. Its seconds are then those of `--timed-epochs` epochs, trained again before every run of
rayvaec, the fastest of which counts for all epochs.

"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from rayvaec.data.store.open import Store, open_store
from rayvaec.datasets import simulate
from rayvaec.inference.trained_model import TrainedModel, load_model
from rayvaec.kernels.nb_sample import draw_counts
from rayvaec.kernels.rng import normal_noise, position_keys
from rayvaec.model.scvi.importer import import_condscvi, import_model
from rayvaec.training.records import read_epochs

if TYPE_CHECKING:
    from anndata import AnnData

LABELS_KEY = "cell_type"
BLOCK_CELLS = 256
LIBRARY_SPREAD = 0.4  # of the log of a cell's total


def draw_atlas(model: Path, n_cells: int, n_genes: int, mean_library: float, seed: int) -> AnnData:
    """Draw counts from a saved CondSCVI: z from its prior, labels of unequal size.

    Genes beyond the model's own are drawn again from genes of the model, chosen by chance: a
    decoder's gene may stand for several, whose counts are independent given z.
    """
    source = import_condscvi(model)
    module, config, labels = source.module, source.module.config, source.registry["labels"]
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, config.n_input, max(n_genes - config.n_input, 0))
    genes = np.concatenate([np.arange(min(n_genes, config.n_input)), extra])
    share = rng.uniform(0.2, 1.0, len(labels))
    codes = rng.choice(len(labels), n_cells, p=share / share.sum())
    codes[: len(labels)] = np.arange(len(labels))
    z = rng.standard_normal((n_cells, config.n_latent)).astype(np.float32)
    depth = mean_library * rng.lognormal(-(LIBRARY_SPREAD**2) / 2, LIBRARY_SPREAD, (n_cells, 1))
    px_r = module.px_r.detach().numpy()
    keys, blocks = position_keys(0, n_cells), []
    for start in range(0, n_cells, BLOCK_CELLS):
        rows = slice(start, start + BLOCK_CELLS)
        y = torch.from_numpy(codes[rows, None])
        one = torch.ones(len(y), 1)
        batch = torch.zeros_like(y) if config.n_batch else None
        decoded = module.decode(torch.from_numpy(z[rows]), one, y, batch)[:, genes]
        rate = decoded.double().numpy()
        mean = rate * np.exp(px_r[genes]) if module.is_softplus else rate
        # The library that makes a cell's expected total its depth.
        rate *= depth[rows] / mean.sum(1, keepdims=True)
        blocks.append(_draw(rate, px_r[genes], module.is_softplus, seed, keys[rows]))
    return _atlas(sparse.vstack(blocks, format="csr"), [labels[code] for code in codes])


def _draw(
    rate: np.ndarray, px_r: np.ndarray, is_softplus: bool, seed: int, keys: np.ndarray
) -> sparse.csr_matrix:
    if not is_softplus:  # NB(mean, theta): logits = log(mean / theta), total_count = theta
        rng = np.random.default_rng([seed, int(keys[0])])
        theta = np.exp(px_r)
        return sparse.csr_matrix(rng.poisson(rng.gamma(theta, rate / theta)).astype(np.int32))
    draws = draw_counts(rate, px_r, seed, keys, np.zeros(len(keys), np.uint64))
    return sparse.csr_matrix(
        (draws.counts.astype(np.int32), draws.indices, draws.indptr), shape=rate.shape
    )


def _atlas(counts: sparse.csr_matrix, labels: list[str]) -> AnnData:
    kept = np.asarray(counts.sum(1)).ravel() > 0
    obs = pd.DataFrame(
        {LABELS_KEY: pd.Categorical(labels)}, index=[f"cell_{i:07}" for i in range(len(labels))]
    )
    var = pd.DataFrame(index=[f"gene_{i:05}" for i in range(counts.shape[1])])
    return anndata.AnnData(counts, obs, var)[kept].copy()


def split(atlas: AnnData, store: Store) -> tuple[AnnData, AnnData]:
    """Return the training and the held-out cells of a store, in its order."""
    train, held_out = (store.rows(name) for name in ("train", "validation"))
    return (
        atlas[store.obs_names(train.start, train.stop)].copy(),
        atlas[store.obs_names(held_out.start, held_out.stop)].copy(),
    )


@torch.no_grad()
def reference_elbo(model: TrainedModel, held_out: AnnData, n_draws: int) -> float:
    """Return the mean ELBO of cells by the dense loss in float64, KL weight 1, no label weights."""
    module = model.module.double().eval()
    cells = model.cells(held_out, labels_key=LABELS_KEY)
    shape = (len(cells), model.registry.n_genes)
    counts = sparse.csr_array((cells.counts, cells.indices, cells.indptr), shape=shape)
    keys, total = position_keys(0, len(cells)), 0.0
    for start in range(0, len(cells), BLOCK_CELLS):
        rows = slice(start, start + BLOCK_CELLS)
        x = torch.from_numpy(counts[rows].toarray().astype(np.float64))
        y = torch.from_numpy(cells.labels[rows].astype(np.int64)).view(-1, 1)
        batch = torch.zeros_like(y) if module.config.n_batch else None
        inferred = module.inference(x, y, batch_index=batch)
        qz = inferred["qz"]
        for draw in range(n_draws):
            noise = normal_noise(0, keys[rows], np.full(len(y), draw), qz.loc.shape[1])
            z = qz.loc + qz.scale * torch.from_numpy(noise).double()
            generated = module.generative(z, inferred["library"], y, batch_index=batch)
            output = module.loss({"X": x, "labels": y}, inferred, generated)
            total -= float((output.reconstruction_loss + output.kl_local).sum())
    return total / len(cells) / n_draws


def train_peer(options: argparse.Namespace, work: Path, epochs: int) -> dict[str, Any]:
    """Train scvi-tools in its own process; return what it printed."""
    command = [options.scvi_python, str(Path(__file__).with_name("train_condscvi.py"))]
    command += [str(work / "train.h5ad"), str(work / "scvi"), "--labels-key", LABELS_KEY]
    command += ["--epochs", str(epochs), "--seed", str(options.seed), "--save-at"]
    command += [str(epoch) for epoch in [*options.save_at, epochs]]
    if options.threads:
        command += ["--threads", str(options.threads)]
    began = time.perf_counter()
    output = _output(command)
    result = json.loads(output.strip().splitlines()[-1])
    result["command_seconds"] = round(time.perf_counter() - began, 1)
    return result


def judge_peer(
    options: argparse.Namespace, work: Path, held_out: AnnData, peer: dict[str, Any]
) -> None:
    """Add to every saved epoch of the peer its held-out ELBO; print a line each."""
    for saved in peer["saved"]:
        folder = Path(saved.pop("folder"))
        imported = work / f"{folder.name}_imported"
        if not imported.exists():
            import_model(folder, imported)
        saved["elbo"] = round(reference_elbo(load_model(imported), held_out, options.draws), 3)
        print(json.dumps({"side": "scvi-tools", **saved}), flush=True)


def stored_peer(options: argparse.Namespace, timed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the peer's saved epochs with the seconds that timed ones say they take."""
    per_epoch = [run["saved"][-1]["seconds"] / options.timed_epochs for run in timed]
    print(json.dumps({"side": "scvi-tools", "seconds_per_epoch": per_epoch}), flush=True)
    epochs = sorted({*options.save_at, options.epochs})
    missing = [n for n in epochs if not (options.peer / f"epoch_{n}").is_dir()]
    if missing:
        sys.exit(f"{options.peer} has no epoch_{missing[0]}; name epochs it has by --save-at")
    saved = [
        {
            "epoch": n,
            "seconds": round(n * min(per_epoch), 1),
            "folder": str(options.peer / f"epoch_{n}"),
        }
        for n in epochs
    ]
    return {**timed[0], "saved": saved, "seconds_per_epoch": per_epoch}


def train_ours(options: argparse.Namespace, work: Path, preset: str, epochs: int) -> dict[str, Any]:
    """Run `rayvaec train` once."""
    out = work / f"run_{preset}_{epochs}"
    command = [sys.executable, "-m", "rayvaec", "train", str(work / "store"), "--out", str(out)]
    command += ["--set", f"preset={preset}", "--seed", str(options.seed)]
    if epochs:
        command += ["--max-epochs", str(epochs)]
    if options.threads:
        command += ["--set", f"cpus_per_worker={options.threads}"]
    began = time.perf_counter()
    output = _output(command)
    whole = time.perf_counter() - began
    records = read_epochs(out)
    startup = re.search(r"start-up (\d+) s", output)
    return {
        "side": "rayvaec",
        "preset": preset,
        "epoch": records[-1]["epoch"],
        "seconds": records[-1]["time"],
        "folder": str(out / "last"),
        "epoch_ends": [[round(r["time"], 2), round(r["val_elbo"], 2)] for r in records],
        "cells_per_second": records[-1]["cells_per_second"],
        "startup_seconds": int(startup[1]) if startup else None,
        "command_seconds": round(whole, 1),
    }


def judge_ours(options: argparse.Namespace, held_out: AnnData, runs: list[dict[str, Any]]) -> None:
    """Add to every run its last model's held-out ELBO; print a line each."""
    for run in runs:
        model = load_model(Path(run.pop("folder")))
        run["elbo"] = round(reference_elbo(model, held_out, options.draws), 3)
        print(json.dumps(run), flush=True)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def table(peer: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """Return the runs as a table for a person."""
    lines = [f"{'':22} {'epochs':>6} {'seconds':>9} {'held-out ELBO':>14} {'start-up':>9}"]
    for run in [*peer, *ours]:
        name = f"rayvaec {run['preset']}" if "preset" in run else "scvi-tools"
        startup = run.get("startup_seconds")
        lines.append(
            f"{name:22} {run['epoch']:6} {run['seconds']:9.1f} {run['elbo']:14.2f} "
            f"{'' if startup is None else startup:>9}"
        )
    return "\n".join(lines)


def summary(
    options: argparse.Namespace, peer: dict[str, Any], ours: list[dict[str, Any]], setup: dict
) -> dict[str, Any]:
    """Return the line with the result: seconds to the peer's last ELBO, per preset."""
    target = next(s for s in peer["saved"] if s["epoch"] == options.epochs)
    reached = {}
    for preset in options.presets:
        there = [r for r in ours if r["preset"] == preset and r["elbo"] >= target["elbo"]]
        best = min(there, key=lambda r: r["seconds"], default=None)
        reached[preset] = best and {k: best[k] for k in ("epoch", "seconds", "startup_seconds")}
    first = reached[options.presets[0]]
    return {
        "name": "time_to_elbo",
        "ours": first and first["seconds"],
        "peer": target["seconds"],
        "ratio": first and round(target["seconds"] / first["seconds"], 2),
        "unit": "s",
        "target_elbo": target["elbo"],
        "reached": reached,
        "best_elbo": {"scvi-tools": max(s["elbo"] for s in peer["saved"])}
        | {p: max(r["elbo"] for r in ours if r["preset"] == p) for p in options.presets},
        "setup": setup,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a folder that CondSCVI.save wrote")
    parser.add_argument("--n-cells", type=int, default=20_000, help="training cells")
    parser.add_argument("--n-genes", type=int, default=2_886)
    parser.add_argument("--held-out", type=int, default=2_000)
    parser.add_argument("--mean-library", type=float, default=550.0, help="counts a cell")
    parser.add_argument("--epochs", type=int, default=50, help="of scvi-tools")
    parser.add_argument("--save-at", type=int, nargs="*", default=[5, 10, 25, 50, 100, 200])
    parser.add_argument("--peer", type=Path, help="folder of epochs that scvi-tools saved before")
    parser.add_argument("--timed-epochs", type=int, default=2, help="of scvi-tools, with --peer")
    parser.add_argument("--our-epochs", type=int, nargs="+", default=[2, 4, 6, 8, 12])
    parser.add_argument("--presets", nargs="+", default=["default"], help="recipes of rayvaec")
    parser.add_argument("--draws", type=int, default=4, help="of z a held-out cell")
    parser.add_argument("--threads", type=int, help="of either side; default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scvi-python", default=sys.executable, help="interpreter with scvi-tools")
    parser.add_argument("--work", type=Path, help="folder for data and models; default: temporary")
    return parser.parse_args()


def _prepare(options: argparse.Namespace, work: Path) -> tuple[AnnData, AnnData]:
    """Draw the atlas, prepare the store, write the training cells for the peer.

    What an earlier call with `--work` left is used as it is.
    """
    if (work / "train.h5ad").exists():
        return split(anndata.read_h5ad(work / "atlas.h5ad"), open_store(work / "store"))
    n_cells = options.n_cells + options.held_out
    if options.model is None:
        atlas = simulate(n_cells, options.n_genes, n_batches=1, seed=options.seed)
        del atlas.obs["batch"]
    else:
        atlas = draw_atlas(
            options.model, n_cells, options.n_genes, options.mean_library, options.seed
        )
    atlas.write_h5ad(work / "atlas.h5ad")
    command = [sys.executable, "-m", "rayvaec", "prepare", str(work / "atlas.h5ad")]
    command += ["--out", str(work / "store"), "--labels-key", LABELS_KEY]
    _output([*command, "--val-fraction", str(options.held_out / n_cells)])
    train, held_out = split(atlas, open_store(work / "store"))
    train.X = train.X.astype(np.float32)  # what scvi-tools is fastest with
    train.write_h5ad(work / "train.h5ad")
    return train, held_out


def _train(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train both sides, without a judge in between."""
    timed, ours = [], []
    if options.peer is None:
        timed.append(train_peer(options, work, options.epochs))
    for preset in options.presets:
        for epochs in options.our_epochs:
            if options.peer is not None:
                timed.append(train_peer(options, work, options.timed_epochs))
            ours.append(train_ours(options, work, preset, epochs))
    return (timed[0] if options.peer is None else stored_peer(options, timed)), ours


def _run(options: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = _prepare(options, work)
    setup = {
        "train_cells": train.n_obs,
        "held_out_cells": held_out.n_obs,
        "genes": train.n_vars,
        "labels": len(train.obs[LABELS_KEY].cat.categories),
        "nonzeros": round(train.X.nnz / train.n_obs / train.n_vars, 4),
        "source": "simulate" if options.model is None else options.model.name,
        "draws": options.draws,
        "seed": options.seed,
        "threads": options.threads or "default",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(setup), flush=True)
    peer, ours = _train(options, work)
    judge_peer(options, work, held_out, peer)
    judge_ours(options, held_out, ours)
    setup |= {f"peer_{k}": peer[k] for k in ("kl_weights", "threads", "versions")}
    print(table(peer["saved"], ours))
    print(json.dumps(summary(options, peer, ours, setup)), flush=True)


def main() -> None:
    """Train both sides and print a JSON line per model, a table, and the result as JSON."""
    options = _options()
    if options.work is not None:
        _run(options, options.work.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="rayvaec-elbo-") as folder:
        _run(options, Path(folder))


if __name__ == "__main__":
    main()
