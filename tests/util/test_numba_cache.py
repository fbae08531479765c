from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = {
    "__init__": "FIRST = 1.0",
    "deep": "STEP = 10.0",
    "helper": """
from numba import njit
from package.deep import STEP

@njit
def weight(value):
    return value * STEP
""",
    "sums": """
from package import FIRST
from package import helper
from rayvaec.util.numba_cache import compiled

@compiled
def total(values):
    sum = FIRST
    for value in values:
        sum += helper.weight(value)
    return sum
""",
}
"""A compiled function, what it inlines, and constants of other modules, directly and not."""

CALL = """
import numpy as np
from package.sums import total
{between}
print(total(np.arange(5.0)), total(np.arange(5)))
print(sum(total.stats.cache_hits.values()), "hits")
"""


def _write_package(parent: Path) -> Path:
    folder = parent / "package"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose code has not been compiled yet."""
    return _write_package(tmp_path)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose code has been compiled and kept."""
    package = _write_package(tmp_path_factory.mktemp("once"))
    assert end(start(package)) == 0
    return package


@pytest.fixture
def filled(once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(once, tmp_path / "package"))


def start(package: Path, between: str = "", **environment: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CALL.format(between=between)],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], total: float = 101.0) -> int:
    """Return how often kept code was used, 0 to 2; the results must be right."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    results, hits = out.splitlines()
    assert results.split() == [str(total)] * 2
    return int(hits.split()[0])


def kept(package: Path, suffix: str) -> list[Path]:
    return sorted((package / "__pycache__").glob(f"sums.total-*{suffix}"))


def test_machine_code_is_kept_beside_the_source_and_used_again(filled: Path) -> None:
    assert len(kept(filled, ".nbc")) == 2
    assert end(start(filled)) == 2


@pytest.mark.parametrize(
    ("module", "before", "after", "total"),
    [
        ("__init__", "1.0", "2.0", 102.0),
        ("deep", "10.0", "20.0", 201.0),
        ("helper", "value * STEP", "value + STEP", 61.0),
        ("sums", "sum += ", "sum -= ", -99.0),
    ],
)
def test_code_made_of_other_sources_is_not_used(
    filled: Path, module: str, before: str, after: str, total: float
) -> None:
    source = filled / f"{module}.py"
    source.write_text(source.read_text().replace(before, after))
    assert end(start(filled), total) == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("suffix", [".nbc", ".nbi"])
@pytest.mark.parametrize("damage", [cut, empty, turn_a_bit, become_a_folder])
def test_what_cannot_be_read_is_compiled_anew(
    filled: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    for path in kept(filled, suffix):
        damage(path)
    assert end(start(filled)) < 2  # one of the two may be there still


def test_code_of_other_types_is_not_used(filled: Path) -> None:
    """Two processes that begin at once can give their data files the same name."""
    first, second = kept(filled, ".nbc")
    shutil.copy(first, second)
    assert end(start(filled)) == 1


def test_several_processes_fill_an_empty_cache(package: Path) -> None:
    for process in [start(package) for _ in range(4)]:
        end(process)
    end(start(package))
    assert end(start(package)) == 2


def test_where_nothing_can_be_kept_it_compiles_anyway(package: Path) -> None:
    # The one way of keeping code that is left here is for modules in zip files.
    assert end(start(package, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator")) == 0
    assert not kept(package, ".nbc")


def test_a_cache_folder_that_goes_away_is_done_without(package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    gone = f"import shutil; shutil.rmtree({str(cache)!r}); open({str(cache)!r}, 'w').close()"
    assert end(start(package, gone, NUMBA_CACHE_DIR=str(cache))) == 0
    assert cache.is_file()


def test_other_errors_are_not_hidden(package: Path) -> None:
    process = start(package, NUMBA_CACHE_LOCATOR_CLASSES="NoSuchLocator")
    assert "Unknown cache locator class: 'NoSuchLocator'" in process.communicate()[1]
