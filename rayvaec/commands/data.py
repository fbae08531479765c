"""simulate, prepare, inspect: atlases and stores."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayvaec.commands.options import Verbs, add_out
from rayvaec.errors import StoreError
from rayvaec.location import Url, location


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
    from rayvaec.data.simulate import write_atlas

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
    verb.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".h5ad or .zarr")
    add_out(verb, "STORE", "folder to write")
    verb.add_argument("--labels-key", required=True, metavar="KEY", help="obs column of labels")
    verb.add_argument("--batch-key", metavar="KEY", help="obs column of batches")
    verb.add_argument("--layer", help="layer that holds the raw counts (default: X)")
    verb.add_argument(
        "--genes",
        metavar="intersect|union|FILE",
        help="what to do where inputs differ: shared genes, all genes, or those a file lists",
    )
    verb.add_argument(
        "--n-top-genes", type=int, metavar="N", help="keep the N genes that vary most (seurat_v3)"
    )
    verb.add_argument("--drop-empty", action="store_true", help="leave out cells without counts")
    verb.add_argument("--val-fraction", type=float, default=0.1, help="cells kept for validation")
    verb.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    verb.add_argument("--num-workers", type=int, default=1, help="Ray tasks that write partitions")
    verb.add_argument("--codec", choices=("lz4", "zstd"), default="lz4", help="fast or small")
    verb.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from rayvaec.data.build import PrepareConfig, prepare
    from rayvaec.data.describe import describe_store
    from rayvaec.data.store import open_store

    config = PrepareConfig(
        labels_key=arguments.labels_key,
        batch_key=arguments.batch_key,
        layer=arguments.layer,
        genes=arguments.genes,
        n_top_genes=arguments.n_top_genes,
        drop_empty=arguments.drop_empty,
        val_fraction=arguments.val_fraction,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
        codec=arguments.codec,
    )
    prepare(arguments.inputs, arguments.out, config, overwrite=arguments.overwrite)
    print(describe_store(open_store(arguments.out)))
    print(f"next: rayvaec train {arguments.out} --out RUN")


def add_inspect(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("inspect", help="say what a store, a model or a run holds")
    verb.add_argument("path", metavar="STORE|MODEL|RUN", help="a store may be a URL")
    verb.add_argument("--verify", action="store_true", help="check the checksums of a store")
    verb.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    path = location(arguments.path)
    if isinstance(path, Url) or (path / "zarr.json").exists():
        from rayvaec.data.describe import describe_store
        from rayvaec.data.store import open_store

        store = open_store(path)
        print(describe_store(store))
        if arguments.verify:
            store.verify()
            print("every checksum is right")
    elif (path / "model.safetensors").exists():
        from rayvaec.infer.trained import load_model

        print(load_model(path).describe())
    elif (path / "run.json").exists():
        from rayvaec.train.report import describe_run

        print(describe_run(path))
    else:
        what = "is no store, model or run" if path.exists() else "does not exist"
        raise StoreError(f"{path} {what}", "give a folder that rayvaec wrote")
