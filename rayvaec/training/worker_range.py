"""A number of workers or a range of them: ``4`` or ``"2-8"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def split_range(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``num_workers="2-8"`` as the two settings that it stands for.

    Parameters
    ----------
    values : Mapping
        Settings by name, from one source.

    Returns
    -------
    dict
        With ``min_workers`` wherever ``num_workers`` is given: a plain number means no fewer.
    """
    values = dict(values)
    if "num_workers" in values:
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", str(values["num_workers"]))
        if ends is None:
            values.setdefault("min_workers", None)
        else:
            values["min_workers"], values["num_workers"] = map(int, ends.groups())
    return values


def workers_text(fewest: int, most: int) -> str:
    """Return ``"1 worker"``, ``"3 workers"`` or ``"2 to 8 workers"``."""
    if fewest < most:
        return f"{fewest} to {most} workers"
    return f"{most} worker{'s' if most != 1 else ''}"
