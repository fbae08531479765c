"""Configuration of a posterior predictive check."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rayvaec.data.store.open import SPLITS
from rayvaec.errors import ConfigError
from rayvaec.inference.trained_model import check_draws
from rayvaec.util.messages import suggest


@dataclass(frozen=True)
class CheckConfig:
    """Options of a check.

    Parameters
    ----------
    n_samples : int
        Draws a cell, at least 2: the first is a stand-in for the data that the model is right
        about, and the others are compared with both.
    seed : int
        Seed of all draws.
    split : {"validation", "train", "all"}
        Which cells of the store.
    max_cells : int, optional
        Most cells to check, spread over the split; all of it by default.
    fail_under : mapping of str to float
        Least values of figures; see `parse_thresholds`.

    Raises
    ------
    ConfigError
        If an option is out of range.
    """

    n_samples: int = 10
    seed: int = 0
    split: str = "validation"
    max_cells: int | None = None
    fail_under: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_draws(self.n_samples, self.seed)
        if self.n_samples < 2:
            raise ConfigError(
                f"n_samples={self.n_samples} leaves nothing to compare draws with",
                "give a whole number >= 2",
            )
        if self.split not in SPLITS:
            raise ConfigError(
                f"there is no split {self.split!r}", f"choose one of {', '.join(SPLITS)}"
            )
        if self.max_cells is not None and self.max_cells < 1:
            raise ConfigError(f"max_cells={self.max_cells} checks nothing", "give 1 or more")

    def identity(self) -> dict[str, Any]:
        """Return what the sums over cells depend on, JSON-able."""
        fields = ("n_samples", "seed", "split", "max_cells")
        return {name: getattr(self, name) for name in fields}


def parse_thresholds(words: Iterable[str], known: Iterable[str]) -> dict[str, float]:
    """Read ``NAME=VALUE`` words.

    Parameters
    ----------
    words : iterable of str
        Such as ``"gene_mean=0.9"``.
    known : iterable of str
        Names that figures have.

    Returns
    -------
    dict of str to float

    Raises
    ------
    ConfigError
        If a word has another form, its value is no finite number, its name is unknown or given
        twice; valid names are listed.
    """
    names = sorted(known)
    thresholds: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in names:
            raise ConfigError(
                f"--fail-under={word!r}: there is no figure {name!r}",
                f"choose from {suggest(name, names, len(names))}",
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not math.isfinite(value):
            raise ConfigError(f"--fail-under={word!r} has no number", f"write it as {name}=0.9")
        if name in thresholds:
            raise ConfigError(f"--fail-under={name!r} is given twice", "name it once")
        thresholds[name] = value
    return thresholds
