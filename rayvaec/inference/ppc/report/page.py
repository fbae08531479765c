"""HTML page of the report, self-contained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayvaec.inference.ppc.report.plots import draw_pictures
from rayvaec.util.atomic import remove, write_json
from rayvaec.util.messages import printable

PAGE, REPORT = "index.html", "report.json"


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write the page and the numbers.

    Parameters
    ----------
    report : dict
        Of `build_report`.
    folder : Path
        Where to; what stood there is removed.
    """
    remove(folder)
    folder.mkdir(parents=True)
    write_json(folder / REPORT, report)
    (folder / PAGE).write_text(render_page(report), encoding="utf-8")


def render_page(report: dict[str, Any]) -> str:
    """Return the page of a report.

    Parameters
    ----------
    report : dict
        Of `build_report`.

    Returns
    -------
    str
        HTML with all images inside it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rayvaec.inference.ppc.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "rows": _gene_rows, "weakest": _weakest}
    names = ("A", "B")[: len(report["models"])]
    models = [
        {**model, "name": name, "pictures": draw_pictures(model)}
        for name, model in zip(names, report["models"], strict=True)
    ]
    page = environment.get_template("page.html").render(report=report, models=models)
    return printable(page, keep="\n")


def number(value: float | None, digits: int = 3) -> str:
    """Write a number for a person, to some digits; a dash for what is not known."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    before = math.floor(math.log10(abs(value))) + 1
    if not -4 <= before <= 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - before, 0)}f}"


def _gene_rows(genes: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of some genes, each a dict."""
    at = {name: position for position, name in enumerate(genes["names"])}
    columns = [name for name in genes if name not in ("names", "worst")]
    return [
        {"gene": name, **{column: genes[column][at[name]] for column in columns}} for name in names
    ]


def _weakest(labels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return labels with the weakest agreement first, those without one last."""

    def gap(label: dict[str, Any]) -> float:
        value, reference = label["agreement"], label["agreement_reference"]
        return math.inf if value is None or reference is None else value - reference

    return sorted(labels, key=gap)
