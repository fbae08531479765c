"""Storage that fills up, or goes away for a while, under a run on Ray."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(600)]
AWAY_SECONDS = 60
EXT4_SHUTDOWN = 0x8004587D
"""The ioctl after which an ext4 answers with EIO, until it is mounted again."""


@contextmanager
def filled(path: Path) -> Iterator[None]:
    """Leave no room on a disk, however much is removed from it, by a file that is removed after."""
    over = threading.Event()

    def fill() -> None:
        with path.open("wb", buffering=0) as file:
            while not over.wait(0.01):
                with suppress(OSError):
                    while True:
                        file.write(bytes(2**12))

    filling = threading.Thread(target=fill)
    filling.start()
    yield
    over.set()
    filling.join()
    path.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 160 MB, room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", disk], capture_output=True
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
    with filled(small_disk / "filler"):
        code, text = train.wait(timeout=60)
    assert code == 1, text
    last = text.splitlines()[-1]
    assert last.startswith("rayvaec: error: there is no room left for "), text
    assert last.endswith("; free some space, then go on with --resume")
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


class Device:
    """A disk in a file, mounted on a folder, that can be made to answer with errors."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        with image.open("wb") as file:
            file.truncate(64 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        folder.mkdir()
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def fail(self) -> None:
        """Let every read fail, also of files that are open."""
        folder = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(folder, EXT4_SHUTDOWN, struct.pack("I", 0))
        os.close(folder)

    def unmount(self, patience: float = 60) -> None:
        end = time.monotonic() + patience
        while subprocess.run(["umount", self.folder], capture_output=True).returncode:
            assert time.monotonic() < end, "somebody keeps a file open"
            time.sleep(0.2)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    try:
        device = Device(tmp_path / "image", tmp_path / "device")
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a filesystem, and ext4")
    yield device
    device.unmount()


def test_a_store_that_is_away_for_a_minute_changes_no_bit(
    command: Callable[..., Any], undisturbed: Callable[..., Any], chaos_store: Path, device: Device
) -> None:
    store = device.folder / "store"
    shutil.copytree(chaos_store, store)
    train = command(1, store=store)
    train.until_step(500)
    kept = train.kept_step
    device.fail()
    time.sleep(AWAY_SECONDS)
    assert train.process.poll() is None
    assert train.status == "running"
    device.unmount()
    device.mount()
    train.finish()
    assert len(train.starts) == 2
    assert train.starts[1] >= kept > 0
    train.assert_same_bits(undisturbed(1))
