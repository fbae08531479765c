from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.errors import StoreError
from rayvaec.util import lock
from rayvaec.util.lock import WriteLock

HOLDS = """
import sys, time
from pathlib import Path
from rayvaec.util.lock import WriteLock
with WriteLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``store``."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_writers_at_once_are_refused(holder, tmp_path, atlas_h5ad):
    with pytest.raises(StoreError) as caught:
        prepare([atlas_h5ad], tmp_path / "store", PrepareConfig("cell_type"))
    assert f"process {holder.pid} on " in caught.value.detail
    assert f"is writing {tmp_path / 'store'}" in caught.value.detail
    prepare([atlas_h5ad], tmp_path / "other", PrepareConfig("cell_type"))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".store.lock").exists()
    prepare([atlas_h5ad], tmp_path / "store", PrepareConfig("cell_type"))
    assert not (tmp_path / ".store.lock").exists()


def test_a_thread_of_the_same_process_is_refused_too(tmp_path):
    with WriteLock(tmp_path / "store"):
        with pytest.raises(StoreError, match=f"process {os.getpid()} on"):
            WriteLock(tmp_path / "store").__enter__()
        with WriteLock(tmp_path / "store2"):
            pass
    with WriteLock(tmp_path / "store"):
        pass
    assert not list(tmp_path.iterdir())


def test_many_who_want_it_get_it_one_after_the_other(tmp_path):
    inside, together, done = [], [], []

    def work():
        while len(done) < 40:
            try:
                with WriteLock(tmp_path / "store"):
                    inside.append(1)
                    together.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    done.append(1)
            except StoreError:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1}


@pytest.mark.parametrize("kept", [False, True])
def test_folders_made_for_an_output_go_away_if_the_work_fails(tmp_path, kept):
    out = tmp_path / "a" / "b" / "store"

    def fail():
        with WriteLock(out):
            if kept:
                out.write_text("unfinished")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert [*tmp_path.rglob("*")] == ([out.parents[1], out.parent, out] if kept else [])
    with WriteLock(out):
        pass
    assert out.parent.is_dir()


def test_what_a_killed_writer_left_is_settled_by_the_next(tmp_path):
    (tmp_path / ".store.7.replaced").write_text("old")  # killed between its two renames
    (tmp_path / ".store.7.partial").write_text("half")
    with WriteLock(tmp_path / "store"):
        assert sorted(os.listdir(tmp_path)) == [".store.lock", "store"]
        assert (tmp_path / "store").read_text() == "old"


def test_two_names_of_one_output_are_one_output(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store")
    refused = pytest.raises(StoreError, match=f"process {os.getpid()} on .*is writing .*link")
    with WriteLock(tmp_path / "store"), refused:
        WriteLock(tmp_path / "link").__enter__()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file cannot be written to \(.*\); choose another"):
        WriteLock(tmp_path / "file" / "store").__enter__()


def test_a_writer_that_was_taken_for_dead_does_not_unlock_the_next(tmp_path):
    with WriteLock(tmp_path / "store"):
        named(tmp_path, "node-7", 123, 0)  # on a file system without locks between machines
    assert json.loads((tmp_path / ".store.lock").read_text())["pid"] == 123


def named(tmp_path, host: str, pid: int, seconds_ago: float) -> None:
    """Leave the lock file of another machine, which the kernel's lock does not know of."""
    path = tmp_path / ".store.lock"
    path.write_text(json.dumps({"host": host, "pid": pid, "since": 1.5e9}))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_a_writer_on_another_machine_is_known_by_its_file(tmp_path):
    named(tmp_path, "node-7", 123, lock.EXPIRY_S - 30)
    with pytest.raises(StoreError, match=r"process 123 on node-7 \(since 2017-07-14 .*is writing"):
        WriteLock(tmp_path / "store").__enter__()
    named(tmp_path, "node-7", 123, lock.EXPIRY_S + 30)
    with WriteLock(tmp_path / "store"):
        assert json.loads((tmp_path / ".store.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_file_is_touched_while_its_writer_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    with WriteLock(tmp_path / "store"):
        os.utime(tmp_path / ".store.lock", (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / ".store.lock").stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_file_system_without_locks_goes_by_the_file_alone(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    named(tmp_path, lock.socket.gethostname(), os.getppid(), 0)
    with pytest.raises(StoreError, match=f"process {os.getppid()} on"):
        WriteLock(tmp_path / "store").__enter__()
    named(tmp_path, lock.socket.gethostname(), 2**22 + 1, 0)  # no process has this number
    with WriteLock(tmp_path / "store"):
        pass
