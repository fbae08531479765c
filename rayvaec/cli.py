"""The command `rayvaec`: one thin function a verb.

Exit codes: 0; 1 for a failure in the work; 2 for a mistake in what was asked, said in one line.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import rayvaec
from rayvaec.errors import RayvaecError, StoreError

# Verbs import what they need when they run, so that --help and mistakes answer at once.


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : Sequence[str], optional
        The words after ``rayvaec``; those of this process by default.

    Returns
    -------
    int
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    debug = getattr(arguments, "debug", False)
    # A stop by `kill` or `ray job stop` cleans up just as one by the keyboard does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments.run(arguments)
    except RayvaecError as error:
        return _report(f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("interrupted", 130, debug)
    except Exception as error:
        return _report(f"failed: {type(error).__name__}: {error} (see --debug)", 1, debug)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"rayvaec: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Returns
    -------
    argparse.ArgumentParser
    """
    parser = _Parser(prog="rayvaec", description=rayvaec.__doc__)
    parser.add_argument("--version", action="version", version=f"rayvaec {rayvaec.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for add in (_add_simulate, _add_prepare, _add_inspect, _add_train, _add_bulk, _add_serve):
        add(verbs)
    _add_bridge(verbs)
    _add_demo(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show where an error was raised")
    return parser


Verbs = argparse._SubParsersAction


def _out(verb: argparse.ArgumentParser, metavar: str, help_text: str) -> None:
    verb.add_argument("--out", type=Path, required=True, metavar=metavar, help=help_text)
    verb.add_argument("--overwrite", action="store_true", help="replace what stands there")


def _add_simulate(verbs: Verbs) -> None:
    verb = verbs.add_parser("simulate", help="write a synthetic atlas of raw counts")
    _out(verb, "H5AD", "file to write, .h5ad or .zarr")
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


def _add_prepare(verbs: Verbs) -> None:
    verb = verbs.add_parser("prepare", help="turn AnnData files into a shuffled training store")
    verb.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".h5ad or .zarr")
    _out(verb, "STORE", "folder to write")
    verb.add_argument("--labels-key", required=True, metavar="KEY", help="obs column of labels")
    verb.add_argument("--batch-key", metavar="KEY", help="obs column of batches")
    verb.add_argument("--layer", help="layer that holds the raw counts (default: X)")
    verb.add_argument(
        "--genes",
        metavar="intersect|union|FILE",
        help="what to do where inputs differ: shared genes, all genes, or those a file lists",
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
        drop_empty=arguments.drop_empty,
        val_fraction=arguments.val_fraction,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
        codec=arguments.codec,
    )
    prepare(arguments.inputs, arguments.out, config, overwrite=arguments.overwrite)
    print(describe_store(open_store(arguments.out)))
    print(f"next: rayvaec train {arguments.out} --out RUN")


def _add_inspect(verbs: Verbs) -> None:
    verb = verbs.add_parser("inspect", help="say what a store, a model or a run holds")
    verb.add_argument("path", type=Path, metavar="STORE|MODEL|RUN")
    verb.add_argument("--verify", action="store_true", help="check the checksums of a store")
    verb.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    path: Path = arguments.path
    if (path / "zarr.json").exists():
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


def _add_train(verbs: Verbs) -> None:
    from rayvaec.train.config import TrainConfig

    defaults = TrainConfig().to_json()
    about = "\n".join(
        f"  {name:20} {text} ({'none' if defaults[name] is None else defaults[name]})"
        for name, text in TrainConfig.settings().items()
    )
    verb = verbs.add_parser(
        "train",
        help="train VAEC on a store, data-parallel on Ray Train",
        epilog=f"settings for --set and --config (defaults):\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("store", type=Path, metavar="STORE")
    _out(verb, "RUN", "run folder: best and last model, checkpoints, metrics")
    verb.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with settings")
    verb.add_argument(
        *("--set", "-s"),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="one setting, stronger than the file; may be repeated",
    )
    verb.add_argument("--max-epochs", type=int, metavar="N")
    verb.add_argument("--batch-size", type=int, metavar="N", help="cells a step over all workers")
    verb.add_argument("--num-workers", type=int, metavar="N")
    verb.add_argument("--seed", type=int)
    verb.add_argument("--use-gpu", action="store_true", default=None, help="one GPU a worker")
    verb.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    verb.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from rayvaec.train.config import TrainConfig
    from rayvaec.train.trainer import train

    out: Path = arguments.out
    flags = ("max_epochs", "batch_size", "num_workers", "seed", "use_gpu")
    config = TrainConfig.from_options(
        arguments.config,
        arguments.settings,
        run=out if arguments.resume and (out / "config.json").exists() else None,
        **{name: getattr(arguments, name) for name in flags},
    )
    result = train(
        arguments.store, out, config, resume=arguments.resume, overwrite=arguments.overwrite
    )
    elbo = "" if result.best_elbo is None else f", validation ELBO {result.best_elbo:.2f}"
    print(
        f"trained {result.epochs} epochs in {result.seconds:.0f} s "
        f"(start-up {result.startup_seconds:.0f} s)"
    )
    print(f"best model: {out}/model (epoch {result.best_epoch}{elbo})")
    print(f"next: rayvaec sample {out}/model {arguments.store} --out OUT.zarr --n-samples 10")
    print(f"      rayvaec serve {out}/model")


_BULK = {
    "sample": "draw from the posterior predictive of every cell of a store",
    "embed": "write every cell's latent mean and variance",
    "expression": "write every cell's denoised expression",
    "elbo": "write every cell's evidence lower bound",
}


def _add_bulk(verbs: Verbs) -> None:
    for name, help_text in _BULK.items():
        verb = verbs.add_parser(name, help=help_text)
        verb.add_argument("model", type=Path, metavar="MODEL")
        verb.add_argument("store", type=Path, metavar="STORE")
        _out(verb, "OUT.zarr", "AnnData Zarr to write; a rerun after a stop does what is missing")
        verb.add_argument("--num-workers", type=int, default=1, metavar="N")
        verb.add_argument("--use-gpu", action="store_true", help="one GPU a worker")
        if name in ("sample", "elbo"):
            verb.add_argument("--seed", type=int, default=0)
        if name == "sample":
            verb.add_argument("--n-samples", type=int, required=True, metavar="N")
            verb.add_argument(
                "--reduce",
                default="",
                metavar="mean,var,zero_fraction",
                help="write these moments of the draws instead of the draws",
            )
        verb.set_defaults(run=_bulk)


def _bulk(arguments: argparse.Namespace) -> None:
    from rayvaec.infer import bulk

    options = {name: getattr(arguments, name) for name in ("num_workers", "use_gpu", "overwrite")}
    if arguments.verb in ("sample", "elbo"):
        options["seed"] = arguments.seed
    if arguments.verb == "sample":
        options["n_samples"] = arguments.n_samples
        options["reduce"] = tuple(filter(None, arguments.reduce.split(",")))
    verb = getattr(bulk, f"{arguments.verb}_store")
    verb(arguments.model, arguments.store, arguments.out, **options)
    print(f"wrote {arguments.out}; read it with anndata.read_zarr")


def _add_serve(verbs: Verbs) -> None:
    verb = verbs.add_parser("serve", help="serve a model's draws over HTTP, on Ray Serve")
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("--host", default="127.0.0.1", help="another address needs a token")
    verb.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    verb.add_argument("--num-replicas", type=int, default=1, metavar="N")
    verb.add_argument("--token-file", type=Path, metavar="FILE", help="or RAYVAEC_TOKEN")
    verb.add_argument("--use-gpu", action="store_true", help="one GPU a replica")
    verb.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from rayvaec.serve.app import run

    run(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        num_replicas=arguments.num_replicas,
        token_file=arguments.token_file,
        use_gpu=arguments.use_gpu,
    )


def _add_bridge(verbs: Verbs) -> None:
    verb = verbs.add_parser("import", help="turn a CondSCVI folder of scvi-tools into a model")
    verb.add_argument("folder", type=Path, metavar="DIR", help="what CondSCVI.save wrote")
    _out(verb, "MODEL", "model folder to write")
    verb.set_defaults(run=_import)
    verb = verbs.add_parser("export", help="write a model as scvi-tools' CondSCVI.load opens it")
    verb.add_argument("model", type=Path, metavar="MODEL")
    _out(verb, "DIR", "folder to write")
    verb.add_argument("--layer", help="layer in which scvi-tools shall find counts (default: X)")
    verb.add_argument(
        "--keep-prior", action="store_true", help="no stand-in for the mixture DestVI asks for"
    )
    verb.set_defaults(run=_export)


def _import(arguments: argparse.Namespace) -> None:
    from rayvaec.infer.trained import load_model
    from rayvaec.model.scvi import import_model

    import_model(arguments.folder, arguments.out, arguments.overwrite)
    print(load_model(arguments.out).describe())
    print(f"next: rayvaec serve {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from rayvaec.model.scvi import export_condscvi

    opened_by = export_condscvi(
        arguments.model,
        arguments.out,
        layer=arguments.layer,
        keep_prior=arguments.keep_prior,
        overwrite=arguments.overwrite,
    )
    print(f"wrote {arguments.out}; {opened_by}")


def _add_demo(verbs: Verbs) -> None:
    verb = verbs.add_parser("demo", help="all of it on a synthetic atlas, in a few minutes")
    _out(verb, "FOLDER", "folder for everything that the demo makes")
    verb.add_argument("--n-cells", type=int, default=20_000)
    verb.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from rayvaec.demo import demo

    demo(arguments.out, n_cells=arguments.n_cells, overwrite=arguments.overwrite)


if __name__ == "__main__":
    raise SystemExit(main())
