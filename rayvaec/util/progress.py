"""Progress: one moving line on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger("rayvaec")


class Progress:
    """How far a long piece of work is, how fast it goes and how long it will take.

    Parameters
    ----------
    total : int
        Units of work in all.
    unit : str
        Name of a unit, such as ``"cells"``.
    task : str
        What is being done, such as ``"checking counts"``.
    every : float
        Seconds between two log lines where there is no terminal.
    done : int
        Units that were done before; they do not count for the speed.
    """

    def __init__(
        self, total: int, unit: str, task: str, every: float = 10.0, done: int = 0
    ) -> None:
        self._total, self._unit, self._task, self._every = total, unit, task, every
        self._done, self._before, self._started = done, done, time.monotonic()
        self._last_line, self._logged = self._started, done
        self._note = ""
        self._bar, self._open = None, ExitStack()
        if sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())  # log lines above the moving one
            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=task, unit_scale=True)

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units as done; `note` is shown at the end of the line."""
        self._done += n
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= self._every:
            self._log()

    def _log(self) -> None:
        self._last_line, self._logged = time.monotonic(), self._done
        rate = (self._done - self._before) / max(self._last_line - self._started, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        logger.info(
            "%s: %d of %d %s, %s/s, %s left%s",
            self._task,
            self._done,
            self._total,
            self._unit,
            _rate(rate),
            _duration(left),
            f", {self._note}" if self._note else "",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._open.close()
        elif self._done > self._logged:
            self._log()


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _duration(seconds: float) -> str:
    """Say how long something takes, to two digits or so."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
