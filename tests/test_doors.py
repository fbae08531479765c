"""The same odd input has the same verdict by every way in: same value named, same counts stored."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr
from anndata.io import write_elem
from odd_inputs import GENES, KEY, N_CELLS, ODD, make_cells, make_counts, write_odd

from rayvaec.data.inputs.obs import ObsKeys
from rayvaec.data.prepare.append import append_config
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import Store, open_store
from rayvaec.errors import CountsError, RayvaecError, RequestError
from rayvaec.protocol import encode_cells
from rayvaec.serving.decoding.h5ad.reader import Columns, read_cells
from rayvaec.serving.decoding.h5ad.sandbox import Sandbox

MEGABYTE = 2**20
Found = dict[str, tuple[str, tuple[int, ...]]]
"""Label and counts of each cell, by its name."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(4 * MEGABYTE)
    yield box
    box.close()


def dense(indptr, indices, counts) -> np.ndarray:
    x = np.zeros((len(indptr) - 1, len(GENES)), int)
    rows = np.repeat(np.arange(len(x)), np.diff(indptr))
    np.add.at(x, (rows, indices), counts)
    return x


def cells_of(store: Store) -> Found:
    rows = store.read(0, store.n_cells)
    x = dense(rows.indptr, rows.indices, rows.counts)
    labels = [store.registry.labels[code] for code in rows.labels]
    assert store.registry.genes == tuple(GENES)
    names = store.obs_names(0, store.n_cells)
    return dict(zip(names, zip(labels, map(tuple, x.tolist()), strict=True), strict=True))


def prepared(path: Path, layer: str | None) -> Found:
    prepare([path], path.parent / "store", PrepareConfig(KEY, layer=layer))
    return cells_of(open_store(path.parent / "store"))


def appended(path: Path, layer: str | None) -> Found:
    old = path.parent / "old.h5ad"
    make_cells("old").write_h5ad(old)
    prepare([old], path.parent / "store", PrepareConfig(KEY))
    config = append_config(path.parent / "store", layer=layer, new_labels=True)
    prepare([path], path.parent / "store", config, append=True)
    found = cells_of(open_store(path.parent / "store"))
    return {name: cell for name, cell in found.items() if not name.startswith("old")}


def external(path: Path, layer: str | None) -> Found:
    return cells_of(open_store(path, ObsKeys(KEY, layer=layer)))


def uploaded(path: Path, layer: str | None, sandbox: Sandbox) -> Found:
    """Read by what the process of uploads reads with; and the process gives the same."""
    body, columns = path.read_bytes(), Columns(KEY, None, layer)
    try:
        cells, genes = read_cells(body, columns, 4 * MEGABYTE)
    except RequestError as error:
        with pytest.raises(type(error), match=re.escape(error.detail)):
            sandbox.read(body, columns, {})
        raise
    assert sandbox.read(body, columns, {}) == encode_cells(cells, {"genes": genes})
    x = dense(cells.indptr, cells.indices, cells.counts)
    assert genes == GENES
    cells_found = zip(cells.labels, map(tuple, x.tolist()), strict=True)
    return dict(zip(cells.cell_ids, cells_found, strict=True))


DOORS = {
    "prepare h5ad": (prepared, ".h5ad"),
    "prepare zarr": (prepared, ".zarr"),
    "append": (appended, ".h5ad"),
    "train on an external store": (external, ".zarr"),
    "upload": (uploaded, ".h5ad"),
}


@pytest.mark.filterwarnings("ignore:Changing the sparsity structure")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ODD)
def test_every_door_has_the_same_verdict(tmp_path, sandbox, name, door):
    odd, (read, suffix) = ODD[name], DOORS[door]
    if odd.h5ad_only and suffix == ".zarr":
        pytest.skip(f"there is no such Zarr: {odd.h5ad_only}")
    path = write_odd(odd, tmp_path / f"odd{suffix}")
    more = (sandbox,) if read is uploaded else ()
    refused = odd.external if read is external and odd.external else odd.refused
    before = sorted(tmp_path.iterdir())
    if refused is not None:
        with pytest.raises(RayvaecError, match=refused) as caught:
            read(path, odd.layer, *more)
        assert caught.value.fix
        assert read is not prepared or sorted(tmp_path.iterdir()) == before
        assert not any(file.name.startswith(".") for file in tmp_path.iterdir())
        return
    found = read(path, odd.layer, *more)
    labels = [odd.labels[cell % 3] for cell in range(N_CELLS)]
    x = map(tuple, make_counts().tolist())
    assert found == {f"c{cell}": each for cell, each in enumerate(zip(labels, x, strict=True))}


def test_unused_categories_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rayvaec"):
        prepared(write_odd(ODD["unused categories"], tmp_path / "odd.h5ad"), None)
    assert "obs column 'label' have no cells and are left out: unused" in caplog.text


TWINS = {
    "whole and floating": ((0, 1, 2), (0.0, 1.0, 2.0), "floating-point numbers in .*astype\\(int"),
    "text of both": (("0", "1", "2"), ("0.0", "1.0", "2.0"), "'0.0' in .* and '0' in .*suffix"),
    "floating and text": ((0.0, 1.0, 2.0), ("0", "1", "2"), "floating-point numbers in .*text in"),
}
DIFFERENT = {
    "one file tells them apart": (("1", "1.0", "2"), ("1", "2", "3"), 4),
    "not the same number": (("1.1", "2"), ("1.10", "2"), 3),
    "no twin": ((0.5, 1.5), (2.5, 3.0), 4),
}


def written(folder: Path, kind: str, first, second):
    """Write two parts, as files or as members of one collection."""
    parts = [make_cells("c", first), make_cells("d", second)]
    if kind == "files":
        paths = [folder / "first.h5ad", folder / "second.h5ad"]
        for part, path in zip(parts, paths, strict=True):
            part.write_h5ad(path)
        return paths
    group = zarr.open_group(folder / "atlas.zarr", mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    with anndata.settings.override(auto_shard_zarr_v3=True):
        for number, part in enumerate(parts):
            write_elem(group, f"dataset_{number}", part)
    return [folder / "atlas.zarr"]


def through_prepare(folder, first, second):
    paths = written(folder, "files", first, second)
    prepare(paths, folder / "store", PrepareConfig(KEY))
    return open_store(folder / "store")


def through_append(folder, first, second):
    paths = written(folder, "files", first, second)
    prepare(paths[:1], folder / "store", PrepareConfig(KEY))
    config = append_config(folder / "store", new_labels=True)
    prepare(paths[1:], folder / "store", config, append=True)
    return open_store(folder / "store")


def through_collection(folder, first, second):
    return open_store(written(folder, "collection", first, second)[0], ObsKeys(KEY))


PARTS = {"prepare": through_prepare, "append": through_append, "collection": through_collection}


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("name", TWINS)
def test_one_number_has_one_name(tmp_path, name, way):
    first, second, message = TWINS[name]
    if way == "append":  # of the store only the names are known
        message = "'0.0' in .* and '0' in .*same number"
    with pytest.raises(CountsError, match=message):
        PARTS[way](tmp_path, first, second)


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("name", DIFFERENT)
def test_other_labels_are_left_alone(tmp_path, name, way):
    first, second, n_labels = DIFFERENT[name]
    assert PARTS[way](tmp_path, first, second).registry.n_labels == n_labels


def test_the_advice_ends_at_one_name(tmp_path):
    for first, second in (((0, 1, 2), (0.0, 1.0, 2.0)), (("0", "1", "x"), ("0.0", "1.0", "x"))):
        paths = written(tmp_path, "files", first, second)
        with pytest.raises(CountsError) as caught:
            prepare(paths, tmp_path / "store", PrepareConfig(KEY))
        place, code = re.match(r"in (\S+): (.*)", caught.value.fix).groups()
        assert place == str(paths[1])
        adata = make_cells("d", second)
        exec(code, {"adata": adata})
        adata.write_h5ad(paths[1])
        manifest = prepare(paths, tmp_path / "store", PrepareConfig(KEY))
        assert manifest.registry.labels == tuple(map(str, first))
        shutil.rmtree(tmp_path / "store")
