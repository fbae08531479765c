from __future__ import annotations

from pathlib import Path

import pytest

from rayvaec.training.records import (
    METRICS,
    RecordTail,
    append_record,
    cut_records,
    read_epochs,
    read_progress,
    read_records,
    write_progress,
)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    records = [{"epoch": 1, "step": 5, "val_elbo": -1.5}, {"epoch": 2, "step": 7}]
    for record in records:
        append_record(tmp_path, record)
    assert read_records(tmp_path) == records
    assert read_epochs(tmp_path) == records[:1]


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    append_record(tmp_path, {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "val_')
    assert read_records(tmp_path) == [{"step": 1}]
    cut_records(tmp_path, 5)
    append_record(tmp_path, {"step": 2})
    assert read_records(tmp_path) == [{"step": 1}, {"step": 2}]


def test_cutting_removes_what_comes_after_a_step(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        append_record(tmp_path, {"step": step})
    cut_records(tmp_path, 4)
    assert [record["step"] for record in read_records(tmp_path)] == [2, 4]
    cut_records(tmp_path, 0)
    assert read_records(tmp_path) == []


def test_a_value_that_json_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append_record(tmp_path, {"step": 1, "val_elbo": float("nan")})
    assert read_records(tmp_path) == []


def test_progress_is_replaced(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    write_progress(tmp_path, 1, 100)
    write_progress(tmp_path, 2, 300)
    assert read_progress(tmp_path) == {"epoch": 2, "cells": 300}


def test_a_tail_gives_every_step_once_though_the_file_is_written_anew(tmp_path: Path) -> None:
    tail = RecordTail(tmp_path)
    assert tail.read() == []

    def steps() -> list[int]:
        return [record["step"] for record in tail.read()]

    for step in (10, 20):
        append_record(tmp_path, {"epoch": 1, "step": step})
    assert steps() == [10, 20]
    assert steps() == []
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 1, "st')
    assert steps() == []
    # Longer than what was read, and in the same place on the disk.
    lines = [f'{{"epoch": 2, "step": {step}}}\n' for step in (20, 25, 30)]
    with (tmp_path / METRICS).open("r+") as file:
        file.truncate()
        file.writelines(lines)
    assert steps() == [25, 30]
    append_record(tmp_path, {"epoch": 3, "step": 40})
    assert steps() == [40]
