"""Read the lanes of one worker: load windows of rows, gather minibatches from them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayvaec.data.loading.sampler import LanePlan
from rayvaec.data.loading.shuffle_buffer import (
    Minibatch,
    Pick,
    ReusableBuffers,
    Window,
    gather,
    load_window,
)
from rayvaec.data.store.open import Store


@dataclass
class _Lane:
    """Where a lane is.

    Parameters
    ----------
    number : int
        Which lane.
    at, end : int
        Where it stands on the line, and where it ends.
    borders : array of int64
        Borders of its windows on the line.
    next_window : int
        Number of the first window that was not asked for yet.
    windows : deque of Future
        Windows that are loaded or being loaded, the current one first.
    """

    number: int
    at: int
    end: int
    borders: NDArray[np.int64]
    next_window: int
    windows: deque[Future[Window]] = field(default_factory=deque)


def _lane(plan: LanePlan, number: int, step: int) -> _Lane:
    """Return a lane that stands at the beginning of a step."""
    borders = plan.windows(number)
    at, _ = plan.share(number, step)
    window = int(np.searchsorted(borders[:-1], at, side="right")) - 1
    return _Lane(number, at, int(borders[-1]), borders, max(window, 0))


class LaneReader:
    """Gathers minibatches from some lanes of a plan.

    Parameters
    ----------
    store : Store
        Where to read.
    plan : LanePlan
        The epoch's order.
    lanes : range
        The lanes to go along.
    first_step : int
        The first step that will be read; the others follow in order.
    decoders : Executor
        Runs the loading of windows.
    ahead : int
        Windows are loaded from this many steps before they are needed.
    free : list of ReusableBuffers
        Room that readers before this one have left; this one takes from it and leaves its own.
    """

    def __init__(
        self,
        store: Store,
        plan: LanePlan,
        lanes: range,
        first_step: int,
        decoders: Executor,
        ahead: int,
        free: list[ReusableBuffers],
    ) -> None:
        self._store, self._plan, self._decoders, self._ahead = store, plan, decoders, ahead
        self._lanes = [_lane(plan, number, first_step) for number in lanes]
        self._free = free
        self._rooms: list[ReusableBuffers] = []

    def read(self, step: int) -> Minibatch:
        """Return the lanes' rows of a step.

        Parameters
        ----------
        step : int
            The first step, then each time the next one.

        Returns
        -------
        Minibatch

        Raises
        ------
        StoreError
            If a file is missing, cut short or damaged; the message names it.
        """
        picks: list[Pick] = []
        used_up: list[ReusableBuffers] = []
        for lane in self._lanes:
            self._request(lane)
        for lane in self._lanes:
            end = min(lane.at + self._plan.lane_rows, lane.end)
            while lane.at < end:
                window = lane.windows[0].result()
                stop = min(end, window.end)
                picks.append(Pick(window, slice(lane.at - window.begin, stop - window.begin)))
                lane.at = stop
                if stop == window.end:
                    lane.windows.popleft()
                    used_up.append(window.buffers)
        minibatch = gather(self._store, picks, self._room(), self._plan.n_global(step), step)
        self._free += used_up
        return minibatch

    def _request(self, lane: _Lane) -> None:
        """Have the windows of a lane loaded that it needs in this step and some steps ahead."""
        end = min(lane.at + (1 + self._ahead) * self._plan.lane_rows, lane.end)
        while lane.borders[lane.next_window] < end:
            lane.windows.append(self._decoders.submit(self._load, lane, lane.next_window))
            lane.next_window += 1

    def _load(self, lane: _Lane, number: int) -> Window:
        begin, end = int(lane.borders[number]), int(lane.borders[number + 1])
        buffers = self._take()
        order = self._plan.order(lane.number, number, end - begin)
        return load_window(self._store, self._plan.runs(begin, end), buffers, (begin, end), order)

    def _room(self) -> ReusableBuffers:
        """Return room for a minibatch that no earlier minibatch is in any more."""
        for room in self._rooms:
            if not room.in_use():
                return room
        room = self._take()
        # Those that are prepared ahead, one in the consumer's hands and one being gathered. A
        # consumer that keeps more gets fresh memory.
        if len(self._rooms) < self._ahead + 2:
            self._rooms.append(room)
        return room

    def _take(self) -> ReusableBuffers:
        """Return room that nobody uses."""
        try:
            # A consumer may still hold what was gathered last in the epoch before.
            while (buffers := self._free.pop()).in_use():
                pass
        except IndexError:
            return ReusableBuffers(self._store)
        return buffers

    def close(self) -> None:
        """Leave the room for minibatches to the next reader."""
        self._free += self._rooms
        self._rooms = []
