"""Command `demo`: the whole workflow on a synthetic atlas."""

from __future__ import annotations

import argparse

from rayvaec.commands.options import Verbs, add_out


def add_demo(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("demo", help="all of it on a synthetic atlas, in a few minutes")
    add_out(verb, "FOLDER", "folder for everything that the demo makes")
    verb.add_argument("--n-cells", type=int, default=20_000)
    verb.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from rayvaec.demo import demo

    demo(arguments.out, n_cells=arguments.n_cells, overwrite=arguments.overwrite)
