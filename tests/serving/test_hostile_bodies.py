"""Bodies that want to become large are refused, within a bound on memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayvaec.protocol import ARROW, JSON

SCRIPT = Path(__file__).with_name("hostile_bodies.py")
MEBIBYTES = 256
MAY_BE_ANSWERED = ("0 in batches", "18446744073709551615 in batches", "0.5 in batches")
"""The model has no batches, and ignores them."""


@pytest.mark.parametrize(("kind", "n_bodies"), [(JSON, 49), (ARROW, 20)])
def test_no_body_takes_much_memory(kind, n_bodies):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, str(2 * MEBIBYTES)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == n_bodies
    for name, status, words, mebibytes in answers:
        refused = (200,) if name in MAY_BE_ANSWERED and status == 200 else (400, 413, 422)
        assert status in refused, (name, status, words)
        assert mebibytes <= MEBIBYTES, (name, mebibytes)


def test_what_is_allowed_is_read_as_it_was_sent():
    """The script's own cells are good ones: nothing is refused for what is not hostile in it."""
    code = (
        "import hostile_bodies as h\n"
        "from rayvaec.protocol import ARROW\n"
        "for body in (h.stream(h.cells(3)), h.stream(h.cells(2), batches=40)):\n"
        "    print(h.answer(body, ARROW))\n"
        "print(h.answer(h.repeated('counts', '3', 2), 'application/json'))\n"
    )
    path = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.splitlines()[:2] == ["(200, '')", "(200, '')"], done.stderr
    assert "cells.indices has 0 entries and cells.counts has 1" in done.stdout
