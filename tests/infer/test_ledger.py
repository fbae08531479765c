from __future__ import annotations

from pathlib import Path

import pytest

from rayvaec.infer.ledger import Ledger


@pytest.fixture
def begun(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "out.zarr", {"seed": 0})
    ledger.output.mkdir()
    ledger.begin()
    return ledger


def test_the_same_plan_goes_on(begun: Ledger) -> None:
    begun.finish("regions", 3, {"nnz": [1, 2]})
    begun.finish("regions", 11, {})
    again = Ledger(begun.out, {"seed": 0})
    assert again.goes_on
    assert again.finished("regions", range(11)) == {3: {"nnz": [1, 2]}}
    assert again.finished("regions", range(12)) == {3: {"nnz": [1, 2]}, 11: {}}
    assert again.finished("files", range(12)) == {}


def test_another_plan_starts_anew(begun: Ledger) -> None:
    begun.finish("regions", 3, {})
    (begun.parts / "3.counts.npy").touch()
    other = Ledger(begun.out, {"seed": 1})
    assert not other.goes_on
    assert other.finished("regions", range(9)) == {}
    assert not list(other.parts.iterdir())
    assert not other.output.exists()


def test_work_that_was_cut_off_before_its_output_stood_starts_anew(tmp_path: Path) -> None:
    cut_off = Ledger(tmp_path / "out.zarr", {"seed": 0})
    cut_off.output.mkdir()
    again = Ledger(tmp_path / "out.zarr", {"seed": 0})
    assert not again.goes_on
    assert not again.output.exists()


def test_publishing_replaces_what_stood_there_and_leaves_nothing_else(begun: Ledger) -> None:
    begun.out.mkdir()
    (begun.out / "old").touch()
    (begun.output / "new").touch()
    begun.publish()
    assert [path.name for path in begun.out.iterdir()] == ["new"]
    assert [path.name for path in begun.out.parent.iterdir()] == ["out.zarr"]


def test_an_output_that_cannot_be_replaced_stands_and_the_work_is_kept(
    begun: Ledger, monkeypatch: pytest.MonkeyPatch
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
    again = Ledger(begun.out, {"seed": 0})
    assert again.goes_on
    again.publish()
    assert [path.name for path in begun.out.iterdir()] == ["new"]
    assert [path.name for path in begun.out.parent.iterdir()] == ["out.zarr"]
