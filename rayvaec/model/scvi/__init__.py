"""Models of scvi-tools: import, export, what each release computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayvaec.model.scvi.exporter import export_condscvi
    from rayvaec.model.scvi.importer import import_condscvi, import_model

__all__ = ["export_condscvi", "import_condscvi", "import_model"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the model itself imports `versions` from this package.
    if name == "export_condscvi":
        from rayvaec.model.scvi.exporter import export_condscvi

        return export_condscvi
    if name in __all__:
        from rayvaec.model.scvi import importer

        return getattr(importer, name)
    raise AttributeError(f"module 'rayvaec.model.scvi' has no attribute {name!r}")
