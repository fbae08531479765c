"""Storage that fills up, or goes away for a while, under a run on Ray."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
AWAY_SECONDS = 60


def fill(path: Path) -> None:
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**12))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a filesystem")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    command: Callable[..., Any], undisturbed: Callable[..., Any], small_disk: Path
) -> None:
    train = command(1, out=small_disk / "run")
    train.until_step(500)
    filler = small_disk / "filler"
    fill(filler)
    code, text = train.wait(timeout=60)
    assert code == 1, text
    last = text.splitlines()[-1]
    assert last.startswith("rayvaec: error: there is no room left for "), text
    assert last.endswith("; free some space, then --resume: the last good checkpoint is kept")
    filler.unlink()
    kept = train.kept_step
    again = command(1, "--resume", out=train.path)
    again.finish()
    assert again.starts[1:] == [kept]
    again.assert_same_bits(undisturbed(1))


def test_a_run_folder_that_is_away_for_a_minute_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    train = command(1)
    train.until_step(500)
    train.path.rename(tmp_path / "away")
    time.sleep(AWAY_SECONDS)
    assert not train.path.exists(), "something was written in the place of the folder"
    (tmp_path / "away").rename(train.path)
    train.finish()
    train.assert_same_bits(undisturbed(1))


def test_a_store_that_is_away_for_a_minute_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Any], chaos_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(chaos_store, store)
    train = command(1, store=store)
    train.until_step(500)
    store.rename(tmp_path / "away")
    stopped = []
    end = time.monotonic() + AWAY_SECONDS
    while time.monotonic() < end:
        stopped.append(train.step)
        time.sleep(1)
    assert stopped[-1] == stopped[-20], "the store is not needed"
    (tmp_path / "away").rename(store)
    train.finish()
    assert len(train.starts) > 1
    train.assert_same_bits(undisturbed(1))
