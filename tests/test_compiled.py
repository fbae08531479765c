from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import numpy as np
from rayvaec.compiled import compiled

@compiled
def total(values):
    sum = 0.0
    for value in values:
        sum += value
    return sum

print(total(np.arange(5.0)))
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "module.py").write_text(MODULE)
    command = [sys.executable, "-W", "error", "-c", "import module"]
    return subprocess.run(
        *(command,),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_machine_code_is_kept_beside_the_source(tmp_path):
    assert run(tmp_path).stdout.split() == ["10.0"]
    assert list(tmp_path.glob("__pycache__/module.total-*.nbc"))


def test_where_nothing_can_be_kept_it_compiles_anyway(tmp_path):
    # The one way of keeping code that is left here is for modules in zip files.
    done = run(tmp_path, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator")
    assert done.stdout.split() == ["10.0"]
    assert done.stderr == ""
    assert not list(tmp_path.glob("__pycache__/*.nbc"))


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(tmp_path, NUMBA_CACHE_LOCATOR_CLASSES="NoSuchLocator")
    assert "Unknown cache locator class: 'NoSuchLocator'" in error.value.stderr
