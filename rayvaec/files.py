"""Outputs that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rayvaec.errors import StoreError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of writing where there is no room, or a file may not grow."""

PARTIAL, REPLACED = ".partial", ".replaced"


def check_free(path: Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, unless it may be overwritten.

    Parameters
    ----------
    path : Path
        Where the output shall go.
    overwrite : bool
        Whether an existing output may be replaced.

    Raises
    ------
    StoreError
        If `path` exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise StoreError(f"the output {path} exists already", "choose another --out or --overwrite")


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_output(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a name beside `path` to write to; rename it to `path` on success.

    On an error whatever was written is removed, folders made for it included, and an output that
    stood at `path` still stands. So does one that appeared there meanwhile, unless it may be
    overwritten. A kill between the two renames leaves a replaced output beside its place:
    `bring_back` knows where.

    Parameters
    ----------
    path : Path
        Where the file or folder shall stand at the end.
    overwrite : bool
        Whether an existing output may be replaced.

    Yields
    ------
    Path
        A path in the same folder that does not exist yet.

    Raises
    ------
    StoreError
        If `path` exists and `overwrite` is false.
    """
    check_free(path, overwrite)
    new_folders = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    remove(partial)
    try:
        yield partial
        check_free(path, overwrite)
        put_in_place(partial, path)
    except BaseException:
        remove(partial)
        with suppress(OSError):  # somebody else has put something there meanwhile
            for folder in new_folders:
                folder.rmdir()
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished output to its place, over what stands there.

    On an error both stand where they were. A kill between the two renames leaves a replaced output
    beside its place: `bring_back` knows where.

    Parameters
    ----------
    partial : Path
        The finished output, on the same disk.
    path : Path
        Where it shall stand.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}{REPLACED}")
    remove(old)
    with suppress(FileNotFoundError):
        path.rename(old)  # not removed first: that takes long enough to be killed at
    try:
        partial.rename(path)
    except BaseException:
        with suppress(FileNotFoundError):
            old.rename(path)
        raise
    remove(old)


def bring_back(path: Path) -> None:
    """Bring back an output that a killed process was replacing; remove what it was writing.

    Parameters
    ----------
    path : Path
        Where the output stands, or stood. No other process may be writing it.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.(\w+)(\{PARTIAL}|\{REPLACED})")
    for left in path.parent.glob(".*"):
        found = ours.fullmatch(left.name)
        # A folder `.out.zarr.partial` is not of `out` but what `prepare` has of `out.zarr`.
        if found is None or (left.is_dir() and not found[1].isdigit()):
            continue
        if left.name.endswith(REPLACED) and not path.exists():
            left.rename(path)
        else:
            remove(left)


def write_text(path: Path, text: str) -> None:
    """Write `text` so that readers see the old file or the new one, never a part."""
    descriptor, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1))
