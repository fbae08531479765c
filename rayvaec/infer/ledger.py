"""What of a piece of bulk work is finished, kept beside its output so that a rerun can go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayvaec.files import put_in_place, remove, write_json

logger = logging.getLogger("rayvaec")


class Ledger:
    """The folder ``OUT.partial`` of unfinished work.

    It holds the output so far, parts that are not yet in it, and a record of every finished item.
    All of it belongs to one plan: a folder of another plan is emptied.

    Parameters
    ----------
    out : Path
        Where the finished output shall stand.
    plan : mapping
        JSON-able identity of the work: what is computed from what.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.output = self.folder / "output.zarr"
        self.parts = self.folder / "parts"
        self._done = self.folder / "done"
        self._plan = self.folder / "plan.json"
        self.goes_on = self._read_plan() == dict(plan)
        if self.goes_on:
            return
        if self.folder.exists():
            logger.info("%s belongs to other work and is removed", self.folder)
            remove(self.folder)
        for folder in (self.parts, self._done):
            folder.mkdir(parents=True)
        # Not before the output exists does the plan make the folder one to go on with.
        self._identity = dict(plan)

    def _read_plan(self) -> Any:
        try:
            return json.loads(self._plan.read_text())
        except (OSError, ValueError):
            return None

    def begin(self) -> None:
        """Note the plan: from now on the folder can be gone on with."""
        write_json(self._plan, self._identity)

    def finish(self, stage: str, item: int, record: Any) -> None:
        """Note that an item is finished.

        Parameters
        ----------
        stage : str
            Name of the stage that it belongs to.
        item : int
            Its number.
        record : JSON-able
            What later stages need to know of it.
        """
        write_json(self._done / f"{stage}-{item}.json", record)

    def finished(self, stage: str, items: Iterable[int]) -> dict[int, Any]:
        """Return the records of those of `items` that are finished.

        Parameters
        ----------
        stage : str
            As in `finish`.
        items : iterable of int
            Which to look for.

        Returns
        -------
        dict of int to record
        """
        present = {path.name for path in self._done.glob(f"{stage}-*.json")}
        return {
            item: json.loads((self._done / f"{stage}-{item}.json").read_text())
            for item in items
            if f"{stage}-{item}.json" in present
        }

    def publish(self) -> None:
        """Move the finished output to its place, over what stood there, and remove the rest."""
        put_in_place(self.output, self.out)
        remove(self.folder)
