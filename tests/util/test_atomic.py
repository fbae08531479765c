from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rayvaec.errors import StoreError
from rayvaec.util.atomic import bring_back, remove, whole_output, write_json


def test_an_output_appears_when_it_is_whole(tmp_path):
    with whole_output(tmp_path / "a" / "out") as partial:
        partial.mkdir()
        (partial / "file").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def failing_write(path, **kwargs):
    with whole_output(path, **kwargs) as partial:
        partial.write_text("half")
        raise RuntimeError("the disk is full")


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="the disk is full"):
        failing_write(tmp_path / "new" / "folder" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_stood_there(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(RuntimeError, match="the disk is full"):
        failing_write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "old"


def test_an_existing_output_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with (
        pytest.raises(StoreError, match=r"out exists already.*`overwrite=True`"),
        whole_output(out),
    ):
        pass
    with whole_output(out, overwrite=True) as partial:
        partial.write_text("new")
    assert out.read_text() == "new"


def test_an_output_is_never_missing_while_it_is_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "value").write_text("old")
    rename = Path.rename

    def die(self, target):
        if "partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt), whole_output(out, overwrite=True) as partial:
            partial.mkdir()
    assert (out / "value").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    out.rename(tmp_path / ".out.7.replaced")  # as SIGKILL leaves it
    (tmp_path / ".out.7.partial").mkdir()
    bring_back(out)
    assert (out / "value").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / ".out.7.replaced").mkdir()
    bring_back(out)
    assert (out / "value").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_only_what_belongs_to_an_output_is_brought_back_or_removed(tmp_path, monkeypatch):
    others = {".out.backup", ".out.zarr.7.partial", ".outer.7.replaced", "out.7.partial"}
    others |= {".out.zarr.partial", ".out.h5ad.replaced"}
    for name in others:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda _: None)  # a kill: nobody cleans up
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            write_json(tmp_path / "out", {})
    assert len(os.listdir(tmp_path)) == len(others) + 1
    bring_back(tmp_path / "out")
    assert set(os.listdir(tmp_path)) == others


def test_an_output_that_appears_meanwhile_is_replaced_only_where_that_is_allowed(tmp_path):
    def write(overwrite):
        with whole_output(tmp_path / "out", overwrite) as partial:
            partial.write_text("mine")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(StoreError, match="out exists already"):
        write(overwrite=False)
    assert (tmp_path / "out").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]
    write(overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_json_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_remove_takes_files_folders_and_links(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder").exists()
    remove(tmp_path / "folder")
    remove(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
