"""Pinned staging buffers that carry minibatches to the device.

All arrays of a minibatch go as one block of bytes, in the types they are stored in, from memory
that the device reads by itself, while the step before is computed. A block's shape is that of the
largest minibatch so far: rows without cells and, in one row more, entries without counts fill it
up. They weigh nothing, and every step then works on arrays of the same shapes, which a CUDA graph
demands.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.kernels.counts import CsrCounts

ALIGNMENT = 256
SPARE, ENTRIES = 1.25, 4096
"""Room for entries: so many times those of a minibatch, in so large pieces."""


class StepNumbers(NamedTuple):
    """What a step takes beside its cells.

    Parameters
    ----------
    step : int
        Steps taken before.
    lr, kl_weight : float
        Learning rate, and weight of the Kullback-Leibler term.
    """

    step: int
    lr: float
    kl_weight: float


class DeviceRows(NamedTuple):
    """A minibatch on the device, as views of one block.

    Parameters
    ----------
    x : CsrCounts
        Raw counts of n_rows x n_genes; the last row holds what fills the block up.
    labels, batches : Tensor[n_rows, 1], int32
        Codes, 0 in rows without a cell.
    cells : Tensor[n_rows], int64
        Rows in the store.
    divisor : Tensor[n_rows], float32
        Cells of the global minibatch; infinite in rows without a cell, which so weigh nothing.
    step : Tensor[1], int64
        Steps taken before.
    rates : Tensor[3], float32
        Learning rate, weight of the Kullback-Leibler term, cells of the global minibatch.
    """

    x: CsrCounts
    labels: Tensor
    batches: Tensor
    cells: Tensor
    divisor: Tensor
    step: Tensor
    rates: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a minibatch lie in a block.

    Parameters
    ----------
    n_rows : int
        Cells at most, and one.
    n_entries : int
        Stored counts at most.
    n_genes : int
        Columns.
    index_type, count_type : numpy.dtype
        Types of genes and counts.
    """

    n_rows: int
    n_entries: int
    n_genes: int
    index_type: np.dtype[Any]
    count_type: np.dtype[Any]

    def holds(self, minibatch: Minibatch) -> bool:
        """Return whether there is room for a minibatch."""
        return (
            len(minibatch) < self.n_rows
            and len(minibatch.indices) <= self.n_entries
            and (minibatch.indices.dtype, minibatch.counts.dtype)
            == (self.index_type, self.count_type)
        )

    @classmethod
    def of(cls, minibatch: Minibatch, before: Layout | None = None) -> Layout:
        """Return a layout with room for a minibatch, and for all that the one before had."""
        n_entries = -(-int(SPARE * len(minibatch.indices) + 1) // ENTRIES) * ENTRIES
        return cls(
            max(len(minibatch) + 1, 0 if before is None else before.n_rows),
            max(n_entries, 0 if before is None else before.n_entries),
            minibatch.n_genes,
            minibatch.indices.dtype,
            minibatch.counts.dtype,
        )

    def _fields(self) -> dict[str, tuple[np.dtype[Any], int]]:
        return {
            "indptr": (np.dtype(np.int64), self.n_rows + 1),
            "cells": (np.dtype(np.int64), self.n_rows),
            "step": (np.dtype(np.int64), 1),
            "labels": (np.dtype(np.int32), self.n_rows),
            "batches": (np.dtype(np.int32), self.n_rows),
            "divisor": (np.dtype(np.float32), self.n_rows),
            "rates": (np.dtype(np.float32), 3),
            "indices": (self.index_type, self.n_entries),
            "counts": (self.count_type, self.n_entries),
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of a block."""
        return sum(_aligned(dtype, n) for dtype, n in self._fields().values())

    def arrays(self, block: Tensor) -> dict[str, Tensor]:
        """Return the arrays of a block, by name.

        Parameters
        ----------
        block : Tensor[n_bytes], uint8
        """
        arrays, at = {}, 0
        for name, (dtype, n) in self._fields().items():
            torch_type = torch.from_numpy(np.empty(0, dtype)).dtype
            arrays[name] = block[at : at + n * dtype.itemsize].view(torch_type)
            at += _aligned(dtype, n)
        return arrays

    def rows(self, block: Tensor) -> DeviceRows:
        """Return the minibatch in a block.

        Parameters
        ----------
        block : Tensor[n_bytes], uint8
        """
        a = self.arrays(block)
        x = CsrCounts(a["indptr"], a["indices"], a["counts"], self.n_genes)
        codes = a["labels"][:, None], a["batches"][:, None]
        return DeviceRows(x, *codes, a["cells"], a["divisor"], a["step"], a["rates"])

    def pack(self, minibatch: Minibatch, numbers: StepNumbers, block: Tensor) -> None:
        """Write a minibatch to a block.

        Parameters
        ----------
        minibatch : Minibatch
            One that the layout holds.
        numbers : StepNumbers
            What goes with it.
        block : Tensor[n_bytes], uint8
            On the CPU.
        """
        a = {name: array.numpy() for name, array in self.arrays(block).items()}
        n, n_entries = len(minibatch), len(minibatch.indices)
        a["indptr"][: n + 1] = minibatch.indptr
        a["indptr"][n + 1 : -1] = n_entries
        a["indptr"][-1] = self.n_entries
        _fill(a["indices"], minibatch.indices)
        _fill(a["counts"], minibatch.counts)
        _fill(a["cells"], minibatch.cells)
        _fill(a["labels"], minibatch.labels)
        _fill(a["batches"], [] if minibatch.batches is None else minibatch.batches)
        a["divisor"][:n], a["divisor"][n:] = minibatch.n_global, np.inf
        a["step"][0] = numbers.step
        a["rates"][:] = numbers.lr, numbers.kl_weight, minibatch.n_global


def _aligned(dtype: np.dtype[Any], n: int) -> int:
    return -(-n * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _fill(into: NDArray[Any], values: NDArray[Any] | list[int]) -> None:
    into[: len(values)], into[len(values) :] = values, 0


class Block:
    """Bytes on the host and on the device, and how far they are.

    Parameters
    ----------
    layout : Layout
        What they hold.
    device : torch.device
        Where they go.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.layout = layout
        self.host = torch.empty(layout.n_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.there = torch.empty(layout.n_bytes, dtype=torch.uint8, device=device)
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._taken = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Wait until the host's bytes have been read, and may be written again."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def send(self, stream: torch.cuda.Stream | None) -> None:
        """Copy the host's bytes to the device, after what was there has been taken."""
        if stream is None or self._arrived is None or self._taken is None:
            self.there.copy_(self.host)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._taken)
            self.there.copy_(self.host, non_blocking=True)
            self._arrived.record(stream)

    def take(self, into: Tensor) -> None:
        """Copy the device's bytes, once they have arrived, on the stream at hand."""
        if self._arrived is None or self._taken is None:
            into.copy_(self.there)
            return
        stream = torch.cuda.current_stream(into.device)
        stream.wait_event(self._arrived)
        into.copy_(self.there, non_blocking=True)
        self._taken.record(stream)


class Staging:
    """Sends minibatches to a device ahead of their use.

    One thread sends them, in the order of their steps, and another takes them.

    Parameters
    ----------
    device : torch.device
        Where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._layout: Layout | None = None
        self._free: deque[Block] = deque()

    def send(self, minibatch: Minibatch, numbers: StepNumbers) -> Block:
        """Begin to send a minibatch.

        Parameters
        ----------
        minibatch : Minibatch
            Is copied, and may go.
        numbers : StepNumbers
            What goes with it.

        Returns
        -------
        Block
            What it will be taken from.
        """
        if self._layout is None or not self._layout.holds(minibatch):
            self._layout = Layout.of(minibatch, self._layout)
        block = self._free_block(self._layout)
        block.wait()
        block.layout.pack(minibatch, numbers, block.host)
        block.send(self._stream)
        return block

    def take(self, block: Block, into: Tensor) -> None:
        """Copy a minibatch to where it is used, on the stream at hand.

        Parameters
        ----------
        block : Block
            From `send`; is used again from now on.
        into : Tensor[n_bytes], uint8
            Room of the block's layout.
        """
        block.take(into)
        self._free.append(block)

    def _free_block(self, layout: Layout) -> Block:
        while self._free:
            block = self._free.popleft()
            if block.layout == layout:
                return block
        return Block(layout, self._device)
