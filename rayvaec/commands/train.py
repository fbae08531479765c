"""Command `train`: a training run on a store."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayvaec.commands.options import Verbs, add_layer, add_out


def add_train(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    from rayvaec.training.config import TrainConfig

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
    verb.add_argument("store", metavar="STORE", help="folder, or s3://, gs://, https://")
    verb.add_argument(
        "--labels-key",
        metavar="KEY",
        help="obs column of labels, of an AnnData Zarr or annbatch collection that `prepare` did "
        "not write",
    )
    verb.add_argument("--batch-key", metavar="KEY", help="its obs column of batches")
    add_layer(verb)
    add_out(verb, "RUN", "run folder: best and last model, checkpoints, metrics")
    verb.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with settings")
    verb.add_argument(
        "--set",
        "-s",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="one setting, stronger than the file; may be repeated",
    )
    verb.add_argument("--max-epochs", type=int, metavar="N")
    verb.add_argument("--batch-size", type=int, metavar="N", help="cells a step over all workers")
    verb.add_argument(
        "--num-workers", metavar="N|N-M", help="workers; 2-8: as many as there is room for"
    )
    verb.add_argument("--seed", type=int)
    verb.add_argument("--use-gpu", action="store_true", default=None, help="one GPU a worker")
    verb.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    verb.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from rayvaec.training.config import TrainConfig

    out: Path = arguments.out
    flags = ("max_epochs", "batch_size", "num_workers", "seed", "use_gpu")
    config = TrainConfig.from_options(
        arguments.config,
        arguments.settings,
        run=out if arguments.resume and (out / "config.json").exists() else None,
        **{name: getattr(arguments, name) for name in flags},
    )
    # Only now: they import Ray and torch, which takes long.
    from rayvaec.training.driver.trainer import train
    from rayvaec.training.monitor.console import stopped_text
    from rayvaec.training.run_dir import read_config

    result = train(
        arguments.store,
        out,
        config,
        labels_key=arguments.labels_key,
        batch_key=arguments.batch_key,
        layer=arguments.layer,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    elbo = "" if result.best_elbo is None else f", validation ELBO {result.best_elbo:.2f}"
    start = f" (start-up {result.startup_seconds:.0f} s)" if result.startup_seconds else ""
    print(f"trained {result.epochs} epochs in {result.seconds:.0f} s{start}")
    why = {"stopped": result.stopped, "epoch": result.epochs, "best_epoch": result.best_epoch}
    print(f"stopped {stopped_text(why, read_config(out))}")
    print(f"best model: {out}/model (epoch {result.best_epoch}{elbo})")
    print(f"next: rayvaec sample {out}/model {arguments.store} --out OUT.zarr --n-samples 10")
    print(f"      rayvaec serve {out}/model")
