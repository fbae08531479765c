"""`prepare` that is killed at any point goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rayvaec.data.inputs.reader import Input
from rayvaec.data.prepare import job
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, CountsError, RayvaecError, StoreError

CONFIG = PrepareConfig("cell_type", block_elements=20, partition_elements=60)

KILLED = """
import importlib, os, signal, sys
from pathlib import Path
from rayvaec.data.prepare import job
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.prepare.append import append_config

target, calls, out, append, *inputs = sys.argv[1:]
job.NOTE_EVERY_S = 0
module, _, name = target.partition(":")
*path, last = name.split(".")
owner = importlib.import_module(module)
for name in path:
    owner = getattr(owner, name)
whole, left = getattr(owner, last), [int(calls)]

def killing(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **options)

setattr(owner, last, killing)
config = PrepareConfig("cell_type", block_elements=20, partition_elements=60)
if append == "append":
    config = append_config(Path(out))
prepare([Path(path) for path in inputs], Path(out), config, append=append == "append")
"""


def kill(target: str, calls: int, out: Path, inputs: list[Path], append: bool = False) -> None:
    """Run `prepare` in a process that is killed at the n-th call of a function."""
    command = [sys.executable, "-c", KILLED, target, str(calls), str(out)]
    command += ["append" if append else "new", *map(str, inputs)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of a store but the manifest, which tells the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def said(manifest) -> dict:
    return manifest.to_json() | {"created": None}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a file is written again."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture
def inputs(write_input, counts):
    return [write_input(counts, form="csc"), write_input(counts * 2, "b.h5ad")]


POINTS = [
    ("rayvaec.data.inputs.csc:_columns", 2, "0 cells are checked"),
    ("rayvaec.data.prepare.validate:ValidationState.save", 5, "cells are checked"),
    ("rayvaec.data.prepare.spill:_Block.write", 13, "0 of 5 partitions are written"),
    ("rayvaec.data.prepare.partition_tasks:write_partition", 3, "2 of 5 partitions are written"),
    ("rayvaec.data.prepare.pipeline:write_manifest", 1, "5 of 5 partitions are written"),
    ("rayvaec.data.prepare.pipeline:_publish", 1, "5 of 5 partitions are written"),
]


@pytest.mark.parametrize(("target", "calls", "progress"), POINTS)
def test_killed_work_goes_on_to_the_same_bytes(
    inputs, tmp_path, monkeypatch, target, calls, progress
):
    out, work = tmp_path / "store", tmp_path / ".store.partial"
    whole = prepare(inputs, tmp_path / "whole", CONFIG)
    kill(target, calls, out, inputs)
    assert not out.exists()
    with pytest.raises(StoreError, match=f"{progress}.*; go on with `resume=True`, or start over"):
        prepare(inputs, out, CONFIG)
    finished = [path.stem.removeprefix("partition-") for path in work.glob("partition-*.json")]
    before = {name: states(work / f"store/dataset_{name}") for name in finished}
    begun = {
        name: json.loads((work / f"{name}.json").read_text())["cells"]
        for name in ("survey", "dealt")
        if (work / f"{name}.json").exists()
    }
    starts, blocks = [], Input.blocks
    monkeypatch.setattr(Input, "blocks", lambda *args: starts.append(args[3]) or blocks(*args))
    resumed = prepare(inputs, out, CONFIG, resume=True)
    assert said(resumed) == said(whole) | {"created": None}
    assert files(out) == files(tmp_path / "whole")
    assert open_store(out).manifest == resumed
    assert {name: states(out / f"dataset_{name}") for name in finished} == before
    # Nothing that was noted as done was read again.
    if 0 < begun.get("survey", 0) < 60:
        assert starts[0] == begun["survey"] % 30 > 0
    if begun.get("dealt"):
        assert starts[-2:] == [begun["dealt"] % 30, 0] if begun["dealt"] < 60 else not starts
    assert sorted(tmp_path.iterdir()) == sorted([*inputs, out, tmp_path / "whole"])


def test_work_killed_after_the_last_step_is_only_tidied_up(inputs, tmp_path, monkeypatch):
    out = tmp_path / "store"
    removed, remove = [], job.remove

    def dies(path):
        if path.name == ".store.partial" and out.exists():
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(job, "remove", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(inputs, out, CONFIG)
    monkeypatch.setattr(job, "remove", lambda path: removed.append(path) or remove(path))
    before = states(out)
    manifest = prepare(inputs, out, CONFIG, resume=True)
    assert states(out) == before
    assert open_store(out).manifest == manifest
    assert not (tmp_path / ".store.partial").exists()


def interrupted(inputs, out, monkeypatch, config=CONFIG, **options):
    """Stop `prepare` as ctrl-C would, before its second partition."""
    calls = []
    import rayvaec.data.prepare.partition_tasks as jobs

    write = jobs.write_partition

    def stop(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_partition", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, out, config, **options)


CHANGES = [
    ({"seed": 3}, "`seed` was 0 and is 3"),
    ({"codec": "zstd"}, '`codec` was "lz4" and is "zstd"'),
    ({"genes": "union"}, '`genes` was null and is "union"'),
    ({"val_fraction": 0.5}, "`val_fraction` was 0.1 and is 0.5"),
    ({"partition_elements": 61}, "`partition_elements` was 60 and is 61"),
]


def test_other_work_is_not_gone_on_with(inputs, write_input, counts, tmp_path, monkeypatch, caplog):
    out = tmp_path / "store"
    interrupted(inputs, out, monkeypatch)
    assert "`resume=True` goes on (1 of 5 partitions are written)" in caplog.text
    for change, problem in CHANGES:
        with pytest.raises(ConfigError, match=problem):
            prepare(inputs, out, replace(CONFIG, **change), resume=True)
    with pytest.raises(ConfigError, match=r"input 1 was .*a.h5ad .* and is .*b.h5ad"):
        prepare(inputs[::-1], out, CONFIG, resume=True)
    with pytest.raises(ConfigError, match='input 3 was "not given" and is'):
        prepare([*inputs, write_input(counts, "c.h5ad")], out, CONFIG, resume=True)
    os.utime(inputs[1], ns=(1, 1))
    with pytest.raises(ConfigError, match=r"input 2 was .* and is .*1970-01-01 00:00:00.000000001"):
        prepare(inputs, out, CONFIG, resume=True)
    assert (tmp_path / ".store.partial/partition-0.json").exists()
    manifest = prepare(inputs, out, CONFIG, overwrite=True)
    assert files(out)
    assert open_store(out).hash == manifest.hash()
    assert not (tmp_path / ".store.partial").exists()


def test_more_memory_and_workers_may_finish_what_others_began(inputs, tmp_path, monkeypatch):
    out = tmp_path / "store"
    whole = prepare(inputs, tmp_path / "whole", CONFIG)
    interrupted(inputs, out, monkeypatch)
    config = replace(CONFIG, block_elements=1000, memory=2**33)
    assert said(prepare(inputs, out, config, resume=True)) == said(whole)


def test_resume_without_unfinished_work_begins(inputs, tmp_path):
    manifest = prepare(inputs, tmp_path / "store", CONFIG, resume=True)
    assert open_store(tmp_path / "store").hash == manifest.hash()
    with pytest.raises(StoreError, match="exists already"):
        prepare(inputs, tmp_path / "store", CONFIG, resume=True)


def test_an_existing_store_stands_until_the_new_one_is_whole(inputs, tmp_path, monkeypatch):
    out = tmp_path / "store"
    old = prepare(inputs, out, CONFIG)
    interrupted(inputs, out, monkeypatch, replace(CONFIG, seed=5), overwrite=True)
    assert open_store(out).hash == old.hash()
    new = prepare(inputs, out, replace(CONFIG, seed=5), resume=True, overwrite=True)
    assert open_store(out).hash == new.hash() != old.hash()
    assert sorted(tmp_path.iterdir()) == [*inputs, out]


FULL = [
    "rayvaec.data.prepare.job.write_json",
    "rayvaec.data.prepare.validate.append_durably",
    "rayvaec.data.prepare.spill._Block.write",
    "rayvaec.data.prepare.partitions.create_anndata",
    "rayvaec.data.prepare.partitions.write_json",
    "rayvaec.data.inputs.csc.np.save",
]


@pytest.mark.parametrize("target", FULL)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(inputs, tmp_path, monkeypatch, target):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(StoreError) as caught:
        prepare(inputs, tmp_path / "new/store", CONFIG)
    assert str(tmp_path / "new") in caught.value.detail
    assert "No space left on device" in caught.value.detail
    assert "make room" in caught.value.fix
    assert sorted(tmp_path.iterdir()) == inputs


def test_a_disk_that_is_really_full(inputs, tmp_path):
    """With files that may not grow above 3,000 bytes, as on a small disk."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from rayvaec.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "prepare", *map(str, inputs)]
    command += ["--out", str(tmp_path / "store"), "--labels-key", "cell_type"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("rayvaec: error: ")
    assert str(tmp_path) in last
    assert "File too large" in last
    assert sorted(tmp_path.iterdir()) == inputs


def test_a_fault_that_is_nobody_s_mistake_can_be_gone_on_from(inputs, tmp_path, monkeypatch):
    out = tmp_path / "store"

    def fault(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("rayvaec.data.prepare.partition_tasks.gather", fault)
        with pytest.raises(OSError, match="Input/output"):
            prepare(inputs, out, CONFIG)
    prepare(inputs, out, CONFIG, resume=True)
    open_store(out).verify()


STEPS = [
    "rayvaec.data.prepare.pipeline.read_names",
    "rayvaec.data.prepare.validate.as_counts",
    "rayvaec.data.prepare.shuffle.aligned_blocks",
    "rayvaec.data.prepare.partition_tasks.write_partition",
    "rayvaec.data.prepare.pipeline.write_manifest",
]


@pytest.mark.parametrize("target", STEPS)
@pytest.mark.parametrize("error", [KeyError("column-order"), AssertionError(), RecursionError()])
def test_an_error_of_the_code_leaves_nothing_that_is_in_the_way(
    inputs, tmp_path, monkeypatch, target, error
):
    out = tmp_path / "new/store"

    def fault(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(type(error)):
            prepare(inputs, out, CONFIG)
    assert sorted(tmp_path.iterdir()) == inputs
    prepare(inputs, out, CONFIG)
    open_store(out).verify()


def test_an_error_of_the_code_does_not_take_what_was_there_before(inputs, tmp_path, monkeypatch):
    out = tmp_path / "store"
    interrupted(inputs, out, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("rayvaec.data.prepare.pipeline.write_manifest", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            prepare(inputs, out, CONFIG, resume=True)
    prepare(inputs, out, CONFIG, resume=True)
    open_store(out).verify()


@pytest.mark.parametrize("lost", [RayvaecError("a worker was lost", "--resume"), MemoryError()])
def test_what_may_pass_can_be_gone_on_from(inputs, tmp_path, monkeypatch, lost):
    out = tmp_path / "store"

    def fault(*args, **options):
        raise lost

    with monkeypatch.context() as patch:
        patch.setattr("rayvaec.data.prepare.partition_tasks.gather", fault)
        with pytest.raises(type(lost)):
            prepare(inputs, out, CONFIG)
    with pytest.raises(StoreError, match="0 of 5 partitions are written.*go on with `resume=True`"):
        prepare(inputs, out, CONFIG)
    prepare(inputs, out, CONFIG, resume=True)
    open_store(out).verify()


def test_bad_input_leaves_nothing_to_go_on_with(inputs, write_input, counts, tmp_path):
    bad = write_input(counts * 0.5, "c.h5ad")
    with pytest.raises(CountsError):
        prepare([*inputs, bad], tmp_path / "new/store", CONFIG)
    assert sorted(tmp_path.iterdir()) == [*inputs, bad]
