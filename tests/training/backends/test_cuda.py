"""Steps as a GPU takes them: on a CPU, in float64, and on a GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rayvaec.data.loading.shuffle_buffer import Minibatch
from rayvaec.errors import RayvaecError
from rayvaec.model.saved import read_model
from rayvaec.training import loop as loop_module
from rayvaec.training.backends import host_to_device
from rayvaec.training.backends.cuda import EAGER_STEPS, DeviceSteps, _Replayed
from rayvaec.training.backends.host_to_device import Block
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.loop import TrainLoop
from rayvaec.training.records import read_epochs

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MakeLoop = Callable[..., TrainLoop]


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Have models computed by torch's own operations, as on a GPU, and far more exactly."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def device_loop(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, *run: str, **settings: Any
) -> TrainLoop:
    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "HostSteps", DeviceSteps)
        loop = make_loop(*run, **settings)
    assert isinstance(loop.steps, DeviceSteps)
    return loop


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model(run / "last").module.state_dict()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip": 1.0, "weight_obs": True, "weight_decay": 1e-3, "kl_warmup_epochs": 2.0},
        {"generative": "softmax", "prior": "mog", "use_batches": True},
    ],
)
def test_they_are_the_steps_of_the_host(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_loop("host", max_epochs=2, **settings).run()
    device_loop(make_loop, monkeypatch, "device", max_epochs=2, **settings).run()
    host, device = read_epochs(tmp_path / "host"), read_epochs(tmp_path / "device")
    for name in ("step", "train_loss", "val_elbo", "kl_weight", "lr"):
        # Rates and noise go to the device in float32.
        assert [r[name] for r in device] == pytest.approx([r[name] for r in host], rel=2e-6), name
    for name, value in weights(tmp_path / "host").items():
        torch.testing.assert_close(weights(tmp_path / "device")[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("in_float64")
def test_minibatches_that_outgrow_their_room_get_more(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device_loop(make_loop, monkeypatch, "roomy", max_epochs=1).run()
    monkeypatch.setattr(host_to_device, "SPARE", 1.0)
    monkeypatch.setattr(host_to_device, "ENTRIES", 1)
    loop = device_loop(make_loop, monkeypatch, "tight", max_epochs=1)
    assert isinstance(loop.steps, DeviceSteps)
    program_for, layouts = loop.steps._program_for, []
    monkeypatch.setattr(
        loop.steps, "_program_for", lambda layout: layouts.append(layout) or program_for(layout)
    )
    loop.run()
    assert len(layouts) > 2
    assert [layout.n_entries for layout in layouts] == sorted({e.n_entries for e in layouts})
    roomy, tight = read_epochs(tmp_path / "roomy")[0], read_epochs(tmp_path / "tight")[0]
    for name in ("step", "train_loss", "val_elbo"):
        assert tight[name] == pytest.approx(roomy[name], rel=1e-12), name


@pytest.mark.usefixtures("in_float64")
def test_a_killed_run_goes_on_where_it_was(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"checkpoint_steps": 7, "checkpoint_seconds": 1e-3}
    device_loop(make_loop, monkeypatch, "straight").run()
    with pytest.raises(InterruptedError):
        device_loop(make_loop, monkeypatch, "killed", "step_0000000017", **settings).run()
    resumed = device_loop(make_loop, monkeypatch, "killed", **settings)
    assert resumed.state.step == 17
    resumed.run()
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name


@pytest.mark.usefixtures("in_float64")
def test_a_run_goes_on_with_the_other_kind_of_steps(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"checkpoint_steps": 7, "checkpoint_seconds": 1e-3, "lr": 1e-4}
    make_loop("straight", **settings).run()
    with pytest.raises(InterruptedError):
        make_loop("changed", "step_0000000007", **settings).run()
    with pytest.raises(InterruptedError):
        device_loop(make_loop, monkeypatch, "changed", "step_0000000017", **settings).run()
    make_loop("changed", **settings).run()
    straight, changed = read_epochs(tmp_path / "straight"), read_epochs(tmp_path / "changed")
    for name in ("train_loss", "val_elbo"):
        expected = [record[name] for record in straight]
        assert [record[name] for record in changed] == pytest.approx(expected, rel=2e-6), name


@pytest.mark.usefixtures("in_float64")
def test_a_loss_that_is_not_finite_stops_the_weights_at_once_and_the_run_soon(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loop = device_loop(make_loop, monkeypatch)
    take, before, cells = loop.steps.take, {}, []

    def poison(minibatch: Minibatch, prepared: Block) -> None:
        if minibatch.step == 3 and not before:
            before.update({k: v.clone() for k, v in loop.module.state_dict().items()})
            cells.extend(minibatch.cells)
            prepared.layout.rows(prepared.there).rates[1] = math.nan
        take(minibatch, prepared)

    monkeypatch.setattr(loop.steps, "take", poison)
    with pytest.raises(RayvaecError) as caught:
        loop.run()
    first = loop.store.obs_names(min(cells), min(cells) + 1)[0]
    assert f"the loss of 64 cells ({first}, " in str(caught.value)
    assert "stopped being finite at step 4, in epoch 1" in str(caught.value)
    for name, value in loop.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert read_model(tmp_path / "run" / "last").provenance["metrics"]["step"] == 3


def test_what_cannot_be_made_a_graph_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    runs: list[int] = []
    replayed = _Replayed(lambda: runs.append(1), stream=cast(torch.cuda.Stream, object()))
    for _ in range(EAGER_STEPS - 1):
        replayed()
    with pytest.warns(UserWarning, match="as a CUDA graph: operation not permitted when stream"):
        replayed()
    for _ in range(3):  # the warning is not said again: it would be an error here
        replayed()
    assert len(runs) == EAGER_STEPS + 3


@gpu
@needs_gpu
def test_a_gpu_trains_as_a_cpu_does(make_loop: MakeLoop, tmp_path: Path) -> None:
    # Where little grows, rounding stays what it is.
    settings = {"lr": 1e-5, "max_epochs": 3}
    make_loop("host", **settings).run()
    loop = make_loop("device", ranks=Ranks(device=torch.device("cuda", 0)), **settings)
    loop.run()
    assert isinstance(loop.steps, DeviceSteps)
    program = loop.steps._program
    assert program is not None
    assert program.compute._graph is not None
    assert program.update._graph is not None
    host, device = read_epochs(tmp_path / "host"), read_epochs(tmp_path / "device")
    for name in ("train_loss", "val_elbo"):
        assert [r[name] for r in device] == pytest.approx([r[name] for r in host], rel=1e-4), name


@gpu
@needs_gpu
@pytest.mark.parametrize("generative", ["softplus", "softmax"])
def test_a_killed_run_on_a_gpu_ends_with_the_same_bits(
    make_loop: MakeLoop, tmp_path: Path, generative: str
) -> None:
    ranks = Ranks(device=torch.device("cuda", 0))
    settings = {
        "checkpoint_steps": 7,
        "checkpoint_seconds": 1e-3,
        "generative": generative,
        "ranks": ranks,
    }
    make_loop("straight", **settings).run()
    with pytest.raises(InterruptedError):
        make_loop("killed", "step_0000000017", **settings).run()
    make_loop("killed", **settings).run()
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name
