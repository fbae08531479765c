"""The page's CSV files, in JavaScript's own interpreter."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from importlib.resources import files

import pytest

from rayvaec.serving import page

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")

FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "\uff1d1",
    '=cmd|"/c x"!A1',
]
PLAIN = ["CD3D", "T cell", "a,b", 'say "x"', "a=b", "HLA-A", "two\nlines", "", "\u00e4"]


def table(genes: list[str], ids: list[str], labels: list[str]) -> str:
    """Return the file that the page makes of cells without counts."""
    empty = {"indptr": [0] * (len(ids) + 1), "indices": [], "counts": []}
    draws = {"genes": genes, "ids": ids, "labels": labels, "length": len(ids), **empty}
    source = files(page).joinpath("csv.js").read_text()
    script = f"{source}\nprocess.stdout.write(table({json.dumps(draws)}).join('\\n') + '\\n');"
    command = ["node", "--input-type=module", "-"]
    return subprocess.run(command, input=script.encode(), stdout=-1, check=True).stdout.decode()


def test_no_field_begins_as_a_formula_and_every_name_can_be_read_back():
    names = [*FORMULAS, *PLAIN]
    text = table(names, names, names)
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    expected = [f"'{name}" for name in FORMULAS] + PLAIN
    assert head == ["cell", "label", *expected]
    assert [row[:2] for row in rows] == [[name, name] for name in expected]
    assert {value for row in rows for value in row[2:]} == {"0"}
