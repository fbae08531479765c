"""Commands `import` and `export`: models from and to scvi-tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayvaec.commands.options import Verbs, add_out
from rayvaec.util.atomic import check_suffix


def add_bridge(verbs: Verbs) -> None:
    """Add the verbs to the parser."""
    verb = verbs.add_parser("import", help="turn a CondSCVI folder of scvi-tools into a model")
    verb.add_argument("folder", type=Path, metavar="DIR", help="what CondSCVI.save wrote")
    add_out(verb, "MODEL", "model folder to write")
    verb.set_defaults(run=_import)
    verb = verbs.add_parser("export", help="write a model as scvi-tools' CondSCVI.load opens it")
    verb.add_argument("model", type=Path, metavar="MODEL")
    add_out(verb, "DIR", "folder to write")
    verb.add_argument("--layer", help="layer in which scvi-tools shall find counts (default: X)")
    verb.add_argument(
        "--keep-prior", action="store_true", help="no stand-in for the mixture DestVI asks for"
    )
    verb.set_defaults(run=_export)


def _import(arguments: argparse.Namespace) -> None:
    from rayvaec.inference.trained_model import load_model
    from rayvaec.model.scvi.importer import import_model
    from rayvaec.util.lock import WriteLock

    check_suffix(arguments.out)
    with WriteLock(arguments.out):
        import_model(arguments.folder, arguments.out, arguments.overwrite)
    print(load_model(arguments.out).describe())
    print(f"next: rayvaec serve {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from rayvaec.model.scvi.importer import export_condscvi
    from rayvaec.util.lock import WriteLock

    check_suffix(arguments.out)
    with WriteLock(arguments.out):
        opened_by = export_condscvi(
            arguments.model,
            arguments.out,
            layer=arguments.layer,
            keep_prior=arguments.keep_prior,
            overwrite=arguments.overwrite,
        )
    print(f"wrote {arguments.out}; {opened_by}")
