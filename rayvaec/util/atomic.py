"""Atomic outputs: written to a temporary name beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rayvaec.errors import ConfigError, StoreError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of writing where there is no room, or a file may not grow."""

FILE_SUFFIXES = (
    *(".csv", ".tsv", ".txt", ".parquet", ".feather", ".xlsx", ".json", ".jsonl", ".html", ".pdf"),
    *(".h5ad", ".h5", ".hdf5", ".h5mu", ".loom", ".mtx", ".npz", ".npy", ".rds"),
    *(".pt", ".pth", ".pkl", ".ckpt", ".safetensors", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"),
)
"""Endings of names that promise a file, not a folder."""

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


def check_suffix(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse an output whose name promises another format than the one that is written.

    Parameters
    ----------
    path : Path
        Where the output shall go.
    suffixes : sequence of str
        The formats it can have, such as ``.zarr``; none for a folder.

    Raises
    ------
    ConfigError
        If the name ends in none of `suffixes` or, for a folder, in one of a file's.
    """
    suffix = path.suffix.lower()
    if suffixes and suffix not in suffixes:
        *others, last = suffixes
        known = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(
            f"the name of the output {path} does not end in a format that can be written here",
            f"choose a name that ends in {known}",
        )
    if not suffixes and suffix in FILE_SUFFIXES:
        raise ConfigError(
            f"the output {path} will be a folder, and its name says that it is a {suffix} file",
            f"choose a name that does not end in {suffix}",
        )


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


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, so that readers see the old file or the new one, never a part."""
    descriptor, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as `open_whole` does, and so that it outlives a power cut."""
    with open_whole(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1))
