"""Training curves as a picture: ELBO, learning rate, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayvaec.training.records import read_attempts, read_records
from rayvaec.training.worker_range import workers_text
from rayvaec.util.atomic import whole_output
from rayvaec.util.messages import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
TRAIN, VALIDATION, OTHER, FAINT = "#4c72b0", "#c44e52", "#555555", "#bbbbbb"
MANY_EPOCHS = 20

Record = dict[str, Any]


def draw_curves(run: Path) -> Path | None:
    """Draw RUN/curves.png.

    Parameters
    ----------
    run : Path
        A run folder.

    Returns
    -------
    Path or None
        The picture; None where the run has not finished an epoch yet.
    """
    from matplotlib.figure import Figure

    records = read_records(run)
    epochs = [record for record in records if "val_elbo" in record]
    if not epochs:
        return None
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    elbo, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    _draw_elbo(elbo, records, epochs, steps_per_epoch)
    _draw_rate(rate, records, steps_per_epoch)
    _draw_speed(speed, epochs)
    for attempt in read_attempts(run)[1:]:
        for axes in (elbo, rate, speed):
            axes.axvline(attempt["step"] / steps_per_epoch, color=FAINT, ls=":", lw=1, zorder=0)
    for axes in (elbo, rate, speed):
        axes.grid(axis="y", color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_xlabel("epoch")
    speed.xaxis.get_major_locator().set_params(integer=True)
    speed.set_xlim(0, epochs[-1]["epoch"] * 1.02)
    last = epochs[-1]
    took = f"{last['epoch']} epochs, {last['step']:,} steps, {last['time']:,.0f} s"
    title = f"{printable(run.resolve().name)}: {took}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    with whole_output(run / CURVES, overwrite=True) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return run / CURVES


def _draw_elbo(
    axes: Axes, records: list[Record], epochs: list[Record], steps_per_epoch: float
) -> None:
    within = [record for record in records if "val_elbo" not in record]
    if (
        within and len(epochs) < MANY_EPOCHS
    ):  # a haze that would hide the rest, where there are more
        at = [record["step"] / steps_per_epoch for record in within]
        axes.plot(at, [-r["train_loss"] for r in within], color=TRAIN, lw=0.5, alpha=0.35)
    numbers = [record["epoch"] for record in epochs]
    dots = "." if len(epochs) <= 2 * MANY_EPOCHS else None
    losses = [-record["train_loss"] for record in epochs]
    axes.plot(numbers, losses, color=TRAIN, marker=dots, label="training (minus the loss)")
    judged = [record for record in epochs if record["val_elbo"] is not None]
    shown = list(losses)
    if judged:
        at, elbos = [r["epoch"] for r in judged], [r["val_elbo"] for r in judged]
        axes.plot(at, elbos, color=VALIDATION, marker=dots, label="validation")
        best = max(judged, key=lambda record: record["val_elbo"])
        label = f"best: {best['val_elbo']:.2f} in epoch {best['epoch']}"
        place = ([best["epoch"]], [best["val_elbo"]])
        axes.scatter(*place, s=80, facecolors="none", edgecolors=VALIDATION, lw=1.5, label=label)
        shown += elbos
    if len(epochs) >= MANY_EPOCHS:
        # The first epochs are so much worse that they would hide what comes after them.
        start = len(epochs) // 10
        low = min(losses[start], *(r["val_elbo"] for r in judged[start : start + 1]), max(shown))
        margin = 0.1 * (max(shown) - low)
        if margin > 0:
            axes.set_ylim(low - margin, max(shown) + margin)
    axes.set_ylabel("ELBO (nats a cell)")
    axes.legend(frameon=False, loc="lower right")


def _draw_rate(axes: Axes, records: list[Record], steps_per_epoch: float) -> None:
    at = [record["step"] / steps_per_epoch for record in records]
    axes.plot(at, [record["lr"] for record in records], color=OTHER)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def _draw_speed(axes: Axes, epochs: list[Record]) -> None:
    speeds = [record["cells_per_second"] for record in epochs]
    edges = [epochs[0]["epoch"] - 1, *(record["epoch"] for record in epochs)]
    axes.stairs(speeds, edges, baseline=None, color=OTHER, lw=1.5)
    axes.set_ylabel("cells/s")
    axes.set_ylim(0, max(speeds) * 1.4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    counts = [record["num_workers"] for record in epochs]
    changes = [i for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]]
    for row, i in enumerate(changes):
        place = (epochs[i]["epoch"] - 0.8, max(speeds) * (1.38 if row % 2 else 1.22))
        axes.annotate(workers_text(counts[i], counts[i]), place, fontsize=8, va="top", color=OTHER)
