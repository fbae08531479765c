"""Storage that fills up, or goes away for a while, under a run on Ray."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rayvaec.model.saved import read_model
from rayvaec.train.checkpoint import newest_checkpoint
from rayvaec.train.metrics import read_attempts, read_records

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_records(run)), default=0)


def assert_same_bits(run: Path, reference: Path) -> None:
    ours, theirs = (read_model(path / "last").module.state_dict() for path in (run, reference))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


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
    command: Callable[..., Any], undisturbed: Callable[..., Path], small_disk: Path
) -> None:
    train = command("--num-workers", "1", out=small_disk / "run")
    train.until(lambda: last_step(train.out) > 500)
    filler = small_disk / "filler"
    fill(filler)
    code, text = train.wait()
    assert code == 1, text
    last = text.splitlines()[-1]
    assert last.startswith("rayvaec: error: there is no room left for "), text
    assert last.endswith("; free some space, then --resume: the last good checkpoint is kept")
    filler.unlink()
    newest = newest_checkpoint(train.out / "checkpoints")
    assert newest is not None
    again = command("--num-workers", "1", "--resume", out=train.out)
    code, text = again.wait()
    assert code == 0, text
    assert f"step_{read_attempts(train.out)[-1]['step']:010d}" == newest.name
    assert_same_bits(train.out, undisturbed(1))


def test_a_run_folder_that_is_away_for_a_while_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    train = command("--num-workers", "1")
    train.until(lambda: last_step(train.out) > 500)
    train.out.rename(tmp_path / "away")
    time.sleep(30)
    assert not train.out.exists(), "something was written in the place of the folder"
    (tmp_path / "away").rename(train.out)
    code, text = train.wait()
    assert code == 0, text
    assert json.loads((train.out / "run.json").read_text())["status"] == "finished"
    assert_same_bits(train.out, undisturbed(1))
