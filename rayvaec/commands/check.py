"""Command `check`: posterior predictive checks on held-out cells."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rayvaec.commands.options import Verbs, add_layer, add_out, with_layer


def add_check(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    verb = verbs.add_parser("check", help="compare a model's draws with held-out cells: a report")
    verb.add_argument("model", type=Path, metavar="MODEL")
    verb.add_argument("store", metavar="STORE", help="folder, or s3://, gs://, https://")
    add_layer(verb)
    add_out(verb, "REPORT", "folder to write: index.html and report.json")
    verb.add_argument("--against", type=Path, metavar="MODEL2", help="a second model to compare")
    verb.add_argument(
        "--fail-under",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="exit code 1 if this figure is lower, such as gene_mean=0.9; may be repeated",
    )
    verb.add_argument("--n-samples", type=int, default=10, metavar="N", help="draws a cell (10)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument(
        "--split", default="validation", metavar="validation|train|all", help="which cells"
    )
    verb.add_argument("--max-cells", type=int, metavar="N", help="check N of them at most")
    verb.add_argument("--num-workers", type=int, default=1, metavar="N")
    verb.add_argument("--use-gpu", action="store_true", help="one GPU a worker")
    verb.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> None:
    from rayvaec.inference.ppc.config import CheckConfig, parse_thresholds
    from rayvaec.inference.ppc.metrics import FIGURES
    from rayvaec.inference.ppc.run import check_store, fail_below

    config = CheckConfig(
        n_samples=arguments.n_samples,
        seed=arguments.seed,
        split=arguments.split,
        max_cells=arguments.max_cells,
        fail_under=parse_thresholds(arguments.fail_under, FIGURES),
    )
    report = check_store(
        arguments.model,
        with_layer(arguments.store, arguments.layer),
        arguments.out,
        config,
        against=arguments.against,
        num_workers=arguments.num_workers,
        use_gpu=arguments.use_gpu,
        overwrite=arguments.overwrite,
    )
    _show(report)
    print(f"wrote {arguments.out}; open {arguments.out}/index.html")
    fail_below(report, arguments.out)


def _show(report: dict[str, Any]) -> None:
    """Print the verdicts and a line for every figure."""
    for model in report["models"]:
        print(f"{model['path']}: {model['verdict']['headline']}")
    for name in report["models"][0]["figures"]:
        columns = [
            f"{_text(figure['value']):>9} {_aside(figure):22}"
            for figure in (model["figures"][name] for model in report["models"])
        ]
        print(f"  {name:15}{''.join(columns)}".rstrip())


def _aside(figure: dict[str, Any]) -> str:
    if figure["reference"] is None:
        return ""
    return f"(if right {_text(figure['reference'])}, {figure['judged']})"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
