from __future__ import annotations

import logging

from rayvaec.progress import Progress


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


def test_nothing_done_says_nothing(caplog):
    with caplog.at_level(logging.INFO, "rayvaec"), Progress(10, "cells", "checking"):
        pass
    assert not caplog.records
