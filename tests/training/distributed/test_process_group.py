"""Collectives: entered by all workers or by none."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rayvaec

PACKAGE = Path(rayvaec.__file__).parent


def test_only_ranks_uses_collectives() -> None:
    users = {
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)
        and "torch.distributed" in ast.unparse(node).replace(" import ", ".").replace("from ", "")
    }
    assert users == {PACKAGE / "training" / "distributed" / "process_group.py"}


ON_DEVICE = {"on_device": True, "poisoned": {"1": 3}}


@pytest.mark.parametrize(
    ("faults", "settings"),
    [
        ({"poisoned": {"0": 3, "1": 3}}, {}),
        ({"poisoned": {"1": 3}}, {"log_steps": 1}),
        (ON_DEVICE, {}),
        (ON_DEVICE, {"log_steps": 1}),
        (ON_DEVICE, {"checkpoint_steps": 6}),
        (ON_DEVICE | {"outgrown": {"0": 3}}, {}),
        (ON_DEVICE | {"outgrown": {"0": 4}}, {"log_steps": 7}),
        (ON_DEVICE | {"outgrown": {"0": 4, "1": 7}}, {}),
        (ON_DEVICE | {"poisoned": {"0": 3, "1": 3}, "outgrown": {"1": 4}}, {}),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_ends_all_workers_alike(
    run_ranks: Callable[..., list[str]],
    tmp_path: Path,
    faults: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    first, second = run_ranks(tmp_path, 2, faults=faults, **settings)
    n_cells = 32 * len(faults["poisoned"])
    assert first == second
    assert f"the loss of {n_cells} cells (" in first
    assert "stopped being finite at step 4, in epoch 1; " in first


def test_workers_whose_minibatches_outgrow_their_room_apart_go_on(
    run_ranks: Callable[..., list[str]], tmp_path: Path
) -> None:
    faults = {"on_device": True, "outgrown": {"0": 4, "1": 7}}
    assert run_ranks(tmp_path, 2, faults=faults, max_epochs=1) == ["done", "done"]
