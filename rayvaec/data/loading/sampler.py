"""Which cells make up a minibatch: a pure function of (seed, epoch, step).

The training rows are cut into blocks of consecutive rows, the blocks are laid end to end in a
seeded order, and the line is cut into as many equal lanes as the configuration says, whatever the
number of workers. A lane's blocks are grouped into windows; the rows of a window are shuffled,
and a minibatch takes the next ``batch_size / lanes`` of every lane. A worker runs some of the
lanes, so the minibatches do not depend on how many workers there are; and a lane's position after
any number of steps is known without replaying them.

All random numbers are raw Philox words, whose stream numpy guarantees: the same minibatches come
with every version.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LanePlan:
    """The order of one epoch.

    Parameters
    ----------
    start, stop : int
        The rows to visit, ``[start, stop)``.
    batch_size : int
        Rows of a global minibatch; a multiple of `lanes`.
    lanes : int
        Number of lanes.
    block_rows : int
        Consecutive rows that are read together.
    window_blocks : int
        Blocks that are shuffled together.
    seed, epoch : int
        What the order is drawn from; in ``[0, 2**64)``.
    """

    start: int
    stop: int
    batch_size: int
    lanes: int
    block_rows: int
    window_blocks: int
    seed: int
    epoch: int

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return self.stop - self.start

    @property
    def lane_rows(self) -> int:
        """Rows that a lane gives to every full minibatch."""
        return self.batch_size // self.lanes

    @property
    def n_steps(self) -> int:
        """Minibatches of an epoch; only the last may be short."""
        return -(-self.n_rows // self.batch_size)

    def n_global(self, step: int) -> int:
        """Return the rows of a step's global minibatch."""
        return min(self.batch_size, self.n_rows - step * self.batch_size)

    @cached_property
    def _blocks(self) -> NDArray[np.int64]:
        """Blocks in the order in which they are laid out."""
        n_blocks = -(-self.n_rows // self.block_rows)
        return permutation(n_blocks, self.seed, self.epoch)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where, on the line, each laid-out block ends."""
        last = self.n_rows // self.block_rows * self.block_rows
        sizes = np.where(
            self._blocks * self.block_rows == last, self.n_rows - last, self.block_rows
        )
        return np.cumsum(sizes)

    def lane(self, lane: int) -> tuple[int, int]:
        """Return the part of the line that a lane goes along."""
        return lane * self.n_rows // self.lanes, (lane + 1) * self.n_rows // self.lanes

    def share(self, lane: int, step: int) -> tuple[int, int]:
        """Return the part of the line that a lane gives to a step, before shuffling."""
        begin, end = self.lane(lane)
        at = begin + step * self.lane_rows
        return min(at, end), min(at + self.lane_rows, end)

    def windows(self, lane: int) -> NDArray[np.int64]:
        """Return the borders of a lane's windows on the line, both ends included.

        Windows end where blocks end, so that no block is read twice for two windows. The first
        window is shorter in the lower lanes: the lanes then take turns in needing a new one,
        where otherwise one minibatch would wait for all of them.
        """
        begin, end = self.lane(lane)
        if begin == end:
            return np.array([begin, end])
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        first_window = 1 + lane * self.window_blocks // self.lanes
        borders = self._ends[first + first_window - 1 : last : self.window_blocks]
        return np.concatenate([[begin], borders, [end]])

    def runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the consecutive rows, as (start, stop), behind a part of the line, in order."""
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        runs = []
        for block in range(first, last + 1):
            row = self.start + int(self._blocks[block]) * self.block_rows
            block_end = int(self._ends[block])
            block_begin = int(self._ends[block - 1]) if block else 0
            runs.append(
                (row + max(begin - block_begin, 0), row + min(end, block_end) - block_begin)
            )
        return runs

    def order(self, lane: int, window: int, n_rows: int) -> NDArray[np.int64]:
        """Return the seeded order of a window's rows."""
        return permutation(n_rows, self.seed, self.epoch, lane + 1, window)


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)`` that is a pure function of `n` and `key`.

    Parameters
    ----------
    n : int
        Number of elements.
    *key : int
        Whatever tells one permutation from another, each in ``[0, 2**64)``.

    Returns
    -------
    array[n] of int64
    """
    packed = struct.pack(f"<{len(key)}Q", *key)
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(words)
