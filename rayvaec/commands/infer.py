"""sample, embed, expression, elbo: a model over a whole store."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayvaec.commands.options import Verbs, add_out

_BULK = {
    "sample": "draw from the posterior predictive of every cell of a store",
    "embed": "write every cell's latent mean and variance",
    "expression": "write every cell's denoised expression",
    "elbo": "write every cell's evidence lower bound",
}


def add_bulk(verbs: Verbs) -> None:
    """Add the verbs to the parser."""
    for name, help_text in _BULK.items():
        verb = verbs.add_parser(name, help=help_text)
        verb.add_argument("model", type=Path, metavar="MODEL")
        verb.add_argument("store", metavar="STORE", help="folder, or s3://, gs://, https://")
        add_out(
            verb, "OUT.zarr", "AnnData Zarr to write; a rerun after a stop does what is missing"
        )
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
