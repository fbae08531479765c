from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rayvaec.data.registry import Registry
from rayvaec.data.store.manifest import FORMAT_VERSION, Manifest, PartitionInfo, Portion
from rayvaec.errors import StoreError

MANIFEST = Manifest(
    registry=Registry(("g", "h"), ("T", "B"), "cell_type", ("x",), "batch"),
    n_cells=7,
    nnz=9,
    cells_per_label=(3, 4),
    gene_totals=(5, 6),
    total_counts=11,
    n_train=5,
    seed=3,
    sources=({"path": "a.h5ad", "n_cells": 7},),
    partitions=(
        PartitionInfo("dataset_0", 4, 5, {"X/zarr.json": "sha256:aa"}, "sha256:bb"),
        PartitionInfo("dataset_1", 3, 4, {}, "sha256:cc"),
    ),
    created="2026-01-01T00:00:00+00:00",
    rayvaec_version="0.1.0",
)


def as_read(manifest: Manifest = MANIFEST) -> dict:
    return json.loads(json.dumps(manifest.to_json()))


def test_json_there_and_back():
    assert Manifest.from_json(as_read(), "S") == MANIFEST


def test_splits_are_written_as_ranges():
    assert as_read()["splits"] == {"train": [0, 5], "validation": [5, 7]}
    assert as_read()["format_version"] == 1


def test_the_hash_is_that_of_the_contents():
    digest = MANIFEST.hash()
    assert len(digest) == 64
    for change in ({"created": "later"}, {"rayvaec_version": "9"}, {"sources": ()}):
        assert replace(MANIFEST, **change).hash() == digest
    other = replace(MANIFEST.partitions[0], checksum="sha256:dd")
    for change in (
        *({"n_train": 6}, {"seed": 4}, {"partitions": (other, MANIFEST.partitions[1])}),
        {"registry": Registry(("g", "i"), ("T", "B"), "cell_type", ("x",), "batch")},
    ):
        assert replace(MANIFEST, **change).hash() != digest


APPENDED = replace(
    MANIFEST,
    n_train=4,
    portions=(Portion(1, 3), Portion(1, 1)),
    options={"codec": "zstd"},
)


def test_the_rows_of_portions_are_training_cells_first():
    assert MANIFEST.segments() == ((0, 0, 4), (1, 0, 1), (1, 1, 3))
    assert APPENDED.segments() == ((0, 0, 3), (1, 0, 1), (0, 3, 4), (1, 1, 3))
    assert Manifest.from_json(as_read(APPENDED), "S") == APPENDED
    hashes = {APPENDED.hash(), replace(APPENDED, options={}).hash()}
    assert len(hashes) == 1
    assert replace(APPENDED, portions=()).hash() not in hashes


@pytest.mark.parametrize(
    "portions", [((2, 3),), ((1, 3), (1, 2)), ((1, 5), (1, -1)), ((2, 4), (0, 0))]
)
def test_portions_that_do_not_fit_are_refused(portions):
    value = as_read(APPENDED)
    value["portions"] = [{"n_partitions": n, "n_train": train} for n, train in portions]
    with pytest.raises(StoreError, match="portions in the manifest of the store S do not fit"):
        Manifest.from_json(value, "S")


def test_a_newer_format_is_refused():
    value = as_read() | {"format_version": FORMAT_VERSION + 1}
    with pytest.raises(StoreError, match=r"S has format version 2 .* up to 1; upgrade rayvaec"):
        Manifest.from_json(value, "S")


@pytest.mark.parametrize("key", sorted(set(as_read()) - {"format_version"}))
def test_a_missing_entry_is_named(key):
    value = as_read()
    del value[key]
    with pytest.raises(StoreError, match=f"the manifest of the store S lacks '{key}'"):
        Manifest.from_json(value, "S")


@pytest.mark.parametrize(
    "change",
    [
        *({"n_cells": "many"}, {"registry": []}, {"registry": {"genes": ["g", "g"]}}),
        *({"partitions": [{"name": "dataset_0"}]}, {"partitions": 3}, {"splits": None}),
        {"partitions": []},
    ],
    ids=str,
)
def test_damage_is_refused(change):
    with pytest.raises(StoreError, match="the manifest of the store S"):
        Manifest.from_json(as_read() | change, "S")


@pytest.mark.parametrize("value", [None, [], {}, {"format_version": "1"}])
def test_what_is_no_manifest_is_refused(value):
    with pytest.raises(StoreError, match="has no format version"):
        Manifest.from_json(value, "S")


@pytest.mark.parametrize("change", [{"n_cells": 8}, {"n_train": 8}, {"n_train": -1}])
def test_numbers_that_do_not_add_up_are_refused(change):
    with pytest.raises(StoreError, match="and its partitions of 7"):
        Manifest.from_json(as_read(replace(MANIFEST, **change)), "S")
