"""Samples of stores whose rows are in any order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata.io import write_elem
from scipy import sparse

from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.prepare.append import append_config
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import Store, open_store
from rayvaec.data.store.row_sample import MOST_RUN_ROWS, RUNS, RowSample, sample_rows
from rayvaec.data.store.summarize import summarize
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.run import _rows
from rayvaec.model.vaec import VAEC
from rayvaec.training import initialization
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.validation import validation_elbo

N_CELLS, N_GENES = 4000, 6
LABELS = {
    "sorted": np.repeat(["a", "b", "c", "d"], N_CELLS // 4),
    "in turns": np.tile(["a", "b", "c", "d"], N_CELLS // 4),
    "sorted with a rare one": np.repeat(["a", "b"], [N_CELLS - 400, 400]),
}


def cells(labels: np.ndarray, first: int = 0) -> anndata.AnnData:
    x = np.random.default_rng(first).poisson(2, (len(labels), N_GENES)).astype("f4")
    x[:, 0] += 1
    obs = pd.DataFrame({"kind": labels}, [f"cell {first + row}" for row in range(len(labels))])
    return anndata.AnnData(
        sparse.csr_matrix(x), obs, pd.DataFrame(index=[f"g{gene}" for gene in range(N_GENES)])
    )


def external(folder: Path, labels: np.ndarray) -> Store:
    with anndata.settings.override(auto_shard_zarr_v3=True):
        group = zarr.open_group(folder / "external.zarr", mode="w", zarr_format=3)
        write_elem(group, "/", cells(labels))
    return open_store(folder / "external.zarr", ObsKeys("kind"))


def appended(folder: Path, labels: np.ndarray) -> Store:
    """A store whose second half was appended."""
    out, halves = folder / "appended", np.array_split(labels, 2)
    for number, half in enumerate(halves):
        cells(half, number * N_CELLS).write_h5ad(folder / f"{number}.h5ad")
    prepare([folder / "0.h5ad"], out, PrepareConfig("kind", rows_per_chunk=16))
    config = append_config(out, new_labels=True)
    prepare([folder / "1.h5ad"], out, config, append=True)
    return open_store(out)


def prepared(folder: Path, labels: np.ndarray) -> Store:
    cells(labels).write_h5ad(folder / "0.h5ad")
    prepare([folder / "0.h5ad"], folder / "prepared", PrepareConfig("kind"))
    return open_store(folder / "prepared")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    made = {}
    for kind, make in (("external", external), ("appended", appended), ("prepared", prepared)):
        for order, labels in LABELS.items():
            made[f"{kind}, {order}"] = make(tmp_path_factory.mktemp("made"), labels)
    return made


NAMES = [f"{kind}, {order}" for kind in ("external", "appended", "prepared") for order in LABELS]


def start_values(store: Store) -> None:
    initialization.start_from_counts(VAEC(N_GENES, store.registry.n_labels), store)


def validated(store: Store) -> None:
    validation_elbo(VAEC(N_GENES, store.registry.n_labels), store, Ranks(), 0, max_cells=200)


def checked(store: Store) -> None:
    rows = _rows(store, CheckConfig(split="all", max_cells=400))
    for region in rows.parts(100):  # each stands for all cells, or errors would be wrong
        store.read_runs(region.runs)


@pytest.mark.parametrize(
    ("look", "reads"),
    [
        (start_values, 1),
        (validated, 1),
        (lambda store: summarize(store, max_cells=400), 1),
        (checked, 4),
    ],
    ids=["start values", "validation", "summary", "check"],
)
@pytest.mark.parametrize("name", NAMES)
def test_whoever_looks_at_a_part_sees_every_kind_of_cell(stores, monkeypatch, name, look, reads):
    store, seen, read = stores[name], [], Store.read_runs
    monkeypatch.setattr(initialization, "START_CELLS", 400)
    monkeypatch.setattr(
        Store, "read_runs", lambda self, runs: seen.append(read(self, runs)) or seen[-1]
    )
    with torch.random.fork_rng():
        look(store)
    whole = np.array(store.manifest.cells_per_label) / store.n_cells
    assert len(seen) == reads
    for rows in seen:
        assert 100 <= len(rows) <= 400
        found = np.bincount(rows.labels, minlength=len(whole)) / len(rows)
        spread = 4 * np.sqrt(whole * (1 - whole) / len(rows))
        assert (abs(found - whole) < spread).all(), f"{found} of {whole}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation", "all"])
@pytest.mark.parametrize("most", [1, 3, 300, 399, 1000, 3599, 10**6, None])
def test_rows_are_of_the_split_and_none_comes_twice(stores, name, split, most):
    store = stores[name]
    found, rows = sample_rows(store, split, most), store.rows(split)
    wanted = len(rows) if most is None else min(most, len(rows))
    assert wanted - wanted // RUNS <= len(found) <= wanted
    assert len(found.rows) == len(found)
    assert rows.start <= found.rows[0] <= found.rows[-1] < rows.stop
    assert all(a < b for a, b in pairwise(found.rows))
    assert sample_rows(store, split, most) == found
    if store.is_shuffled or wanted == len(rows):
        assert found.runs == (rows[:wanted],)
    else:
        assert max(map(len, found.runs)) <= MOST_RUN_ROWS


def test_a_split_without_rows_has_an_empty_sample(stores):
    nothing = SimpleNamespace(rows=lambda split: range(7, 7), is_shuffled=False)
    for most in (None, 5):
        found = sample_rows(nothing, "validation", most)
        assert len(found) == 0
        assert found.rows.tolist() == []
        assert found.parts(3) == []


def test_parts_are_the_sample_cut():
    sample = RowSample((range(3, 5), range(10, 11), range(20, 27)))
    rows = [3, 4, 10, *range(20, 27)]
    assert sample.rows.tolist() == rows
    for size in (1, 2, 3, 4, 10, 99):
        parts = sample.parts(size)
        assert [row for part in parts for row in part.rows] == rows
        assert {len(part) for part in parts[:-1]} <= {size}
        assert all(len(run) for part in parts for run in part.runs)
    assert len(sample.part(10, 12)) == 0


def test_mixed_rows_are_the_same_in_another_order():
    sample = RowSample((range(100, 4100), range(9000, 9001)))
    mixed = sample.mixed()
    assert sorted(mixed.rows) == sample.rows.tolist()
    quarters = [part.rows.mean() for part in mixed.parts(1001)]
    assert np.ptp(quarters) < 500  # 3,000 in the order of the store


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_read_as_one_by_one(stores, name):
    store = stores[name]
    runs = (range(3990, 4000), range(5, 5), range(17, 18), range(1795, 3605))
    found = store.read_runs(runs)
    single = [store.read(row, row + 1) for run in runs for row in run]
    for field in ("indices", "counts", "labels"):
        expected = np.concatenate([getattr(rows, field) for rows in single])
        np.testing.assert_array_equal(getattr(found, field), expected)
    np.testing.assert_array_equal(np.diff(found.indptr), [rows.indptr[1] for rows in single])
    assert len(store.read_runs(())) == 0


def test_runs_far_away_are_read_together(stores, serve_files):
    here = stores["appended, sorted"]
    server = serve_files(here.path.parent)
    there = open_store(f"{server.url}/appended")
    sample = sample_rows(there, "train", 300)
    there.read_runs(sample.runs[:1])
    server.requests.clear()
    found = there.read_runs(sample.runs)
    np.testing.assert_array_equal(found.counts, here.read_runs(sample.runs).counts)
    assert len(server.requests) < len(sample.runs) / 4
