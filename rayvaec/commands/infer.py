"""Commands that apply a model to a whole store: `sample`, `embed`, `expression`, `elbo`, ..."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rayvaec.commands.options import Verbs, add_layer, add_out, with_layer

_ANNDATA = "AnnData to write, .zarr or .h5ad"
_OR_TABLE = f"{_ANNDATA}, or table, .csv or .parquet"
_BULK = {
    "sample": ("draw from the posterior predictive of every cell of a store", "OUT", _ANNDATA),
    "embed": ("write every cell's latent mean and variance", "OUT", _OR_TABLE),
    "expression": (
        "write every cell's denoised expression, or each label's",
        *("OUT", f"{_ANNDATA}; with --by-label a table too, .csv or .parquet"),
    ),
    "elbo": ("write every cell's evidence lower bound", "OUT", _OR_TABLE),
    "marginal-ll": ("write every cell's marginal log-likelihood", "OUT", _OR_TABLE),
    "de": ("compare the genes of groups of a store's cells", "OUT", "table, .csv or .parquet"),
    "vamp-prior": ("write the empirical prior that DestVI takes", "OUT.npz", "arrays to write"),
}
_SEEDED = ("sample", "elbo", "marginal-ll", "de", "vamp-prior")
_READ_WITH = {
    ".zarr": "anndata.read_zarr",
    ".h5ad": "anndata.read_h5ad",
    ".csv": "pandas.read_csv",
    ".parquet": "pandas.read_parquet",
    ".npz": "numpy.load",
}


def add_bulk(verbs: Verbs) -> None:
    """Add the verbs to the parser."""
    for name, (help_text, metavar, what) in _BULK.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        verb.add_argument("model", type=Path, metavar="MODEL")
        verb.add_argument("store", metavar="STORE", help="folder, or s3://, gs://, https://")
        add_layer(verb)
        add_out(verb, metavar, f"{what}; a rerun after a stop does what is missing")
        verb.add_argument("--num-workers", type=int, default=1, metavar="N")
        verb.add_argument("--use-gpu", action="store_true", help="one GPU a worker")
        if name in _SEEDED:
            verb.add_argument("--seed", type=int, default=0)
        if name in _OWN:
            _OWN[name](verb)
        verb.set_defaults(run=_bulk)


def _add_sample(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--n-samples", type=int, required=True, metavar="N")
    verb.add_argument(
        "--reduce",
        type=lambda names: tuple(filter(None, names.split(","))),
        default=(),
        metavar="mean,var,zero_fraction,quantiles",
        help="write these moments of the draws instead of the draws",
    )
    verb.add_argument(
        "--quantiles",
        type=_numbers,
        default=(),
        metavar="0.05,0.5,0.95",
        help="which, with --reduce quantiles",
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    return tuple(float(word) for word in text.split(",") if word)


def _add_expression(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--by-label", action="store_true", help="the mean over each label's cells")


def _add_marginal_ll(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--n-mc-samples", type=int, default=1000, metavar="N", help="draws of z")


def _add_vamp_prior(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--p", type=int, default=10, metavar="N", help="clusters of each label")


def _add_de(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--groupby", metavar="KEY", help="column of labels (default) or of batches")
    verb.add_argument("--group1", nargs="+", metavar="A", help="default: every group in turn")
    verb.add_argument("--group2", metavar="B", help="default: all other cells")
    verb.add_argument("--delta", type=float, default=0.25, help="least log2 fold change (0.25)")
    verb.add_argument("--fdr", type=float, default=0.05, help="false discoveries (0.05)")
    verb.add_argument("--n-samples", type=int, default=5000, metavar="N", help="pairs of draws")
    verb.add_argument(
        "--batch-correction", action="store_true", help="decode a pair's draws from the same batch"
    )


_OWN = {
    "sample": _add_sample,
    "expression": _add_expression,
    "marginal-ll": _add_marginal_ll,
    "vamp-prior": _add_vamp_prior,
    "de": _add_de,
}
_COMPARISON = ("delta", "fdr", "n_samples", "batch_correction", "seed")


def _bulk(arguments: argparse.Namespace) -> None:
    from rayvaec.inference.analyses.differential import Comparison
    from rayvaec.inference.bulk import api

    options = dict(vars(arguments))
    for name in ("verb", "run", "debug"):
        del options[name]
    model, store, out = (options.pop(name) for name in ("model", "store", "out"))
    store = with_layer(store, options.pop("layer"))
    if arguments.verb == "de":
        options["how"] = Comparison(**{name: options.pop(name) for name in _COMPARISON})
    verbs: dict[str, Callable[..., None]] = {
        "sample": api.sample_store,
        "embed": api.embed_store,
        "expression": api.expression_store,
        "elbo": api.elbo_store,
        "marginal-ll": api.marginal_ll_store,
        "de": api.differential_expression_store,
        "vamp-prior": api.vamp_prior_store,
    }
    verbs[arguments.verb](model, store, out, **options)
    print(f"wrote {out}; read it with {_READ_WITH[out.suffix.lower()]}")
