"""How elements of Zarr groups are reached."""

from __future__ import annotations

from typing import Any

from rayvaec.data.arrays.delta import without_delta_warning
from rayvaec.data.inputs.access import Access


class ZarrAccess(Access):
    """Reads Zarr groups; see `Access`."""

    def names(self, group: Any) -> list[str] | None:
        """Return the names of a group's elements, None on a web server."""
        return super().names(group) if group.store.supports_listing else None

    def child(self, group: Any, name: str) -> Any:
        """Return an element of a group, None where there is none."""
        with without_delta_warning():
            return group.get(name)
