"""Working directory of `prepare`: what has been written, for `--resume`.

``.<name>.partial`` holds ``plan.json`` (what is made of what), ``store`` (the output so far),
``scratch`` (what goes away) and one record for everything that is finished, each written as a whole
and after what it speaks of. A process that was killed at any moment so leaves a folder that the
next one can go on from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rayvaec import __version__
from rayvaec.data.prepare.config import PrepareConfig
from rayvaec.errors import ConfigError, RayvaecError, StoreError
from rayvaec.util.atomic import FULL_DISK, remove, write_json
from rayvaec.util.messages import differences

SHAPING = (
    *("labels_key", "batch_key", "layer", "genes", "n_top_genes", "drop_empty", "new_labels"),
    *("val_fraction", "seed", "codec", "rows_per_chunk", "partition_elements"),
)
"""The fields of a configuration that the result depends on."""


def work_plan(
    inputs: Sequence[tuple[Path, str | None]], config: PrepareConfig, store_hash: str | None
) -> dict[str, object]:
    """Describe a piece of work by what messages call its parts.

    Parameters
    ----------
    inputs : sequence of tuple of Path and str
        Files and folders, and the layer that is read of each; of a file, path, size and time of
        the last change matter.
    config : PrepareConfig
        Of which the fields that the result depends on.
    store_hash : str, optional
        Hash of the store that cells are appended to.

    Returns
    -------
    dict of str to JSON-able
    """
    plan: dict[str, object] = {
        f"--{field.replace('_', '-')}": getattr(config, field) for field in SHAPING
    }
    if config.genes is not None:
        plan["--genes"] = _genes(config.genes)
    for number, (path, layer) in enumerate(inputs, 1):
        own = "" if layer == config.layer else f", layer {layer or 'X'}"
        plan[f"input {number}"] = _state(path) + own
    plan["the store appended to"] = store_hash
    plan["rayvaec's version"] = __version__
    return plan


def _genes(genes: str | Path) -> str:
    if genes in ("intersect", "union"):
        return str(genes)
    try:
        digest = hashlib.sha256(Path(genes).read_bytes()).hexdigest()
    except OSError:
        return str(genes)  # whoever reads it says what is wrong
    return f"{Path(genes).absolute()} ({digest[:12]})"


def _state(path: Path) -> str:
    """Return what changes when a file, or anything in a folder, does."""
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
    stats = [os.stat(file) for file in files]
    size = sum(stat.st_size for stat in stats)
    latest = max((stat.st_mtime_ns for stat in stats), default=0)
    moment = datetime.fromtimestamp(latest // 10**9, UTC).isoformat(sep=" ").removesuffix("+00:00")
    many = f"{len(files)} files, " if path.is_dir() else ""
    return f"{path.absolute()} ({many}{size} bytes, changed {moment}.{latest % 10**9:09d})"


logger = logging.getLogger("rayvaec")

NOTE_EVERY_S = 30.0
"""Seconds of work that an interruption may cost."""


class Workspace:
    """Where the work on one output lies; `working` opens it.

    Parameters
    ----------
    out : Path
        Where the finished output shall stand; an absolute path.

    Attributes
    ----------
    folder, store, scratch : Path
        All of it, the output so far, and temporary files.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.store = self.folder / "store"
        self.scratch = self.folder / "scratch"
        self._noted = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time to note how far a long pass is; then starts to wait anew."""
        if time.monotonic() - self._noted < NOTE_EVERY_S:
            return False
        self._noted = time.monotonic()
        return True

    def write(self, name: str, record: Any) -> None:
        """Note a JSON-able record durably, in place of an earlier one of its name."""
        write_json(self.folder / f"{name}.json", record)

    def read(self, name: str) -> Any:
        """Return a record; None where there is none."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def records(self, stem: str) -> dict[int, Any]:
        """Return the records ``<stem>-<number>`` by their numbers."""
        numbers = [
            path.stem.removeprefix(f"{stem}-") for path in self.folder.glob(f"{stem}-*.json")
        ]
        return {int(number): self.read(f"{stem}-{number}") for number in numbers}

    def describe(self) -> str:
        """Say how far the work is."""
        layout, done = self.read("layout"), len(self.records("partition"))
        if layout is not None:
            return f"{done} of {layout['n_partitions']} partitions are written"
        survey = self.read("survey")
        return f"{0 if survey is None else survey['cells']} cells are checked"


@contextmanager
def working(
    out: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Workspace]:
    """Open the workspace of an output, whose lock the caller holds.

    It is removed at the end. After an error it is removed too, if this call began the work and
    the next call would fail like it: for a mistake in the input or in the code. An interruption,
    storage that fails and lost workers leave it to be gone on with.

    Parameters
    ----------
    out : Path
        Where the finished output shall stand; an absolute path.
    plan : mapping
        JSON-able identity of the work, by what messages shall call each part.
    resume : bool
        Whether to go on from where another process was interrupted.
    overwrite : bool
        Whether to remove what another process left.

    Yields
    ------
    Workspace

    Raises
    ------
    StoreError
        If there is unfinished work and neither is true, or the disk is full.
    ConfigError
        If the unfinished work has another plan and shall be resumed.
    """
    work = Workspace(out)
    went_on = _settle_leftover(work, plan, resume, overwrite)
    try:
        with _full_disk(out, resumable=went_on):
            work.scratch.mkdir(parents=True, exist_ok=True)
            if not went_on:
                work.write("plan", plan)
            yield work
    except BaseException as error:
        if not (went_on or _may_pass(error)):
            remove(work.folder)
        else:
            with suppress(OSError):
                logger.warning("the same command with --resume goes on (%s)", work.describe())
        raise
    remove(work.folder)


def _may_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed later: the cause is no mistake in input or code."""
    if isinstance(error, RayvaecError):
        return error.exit_code == RayvaecError.exit_code
    return isinstance(error, OSError | MemoryError) or not isinstance(error, Exception)


@contextmanager
def _full_disk(out: Path, resumable: bool) -> Iterator[None]:
    """Turn the errors of a full disk into one that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        place = f": {error.filename}" if error.filename else ""
        raise StoreError(
            f"{out.parent} has no room left for {out.name} ({error.strerror}{place})",
            "make room on that disk and use --resume"
            if resumable
            else "make room on that disk, or choose another --out",
        ) from error


def _settle_leftover(
    work: Workspace, plan: Mapping[str, Any], resume: bool, overwrite: bool
) -> bool:
    """Return whether there is unfinished work to go on with; remove it if it shall not be."""
    try:
        before = work.read("plan")
    except ValueError as error:
        raise StoreError(f"{work.folder} is damaged ({error})", "remove that folder") from error
    if before is None:  # it was killed before it did anything, if there is a folder at all
        remove(work.folder)
        return False
    if resume:
        _refuse_other_plan(work.out, before, plan)
        logger.info("going on with %s (%s)", work.out, work.describe())
        return True
    if not overwrite:
        raise StoreError(
            f"work on {work.out} was interrupted ({work.describe()})",
            "go on with --resume, or start over with --overwrite",
        )
    logger.info("removing the unfinished work on %s (%s)", work.out, work.describe())
    remove(work.folder)
    return False


def _refuse_other_plan(out: Path, before: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    differ = differences(before, plan)
    if differ:
        raise ConfigError(
            f"the work on {out} cannot be resumed: {differ}",
            "give what was given before, or start over with --overwrite and without --resume",
        )


def append_durably(path: Path, values: NDArray[Any], at: int) -> None:
    """Write an array to a file from a byte on, cutting off what stood there, and sync it."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Make sure that the files below a folder outlive a power cut."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
