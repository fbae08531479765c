"""Models in half precision: computed with in float32, with gradients in the weights' own dtype.

The kernels, LayerNorm of counts in the thousands and the likelihood need float32. A method of a
float16 or bfloat16 model runs on a twin of it whose weights are float32 casts of its own, which
torch differentiates; float32 and float64 models run as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)
_P = ParamSpec("_P")
_R = TypeVar("_R")

REDUCED = (torch.float16, torch.bfloat16)


def in_working_precision(module: _M) -> _M:
    """Return a module whose weights are float32 or float64.

    Parameters
    ----------
    module : nn.Module
        Its first parameter's dtype is taken for that of all.

    Returns
    -------
    nn.Module
        `module` itself, or a twin with float32 casts of its parameters and buffers.
    """
    return _twin(module) if next(module.parameters()).dtype in REDUCED else module


def _twin(module: _M) -> _M:
    twin = copy.copy(module)
    # Casts are no leaves of autograd, which is what lets gradients through to the weights.
    parameters: Any = {name: _cast(value) for name, value in module._parameters.items()}
    twin._parameters = parameters
    twin._buffers = {name: _cast(value) for name, value in module._buffers.items()}
    twin._modules = {
        name: None if part is None else _twin(part) for name, part in module._modules.items()
    }
    return twin


def _cast(value: Tensor | None) -> Tensor | None:
    return value if value is None or not value.is_floating_point() else value.float()


def working_precision(
    method: Callable[Concatenate[_M, _P], _R],
) -> Callable[Concatenate[_M, _P], _R]:
    """Run a method in working precision; running statistics that it updates are kept."""

    @wraps(method)
    def run(module: _M, /, *arguments: _P.args, **options: _P.kwargs) -> _R:
        working = in_working_precision(module)
        result = method(working, *arguments, **options)
        if working is not module and module.training:
            _keep_statistics(working, module)
        return result

    return run


@torch.no_grad()
def _keep_statistics(working: nn.Module, module: nn.Module) -> None:
    for part, own in zip(working.modules(), module.modules(), strict=True):
        if isinstance(own, nn.BatchNorm1d):
            for name, value in own.named_buffers():
                value.copy_(part.get_buffer(name))


def working_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a module's results have."""
    dtype: Any = next(module.parameters()).dtype
    return torch.float32 if dtype in REDUCED else dtype
