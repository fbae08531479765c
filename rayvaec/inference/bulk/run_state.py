"""State of a bulk run: which regions are finished, so that a rerun can resume.

::

    OUT.partial/plan.json      what is computed from what
    OUT.partial/WORK/          output so far, parts that are not yet in it, records of what is done

WORK is named after the plan: workers whose command was killed may still write for a moment, and
must not write into what another plan has begun since.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayvaec.errors import StoreError
from rayvaec.util.atomic import put_in_place, remove, write_json
from rayvaec.util.messages import differences

logger = logging.getLogger("rayvaec")

FORMAT_VERSION = 2


class RunState:
    """Unfinished work on an output, whose lock the caller holds.

    Parameters
    ----------
    out : Path
        Where the finished output shall stand; an absolute path.
    plan : mapping
        JSON-able identity of the work: what is computed from what.
    overwrite : bool
        Whether unfinished work of another plan may be removed.

    Attributes
    ----------
    folder, work : Path
        All that is unfinished, and the part of it that is this plan's.
    output, parts : Path
        The AnnData that workers fill, and the folder for what they keep of regions.
    result : Path
        What is published in the end; `output` itself where AnnData Zarr is asked for.
    is_resuming : bool
        Whether work of the same plan was begun before.

    Raises
    ------
    StoreError
        If there is unfinished work of another plan, or a folder that is not of this kind.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self._plan_file = self.folder / "plan.json"
        self._identity = {"format_version": FORMAT_VERSION, "plan": json.loads(json.dumps(plan))}
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        self.work = self.folder / digest[:12]
        self.output, self.parts = self.work / "output.zarr", self.work / "parts"
        self.result = self.work / f"output{out.suffix.lower()}"
        self._done = self.work / "done"
        self._settle_leftover(overwrite)
        self.is_resuming = (self._done / "begun-0.json").exists()
        if not self.is_resuming:
            remove(self.work)
            for folder in (self.parts, self._done):
                folder.mkdir(parents=True)

    def _settle_leftover(self, overwrite: bool) -> None:
        """Refuse or remove what is not of this plan; note the plan where there was nothing."""
        try:
            before = json.loads(self._plan_file.read_text())
        except FileNotFoundError:
            before = None
            if self.folder.exists() and any(self.folder.iterdir()):
                raise StoreError(
                    f"{self.folder} is in the way and is not unfinished work",
                    "move it elsewhere, or choose another output",
                ) from None
        except ValueError:
            before = {}
        if before is not None and before != self._identity:
            self._refuse_other(before, overwrite)
            logger.info("removing the unfinished work in %s", self.folder)
            remove(self.folder)
        if before != self._identity:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._plan_file, self._identity)

    def _refuse_other(self, before: Any, overwrite: bool) -> None:
        if overwrite:
            return
        if isinstance(before, dict) and before.get("format_version") == FORMAT_VERSION:
            why = differences(before["plan"], self._identity["plan"])
            fix = "give the options of before to go on with it, or --overwrite to start anew"
        else:
            why, fix = "another version of rayvaec left it", "use --overwrite to start anew"
        raise StoreError(f"{self.folder} holds unfinished work of another kind: {why}", fix)

    def commit(self) -> None:
        """Note that the output to fill exists: from now on the work can be gone on with."""
        self.finish("begun", 0, {})

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
        """Move the result to its place, over what stood there, and remove the rest."""
        put_in_place(self.result, self.out)
        remove(self.folder)
