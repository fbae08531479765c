"""Store descriptions: a pinned manifest by which workers open the very same store.

A description holds the address and the manifest of a store as it was when some work on it began.
Cells that are appended afterwards are then no part of that work: appending leaves the old
partitions as they are. Of an external store it also holds what its survey found.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayvaec.data.store.manifest import Manifest, ScanResult
from rayvaec.data.store.store import Store
from rayvaec.errors import StoreError
from rayvaec.util.atomic import write_json
from rayvaec.util.location import Location, location

logger = logging.getLogger("rayvaec")

DESCRIPTION = "store.json"
"""Name of the file that `share` writes."""
OWN, EXTERNAL = "rayvaec_store", "rayvaec_foreign_store"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Description:
    """A store as it was.

    Parameters
    ----------
    location : Path or Url
        Where it lay.
    manifest : Manifest
        What it held.
    findings : ScanResult, optional
        Of an external store, what its survey found.
    """

    location: Location
    manifest: Manifest
    findings: ScanResult | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict that `read_description` reads."""
        return {
            OWN if self.findings is None else EXTERNAL: FORMAT_VERSION,
            "location": str(self.location),
            **({} if self.findings is None else vars(self.findings)),
            "manifest": self.manifest.sealed(),
        }

    def fits(self, store: Store) -> bool:
        """Return whether a store is the described one, also with cells appended since."""
        return store.hash == self.manifest.hash() or store.manifest.continues(self.manifest)

    def cells_of(self, store: Store) -> Store:
        """Return a store with the cells that were described.

        Parameters
        ----------
        store : Store
            What lies there now; not an external one.

        Returns
        -------
        Store

        Raises
        ------
        StoreError
            If it is another store.
        """
        if not self.fits(store):
            raise StoreError(
                f"{store.path} is not the store that this work began with: that one had "
                f"{self.manifest.n_cells} cells, and it was not only appended to",
                "put the old store back, or begin anew with the new one",
            )
        added = store.n_cells - self.manifest.n_cells
        if not added:
            return store
        logger.warning(
            "%d cells were appended to %s since this work began: it goes on with the %d of then",
            added,
            store.path,
            self.manifest.n_cells,
        )
        return Store(store.path, self.manifest)


def share(store: Store, folder: Path) -> str:
    """Write a description of a store.

    Parameters
    ----------
    store : Store
        What to describe.
    folder : Path
        Where the file goes; the processes that read it must see it too.

    Returns
    -------
    str
        Path of the file, for `rayvaec.data.store.open.open_store`.
    """
    path = folder / DESCRIPTION
    write_json(path, Description(store.path, store.manifest, store.findings).to_json())
    return str(path)


def read_description(path: Path) -> Description:
    """Read what `share` wrote.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Description

    Raises
    ------
    StoreError
        If it is no description, or one of a newer version.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, Mapping) or not {OWN, EXTERNAL} & {*value}:
            raise ValueError("it is something else")
        if value.get(OWN, value.get(EXTERNAL)) > FORMAT_VERSION:
            raise StoreError(f"{path} was written by a newer rayvaec", "upgrade rayvaec")
        where = location(value["location"])
        findings = None
        if EXTERNAL in value:
            findings = ScanResult(int(value["largest"]), str(value["digest"]))
        return Description(where, Manifest.from_json(value["manifest"], str(where)), findings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is no description of a store ({error})", "name the store itself"
        ) from error
