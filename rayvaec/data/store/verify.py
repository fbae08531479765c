"""Verify the checksums of a store's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from rayvaec.data.io.byte_reader import ByteReader
from rayvaec.data.store.manifest import PartitionInfo
from rayvaec.errors import StoreError
from rayvaec.util.progress import Progress


def check_text(blobs: ByteReader, key: str, text: str, checksums: Mapping[str, str]) -> None:
    """Compare a small file with its checksum before anything is made of what it says.

    Chunks have checksums of their own, and the metadata that says how to read them has none: a
    wrong fill value, or a key that leads nowhere, would be read as counts.

    Parameters
    ----------
    blobs : ByteReader
        Where the file is.
    key, text : str
        Its path in `blobs`, and its text.
    checksums : mapping of str to str
        By path; a file that is not listed is not checked.

    Raises
    ------
    StoreError
        If the file is another than the one that was written; the message names it.
    """
    wanted = checksums.get(key)
    if wanted is not None and f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" != wanted:
        raise _changed(blobs, key)


def verify_partitions(blobs: ByteReader, partitions: Iterable[PartitionInfo]) -> None:
    """Compare every file of every partition with its checksum.

    All files are looked for before the first is read: an interrupted copy is found at once.

    Parameters
    ----------
    blobs : ByteReader
        The store's files.
    partitions : iterable of PartitionInfo
        What to verify.

    Raises
    ------
    StoreError
        If a file is missing or has other bytes; the message names it.
    """
    checksums = {f"{p.name}/{path}": found for p in partitions for path, found in p.files.items()}
    sizes = {key: blobs.size(key) for key in checksums}
    missing = [key for key, size in sizes.items() if size is None]
    if missing:
        raise _missing(blobs, missing)
    known = {key: size for key, size in sizes.items() if size is not None}
    with Progress(sum(known.values()), "bytes", "verifying") as progress:
        for key, size in known.items():
            found = blobs.checksum(key)
            if found is None:
                raise _missing(blobs, [key])
            if found != checksums[key]:
                raise _changed(blobs, key)
            progress.advance(size)


def _missing(blobs: ByteReader, keys: list[str]) -> StoreError:
    others = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
    return StoreError(
        f"the file {blobs.locate(keys[0])} is missing{others}", "copy the store again"
    )


def _changed(blobs: ByteReader, key: str) -> StoreError:
    return StoreError(
        f"the file {blobs.locate(key)} does not match its checksum: it was changed, damaged or "
        "cut short",
        "copy it again, or write the store again with `rayvaec prepare ... --overwrite`",
    )
