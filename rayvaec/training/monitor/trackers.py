"""Experiment trackers: TensorBoard, MLflow and Ray metrics.

RUN/metrics.jsonl is the record; what happens here only copies it. The copying is done on the
driver, by a thread for each tracker, so that a server that is slow or away costs the training
nothing: the thread tries again later, from where it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from rayvaec.training.config import TrainConfig
from rayvaec.training.records import RecordTail
from rayvaec.util.atomic import write_json

logger = logging.getLogger("rayvaec")

SHOWN = {
    "train_loss": "loss/train",
    "val_elbo": "elbo/validation",
    "lr": "schedule/lr",
    "kl_weight": "schedule/kl_weight",
    "cells_per_second": "speed/cells_per_second",
    "num_workers": "speed/num_workers",
    "epoch": "epoch",
}
"""Values of a record that are mirrored, and what TensorBoard calls them."""
POLL_SECONDS, FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0, 600.0
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for a tracker."""


class Tracker(Protocol):
    """Somewhere that records are copied to."""

    name: str

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Copy records, oldest first; may raise anything, and is then given them again."""

    def close(self) -> None:
        """Make what was written visible."""


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the values of a record that are mirrored."""
    return {name: float(record[name]) for name in SHOWN if record.get(name) is not None}


class TensorBoard:
    """Event files in RUN/tensorboard, for ``tensorboard --logdir RUN``.

    They are written anew from metrics.jsonl when a run is resumed, so that no step stands twice.
    """

    name = "TensorBoard"

    def __init__(self, run: Path) -> None:
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write a point for every value."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        if self._writer is None:
            self._writer = self._new_file()
        for record in records:
            for name, value in values_of(record).items():
                point = scalar(SHOWN[name], value)
                self._add(Event(wall_time=time.time(), step=record["step"], summary=point))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _new_file(self) -> Any:
        # Not a SummaryWriter: where the disk is full, that one tries again at the process's exit,
        # with a traceback after the line that says what is wrong.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        now = time.time()
        file = self._folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}"
        writer = RecordWriter(str(file))
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        return writer

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


class MLflow:
    """A run on the server that MLFLOW_TRACKING_URI names; a resumed run goes on in the same one."""

    name = "MLflow"

    def __init__(self, run: Path, config: TrainConfig) -> None:
        self._run, self._config = run, config
        self._client: Any = None
        self._id = ""
        self._done = -1

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Log a metric for every value; parameters and a name the first time."""
        from mlflow.entities import Metric

        if self._client is None:
            self._open()
        now = _milliseconds()
        metrics = [
            Metric(name, value, now, record["step"])
            for record in records
            if record["step"] > self._done
            for name, value in values_of(record).items()
        ]
        for start in range(0, len(metrics), 1000):  # the most that a server takes at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])
        self._done = max([self._done, *(record["step"] for record in records)])

    def close(self) -> None:
        """Say that the run has come to its end."""
        if self._client is not None:
            self._client.set_terminated(self._id)

    def _open(self) -> None:
        from mlflow import MlflowClient

        client = MlflowClient()
        known = self._run / "mlflow.json"
        if known.exists():
            self._id = json.loads(known.read_text())["run_id"]
            client.update_run(self._id, status="RUNNING")
            history = client.get_metric_history(self._id, "train_loss")
            self._done = max((metric.step for metric in history), default=-1)
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayvaec")
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self._id = client.create_run(experiment, run_name=self._run.name).info.run_id
            write_json(known, {"run_id": self._id})
            for key, value in self._config.to_json().items():
                client.log_param(self._id, key, value)
        self._client = client


class RayMetrics:
    """Gauges of Ray's own metrics, which Ray exports to Prometheus."""

    name = "Ray's metrics"

    def __init__(self, run: Path) -> None:
        self._tags = {"run": str(run)}
        self._gauges: dict[str, Any] = {}

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Set every gauge to the newest value."""
        from ray.util.metrics import Gauge

        newest: dict[str, float] = {}
        for record in records:
            newest |= {**values_of(record), "step": float(record["step"])}
        for name, value in newest.items():
            if name not in self._gauges:
                about = f"rayvaec train: {name} in the newest record of metrics.jsonl"
                self._gauges[name] = Gauge(f"rayvaec_train_{name}", about, tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        """Nothing is left to be written."""


def trackers_for(run: Path, config: TrainConfig) -> list[Tracker]:
    """Return the trackers that this machine and its environment offer."""
    trackers: list[Tracker] = [RayMetrics(run)]
    if find_spec("tensorboardX"):
        trackers.append(TensorBoard(run))
    if os.environ.get("MLFLOW_TRACKING_URI"):
        if find_spec("mlflow"):
            trackers.append(MLflow(run, config))
        else:
            logger.warning("MLFLOW_TRACKING_URI is set and MLflow is not installed: not used")
    return trackers


class Mirror:
    """Copy the records of a run to one tracker while it goes on.

    Parameters
    ----------
    run : Path
        The run folder.
    tracker : Tracker
        Where to.
    """

    def __init__(self, run: Path, tracker: Tracker) -> None:
        self._tracker, self._tail = tracker, RecordTail(run)
        self._waiting: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._pause = 0.0
        name = f"rayvaec-{tracker.name}"
        self._thread = threading.Thread(target=self._copy, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(CLOSE_SECONDS)

    def _copy(self) -> None:
        while not self._over.wait(self._pause or POLL_SECONDS):
            self._try(self._advance)
        self._try(self._advance)
        self._try(self._tracker.close)

    def _advance(self) -> None:
        self._waiting += self._tail.read()
        if self._waiting:
            self._tracker.write(self._waiting)
            self._waiting = []

    def _try(self, action: Any) -> None:
        try:
            action()
            self._pause = 0.0
        except Exception as error:  # whatever a tracker raises, the training goes on
            if not self._pause:
                reason = " ".join(str(error).split())[:200]
                logger.warning("%s cannot be written to: %s", self._tracker.name, reason)
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)


def _milliseconds() -> int:
    return int(time.time() * 1000)
