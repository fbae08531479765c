from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rayvaec.errors import StoreError
from rayvaec.model.vaec import VAEC
from rayvaec.training.checkpoint import (
    RunState,
    checkpoint_name,
    clear_checkpoints,
    drop_old_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def trained(n_genes: int = 12, seed: int = 0) -> tuple[VAEC, torch.optim.Adam]:
    """A model whose optimiser has taken two steps."""
    torch.manual_seed(seed)
    module = VAEC(n_genes, 3, n_hidden=8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, fused=True)
    tensors = {"X": torch.poisson(torch.ones(6, n_genes)), "labels": torch.arange(6)[:, None] % 3}
    for _ in range(2):
        optimizer.zero_grad()
        module(tensors)[2].loss.backward()
        optimizer.step()
    return module, optimizer


def write(folder: Path, state: RunState) -> Path:
    path = folder / checkpoint_name(state)
    path.mkdir(parents=True)
    write_checkpoint(path, *trained(), state)
    return path


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = RunState(3, 4, 40, 1.25, 0.5, 128, 99.5, -12.5, 2)
    path = write(tmp_path, state)
    module, optimizer = trained(seed=1)
    assert read_checkpoint(path, module, optimizer) == state
    expected, expected_optimizer = trained()
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        moments, wanted = optimizer.state[ours], expected_optimizer.state[theirs]
        assert moments.keys() == wanted.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in wanted.items():
            assert torch.equal(moments[key], value), key


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = write(tmp_path, RunState())
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors"]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # storage that is away, not a run without checkpoints
        newest_checkpoint(tmp_path / "none")
    assert newest_checkpoint(tmp_path) is None
    paths = [write(tmp_path, RunState(step=step)) for step in (9, 100, 20)]
    assert newest_checkpoint(tmp_path) == paths[1]
    with (paths[1] / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    assert newest_checkpoint(tmp_path) == paths[2]
    (paths[2] / "state.json").write_text('{"step"')
    assert newest_checkpoint(tmp_path) == paths[0]
    (paths[0] / "state.json").unlink()
    with pytest.raises(StoreError, match=r"no checkpoint in .* is whole, the newest is step_0+100"):
        newest_checkpoint(tmp_path)
    clear_checkpoints(tmp_path, keep=paths[1])  # as a kill during the first one leaves it
    assert newest_checkpoint(tmp_path) is None


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RunState(step=1))
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)
    with pytest.raises(StoreError, match="step_0000000001 is damaged"):
        read_checkpoint(path, *trained())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RunState())
    with pytest.raises(StoreError, match="is of another model"):
        read_checkpoint(path, *trained(n_genes=13))


def test_clearing_and_dropping(tmp_path: Path) -> None:
    paths = [write(tmp_path, RunState(step=step)) for step in (1, 2, 3, 4)]
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{")
    drop_old_checkpoints(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == paths[3]
    assert sorted(tmp_path.glob("step_*")) == paths[2:]
    clear_checkpoints(tmp_path, keep=paths[2])
    assert list(tmp_path.iterdir()) == [paths[2]]
    clear_checkpoints(tmp_path, keep=None)
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
    clear_checkpoints(tmp_path, keep=None)
