"""Arrays on their way to the device of a model, and results on their way back to numpy.

Everything outside training crosses between numpy and torch here. Call these functions as attributes
of the module (``transfer.to_host(x)``): a test that computes on torch's `meta` device, which holds
no values, puts others in their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(
    array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return an array as a tensor on a device.

    Parameters
    ----------
    array : NDArray
        Not copied where the device is the CPU, the array contiguous and the dtype its own.
    device : torch.device
    dtype : torch.dtype, optional
        Of the result; the array's own by default.

    Returns
    -------
    Tensor of the array's shape
    """
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)


def to_host(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor of any device as an array, of its own dtype and without its gradient.

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    NDArray of the tensor's shape
        Sharing the tensor's memory where that is the CPU's.
    """
    return tensor.detach().cpu().numpy()
