"""Counts, registries, the sharded store and its loader.

`open_store` and `Loader` are what a user of this package needs; they load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayvaec.data.loading.loader import Loader
    from rayvaec.data.store.open import open_store

__all__ = ["Loader", "open_store"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing one module of this package does not import all.
    if name == "Loader":
        from rayvaec.data.loading.loader import Loader

        return Loader
    if name == "open_store":
        from rayvaec.data.store.open import open_store

        return open_store
    raise AttributeError(f"module 'rayvaec.data' has no attribute {name!r}")
