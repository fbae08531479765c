"""What a Zarr group says about itself, in either version of the format."""

from __future__ import annotations

import json
from typing import Any

from rayvaec.data.blobs import Blobs
from rayvaec.errors import StoreError

COLLECTION = "annbatch-preshuffled"


def group_attributes(blobs: Blobs, prefix: str = "") -> dict[str, Any] | None:
    """Read the attributes of a group.

    Parameters
    ----------
    blobs : Blobs
        Where it lies.
    prefix : str
        Its path with a slash at the end; empty for the root.

    Returns
    -------
    dict or None
        None where there is no group.

    Raises
    ------
    StoreError
        If its metadata is damaged.
    """
    key = f"{prefix}zarr.json"
    text = blobs.text(key)
    if text is None and blobs.text(f"{prefix}.zgroup") is not None:  # Zarr v2
        key = f"{prefix}.zattrs"
        text = f'{{"attributes": {blobs.text(key) or "{}"}}}'
    if text is None:
        return None
    try:
        group = json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"the file {blobs.locate(key)} is damaged ({error})", "copy the store again"
        ) from error
    attributes = group.get("attributes") if isinstance(group, dict) else None
    return attributes if isinstance(attributes, dict) else {}
