"""Commands `simulate`, `prepare` and `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rayvaec.commands.options import Verbs, add_out
from rayvaec.errors import ConfigError, StoreError
from rayvaec.util.location import Url, location

if TYPE_CHECKING:
    from rayvaec.data.prepare.config import PrepareConfig


def add_simulate(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("simulate", help="write a synthetic atlas of raw counts")
    add_out(verb, "H5AD", "file to write, .h5ad or .zarr")
    verb.add_argument("--n-cells", type=int, default=20_000)
    verb.add_argument("--n-genes", type=int, default=2_000)
    verb.add_argument("--n-labels", type=int, default=8)
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    from rayvaec.datasets import write_atlas

    write_atlas(
        arguments.out,
        n_cells=arguments.n_cells,
        n_genes=arguments.n_genes,
        n_labels=arguments.n_labels,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.out}")
    print(f"next: rayvaec prepare {arguments.out} --out STORE --labels-key cell_type")


def add_prepare(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("prepare", help="turn AnnData files into a shuffled training store")
    verb.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help=".h5ad or .zarr; FILE::LAYER reads that layer of this file, FILE::X its X",
    )
    add_out(verb, "STORE", "folder to write")
    verb.add_argument(
        "--labels-key", metavar="KEY", help="obs column of labels; needed for a new store"
    )
    verb.add_argument("--batch-key", metavar="KEY", help="obs column of batches")
    verb.add_argument("--layer", help="layer that holds the raw counts, or raw (default: X)")
    verb.add_argument(
        "--genes",
        metavar="intersect|union|FILE",
        help="what to do where inputs differ: shared genes, all genes, or those a file lists",
    )
    verb.add_argument(
        "--n-top-genes", type=int, metavar="N", help="keep the N genes that vary most (seurat_v3)"
    )
    verb.add_argument("--drop-empty", action="store_true", help="leave out cells without counts")
    verb.add_argument("--val-fraction", type=float, help="cells kept for validation (default: 0.1)")
    verb.add_argument("--seed", type=int, help="seed of the shuffle (default: 0)")
    verb.add_argument("--num-workers", type=int, default=1, help="Ray tasks that write partitions")
    verb.add_argument(
        "--codec",
        choices=("lz4", "zstd"),
        help="lz4: the fastest to read; zstd: the smallest (default: lz4)",
    )
    verb.add_argument(
        "--memory",
        metavar="SIZE",
        help="most that all processes together may take, such as 4G (default: a quarter of the "
        "machine's)",
    )
    verb.add_argument(
        "--resume", action="store_true", help="go on where an interrupted prepare stopped"
    )
    verb.add_argument(
        "--append",
        action="store_true",
        help="add the cells to the existing STORE, written as it was: same genes, codec, seed",
    )
    verb.add_argument(
        "--new-labels", action="store_true", help="with --append: labels may be new to the STORE"
    )
    verb.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from rayvaec.data.prepare.pipeline import prepare
    from rayvaec.data.store.describe import describe_store
    from rayvaec.data.store.open import open_store

    prepare(
        arguments.inputs,
        arguments.out,
        _append_config(arguments) if arguments.append else _prepare_config(arguments),
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        append=arguments.append,
    )
    print(describe_store(open_store(arguments.out)))
    print(f"next: rayvaec train {arguments.out} --out RUN")


def _prepare_config(arguments: argparse.Namespace) -> PrepareConfig:
    """Return what the options say, and the configuration's own defaults for the others."""
    from rayvaec.data.prepare.config import PrepareConfig

    if arguments.labels_key is None:
        raise ConfigError("--labels-key is missing", "name the obs column of cell types")
    if arguments.new_labels:
        raise ConfigError("--new-labels is given without --append", "leave it out")
    names = (
        *("labels_key", "batch_key", "layer", "genes", "n_top_genes", "drop_empty"),
        *("val_fraction", "seed", "num_workers", "codec"),
    )
    given = {name: getattr(arguments, name) for name in names}
    values = {name: value for name, value in given.items() if value is not None}
    return PrepareConfig(**values, memory=_memory(arguments))


def _append_config(arguments: argparse.Namespace) -> PrepareConfig:
    """Return how the store was written, with what may differ for the new cells."""
    from rayvaec.data.prepare.append import append_config

    for name in ("n_top_genes", "val_fraction", "seed", "codec"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is given with --append", "leave it out: the store has it")
    names = (
        *("labels_key", "batch_key", "layer", "genes", "drop_empty", "new_labels"),
        "num_workers",
    )
    return append_config(
        arguments.out,
        **{name: getattr(arguments, name) for name in names},
        memory=_memory(arguments),
    )


def _memory(arguments: argparse.Namespace) -> int | None:
    from rayvaec.data.prepare.memory import parse_bytes

    return None if arguments.memory is None else parse_bytes(arguments.memory)


def add_inspect(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("inspect", help="say what a store, a model or a run holds")
    verb.add_argument("path", metavar="STORE|MODEL|RUN", help="a store may be a URL")
    verb.add_argument("--verify", action="store_true", help="check the checksums of a store")
    verb.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    path = location(arguments.path)
    if isinstance(path, Url) or _is_zarr(path):
        from rayvaec.data.store.describe import describe_external, describe_store
        from rayvaec.data.store.open import is_external, open_store

        if is_external(path) and not arguments.verify:
            print(describe_external(path))
            return
        store = open_store(path)
        print(describe_store(store))
        if arguments.verify:
            store.verify()
            print("every checksum is right")
    elif (path / "model.safetensors").exists():
        from rayvaec.inference.trained_model import load_model

        print(load_model(path).describe())
    elif (path / "run.json").exists():
        from rayvaec.training.monitor.console import describe_run
        from rayvaec.training.monitor.curves import draw_curves

        print(describe_run(path))
        curves = draw_curves(path)
        if curves is not None:
            print(f"curves      {curves}")
    else:
        what = "is no store, model or run" if path.exists() else "does not exist"
        raise StoreError(f"{path} {what}", "give a folder that rayvaec wrote")


def _is_zarr(path: Path) -> bool:
    """Return whether a path is a Zarr group's, or may be a store's description."""
    return path.suffix == ".json" or any((path / n).exists() for n in ("zarr.json", ".zgroup"))
