from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.prepare.shuffle import shuffled_positions
from rayvaec.data.store.open import open_store
from rayvaec.errors import ConfigError, CountsError, StoreError

LABELS = PrepareConfig("cell_type", block_elements=40, partition_elements=60)


def contents(path):
    """Return a store's counts, labels and batches, by cell name."""
    store = open_store(path)
    store.verify()
    rows = store.read(0, store.n_cells)
    x = sparse.csr_array(
        (rows.counts.astype("i8"), rows.indices.astype("i4"), rows.indptr),
        (store.n_cells, store.n_genes),
    )
    frame = pd.DataFrame(x.toarray(), store.obs_names(0, store.n_cells), store.registry.genes)
    frame["label"] = [store.registry.labels[code] for code in rows.labels]
    if rows.batches is not None:
        frame["batch"] = [store.registry.batches[code] for code in rows.batches]
    return frame


def expected(x, stem, genes=None):
    """Return what `contents` shall give for a file of `write_input`."""
    index = [f"{stem}_{row}" for row in range(len(x))]
    frame = pd.DataFrame(
        x.astype("i8"), index, genes or [f"g{column}" for column in range(x.shape[1])]
    )
    frame["label"] = [f"type {row % 3}" for row in range(len(x))]
    return frame


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of a store but the manifest, which tells the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["f4", "i8"])
def test_a_store_holds_every_count(write_input, counts, tmp_path, name, form, dtype):
    path = write_input(counts.astype(dtype), name, form)
    manifest = prepare([path], tmp_path / "store", LABELS)
    pd.testing.assert_frame_equal(
        contents(tmp_path / "store").sort_index(), expected(counts, "a").sort_index()
    )
    assert open_store(tmp_path / "store").manifest == manifest
    assert len(manifest.partitions) > 1
    assert manifest.n_cells == 30
    assert manifest.nnz == np.count_nonzero(counts)
    assert manifest.cells_per_label == (10, 10, 10)
    assert manifest.gene_totals == tuple(counts.sum(0))
    assert manifest.total_counts == counts.sum()
    assert manifest.n_train == 27
    assert manifest.registry.labels == ("type 0", "type 1", "type 2")
    assert (manifest.registry.labels_key, manifest.registry.batch_key) == ("cell_type", None)
    assert manifest.sources == ({"path": str(path), "layer": None, "n_cells": 30, "n_genes": 12},)


def test_anndata_reads_a_partition(write_input, counts, tmp_path):
    path = write_input(counts, obs={"donor": ["y", "x"] * 15, "other": range(30)})
    config = PrepareConfig("cell_type", batch_key="donor")
    prepare([path], tmp_path / "store", config)
    adata = anndata.read_zarr(tmp_path / "store" / "dataset_0")
    order = [int(name.removeprefix("a_")) for name in adata.obs_names]
    np.testing.assert_array_equal(adata.X.toarray(), counts[order])
    assert adata.var_names.tolist() == [f"g{column}" for column in range(12)]
    assert list(adata.obs) == ["cell_type", "donor"]
    assert adata.obs["cell_type"].tolist() == [f"type {row % 3}" for row in order]
    assert adata.obs["donor"].tolist() == [["y", "x"][row % 2] for row in order]
    assert contents(tmp_path / "store")["batch"].tolist() == adata.obs["donor"].tolist()


def test_inputs_are_joined_by_gene_name(write_input, counts, tmp_path):
    genes = [f"g{column}" for column in range(12)]
    back = counts[:, ::-1]
    paths = [
        write_input(counts, "a.h5ad"),
        write_input(back + 1, "b.zarr", "csc", genes=genes[::-1], labels=["other"] * 30),
    ]
    manifest = prepare(paths, tmp_path / "store", LABELS)
    assert manifest.registry.genes == tuple(genes)
    assert manifest.registry.labels == ("other", "type 0", "type 1", "type 2")
    assert manifest.cells_per_label == (30, 10, 10, 10)
    found = contents(tmp_path / "store").sort_index()
    second = expected(counts + 1, "b").assign(label="other")
    pd.testing.assert_frame_equal(
        found, pd.concat([expected(counts, "a"), second]).sort_index(), check_names=False
    )


@pytest.mark.parametrize(
    ("choice", "genes"),
    [
        ("intersect", ["g3", "g4", "g5"]),
        ("union", ["g0", "g1", "g2", "g3", "g4", "g5", "h", "i"]),
        ("list", ["g5", "g3"]),
    ],
)
def test_genes_are_chosen(write_input, tmp_path, choice, genes):
    rng = np.random.default_rng(0)
    one, two = rng.integers(1, 9, (5, 6)), rng.integers(1, 9, (4, 5))
    paths = [
        write_input(one, "a.h5ad", genes=["g0", "g1", "g2", "g3", "g4", "g5"]),
        write_input(two, "b.h5ad", genes=["g5", "h", "g4", "i", "g3"]),
    ]
    listed = tmp_path / "genes.txt"
    listed.write_text("g5\n\n g3 \n")
    config = PrepareConfig("cell_type", genes=listed if choice == "list" else choice)
    manifest = prepare(paths, tmp_path / "store", config)
    assert manifest.registry.genes == tuple(genes)
    a = pd.DataFrame(one, [f"a_{i}" for i in range(5)], [f"g{i}" for i in range(6)])
    b = pd.DataFrame(two, [f"b_{i}" for i in range(4)], ["g5", "h", "g4", "i", "g3"])
    whole = pd.concat([a, b]).reindex(columns=genes).fillna(0).astype("i8").sort_index()
    found = contents(tmp_path / "store").sort_index().drop(columns="label")
    pd.testing.assert_frame_equal(found, whole, check_names=False)
    assert manifest.gene_totals == tuple(whole.sum())


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_one_name_are_told_apart(write_input, counts, tmp_path):
    names = [f"AAAC-{row // 2}" for row in range(30)]
    paths = [write_input(counts, name, cells=names) for name in ("a.h5ad", "b.h5ad")]
    prepare(paths, tmp_path / "store", LABELS)
    found = contents(tmp_path / "store")
    assert found.index.is_unique
    assert set(names) < set(found.index)
    assert sorted(found["g0"]) == sorted([*counts[:, 0]] * 2)
    assert found.loc["AAAC-7"].tolist()[:12] == counts[14].tolist()


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_the_result_follows_from_inputs_and_seed_alone(write_input, counts, tmp_path):
    paths = [write_input(counts), write_input(counts * 2, "b.h5ad", "csc", cells=["b"] * 30)]
    stores = []
    for number, elements in enumerate((1, 37, 10**6)):
        config = PrepareConfig("cell_type", block_elements=elements, partition_elements=100)
        stores.append(prepare(paths, tmp_path / f"s{number}", config))
        assert files(tmp_path / f"s{number}") == files(tmp_path / "s0")
    assert len({manifest.hash() for manifest in stores}) == 1
    other = prepare(paths, tmp_path / "other", PrepareConfig("cell_type", seed=1))
    assert other.hash() != stores[0].hash()
    first, second = contents(tmp_path / "s0"), contents(tmp_path / "other")
    assert sorted(first.index) == sorted(second.index)
    assert list(first.index) != list(second.index)


@pytest.mark.ray
def test_workers_do_not_change_the_result(ray_local, write_input, counts, tmp_path):
    path = write_input(counts)
    configs = [PrepareConfig("cell_type", num_workers=n, partition_elements=20) for n in (1, 2)]
    alone, together = (
        prepare([path], tmp_path / str(config.num_workers), config) for config in configs
    )
    assert len(alone.partitions) > 4
    assert together.hash() == alone.hash()
    assert files(tmp_path / "2") == files(tmp_path / "1")
    with pytest.raises(ConfigError, match="40 workers need 40 CPUs and Ray has 2"):
        prepare([path], tmp_path / "3", PrepareConfig("cell_type", num_workers=40))
    assert not (tmp_path / "3").exists()


def test_the_shuffle_is_uniform_and_never_changes():
    # The last line of defence for stores that are to be made again years later.
    assert shuffled_positions(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    positions = np.array([shuffled_positions(6, seed) for seed in range(3000)])
    assert (np.sort(positions, axis=1) == np.arange(6)).all()
    for cell in range(6):
        observed = np.bincount(positions[:, cell], minlength=6)
        assert stats.chisquare(observed).pvalue > 1e-4
    pairs = np.bincount(positions[:, 0] * 6 + positions[:, 1], minlength=36).reshape(6, 6)
    assert stats.chisquare(pairs[~np.eye(6, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize(("fraction", "n_train"), [(0, 30), (0.1, 27), (0.5, 15), (0.001, 29)])
def test_the_last_cells_are_for_validation(write_input, counts, tmp_path, fraction, n_train):
    config = PrepareConfig("cell_type", val_fraction=fraction)
    assert prepare([write_input(counts)], tmp_path / "store", config).n_train == n_train


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_inputs_may_be_more_than_files_that_a_process_may_open(write_input, counts, tmp_path, form):
    paths = [write_input(counts, f"{number:02}.h5ad", form) for number in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, limits[1]))
    try:
        manifest = prepare(paths, tmp_path / "store", LABELS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert manifest.n_cells == 40 * len(counts)
    assert manifest.gene_totals == tuple(40 * counts.sum(axis=0))
    assert len(os.listdir("/proc/self/fd")) <= in_use + 1


def test_memory_does_not_grow_with_the_input(write_input, tmp_path):
    rng = np.random.default_rng(0)
    x = sparse.random_array((20_000, 1_000), density=0.1, rng=rng, dtype="f4", format="csr")
    x.data[:] = rng.integers(1, 100, x.nnz)
    path = write_input(x.astype("f4"), labels=["t"] * x.shape[0])
    config = PrepareConfig("cell_type", block_elements=20_000, partition_elements=100_000)
    prepare([path], tmp_path / "warm", config)
    size = x.data.nbytes + x.indices.nbytes
    del x
    tracemalloc.start()
    prepare([path], tmp_path / "store", config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 15_000_000
    assert peak < size / 4, peak


@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_value_that_is_no_count_is_refused(write_input, counts, tmp_path, form, value):
    x = counts.astype("f4")
    x[17, 5] = value
    path = write_input(x, form=form, layers={"counts": counts})
    with pytest.raises(CountsError) as caught:
        prepare([path], tmp_path / "store", LABELS)
    assert f"{path}, X: {np.float32(value)} at cell a_17, gene g5 is" in str(caught.value)
    if value == 0.5:
        assert caught.value.fix == "pass raw counts, such as `layer='counts'` (layers: counts)"
    assert sorted(tmp_path.iterdir()) == [path]
    config = PrepareConfig("cell_type", layer="counts")
    manifest = prepare([path], tmp_path / "store", config)
    assert manifest.total_counts == counts.sum()
    assert manifest.sources[0]["layer"] == "counts"


def test_a_bad_value_in_a_gene_that_is_not_kept_is_refused_too(write_input, counts, tmp_path):
    x = counts.astype("f4")
    x[3, 0] = 0.25
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join(f"g{column}" for column in range(1, 12)))
    with pytest.raises(CountsError, match="0.25 at cell a_3, gene g0"):
        prepare([write_input(x)], tmp_path / "store", PrepareConfig("cell_type", genes=listed))


def test_missing_labels_are_refused(write_input, counts, tmp_path):
    path = write_input(counts, labels=["t", np.nan, None] * 10)
    problem = r"obs column 'cell_type' has no value for 20 of 30 cells, the first a_1; remove these"
    with pytest.raises(CountsError, match=problem):
        prepare([path], tmp_path / "store", LABELS)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_missing_labels_column_lists_those_that_exist(write_input, counts, tmp_path):
    path = write_input(counts, obs={"donor": ["x"] * 30})
    with pytest.raises(
        CountsError, match=r"no obs column 'celltype'; the columns are cell_type, d"
    ):
        prepare([path], tmp_path / "store", PrepareConfig("celltype"))
    with pytest.raises(CountsError, match=r"no obs column 'donr'; the columns are donor"):
        prepare([path], tmp_path / "store", PrepareConfig("cell_type", batch_key="donr"))
    gaps = write_input(counts, "b.h5ad", obs={"donor": pd.Categorical(["x", None] * 15)})
    with pytest.raises(CountsError, match=r"'donor' has no value for 15 .*give each a batch"):
        prepare([gaps], tmp_path / "store", PrepareConfig("cell_type", batch_key="donor"))


def test_batches_without_cells_are_no_batches(write_input, counts, tmp_path):
    donor = pd.Categorical(["y", "x"] * 15, categories=["z", "y", "x"])
    path = write_input(counts, obs={"donor": donor})
    config = PrepareConfig("cell_type", batch_key="donor")
    assert prepare([path], tmp_path / "store", config).registry.batches == ("x", "y")


def test_a_category_may_have_its_cells_in_another_input(write_input, counts, tmp_path):
    first = pd.Categorical(["t"] * 30, categories=["b", "t"])
    paths = [write_input(counts, labels=first), write_input(counts, "b.h5ad", labels=["b"] * 30)]
    assert prepare(paths, tmp_path / "store", LABELS).cells_per_label == (30, 30)


def test_labels_of_two_kinds_are_refused_where_they_would_get_two_names(
    write_input, counts, tmp_path
):
    paths = {
        "fractions": write_input(counts, "a.h5ad", labels=[1.0, 2.0, 1.5] * 10),
        "whole": write_input(counts, "b.h5ad", labels=[1, 2, 3] * 10),
        "text": write_input(counts, "c.h5ad", labels=["1", "2", "x"] * 10),
        "truth": write_input(counts, "d.h5ad", labels=[True, False, True] * 10),
    }
    for other in ("whole", "text", "truth"):
        with pytest.raises(CountsError) as caught:
            prepare([paths[other], paths["fractions"]], tmp_path / "store", LABELS)
        assert "'cell_type' holds floating-point numbers in" in caught.value.detail
        assert ".astype(float)" in caught.value.fix or other != "whole"
        assert caught.value.fix.endswith(".astype(str)")
    manifest = prepare([paths["whole"], paths["text"]], tmp_path / "store", LABELS)
    assert manifest.registry.labels == ("1", "2", "3", "x")
    assert manifest.cells_per_label == (20, 20, 10, 10)


def test_an_empty_file_among_many_is_named(write_input, counts, tmp_path):
    paths = [write_input(counts, f"{name}.h5ad") for name in "abc"]
    paths[1].write_bytes(b"")
    with pytest.raises(CountsError, match="b.h5ad is not an HDF5 file"):
        prepare(paths, tmp_path / "store", LABELS)
    write_input(np.zeros((0, 12), "f4"), "b.h5ad", labels=[])
    with pytest.raises(CountsError, match="b.h5ad has no cells; leave this input out"):
        prepare(paths, tmp_path / "store", LABELS)
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_one_bad_value_among_many_is_found_and_named(write_input, tmp_path, form):
    rng = np.random.default_rng(0)
    x = rng.poisson(0.3, (60_000, 20)).astype("f4") + np.eye(20, dtype="f4")[0]
    x[51_234, 17] = 2.5
    path = write_input(x, form=form, labels=["t"] * len(x))
    config = PrepareConfig("cell_type", block_elements=50_000)
    with pytest.raises(CountsError, match=r"2.5 at cell a_51234, gene g17 is not a whole number"):
        prepare([path], tmp_path / "store", config)


def test_partitions_are_smaller_where_memory_is_short(
    write_input, counts, tmp_path, monkeypatch, caplog
):
    path = write_input(counts)
    assert prepare([path], tmp_path / "store", LABELS).options["partition_elements"] == 60
    assert not caplog.text
    monkeypatch.setattr("rayvaec.data.prepare.memory.LEAST_PARTITION", 1)
    monkeypatch.setattr(
        "rayvaec.data.prepare.memory.partition_bytes", lambda size, *_: 0 if size < 20 else 2**60
    )
    manifest = prepare([path], tmp_path / "small", LABELS)
    assert manifest.options["partition_elements"] == 15
    assert len(manifest.partitions) == -(-manifest.nnz // 15)
    assert "partitions get 15 values instead of 60, as `memory` allows no more" in caplog.text


def test_genes_that_differ_are_refused(write_input, counts, tmp_path):
    paths = [write_input(counts), write_input(counts[:, :10], "b.h5ad", genes=[*"ABCDEFGHI", "g0"])]
    with pytest.raises(CountsError) as caught:
        prepare(paths, tmp_path / "store", LABELS)
    assert (
        f"genes differ: 11 only in {paths[0]} (g1, g2, g3 and 8 more), 9 only in {paths[1]} (A, B"
        in str(caught.value)
    )
    assert "`genes='intersect'`" in caught.value.fix
    none = write_input(counts[:, :9], "c.h5ad", genes=list("ABCDEFGHI"))
    with pytest.raises(CountsError, match=r"no gene is in all inputs \(.*a.h5ad: g0, g1, g2 and 9"):
        prepare([paths[0], none], tmp_path / "store", PrepareConfig("cell_type", genes="intersect"))


def named(write_input, counts, **files: str) -> list[Path]:
    """Write inputs whose genes are called by single letters."""
    return [
        write_input(counts[:, : len(genes)] + 1, f"{name}.h5ad", genes=list(genes))
        for name, genes in files.items()
    ]


@pytest.mark.parametrize(
    ("files", "stranger"),
    [
        ({"a": "ABC", "b": "DEF"}, "b"),
        ({"a": "ABC", "b": "ABC", "c": "XYZ"}, "c"),
        ({"a": "ABC", "b": "XYZ", "c": "ABC", "d": "XYZ"}, "b"),
    ],
)
def test_a_union_of_strangers_is_refused(write_input, counts, tmp_path, files, stranger):
    paths = named(write_input, counts, **files)
    with pytest.raises(CountsError) as caught:
        prepare(paths, tmp_path / "store", PrepareConfig("cell_type", genes="union"))
    first, other = ", ".join(files["a"]), ", ".join(files[stranger])
    assert caught.value.detail == (
        f"{tmp_path / stranger}.h5ad shares no gene with {tmp_path}/a.h5ad ({other}; {first})"
    )
    assert "one kind of gene names" in caught.value.fix
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("choice", "files", "shared"),
    [
        ("union", {"a": "ABC", "b": "CDE"}, "share 1 of 5 genes, the others count as zero"),
        # A chain: each has a gene in common with the next.
        ("union", {"a": "AB", "b": "CD", "c": "BC"}, "share 0 of 4 genes, the others count"),
        ("union", {"a": "ABCD", "b": "ABCE"}, None),
        ("union", {"a": "ABCD", "b": "BADC"}, None),
        ("intersect", {"a": "ABCDE", "b": "EFGHI"}, "share 1 of 5 genes, the others are left out"),
        ("intersect", {"a": "ABCDEFGHIJ", "b": "AB"}, None),
    ],
)
def test_few_shared_genes_are_warned_of(
    write_input, counts, tmp_path, caplog, choice, files, shared
):
    paths = named(write_input, counts, **files)
    prepare(paths, tmp_path / "store", PrepareConfig("cell_type", genes=choice))
    said = [record.getMessage() for record in caplog.records if "share" in record.getMessage()]
    assert len(said) == (shared is not None)
    assert shared is None or (shared in said[0] and "one kind of gene names" in said[0])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_of_one_name_are_refused(write_input, counts, tmp_path):
    path = write_input(counts, genes=["g1", "g1", *[f"g{column}" for column in range(2, 12)]])
    with pytest.raises(CountsError, match=r"a.h5ad has 1 gene names more than once: g1; .*unique"):
        prepare([path], tmp_path / "store", LABELS)


def test_a_bad_gene_list_is_refused(write_input, counts, tmp_path):
    path, listed = write_input(counts), tmp_path / "genes.txt"
    config = PrepareConfig("cell_type", genes=listed)
    with pytest.raises(
        ConfigError, match=r"gene list .*genes.txt cannot be read .*intersect, union"
    ):
        prepare([path], tmp_path / "store", config)
    listed.write_text("\n\n")
    with pytest.raises(ConfigError, match="is empty"):
        prepare([path], tmp_path / "store", config)
    listed.write_text("g1\ng2\ng1")
    with pytest.raises(CountsError, match="genes.txt has 1 gene names more than once: g1"):
        prepare([path], tmp_path / "store", config)
    listed.write_text("g1\ngene2")
    with pytest.raises(
        CountsError, match=r"a.h5ad lacks 1 of the 2 genes in .*: gene2; .*genes like"
    ):
        prepare([path], tmp_path / "store", config)


@pytest.mark.parametrize(("shape", "what"), [((0, 4), "cells"), ((4, 0), "genes")])
def test_an_input_with_nothing_in_it_is_refused(write_input, tmp_path, shape, what):
    path = write_input(np.zeros(shape, "f4"), labels=["t"] * shape[0])
    with pytest.raises(CountsError, match=f"a.h5ad has no {what}; leave this input out"):
        prepare([path], tmp_path / "store", LABELS)


def test_cells_without_counts_are_refused_or_left_out(write_input, counts, tmp_path):
    counts[[4, 9]] = 0
    paths = [write_input(counts + 1, "b.h5ad"), write_input(counts)]
    with pytest.raises(CountsError, match=r"2 of 60 cells have no .*a_4 in .*`drop_empty=True`"):
        prepare(paths, tmp_path / "store", LABELS)
    config = PrepareConfig("cell_type", drop_empty=True, block_elements=40)
    manifest = prepare(paths, tmp_path / "store", config)
    assert (manifest.n_cells, manifest.cells_per_label) == (58, (19, 19, 20))
    found = contents(tmp_path / "store").sort_index()
    whole = pd.concat([expected(counts, "a"), expected(counts + 1, "b")])
    pd.testing.assert_frame_equal(found, whole.drop(["a_4", "a_9"]).sort_index())
    alone = write_input(counts, "c.h5ad", labels=["t"] * 4 + ["lost"] + ["t"] * 25)
    with pytest.raises(CountsError, match="no cell of lost has counts"):
        prepare([alone], tmp_path / "other", config)


def test_an_output_that_exists_is_kept_unless_overwritten(write_input, counts, tmp_path):
    path, out = write_input(counts), tmp_path / "store"
    first = prepare([path], out, LABELS)
    with pytest.raises(StoreError, match="store exists already; .*`overwrite=True`"):
        prepare([path], out, LABELS)
    bad = write_input(counts * 0.5, "b.h5ad")
    with pytest.raises(CountsError):
        prepare([bad], out, LABELS, overwrite=True)
    assert open_store(out).hash == first.hash()
    second = prepare([path], out, PrepareConfig("cell_type", seed=5), overwrite=True)
    assert open_store(out).hash == second.hash() != first.hash()
    assert sorted(tmp_path.iterdir()) == [path, bad, out]


def test_outputs_and_inputs_that_overlap_are_refused(write_input, counts, tmp_path):
    path = write_input(counts, "a.zarr")
    for out in (path, path / "store", tmp_path):
        with pytest.raises(StoreError, match="overlap; choose another `out`"):
            prepare([path], out, LABELS, overwrite=True)
    assert path.is_dir()
    with pytest.raises(ConfigError, match="is given twice"):
        prepare([path, path.parent / "." / path.name], tmp_path / "store", LABELS)
    with pytest.raises(ConfigError, match="there is no input"):
        prepare([], tmp_path / "store", LABELS)


def test_too_little_room_is_said_at_once(write_input, counts, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("rayvaec.data.prepare.pipeline.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"has 0.0 GB free and about 0.0 GB are needed"):
        prepare([write_input(counts)], tmp_path / "store", LABELS)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0; use a number from 0"),
        ({"val_fraction": -0.1}, "`val_fraction` is -0.1"),
        ({"val_fraction": float("nan")}, "`val_fraction` is nan"),
        ({"seed": -1}, "`seed` is -1"),
        ({"num_workers": 0}, "`num_workers` is 0; use 1 or more"),
        ({"rows_per_chunk": 0}, "`rows_per_chunk` is 0"),
        ({"codec": "gzip"}, "no codec 'gzip'; choose one of lz4, zstd"),
        ({"batch_key": "cell_type"}, "are both read from obs column 'cell_type'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        PrepareConfig("cell_type", **options)


def test_the_file_of_real_counts(shared, tmp_path):
    path = shared / "data" / "pbmc_10x_200.h5ad"
    manifest = prepare([path], tmp_path / "store", PrepareConfig("cell_type"))
    adata = anndata.read_h5ad(path)
    found = contents(tmp_path / "store").loc[adata.obs_names]
    np.testing.assert_array_equal(found[adata.var_names].to_numpy(), adata.X.toarray())
    assert found["label"].tolist() == adata.obs["cell_type"].tolist()
    assert manifest.cells_per_label == (16, 53, 29, 102)


def test_every_input_may_have_a_layer_of_its_own(write_input, counts, tmp_path):
    half = counts * 0.5
    paths = [
        f"{write_input(half, 'a.h5ad', raw=counts)}::raw",
        f"{write_input(half, 'b.zarr', layers={'counts': counts})}::counts",
        write_input(half, "c.h5ad", layers={"spliced": counts}),
        f"{write_input(counts, 'd.h5ad', layers={'spliced': half})}::X",
    ]
    config = PrepareConfig("cell_type", layer="spliced")
    manifest = prepare(paths, tmp_path / "store", config)
    assert [source["layer"] for source in manifest.sources] == ["raw", "counts", "spliced", None]
    assert manifest.gene_totals == tuple((4 * counts.sum(axis=0)).tolist())
    with pytest.raises(CountsError, match="a.h5ad has no layer 'rw'; the layers are raw"):
        prepare([tmp_path / "a.h5ad::rw"], tmp_path / "other", config)


def test_a_list_of_genes_may_begin_with_a_byte_order_mark(write_input, counts, tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("g3\ng1\n", encoding="utf-8-sig")
    path = write_input(counts[:, :5] + 1)
    manifest = prepare([path], tmp_path / "store", PrepareConfig("cell_type", genes=genes))
    assert manifest.registry.genes == ("g3", "g1")
