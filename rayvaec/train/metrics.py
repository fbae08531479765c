"""RUN/metrics.jsonl and RUN/progress.json: written by the first worker, read by everyone.

metrics.jsonl holds one JSON object a line. A record with ``val_elbo`` closes an epoch; records
without it (setting ``log_steps``) tell of a part of one. No record ever stands twice: a run that
goes back to a checkpoint first cuts off what came after it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rayvaec.files import write_json

METRICS, PROGRESS = "metrics.jsonl", "progress.json"


def append_record(run: Path, record: dict[str, Any]) -> None:
    """Append a record to the metrics of a run, in one write.

    Parameters
    ----------
    run : Path
        The run folder.
    record : dict
        ``epoch``, ``step`` and whatever was measured; JSON values.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with (run / METRICS).open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


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
    try:
        text = (run / METRICS).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


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
    if not (run / METRICS).exists():
        return
    kept = [record for record in read_records(run) if record["step"] <= step]
    partial = run / f".{METRICS}.partial"
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(run / METRICS)


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
    write_json(run / PROGRESS, {"epoch": epoch, "cells": cells})


def read_progress(run: Path) -> dict[str, Any] | None:
    """Read what `write_progress` wrote, None before the first time."""
    try:
        return json.loads((run / PROGRESS).read_text())
    except FileNotFoundError:
        return None
