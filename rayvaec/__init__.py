"""Distributed training and served posterior-predictive sampling of VAEC at atlas scale."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayvaec.inference.trained_model import TrainedModel, load_model

__version__ = version("rayvaec")
__all__ = ["TrainedModel", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `rayvaec.client` and `--help` import neither torch nor ray.
    if name in ("TrainedModel", "load_model"):
        from rayvaec.inference import trained_model

        return getattr(trained_model, name)
    raise AttributeError(f"module 'rayvaec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
