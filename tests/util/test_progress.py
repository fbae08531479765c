from __future__ import annotations

import io
import logging

from rayvaec.util.progress import Progress


def test_lines_say_how_far_and_how_long(caplog):
    caplog.set_level(logging.INFO, "rayvaec")
    with Progress(100, "cells", "checking counts", every=0) as progress:
        progress.advance(40)
        progress.advance(60, "file 2")
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("checking counts: 40 of 100 cells, ")
    assert "s left" in first
    assert last.startswith("checking counts: 100 of 100 cells, ")
    assert last.endswith("0 s left, file 2")


def test_on_a_terminal_log_lines_stand_above_the_moving_one(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(10, "cells", "training") as progress:
            progress.advance(4)
            logging.getLogger().warning("epoch 1 of 3")
            progress.advance(6)
        logging.getLogger().warning("the end")
    finally:
        logging.getLogger().removeHandler(handler)
    lines = terminal.getvalue().split("\n")
    assert lines[0].rpartition("\r")[2] == "epoch 1 of 3"
    assert "10.0/10.0" in lines[1].rpartition("\r")[2]
    assert lines[2:] == ["the end", ""]


def test_nothing_done_says_nothing(caplog):
    with caplog.at_level(logging.INFO, "rayvaec"), Progress(10, "cells", "checking"):
        pass
    assert not caplog.records


def test_what_was_done_before_does_not_count_for_the_speed(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "rayvaec")
    now = [0.0]
    monkeypatch.setattr("rayvaec.util.progress.time.monotonic", lambda: now[0])
    with Progress(100_000, "cells", "checking", done=90_000) as progress:
        now[0] = 20.0
        progress.advance(20)
        now[0] = 30.0
        progress.advance(580)
    assert [record.getMessage() for record in caplog.records] == [
        "checking: 90020 of 100000 cells, 1/s, 2 h 46 min left",
        "checking: 90600 of 100000 cells, 20/s, 8 min left",
    ]
