from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import chain

import anndata
import numpy as np
import pytest

from rayvaec.data.loading.loader import Loader
from rayvaec.data.prepare.append import append_config
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.describe import describe_store
from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, CountsError, StoreError
from rayvaec.training.run_dir import RunInfo, check_resumable, write_run

CONFIG = PrepareConfig("cell_type", block_elements=40, partition_elements=60)


@pytest.fixture
def old(write_input, counts, tmp_path):
    """A store of 30 cells, named a_0 to a_29."""
    prepare([write_input(counts)], tmp_path / "store", CONFIG)
    return tmp_path / "store"


def append(store, path, resume=False, overwrite=False, **options):
    config = append_config(store, **options)
    return prepare([path], store, config, append=True, resume=resume, overwrite=overwrite)


def cells(store, split="all"):
    """Return names, dense counts and labels of a split, in order."""
    rows = store.rows(split)
    read = store.read(rows.start, rows.stop)
    x = np.zeros((len(rows), store.n_genes), int)
    x[np.repeat(np.arange(len(rows)), np.diff(read.indptr)), read.indices] = read.counts
    labels = [store.registry.labels[code] for code in read.labels]
    return store.obs_names(rows.start, rows.stop), x, labels


def states(folder):
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_appended_cells_join_both_splits(old, write_input, counts, tmp_path):
    before = open_store(old)
    names = {split: cells(before, split)[0] for split in ("train", "validation")}
    untouched = {info.name: states(old / info.name) for info in before.manifest.partitions}
    path = write_input(counts[:20, ::-1] * 2, "b.h5ad", genes=[f"g{k}" for k in range(12)][::-1])
    manifest = append(old, path)
    store = open_store(old)
    store.verify()
    assert store.manifest == manifest
    assert (store.n_cells, store.n_train) == (50, 27 + 18)
    assert {name: states(old / name) for name in untouched} == untouched
    train, validation = cells(store, "train")[0], cells(store, "validation")[0]
    assert train[:27] == names["train"]
    assert validation[:3] == names["validation"]
    new = [*train[27:], *validation[3:]]
    assert sorted(new) == sorted(f"b_{row}" for row in range(20))
    assert new != sorted(new, key=lambda name: int(name[2:]))
    every, x, labels = cells(store)
    assert every == [*train, *validation]
    for name, row, label in zip(every, x, labels, strict=True):
        stem, number = name.split("_")
        expected = counts[int(number)] * (1 if stem == "a" else 2)
        np.testing.assert_array_equal(row, expected)
        assert label == f"type {int(number) % 3}"
    assert manifest.gene_totals == tuple(counts.sum(0) + 2 * counts[:20].sum(0))
    assert manifest.total_counts == sum(manifest.gene_totals)
    assert manifest.nnz == (counts > 0).sum() + (counts[:20] > 0).sum()
    assert manifest.cells_per_label == (17, 17, 16)
    assert [source["n_cells"] for source in manifest.sources] == [30, 20]
    assert "20 of them appended" in describe_store(store)
    whole = anndata.concat([anndata.read_zarr(old / p.name) for p in manifest.partitions])
    assert sorted(whole.obs_names) == sorted(every)


def test_the_loader_visits_every_cell_of_an_appended_store_once(old, write_input, counts):
    append(old, write_input(counts, "b.h5ad"))
    append(old, write_input(counts, "c.h5ad", labels=["type 1"] * 30))
    store = open_store(old)
    assert [portion.n_train for portion in store.manifest.portions] == [27] * 3
    _, x, _ = cells(store)
    for split in ("train", "validation"):
        options = {"batch_size": 8, "lanes": 2, "block_rows": 4, "buffer_rows": 16}
        loader = Loader(store, split=split, **options)
        visited = list(chain.from_iterable(part.cells for part in loader.epoch(0)))
        assert sorted(visited) == list(store.rows(split))
        for minibatch in loader.epoch(0):
            for row, cell in enumerate(minibatch.cells):
                values = slice(minibatch.indptr[row], minibatch.indptr[row + 1])
                dense = np.zeros(12, int)
                dense[minibatch.indices[values]] = minibatch.counts[values]
                np.testing.assert_array_equal(dense, x[cell])
    assert {name[0] for name in cells(store, "validation")[0]} == {"a", "b", "c"}


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_that_the_store_has_get_a_suffix(old, write_input, counts):
    names = [f"a_{row // 2}" for row in range(30)]
    append(old, write_input(counts, "b.h5ad", cells=names))
    every = cells(open_store(old))[0]
    assert len(set(every)) == 60
    assert {f"a_{row}" for row in range(30)} < set(every)


def test_a_run_of_the_store_before_is_not_resumed_on_it(old, write_input, counts, tmp_path):
    before = open_store(old)
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, RunInfo(str(old), before.hash, "2026-01-01T00:00:00+00:00"))
    append(old, write_input(counts, "b.h5ad"))
    assert open_store(old).hash != before.hash
    with pytest.raises(StoreError, match="was trained on .*, which is not the same as"):
        check_resumable(run, open_store(old), None)


def test_new_labels_need_to_be_allowed(old, write_input, counts, caplog):
    path = write_input(counts, "b.h5ad", labels=["type 0", "typ 1", "new"] * 10)
    with pytest.raises(CountsError) as caught:
        append(old, path)
    assert f"2 labels are new to the store {old}: new, typ 1" in caught.value.detail
    assert "`new_labels=True`" in caught.value.fix
    manifest = append(old, path, new_labels=True)
    assert manifest.registry.labels == ("type 0", "type 1", "type 2", "new", "typ 1")
    assert manifest.cells_per_label == (20, 10, 10, 10, 10)
    assert "the store gets 2 new labels: new, typ 1" in caplog.text
    names, _, labels = cells(open_store(old))
    found = dict(zip(names, labels, strict=True))
    assert [found[f"b_{row}"] for row in range(3)] == ["type 0", "typ 1", "new"]
    assert [found[f"a_{row}"] for row in range(3)] == ["type 0", "type 1", "type 2"]


def test_new_batches_join(write_input, counts, tmp_path):
    store = tmp_path / "store"
    path = write_input(counts, obs={"donor": ["x", "y"] * 15})
    prepare([path], store, replace(CONFIG, batch_key="donor"))
    append(store, write_input(counts, "b.h5ad", obs={"donor": ["a", "x"] * 15}))
    registry = open_store(store).registry
    assert registry.batches == ("x", "y", "a")
    with pytest.raises(CountsError, match="no obs column 'donor'"):
        append(store, write_input(counts, "c.h5ad"))
    append(store, write_input(counts, "d.h5ad", obs={"who": ["y"] * 30}), batch_key="who")


def test_genes_must_fit(write_input, counts, tmp_path, old):
    genes = [f"g{k}" for k in range(12)]
    few = write_input(counts[:, :10] + 1, "few.h5ad", genes=genes[:10])
    more = write_input(np.hstack([counts, counts[:, :1]]), "more.h5ad", genes=[*genes, "extra"])
    with pytest.raises(CountsError, match=r"few.h5ad lacks 2 of the store's 12 genes: g10, g11;"):
        append(old, few)
    with pytest.raises(CountsError, match=r"lacks 2 of the store's 12"):
        append(old, few, genes="intersect")
    with pytest.raises(CountsError, match=r"has 1 genes that the store does not have: extra;"):
        append(old, more)
    assert append(old, few, genes="union").n_cells == 60
    assert append(old, more, genes="intersect").n_cells == 90
    assert open_store(old).n_genes == 12
    with pytest.raises(ConfigError, match="has its genes already"):
        append_config(old, genes="genes.txt")


def test_the_store_s_own_choice_of_genes_goes_on(write_input, counts, tmp_path):
    store, genes = tmp_path / "store", [f"g{k}" for k in range(12)]
    prepare([write_input(counts)], store, replace(CONFIG, genes="union"))
    append(store, write_input(counts[:, :10] + 1, "few.h5ad", genes=genes[:10]))
    listed = tmp_path / "genes.txt"
    listed.write_text("g3\ng1")
    prepare(
        [tmp_path / "a.h5ad"], tmp_path / "listed", replace(CONFIG, genes=listed, drop_empty=True)
    )
    append(tmp_path / "listed", tmp_path / "few.h5ad")
    assert open_store(tmp_path / "listed").registry.genes == ("g3", "g1")


def test_counts_must_fit_the_store_s_type(old, write_input, counts):
    counts[3, 4] = 256
    with pytest.raises(CountsError, match=r"counts up to 256 and the store .* up to 255 \(uint8\)"):
        append(old, write_input(counts, "b.h5ad"))
    assert open_store(old).n_cells == 30


POINTS = [
    ("rayvaec.data.prepare.partition_tasks:write_partition", 2, 30),
    ("rayvaec.data.prepare.append:publish_appended", 1, 30),
    ("rayvaec.data.prepare.append:write_manifest", 1, 30),
    ("rayvaec.data.prepare.job:remove", 2, 60),
]


@pytest.mark.parametrize(("target", "calls", "n_cells"), POINTS)
def test_a_store_is_whole_at_any_moment(
    old, write_input, counts, monkeypatch, target, calls, n_cells
):
    module, name = target.split(":")
    path, left = write_input(counts, "b.h5ad"), [calls]
    whole = getattr(importlib.import_module(module), name)

    def dies(*args, **options):
        left[0] -= name != "remove" or args[0].name.endswith(".partial")
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", dies)
        if target.endswith("publish_appended"):
            patch.setattr("rayvaec.data.prepare.pipeline.publish_appended", dies)
        with pytest.raises(KeyboardInterrupt):
            append(old, path)
    store = open_store(old)
    store.verify()
    assert store.n_cells == n_cells
    manifest = append(old, path, resume=True)
    open_store(old).verify()
    assert open_store(old).manifest == manifest
    assert manifest.n_cells == 60
    kept = {info.name for info in manifest.partitions}
    assert {path.name for path in old.glob("dataset_*")} == kept
    assert not (old.parent / ".store.partial").exists()


def test_what_an_interrupted_append_left_in_the_store_goes_away(old, write_input, counts):
    stray = old / "dataset_2000"
    stray.mkdir()
    append(old, write_input(counts, "b.h5ad"))
    assert not stray.exists()


def test_only_stores_are_appended_to(write_input, counts, tmp_path):
    path = write_input(counts)
    with pytest.raises(StoreError, match="there is no store at .*; leave `append=True` out"):
        append(tmp_path / "nothing", path)
    other = write_input(counts, "c.zarr")
    with pytest.raises(StoreError, match="is not a store that rayvaec wrote"):
        append(other, path)


def test_the_shuffle_of_each_portion_is_its_own(old, write_input, counts):
    append(old, write_input(counts, "b.h5ad"))
    append(old, write_input(counts, "c.h5ad"))
    train = cells(open_store(old), "all")[0]
    orders = [[name[2:] for name in train if name.startswith(stem)] for stem in ("a_", "b_", "c_")]
    assert len({tuple(order) for order in orders}) == 3
