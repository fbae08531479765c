"""Plots of the report, as small SVG images for light and dark pages."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayvaec.util.messages import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBSERVED, DRAWN, FAINT = "#2f7fd1", "#e0752d", "#8a8f98"
INK = "#1b1f24"
DARK_INK = "#d5dae1"
WIDTH, HEIGHT = 4.4, 3.5
MOST_LABELS = 30
MOST_DOTS = 20_000

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.transparent": True,
    "savefig.dpi": 150,
}


class Picture(NamedTuple):
    """An image for a page.

    Parameters
    ----------
    uri : str
        ``data:image/svg+xml;base64,...``.
    alt : str
        What it shows, for those who do not see it.
    """

    uri: str
    alt: str


def _style(name: str) -> Any:  # matplotlib's own type lists every setting by name
    return {**_STYLE, "svg.hashsalt": name}


Draw = Callable[["Axes", dict[str, Any]], str]


def draw_pictures(model: dict[str, Any]) -> dict[str, Picture]:
    """Draw all pictures of a model.

    Parameters
    ----------
    model : dict
        Its entry in the report, rounded.

    Returns
    -------
    dict of str to Picture
        By name, such as ``means``.
    """
    draws: dict[str, Draw] = {
        "means": _means,
        "variances": _variances,
        "zeros": _zeros,
        "trend": _trend,
        "libraries": _libraries,
        "correlations": _correlations,
        "pit": _pit,
        "levels": _levels,
        "labels": _labels,
        "latent": _latent,
    }
    return {name: _picture(draw, model, name) for name, draw in draws.items()}


def _picture(draw: Draw, model: dict[str, Any], name: str) -> Picture:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(name)):
        n_rows = min(len(model["labels"]), MOST_LABELS) if name == "labels" else 0
        height = max(HEIGHT, 1.0 + 0.2 * n_rows)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        alt = draw(axes, model)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_uri(buffer.getvalue().decode()), alt)


def _uri(svg: str) -> str:
    """Let the page's colours and fonts into an image."""
    style = (
        f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}"
        "</style>"
    )
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"(font: [\d.]+px )[^;\"]*", r"\1system-ui, sans-serif", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    end = svg.index(">") + 1
    svg = svg[:end] + style + svg[end:]
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _thinned(n: int) -> slice:
    return slice(None, None, max(-(-n // MOST_DOTS), 1))


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str = OBSERVED) -> None:
    some = _thinned(len(x))
    axes.plot(
        x[some],
        y[some],
        ".",
        color=colour,
        ms=3.5 if len(x) < 3000 else 2,
        alpha=0.5 if len(x) < 3000 else 0.3,
        mew=0,
        rasterized=len(x) > 300,
    )


def _against(axes: Axes, model: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Plot a moment of all genes, drawn against observed, on logarithmic axes."""
    observed = _numbers(model["genes"][f"observed_{name}"])
    drawn = _numbers(model["genes"][f"drawn_{name}"])
    shown = (observed > 0) & (drawn > 0)
    observed, drawn = observed[shown], drawn[shown]
    axes.set_xscale("log")
    axes.set_yscale("log")
    if len(observed):
        ends = [min(observed.min(), drawn.min()), max(observed.max(), drawn.max())]
        axes.plot(ends, ends, color=FAINT, lw=1)
    _dots(axes, observed, drawn)
    axes.set_xlabel(f"{name}, observed")
    axes.set_ylabel(f"{name}, drawn")
    return observed, drawn


def _means(axes: Axes, model: dict[str, Any]) -> str:
    observed, drawn = _against(axes, model, "mean")
    return _scatter_alt("mean count", observed, drawn)


def _variances(axes: Axes, model: dict[str, Any]) -> str:
    observed, drawn = _against(axes, model, "variance")
    return _scatter_alt("variance", observed, drawn)


def _scatter_alt(what: str, observed: np.ndarray, drawn: np.ndarray) -> str:
    if not len(observed):
        return f"No gene has a {what} above zero both observed and drawn."
    ratio = drawn / observed
    return (
        f"Scatter plot of {len(observed):,} genes, drawn against observed {what}. The median "
        f"gene's ratio is {np.median(ratio):.2f}; half of the genes lie between "
        f"{np.quantile(ratio, 0.25):.2f} and {np.quantile(ratio, 0.75):.2f}."
    )


def _zeros(axes: Axes, model: dict[str, Any]) -> str:
    observed = _numbers(model["genes"]["observed_zero_fraction"])
    drawn = _numbers(model["genes"]["drawn_zero_fraction"])
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1)
    _dots(axes, observed, drawn)
    axes.set_xlabel("zero fraction, observed")
    axes.set_ylabel("zero fraction, drawn")
    return (
        f"Scatter plot of {len(observed):,} genes, drawn against observed share of cells without "
        f"the gene. The mean difference is {np.mean(drawn - observed):+.4f}."
    )


def _trend(axes: Axes, model: dict[str, Any]) -> str:
    genes, trend = model["genes"], model["trend"]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, colour in (("observed", OBSERVED), ("drawn", DRAWN)):
        mean, variance = (_numbers(genes[f"{name}_{what}"]) for what in ("mean", "variance"))
        shown = (mean > 0) & (variance > 0)
        _dots(axes, mean[shown], variance[shown], colour)
    if trend["edges"]:
        middle = np.sqrt(np.multiply(trend["edges"][1:], trend["edges"][:-1]))
        axes.plot(middle, _numbers(trend["observed"]), color=OBSERVED, lw=2, label="observed")
        drawn = _numbers(trend["drawn"])
        axes.plot(middle, drawn, color=DRAWN, lw=2, ls="--", label="drawn")
        axes.legend(loc="upper left")
    axes.set_xlabel("mean of a gene")
    axes.set_ylabel("its variance")
    return "The genes' variance against their mean, observed and drawn, with the median trend."


def _libraries(axes: Axes, model: dict[str, Any]) -> str:
    from matplotlib.ticker import LogLocator, NullLocator

    libraries = model["libraries"]
    edges = np.array(libraries["edges"])
    width = max(len(libraries["observed"]) // 40, 1)
    for name, colour, style in (("observed", OBSERVED, "-"), ("drawn", DRAWN, "--")):
        shares = np.array(libraries[name])
        sums = np.add.reduceat(shares, np.arange(0, len(shares), width))
        borders = edges[np.append(np.arange(0, len(shares), width), len(shares))]
        axes.stairs(100 * sums, borders, color=colour, lw=1.8, ls=style, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("counts of a cell")
    axes.set_ylabel("% of cells")
    axes.legend()
    return "Histograms of the library size of observed and of drawn cells."


def _correlations(axes: Axes, model: dict[str, Any]) -> str:
    labels = model["correlations"]["labels"].values()
    empty = [np.zeros(0)]
    observed = np.concatenate(empty + [_numbers(label["observed"]) for label in labels])
    drawn = np.concatenate(empty + [_numbers(label["drawn"]) for label in labels])
    known = np.isfinite(observed) & np.isfinite(drawn)
    axes.plot([-1, 1], [-1, 1], color=FAINT, lw=1)
    _dots(axes, observed[known], drawn[known])
    if known.any():
        most = min(1.0, 1.1 * np.abs(np.r_[observed[known], drawn[known]]).max())
        axes.set_xlim(-most, most)
        axes.set_ylim(-most, most)
    axes.locator_params(nbins=5)
    axes.set_xlabel("correlation of two genes, observed")
    axes.set_ylabel("correlation, drawn")
    n_genes = len(model["correlations"]["genes"])
    return (
        f"Scatter plot of the correlations of {n_genes} genes in pairs within labels, "
        "drawn against observed."
    )


def _pit(axes: Axes, model: dict[str, Any]) -> str:
    shares = np.array(model["calibration"]["pit"])
    shares = shares.reshape(-1, 2).sum(1) * len(shares) / 2
    edges = np.linspace(0, 1, len(shares) + 1)
    axes.stairs(shares, edges, fill=True, color=OBSERVED, alpha=0.6)
    axes.axhline(1, color=DRAWN, lw=1.5, ls="--")
    axes.set_ylim(0, max(1.6, 1.05 * shares.max()))
    axes.set_xlabel("where a count lies in its predicted distribution")
    axes.set_ylabel("density (flat at 1 if right)")
    shape = "flat" if np.abs(shares - 1).max() < 0.1 else "not flat"
    return (
        f"Histogram of the probability integral transform of the observed counts; it is {shape}: "
        f"{shares[0]:.2f} at the lower end, {shares[len(shares) // 2]:.2f} in the middle and "
        f"{shares[-1]:.2f} at the upper end, where 1 is right."
    )


def _levels(axes: Axes, model: dict[str, Any]) -> str:
    calibration = model["calibration"]
    levels = calibration["levels"]
    at = np.arange(len(levels))
    colours = ("#7a5fd0", OBSERVED, "#2a9d77")
    told = []
    for number, (interval, colour) in enumerate(
        zip(calibration["intervals"], colours, strict=True)
    ):
        covered = 100 * _numbers([level["coverage"][number] for level in levels])
        axes.axhline(100 * interval, color=colour, lw=1, ls="--")
        axes.plot(at, covered, "o-", color=colour, ms=5, lw=1.5, label=f"{interval:.0%}")
        told.append(f"{interval:.0%} interval: " + ", ".join(f"{c:.0f}" for c in covered))
    axes.set_xticks(at, [level["expected_count"] for level in levels], rotation=30, ha="right")
    axes.set_ylim(0, 103)
    axes.set_xlabel("expected count")
    axes.set_ylabel("% of counts inside")
    axes.legend(loc="lower left", ncols=3, title="interval")
    return "Per cent of counts inside, from low to high expression. " + "; ".join(told) + "."


def _labels(axes: Axes, model: dict[str, Any]) -> str:
    known = [label for label in model["labels"] if label["coverage"]["0.8"] is not None]
    known.sort(key=lambda label: abs(label["coverage"]["0.8"] - 0.8))
    known = known[-MOST_LABELS:]
    covered = [100 * label["coverage"]["0.8"] for label in known]
    axes.axvline(80, color=DRAWN, lw=1.5, ls="--")
    axes.hlines(range(len(known)), 80, covered, color=FAINT, lw=1)
    axes.plot(covered, range(len(known)), "o", color=OBSERVED, ms=6)
    names = [_short(label["label"]) for label in known]
    axes.set_yticks(range(len(known)), names, parse_math=False)
    axes.set_ylim(-0.7, max(len(known) - 0.3, 0.7))
    axes.set_xlim(min([70, *covered]) - 2, max([90, *covered]) + 2)
    axes.set_xlabel("% of counts inside the 80 % interval")
    if not known:
        return "No label has enough expressed genes."
    return (
        f"Coverage of the 80 % interval by label, from {min(covered):.1f} to {max(covered):.1f} %; "
        f"furthest off is {printable(known[-1]['label'])}."
    )


def _latent(axes: Axes, model: dict[str, Any]) -> str:
    latent = model["latent"]
    names = [label["label"] for label in sorted(model["labels"], key=lambda x: -x["n_cells"])]
    position = np.array(latent["points"]["position"]).reshape(-1, 2)
    codes = np.array(latent["points"]["label"])
    shown = [_short(name) for name in names[: len(_CATEGORIES)]]
    every = []
    for name, colour in zip(names, _colours(len(names)), strict=True):
        mine = position[codes == name]
        (dots,) = axes.plot(
            *mine.T,
            ".",
            color=colour,
            ms=3.5 if len(codes) > 500 else 7,
            alpha=0.7,
            mew=0,
            rasterized=True,
        )
        every.append(dots)
    axes.set_xlabel(_axis(latent, 0))
    axes.set_ylabel(_axis(latent, 1))
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    if len(names) > 1:
        columns = 2 if len(shown) <= 12 else 3
        legend = axes.figure.legend(
            every[: len(shown)],
            [str(number) for number in range(len(shown))],
            loc="outside lower center",
            ncols=columns,
            markerscale=3 if len(codes) > 500 else 1.5,
            handletextpad=0.1,
        )
        # Not given above, where names with an underscore in front would be left out.
        for text, name in zip(legend.get_texts(), shown, strict=True):
            text.set(text=name, parse_math=False)
    share = latent["share_between_labels"] or 0
    return (
        f"Map of {len(codes):,} cells on two axes of latent space, coloured by label; "
        f"{share:.0%} of the variance is between labels."
    )


def _axis(latent: dict[str, Any], number: int) -> str:
    shares = latent["share_of_variance"]
    return f"axis {number + 1} ({shares[number]:.0%})" if number < len(shares) else ""


_CATEGORIES = (
    *("#2f7fd1", "#e0752d", "#2a9d77", "#c6487c", "#7a5fd0", "#a38314", "#2aa3b8", "#b0563b"),
    *("#6b9e2e", "#9b59b6", "#5f7d95", "#d1495b", "#3d8f5b", "#c77dba", "#8c6d46", "#5077c9"),
    *("#d99a1c", "#4fa59a", "#a84448", "#7f8c2a"),
)


def _colours(n: int) -> list[str]:
    return [_CATEGORIES[i] if i < len(_CATEGORIES) else FAINT for i in range(n)]


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= 24 else f"{text[:22]}…"
