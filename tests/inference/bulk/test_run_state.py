from __future__ import annotations

from pathlib import Path

import pytest

from rayvaec.errors import StoreError
from rayvaec.inference.bulk.run_state import RunState
from rayvaec.util.atomic import open_whole


@pytest.fixture
def begun(tmp_path: Path) -> RunState:
    state = RunState(tmp_path / "out.zarr", {"seed": 0})
    state.output.mkdir()
    state.commit()
    return state


def test_the_same_plan_is_resuming(begun: RunState) -> None:
    begun.finish("regions", 3, {"nnz": [1, 2]})
    begun.finish("regions", 11, {})
    again = RunState(begun.out, {"seed": 0})
    assert again.is_resuming
    assert again.finished("regions", range(11)) == {3: {"nnz": [1, 2]}}
    assert again.finished("regions", range(12)) == {3: {"nnz": [1, 2]}, 11: {}}
    assert again.finished("files", range(12)) == {}


def test_work_of_another_plan_is_kept_unless_it_may_be_removed(begun: RunState) -> None:
    begun.finish("regions", 3, {})
    with pytest.raises(StoreError) as caught:
        RunState(begun.out, {"seed": 1, "reduce": ["mean"]})
    assert "seed was 0 and is 1, reduce was" in caught.value.detail
    assert "`overwrite=True` to start anew" in caught.value.fix
    assert RunState(begun.out, {"seed": 0}).finished("regions", [3]) == {3: {}}
    other = RunState(begun.out, {"seed": 1}, overwrite=True)
    assert not other.is_resuming
    assert other.finished("regions", range(9)) == {}
    assert not list(other.parts.iterdir())
    assert not begun.work.exists()
    assert RunState(begun.out, {"seed": 1}).folder == other.folder


def test_a_worker_whose_command_was_killed_cannot_write_into_another_plans_work(
    begun: RunState,
) -> None:
    other = RunState(begun.out, {"seed": 1}, overwrite=True)
    with pytest.raises(FileNotFoundError), open_whole(begun.parts / "3.npz"):
        pass
    assert not list(other.parts.iterdir())


def test_work_that_was_cut_off_before_its_output_stood_starts_anew(tmp_path: Path) -> None:
    cut_off = RunState(tmp_path / "out.zarr", {"seed": 0})
    cut_off.output.mkdir()
    again = RunState(tmp_path / "out.zarr", {"seed": 0})
    assert not again.is_resuming
    assert not again.output.exists()


@pytest.mark.parametrize("plan", ['{"seed": 0}', '{"format_ver', "[]"])
def test_work_that_another_version_left_is_refused(tmp_path: Path, plan: str) -> None:
    folder = tmp_path / "out.zarr.partial"
    (folder / "parts").mkdir(parents=True)
    (folder / "plan.json").write_text(plan)
    with pytest.raises(StoreError, match=r"another version of rayvaec .*`overwrite=True`"):
        RunState(tmp_path / "out.zarr", {"seed": 0})
    assert (folder / "parts").exists()
    assert not RunState(tmp_path / "out.zarr", {"seed": 0}, overwrite=True).is_resuming
    assert not (folder / "parts").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_elses_is_never_removed(tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "out.zarr.partial"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(StoreError, match="in the way and is not unfinished work"):
        RunState(tmp_path / "out.zarr", {"seed": 0}, overwrite)
    assert (folder / "precious").exists()


def test_publishing_replaces_what_stood_there_and_leaves_nothing_else(begun: RunState) -> None:
    begun.out.mkdir()
    (begun.out / "old").touch()
    (begun.output / "new").touch()
    begun.publish()
    assert [path.name for path in begun.out.iterdir()] == ["new"]
    assert [path.name for path in begun.out.parent.iterdir()] == ["out.zarr"]


def test_an_output_that_cannot_be_replaced_stands_and_the_work_is_kept(
    begun: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun.out.mkdir()
    (begun.out / "old").touch()
    (begun.output / "new").touch()
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self == begun.output:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            begun.publish()
    assert [path.name for path in begun.out.iterdir()] == ["old"]
    again = RunState(begun.out, {"seed": 0})
    assert again.is_resuming
    again.publish()
    assert [path.name for path in begun.out.iterdir()] == ["new"]
    assert [path.name for path in begun.out.parent.iterdir()] == ["out.zarr"]
