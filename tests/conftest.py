"""Fixtures that several parts share: one small atlas, its store, a model, and a local Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Read by Ray when it starts, so they stand before anything imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.pop("RAY_ADDRESS", None)

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # odd_inputs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group what starts Ray, which mostly waits, for a pytest that runs in several processes.

    One of them has what uses the Ray of `ray_local`, and one what starts another.
    """
    for item in items:
        if item.get_closest_marker("ray"):
            own = "ray_local" not in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("rays of their own" if own else "ray"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference values beside the repository, where there is one."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "parity").is_dir():
        pytest.skip("needs the folder ../shared")
    return folder


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray with two CPUs for the whole test session."""
    import ray

    from rayvaec.cluster import require_token

    require_token()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def atlas_h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated atlas: 1,200 cells, 120 genes, 4 labels."""
    from rayvaec.datasets import simulate

    path = tmp_path_factory.mktemp("atlas") / "atlas.h5ad"
    simulate(n_cells=1200, n_genes=120, n_labels=4, seed=0).write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def store_path(atlas_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store prepared from `atlas_h5ad`."""
    from rayvaec.data.prepare.pipeline import PrepareConfig, prepare

    path = tmp_path_factory.mktemp("store") / "store"
    prepare([atlas_h5ad], path, PrepareConfig(labels_key="cell_type"))
    return path


@pytest.fixture(scope="session")
def model_path(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of the genes and labels of `store_path`, with start values from its counts."""
    import torch

    from rayvaec.data.store.open import open_store
    from rayvaec.model.saved import save_model
    from rayvaec.model.vaec import VAEC

    manifest = open_store(store_path).manifest
    registry = manifest.registry
    torch.manual_seed(0)
    module = VAEC(registry.n_genes, registry.n_labels, n_hidden=32)
    module.init_from_counts(torch.tensor(manifest.gene_totals) / manifest.total_counts)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, module, registry.to_json(), {"store_hash": manifest.hash()})
    return path


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], Iterator[tuple[int, bytes]]]:
    """Find the processes below one: their numbers and command lines."""

    def below(pid: int) -> Iterator[tuple[int, bytes]]:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # processes come and go
                for child in map(int, task.read_text().split()):
                    yield child, Path(f"/proc/{child}/cmdline").read_bytes()
                    yield from below(child)

    return below


@pytest.fixture
def values_on_meta(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have results leave torch's `meta` device, which has none; return the shapes that did.

    That device stands in for a GPU: it knows shapes and types of tensors and holds no values.
    """
    import numpy as np
    import torch

    from rayvaec.kernels import transfer

    shapes: list[tuple[int, ...]] = []
    to_host = transfer.to_host

    def stand_in(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "meta":
            return to_host(tensor)
        shapes.append(tuple(tensor.shape))
        values = np.random.default_rng(len(shapes)).uniform(0.25, 0.75, tensor.shape)
        return values.astype(torch.empty(0, dtype=tensor.dtype).numpy().dtype)

    monkeypatch.setattr(transfer, "to_host", stand_in)
    return shapes
