"""Command `serve`: the HTTP endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayvaec.commands.options import Verbs


def add_serve(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("serve", help="serve models' draws over HTTP, on Ray Serve")
    verb.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="several models need a name each"
    )
    verb.add_argument("--host", default="127.0.0.1", help="another address needs a token")
    verb.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    verb.add_argument(
        "--num-replicas",
        default="1",
        metavar="N|N-M",
        help="processes; 1-4: as the load asks",
    )
    verb.add_argument("--token-file", type=Path, metavar="FILE", help="or RAYVAEC_TOKEN")
    verb.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a name that requests may be sent to, beside this machine's own; may be repeated",
    )
    verb.add_argument("--use-gpu", action="store_true", help="one GPU a replica")
    verb.add_argument(
        "--enable-h5ad-uploads",
        action="store_true",
        help="let requests be h5ad files: HDF5 is C code that reads what strangers send",
    )
    verb.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from rayvaec.serving.deployment import run
    from rayvaec.serving.model_names import named_models

    run(
        named_models(arguments.models),
        host=arguments.host,
        port=arguments.port,
        num_replicas=arguments.num_replicas,
        token_file=arguments.token_file,
        allowed_hosts=arguments.allowed_host,
        use_gpu=arguments.use_gpu,
        enable_h5ad_uploads=arguments.enable_h5ad_uploads,
    )
