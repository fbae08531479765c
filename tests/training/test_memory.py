"""What a worker holds: nothing that waits for a garbage collection, nothing that grows."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from gloo_worker import FolderSink

from rayvaec.data.loading.shuffle_buffer import ReusableBuffers
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.datasets import simulate
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.loop import Task, TrainLoop

SIZES = 2_000, 40_000
SETTINGS = {
    "batch_size": 64,
    "lanes": 4,
    "block_rows": 64,
    "buffer_rows": 512,
    "n_hidden": 8,
    "checkpoint_steps": 20,
}


class Measuring(FolderSink):
    """Notes what `tracemalloc` has found to be held when a checkpoint comes."""

    held = 0

    def put(self, folder: Path | None, name: str, metrics: dict[str, Any]) -> None:
        gc.collect()
        self.held = tracemalloc.get_traced_memory()[0]
        super().put(folder, name, metrics)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encode_covariates": True, "n_layers": 1, "dropout_rate": 0.0},
        {"generative": "softmax"},
        {"generative": "softmax", "prior": "mog"},
    ],
)
def test_no_tensor_waits_for_a_garbage_collection(
    make_loop: Callable[..., TrainLoop], settings: dict[str, Any]
) -> None:
    make_loop("warm", max_epochs=1, **settings).run()  # compiling leaves frames with tensors
    loop = make_loop(max_epochs=1, **settings)  # may be a cycle itself, and so must stay
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        loop.run()
        gc.collect()
        assert not [held for held in gc.garbage if isinstance(held, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Stores of the same genes, both large enough for full windows."""
    folder = tmp_path_factory.mktemp("sizes")
    for n_cells in SIZES:
        simulate(n_cells=n_cells, n_genes=30, n_labels=3).write_h5ad(folder / f"{n_cells}.h5ad")
        config = PrepareConfig(labels_key="cell_type")
        prepare([folder / f"{n_cells}.h5ad"], folder / str(n_cells), config)
    return {n_cells: folder / str(n_cells) for n_cells in SIZES}


def test_a_worker_holds_no_more_of_a_larger_store(
    stores: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ReusableBuffers] = []
    start = ReusableBuffers.__init__

    def counting(self: ReusableBuffers, store: Any) -> None:
        made.append(self)
        start(self, store)

    monkeypatch.setattr(ReusableBuffers, "__init__", counting)

    def held(n_cells: int) -> int:
        """Return the bytes of Python and numpy at a checkpoint, less the buffers of the loader."""
        made.clear()
        run = Path(mkdtemp(dir=tmp_path))
        task = Task(stores[n_cells], run, TrainConfig.from_json(SETTINGS))
        sink = Measuring(run, "step_0000000020")
        gc.collect()
        tracemalloc.start()
        try:
            loop = TrainLoop(task, Ranks(), sink)
            with pytest.raises(InterruptedError):
                loop.run()
        finally:
            tracemalloc.stop()
        rooms = [room for each in made for room in (each.counts.base, each.indices.base)]
        return sink.held - sum(room.nbytes for room in rooms if room is not None)

    # The least of several: what is loaded and compiled once comes with the first and the second.
    small, large = (min(held(n_cells) for _ in range(3)) for n_cells in SIZES)
    # The plan takes 16 bytes a block of 64 cells; anything of every cell, a byte at least.
    assert large - small < 0.75 * (SIZES[1] - SIZES[0])
