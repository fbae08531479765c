"""Model inputs: counts, labels and batches as tensors on the model's device."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.kernels import transfer
from rayvaec.kernels.counts import CsrCounts


class CellRows(Protocol):
    """Rows of counts with their codes, as numpy arrays."""

    @property
    def indptr(self) -> NDArray[np.int64]:
        """Row boundaries, array[n_cells + 1]."""
        ...

    @property
    def indices(self) -> NDArray[np.integer[Any]]:
        """Gene of each non-zero, array[nnz]."""
        ...

    @property
    def counts(self) -> NDArray[np.integer[Any]]:
        """Raw counts, array[nnz]."""
        ...

    @property
    def labels(self) -> NDArray[np.integer[Any]]:
        """Label codes, array[n_cells]."""
        ...

    @property
    def batches(self) -> NDArray[np.integer[Any]] | None:
        """Batch codes, array[n_cells]; None where there are none."""
        ...


class CellTensors(NamedTuple):
    """Cells on the device of a model.

    Parameters
    ----------
    x : CsrCounts
        Raw counts of n_cells x n_genes, in the dtypes they are stored in.
    y, batch_index : Tensor[n_cells, 1], int64
        Label and batch codes; batches None where there are none.
    """

    x: CsrCounts
    y: Tensor
    batch_index: Tensor | None

    @classmethod
    def of(
        cls, rows: CellRows, n_genes: int, device: torch.device, *, n_rows: int | None = None
    ) -> CellTensors:
        """Bring cells to a device.

        Parameters
        ----------
        rows : CellRows
        n_genes : int
            Genes of the model.
        device : torch.device
            The model's.
        n_rows : int, optional
            Rows of the result: cells without counts, of label and batch 0, follow those given. By
            default as many as there are cells.

        Returns
        -------
        CellTensors
        """
        missing = 0 if n_rows is None else n_rows - len(rows.labels)
        indptr = np.pad(rows.indptr, (0, missing), mode="edge") if missing else rows.indptr
        x = CsrCounts.from_numpy(indptr, rows.indices, rows.counts, n_genes).to(device)
        batches = None if rows.batches is None else code_column(rows.batches, device, missing)
        return cls(x, code_column(rows.labels, device, missing), batches)


def code_column(codes: NDArray[np.integer[Any]], device: torch.device, missing: int = 0) -> Tensor:
    """Return label or batch codes as a model takes them.

    Parameters
    ----------
    codes : NDArray[n_cells] of int
    device : torch.device
        The model's.
    missing : int
        Rows of code 0 to be added.

    Returns
    -------
    Tensor[n_cells + missing, 1], int64
    """
    padded = np.pad(codes, (0, missing)) if missing else codes
    return transfer.to_device(padded, device, torch.int64)[:, None]
