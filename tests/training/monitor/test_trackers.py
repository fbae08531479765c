from __future__ import annotations

import logging
import struct
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rayvaec.training.config import TrainConfig
from rayvaec.training.monitor import trackers
from rayvaec.training.monitor.trackers import Mirror, MLflow, TensorBoard, trackers_for
from rayvaec.training.records import append_record, cut_records

# tensorboardX and its protobuf classes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX.*")


def record(step: int, **values: Any) -> dict[str, Any]:
    epoch = {"epoch": 1, "step": step, "train_loss": 800.0 - step, "lr": 0.003, "val_elbo": None}
    return {**epoch, **values}


class Remembers:
    """A tracker that fails as often as it is told to."""

    name = "Remembers"

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.steps, self.closed = failures, list[int](), False

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no\nanswer")
        self.steps += [record["step"] for record in records]

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "FIRST_PAUSE", 0.01)


def wait_for(tracker: Remembers, steps: int) -> None:
    end = time.monotonic() + 20
    while len(tracker.steps) < steps and time.monotonic() < end:
        time.sleep(0.01)


def test_every_record_is_copied_once(tmp_path: Path) -> None:
    append_record(tmp_path, record(1))
    tracker = Remembers()
    with Mirror(tmp_path, tracker):
        append_record(tmp_path, record(2))
        wait_for(tracker, 2)
        cut_records(tmp_path, 1)  # a worker was lost: step 2 is repeated
        append_record(tmp_path, record(2))
        append_record(tmp_path, record(3))
    assert tracker.steps == [1, 2, 3]
    assert tracker.closed


def test_a_tracker_that_fails_is_tried_again_and_mentioned_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append_record(tmp_path, record(1))
    tracker = Remembers(failures=3)
    with caplog.at_level(logging.WARNING, "rayvaec"), Mirror(tmp_path, tracker):
        wait_for(tracker, 1)
        append_record(tmp_path, record(2))
    assert tracker.steps == [1, 2]
    assert [r.getMessage() for r in caplog.records] == ["Remembers cannot be written to: no answer"]


def test_a_tracker_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    append_record(tmp_path, record(1))
    tracker = Remembers()
    monkeypatch.setattr(tracker, "write", lambda _: time.sleep(30))
    started = time.monotonic()
    with Mirror(tmp_path, tracker):
        pass
    assert time.monotonic() - started < 15


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + length :]
    return found


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = TensorBoard(tmp_path)
        tracker.write([record(5), record(10, val_elbo=-700.5)])
        tracker.close()
    shown = points(tmp_path / "tensorboard")
    assert shown["loss/train"] == [(5, 795.0), (10, 790.0)]
    assert shown["elbo/validation"] == [(10, -700.5)]
    assert shown["schedule/lr"][0] == (5, pytest.approx(0.003))


def test_mlflow_is_used_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def names() -> list[str]:
        return [tracker.name for tracker in trackers_for(tmp_path, TrainConfig())]

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert names() == ["Ray's metrics", "TensorBoard"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/nowhere")
    monkeypatch.setattr(trackers, "find_spec", lambda name: name != "mlflow")
    assert names() == ["Ray's metrics", "TensorBoard"]
    assert "MLflow is not installed" in caplog.text
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    assert names()[-1] == "MLflow"


class FakeServer:
    """The part of MlflowClient that is used."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[Any] = []
        self.ended = 0

    def get_experiment_by_name(self, name: str) -> None:
        self.experiment = name

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}/{run_name}"))

    def update_run(self, run_id: str, status: str) -> None:
        self.again = (run_id, status)

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        self.params[key] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.metrics += metrics

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.metrics if metric.key == key]

    def set_terminated(self, run_id: str) -> None:
        self.ended += 1


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return types.SimpleNamespace(key=key, value=value, step=step)

    mlflow = types.SimpleNamespace(MlflowClient=lambda: server)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", types.SimpleNamespace(Metric=metric))
    run = tmp_path / "atlas"
    run.mkdir()
    first = MLflow(run, TrainConfig(seed=4))
    first.write([record(5), record(10, val_elbo=-700.5)])
    first.close()
    again = MLflow(run, TrainConfig(seed=4))
    again.write([record(5), record(10), record(15)])
    again.close()
    losses = [(m.step, m.value) for m in server.metrics if m.key == "train_loss"]
    assert losses == [(5, 795.0), (10, 790.0), (15, 785.0)]
    assert [m.value for m in server.metrics if m.key == "val_elbo"] == [-700.5]
    assert (server.again, server.ended) == (("7/atlas", "RUNNING"), 2)
    assert (server.params["seed"], server.experiment) == (4, "rayvaec")


FULL_DISK = """
import resource, sys
from contextlib import suppress
from pathlib import Path
from rayvaec.training.monitor.trackers import TensorBoard

tracker = TensorBoard(Path(sys.argv[1]))
tracker.write([{"epoch": 1, "step": 1, "train_loss": 2.0}])
size = sum(file.stat().st_size for file in Path(sys.argv[1]).rglob("events*"))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may grow any more
for action in (lambda: tracker.write([{"epoch": 1, "step": 2, "train_loss": 1.0}]), tracker.close):
    try:
        action()
    except OSError:
        continue
    raise AssertionError("there was room")
"""


def test_tensorboard_is_silent_at_the_end_of_a_process_whose_disk_is_full(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL_DISK, tmp_path], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
