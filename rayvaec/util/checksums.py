"""SHA-256 checksums of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_checksum(path: Path) -> str:
    """Return ``sha256:`` and the SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def folder_checksums(folder: Path) -> dict[str, str]:
    """Return path and checksum of every file below a folder, sorted by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    paths = sorted(path.relative_to(folder).as_posix() for path in files)
    return {path: file_checksum(folder / path) for path in paths}


def joint_checksum(files: Mapping[str, str]) -> str:
    """Return one checksum over many files.

    Parameters
    ----------
    files : mapping of str to str
        Path and checksum of every file.

    Returns
    -------
    str
        ``sha256:`` and the digest over the lines ``<digest>  <path>`` in the order of the paths:
        over what ``sha256sum`` prints for them.
    """
    lines = (f"{files[path].removeprefix('sha256:')}  {path}\n" for path in sorted(files))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
