"""Records of a run: ``metrics.jsonl``, attempts, progress.

::

    RUN/metrics.jsonl    a record an epoch, or more      RUN/progress.json    how far it is
    RUN/attempts.jsonl   a record each time that workers start, and each time that some are lost

metrics.jsonl holds one JSON object a line. A record with ``val_elbo`` closes an epoch; records
without it (setting ``log_steps``) tell of a part of one. No record ever stands twice: a run that
goes back to a checkpoint first cuts off what came after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from rayvaec.training.driver.storage_retry import retry_io
from rayvaec.util.atomic import write_json, write_text

METRICS, PROGRESS, ATTEMPTS = "metrics.jsonl", "progress.json", "attempts.jsonl"


def append_record(run: Path, record: dict[str, Any]) -> None:
    """Append a record to the metrics of a run, in one write; waits for storage that is away.

    Parameters
    ----------
    run : Path
        The run folder.
    record : dict
        ``epoch``, ``step`` and whatever was measured; JSON values.
    """
    retry_io(f"{run / METRICS}", _appender(run / METRICS, record), run)


def _appender(path: Path, record: dict[str, Any]) -> Callable[[], None]:
    """Return what appends a record as a line; it may be called again after it has failed."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    end: list[int] = []

    def append() -> None:
        path.parent.stat()
        with path.open("ab+") as file:
            if not end:
                end.append(_end_of_lines(file))
            file.truncate(end[0])  # what an attempt that failed half way may have left
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    return append


def _end_of_lines(file: BinaryIO) -> int:
    """Return where a file's whole lines end; a kill may have left a part of one more."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() in (b"", b"\n"):
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def read_records(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run; a last line that is only half written is left out.

    Parameters
    ----------
    run : Path
        The run folder.

    Returns
    -------
    list of dict
        Empty where nothing has been recorded yet.
    """
    return _read_lines(run / METRICS)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def append_attempt(run: Path, step: int, num_workers: int) -> None:
    """Record that workers have started, from which step on.

    Parameters
    ----------
    run : Path
        The run folder.
    step : int
        Steps that the checkpoint they start from has taken.
    num_workers : int
        How many they are.
    """
    record = {"started": _now(), "step": step, "num_workers": num_workers}
    retry_io(f"{run / ATTEMPTS}", _appender(run / ATTEMPTS, record), run)


def record_worker_failure(run: Path, reason: str) -> None:
    """Record that workers were lost, and that the run goes on; not waiting for storage.

    Parameters
    ----------
    run : Path
        The run folder.
    reason : str
        Which, and how.
    """
    with suppress(OSError):  # whoever is told of losses has lost nothing without it
        _appender(run / ATTEMPTS, {"lost": _now(), "reason": reason})()


def read_attempts(run: Path) -> list[dict[str, Any]]:
    """Read what `append_attempt` wrote: a record each time that workers started.

    Its ``losses`` are the reasons for it, as `record_worker_failure` wrote them; none where workers
    were added or a run was resumed.
    """
    attempts, losses = [], list[str]()
    for record in _read_lines(run / ATTEMPTS):
        if "lost" in record:
            losses.append(record["reason"])
        else:
            attempts.append({**record, "losses": losses})
            losses = []
    return attempts


def read_worker_failures(run: Path) -> list[str]:
    """Read the reasons that `record_worker_failure` wrote, oldest first."""
    return [record["reason"] for record in _read_lines(run / ATTEMPTS) if "lost" in record]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """Read the records that close an epoch."""
    return [record for record in read_records(run) if "val_elbo" in record]


def cut_records(run: Path, step: int) -> None:
    """Remove the records of steps after `step`, so that repeating them writes none twice.

    Parameters
    ----------
    run : Path
        The run folder.
    step : int
        Steps that the checkpoint has taken.
    """

    def cut() -> None:
        run.stat()
        if not (run / METRICS).exists():
            return
        kept = [record for record in read_records(run) if record["step"] <= step]
        write_text(run / METRICS, "".join(json.dumps(record) + "\n" for record in kept))

    retry_io(f"{run / METRICS}", cut, run)


def write_progress(run: Path, epoch: int, cells: int) -> None:
    """Say how far a run is within an epoch.

    Parameters
    ----------
    run : Path
        The run folder.
    epoch : int
        The epoch, from 1.
    cells : int
        Cells trained on since the beginning of the run.
    """
    value = {"epoch": epoch, "cells": cells}
    retry_io(f"{run / PROGRESS}", lambda: write_json(run / PROGRESS, value), run)


def read_progress(run: Path) -> dict[str, Any] | None:
    """Read what `write_progress` wrote, None before the first time."""
    try:
        return json.loads((run / PROGRESS).read_text())
    except FileNotFoundError:
        return None


class RecordTail:
    """Read the records of a run as they come, each step once.

    A run that goes back to a checkpoint writes a new file, and the repeated steps into it; they
    are not given again.

    Parameters
    ----------
    run : Path
        The run folder.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / METRICS
        self._offset, self._last, self._step = 0, b"", -1

    def read(self) -> list[dict[str, Any]]:
        """Return the records that have been added since the last call."""
        try:
            with self._path.open("rb") as file:
                # The last line that was read tells whether this is still the same file.
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._offset = file.seek(0)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        if whole:
            self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        records = [json.loads(line) for line in whole.splitlines()]
        new = [record for record in records if record["step"] > self._step]
        self._step = max([self._step, *(record["step"] for record in new)])
        return new
