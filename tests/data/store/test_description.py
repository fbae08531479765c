"""Work that has begun on a store keeps its cells, or is told that the store is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rayvaec.data.loading.loader import Loader
from rayvaec.data.prepare.append import append_config
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_again, open_store, share
from rayvaec.errors import StoreError
from rayvaec.training.config import TrainConfig
from rayvaec.training.distributed.process_group import Ranks
from rayvaec.training.driver.train_fn import RaySink
from rayvaec.training.driver.trainer import _open
from rayvaec.training.loop import Task, TrainLoop
from rayvaec.training.run_dir import check_resumable, create_run

CONFIG = PrepareConfig("cell_type", batch_key="donor", partition_elements=60)


@pytest.fixture
def write(write_input, counts):
    """Return a function that writes an input with labels and donors of its own."""

    def written(name: str, label: str = "type", donor: str = "d", scale: int = 1) -> Path:
        labels = [f"{label} {row % 3}" for row in range(30)]
        obs = {"donor": [f"{donor}{row % 2}" for row in range(30)]}
        return write_input(counts * scale, name, labels=labels, obs=obs)

    return written


@pytest.fixture
def store(write, tmp_path):
    """The path of a store of 30 cells."""
    prepare([write("a.h5ad")], tmp_path / "store", CONFIG)
    return tmp_path / "store"


def append(store: Path, path: Path) -> None:
    prepare([path], store, append_config(store, new_labels=True), append=True)


def everything(store) -> list[object]:
    rows = store.read(0, store.n_cells)
    arrays = (rows.indptr, rows.indices, rows.counts, rows.labels, rows.batches)
    return [*(array.tolist() for array in arrays), store.obs_names(0, store.n_cells)]


def minibatches(store) -> list[list[int]]:
    loader = Loader(store, batch_size=16, seed=0)
    return [minibatch.cells.tolist() for epoch in range(2) for minibatch in loader.epoch(epoch)]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("label", "donor"), [("type", "d"), ("new", "d"), ("type", "new")])
def test_appended_cells_are_no_part_of_work_that_has_begun(
    store, write, tmp_path, caplog, label, donor, times
):
    before = open_store(store)
    expected, order = everything(before), minibatches(before)
    described = share(before, tmp_path)
    for number in range(times):
        append(store, write(f"more{number}.h5ad", label, donor))
    assert open_store(store).n_cells == 30 + 30 * times
    assert f"{30 * times} cells were appended to" not in caplog.text
    after = open_store(described)
    assert (after.path, after.hash, after.registry) == (store, before.hash, before.registry)
    assert (after.n_cells, after.n_train) == (before.n_cells, before.n_train)
    assert everything(after) == expected
    assert minibatches(after) == order
    after.verify()
    assert f"{30 * times} cells were appended to {store}" in caplog.text
    assert "it goes on with the 30 of then" in caplog.text


def test_an_appended_store_keeps_the_cells_of_both_portions(store, write, tmp_path):
    append(store, write("b.h5ad"))
    before = open_store(store)
    described, expected = share(before, tmp_path), everything(before)
    append(store, write("c.h5ad"))
    assert everything(open_store(described)) == expected


def test_another_store_in_its_place_is_refused(store, write, tmp_path):
    described = share(open_store(store), tmp_path)
    prepare([tmp_path / "a.h5ad"], store, CONFIG, overwrite=True)
    assert open_store(described).n_cells == 30  # the same bytes
    for other in (write("b.h5ad", scale=2), write("c.h5ad", label="other")):
        prepare([other], store, CONFIG, overwrite=True)
        with pytest.raises(StoreError) as caught:
            open_store(described)
        assert f"{store} is not the store that this work began with" in caught.value.detail
        assert "put the old store back" in caught.value.fix
    shutil.rmtree(store)
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(described)


def test_a_store_that_was_moved_is_opened_where_it_lies_now(store, write, tmp_path):
    before = open_store(store)
    described = Path(share(before, tmp_path))
    moved = store.rename(tmp_path / "moved")
    assert open_again(described, moved).hash == before.hash
    append(moved, write("b.h5ad"))
    assert open_again(described, moved).hash == before.hash
    prepare([tmp_path / "b.h5ad"], tmp_path / "other", CONFIG)
    assert open_again(described, tmp_path / "other").hash != before.hash


def test_a_description_of_a_newer_version_is_refused(store, tmp_path):
    described = Path(share(open_store(store), tmp_path))
    value = json.loads(described.read_text())
    described.write_text(json.dumps(value | {"rayvaec_store": 99}))
    with pytest.raises(StoreError, match="was written by a newer rayvaec; upgrade"):
        open_store(described)
    described.write_text(described.read_text()[:100])
    with pytest.raises(StoreError, match=r"store\.json is no description of a store"):
        open_store(described)


def test_a_resumed_run_keeps_its_cells(store, write, tmp_path, caplog):
    run, config = tmp_path / "run", TrainConfig(batch_size=16, n_hidden=8, max_epochs=1)
    before = open_store(store)
    create_run(run, before, config)
    share(before, run)
    append(store, write("b.h5ad"))
    opened = _open(store, run, None, None)
    assert opened.hash == before.hash
    assert check_resumable(run, opened, None) == config
    assert "30 cells were appended" in caplog.text
    # A run of before descriptions has its hash alone.
    (run / "store.json").unlink()
    with pytest.raises(StoreError, match="was trained on .*, which is not the same as"):
        check_resumable(run, _open(store, run, None, None), None)


def test_a_worker_that_starts_again_takes_the_steps_of_before(store, write, tmp_path):
    run, config = tmp_path / "run", TrainConfig(batch_size=16, n_hidden=8, max_epochs=2)
    before = open_store(store)
    create_run(run, before, config)
    task = Task(Path(share(before, run)), run, config)

    def started() -> TrainLoop:
        return TrainLoop(task, Ranks(), RaySink(run / "checkpoints", Ranks()))

    steps = started().loader.steps_per_epoch
    append(store, write("b.h5ad", "new"))
    again = started()
    assert again.loader.steps_per_epoch == steps == -(-before.n_train // 16)
    assert again.store.hash == before.hash
    prepare([write("c.h5ad", scale=2)], store, CONFIG, overwrite=True)
    with pytest.raises(StoreError, match="is not the store that this work began with"):
        started()
