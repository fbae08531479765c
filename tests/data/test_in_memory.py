"""AnnData in memory: every form is read as the same counts and names, and none is changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata_state import state
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import sparse

from rayvaec.data.inputs.memory import InMemory
from rayvaec.errors import ConfigError, CountsError

DTYPES = ("u1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", ">f4", ">i4", "?")


def make(x: Any, **obs: Any) -> anndata.AnnData:
    frame = pd.DataFrame(
        {"kind": [f"t{cell % 2}" for cell in range(x.shape[0])], **obs},
        index=[f"c{cell}" for cell in range(x.shape[0])],
    )
    return anndata.AnnData(x, frame, pd.DataFrame(index=[f"g{gene}" for gene in range(x.shape[1])]))


@st.composite
def stored(draw: st.DrawFn) -> tuple[Any, np.ndarray]:
    """A matrix as it may be stored, and the counts that it stands for."""
    n_cells, n_genes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    largest = 1 if dtype.kind == "b" else 100
    value = st.integers(0, largest)
    if draw(st.booleans()):
        rows = st.lists(st.lists(value, min_size=n_genes, max_size=n_genes), min_size=n_cells)
        dense = np.array(draw(rows)[:n_cells], np.int64)
        return dense.astype(dtype), dense
    entries = st.tuples(st.integers(0, n_cells - 1), st.integers(0, n_genes - 1), value)
    given_entries = draw(st.lists(entries, max_size=12))
    counts = np.zeros((n_cells, n_genes), np.int64)
    for row, column, count in given_entries:
        counts[row, column] += count
    if (dtype.kind == "f" and dtype.itemsize == 2) or not dtype.isnative:
        dtype = np.dtype("f4")  # scipy has no others
    by_row = draw(st.booleans())
    major = 0 if by_row else 1
    order = sorted(given_entries, key=lambda entry: entry[major])  # unsorted within, duplicates
    ends = np.searchsorted(
        [entry[major] for entry in order], np.arange(counts.shape[major] + 1)
    ).astype(draw(st.sampled_from(["i4", "i8"])))
    data = np.array([entry[2] for entry in order]).astype(dtype)
    minor = np.array([entry[1 - major] for entry in order]).astype(ends.dtype)
    make_sparse = sparse.csr_matrix if by_row else sparse.csc_matrix
    return make_sparse((data, minor, ends), shape=counts.shape), counts


def csr(dtype: str, *entries: tuple[int, int, int]) -> tuple[Any, np.ndarray]:
    """Two cells of three genes, stored entry by entry, and the counts that they are."""
    rows, columns, data = map(np.array, zip(*entries, strict=True))
    counts = np.zeros((2, 3), np.int64)
    np.add.at(counts, (rows, columns), data)
    parts = data.astype(dtype), columns.astype("i4"), np.searchsorted(rows, [0, 1, 2]).astype("i4")
    return sparse.csr_matrix(parts, shape=(2, 3)), counts


@given(stored(), st.sampled_from(["X", "layer", "raw", "view"]))
@example(csr("i4", (0, 0, 1), (1, 2, 2)), "X")
@example(csr("f4", (0, 0, 1), (0, 1, 0), (1, 2, 2)), "layer")
@example(csr("i4", (0, 2, 1), (0, 0, 3), (1, 2, 2), (1, 2, 5)), "raw")
def test_every_form_is_the_same_counts_and_is_not_changed(matrix, place):
    x, counts = matrix
    adata = make(np.zeros(counts.shape, np.float32) if place in ("layer", "raw") else x)
    if place == "layer":
        adata.layers["l"] = x
    if place == "raw":
        adata.raw = make(x)
    if place == "view":
        adata = adata[::-1]
        counts = counts[::-1]
    before = state(adata)
    source = InMemory(adata, {"layer": "l", "raw": "raw"}.get(place))
    found = source.counts()
    assert (found.toarray() == counts).all()
    assert found.dtype == np.int32
    assert found.has_canonical_format
    assert found.data.all()
    assert state(adata) == before
    found.data[:], found.indices[:] = 7, 0
    assert state(adata) == before, "memory is shared"


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("rows", [None, [4, 1, 1, 0], np.arange(6) % 2 == 0])
def test_files_opened_backed_are_read(tmp_path: Path, form: Any, rows: Any) -> None:
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    x[2] = 0
    adata = make(form(x))
    adata.layers["l"] = form(x * 2)
    adata.raw = make(form(x * 3))
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    chosen = np.arange(6) if rows is None else np.arange(6)[rows]
    for times, layer in ((1, None), (2, "l"), (3, "raw")):
        source = InMemory(backed, layer, rows=rows)
        assert (source.counts().toarray() == times * x[chosen]).all()
    assert source.column("kind") == [f"t{cell % 2}" for cell in chosen]
    backed.file.close()


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f4"])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_duplicates_are_added_up_beyond_the_type_they_are_stored_in(dtype, form):
    top = 100
    parts = np.full(2000, top, dtype), np.zeros(2000, np.int32), np.array([0, 2000])
    x = form(parts, shape=(1, 1))
    assert InMemory(make(x)).counts().toarray().tolist() == [[2000 * top]]


def test_duplicates_beyond_the_largest_count_are_refused():
    parts = np.full(2, 2**31 - 1), np.array([2, 2]), np.array([0, 0, 2])
    x = sparse.csr_matrix(parts, shape=(2, 3))
    with pytest.raises(CountsError, match=r"row 1, column 2 add up to 4294967294"):
        InMemory(make(x)).counts()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["a", "b", "a"], ["a", "b", "a"]),
        ([0, 1, 0], ["0", "1", "0"]),
        (np.array([2, 1, 2], np.uint8), ["2", "1", "2"]),
        ([0.5, 1.0, 0.5], ["0.5", "1.0", "0.5"]),
        ([True, False, True], ["True", "False", "True"]),
        (["a", None, np.nan], ["a", None, None]),
        (pd.array(["a", pd.NA, "b"], "string"), ["a", None, "b"]),
        (pd.array([1, pd.NA, 2], "Int64"), ["1", None, "2"]),
        (pd.Categorical(["b", None, "b"], ["z", "b"]), ["b", None, "b"]),
        (pd.Categorical.from_codes([1, 0, 1], [10, 20]), ["20", "10", "20"]),
        (np.array(["a", 1, "a"], object), ["a", "1", "a"]),
        (np.array([0.1, 2, 0.1], "f4"), ["0.1", "2.0", "0.1"]),
        (np.array([0.5, 2, 0.5], "f2"), ["0.5", "2.0", "0.5"]),
        (np.array([b"a", b"b", b"a"], object), ["a", "b", "a"]),
    ],
    ids=[
        *("text", "whole", "uint8", "fractions", "truth", "holes", "nullable text"),
        *(
            "nullable whole",
            "categorical",
            "whole categorical",
            "mixed",
            "float32",
            "float16",
            "bytes",
        ),
    ],
)
def test_columns_are_names(values, names):
    adata = make(np.ones((3, 2)), group=values)
    before = adata.obs.copy()
    assert InMemory(adata).column("group") == names
    assert InMemory(adata, rows=[2, 0]).column("group") == [names[2], names[0]]
    assert before.equals(adata.obs)


def test_missing_values_are_counted_and_unused_categories_said(caplog):
    caplog.set_level("INFO", logger="rayvaec")
    adata = make(np.ones((3, 2)), group=pd.Categorical(["b", None, "b"], ["z", "b", "y"]))
    with pytest.raises(
        CountsError, match=r"adata.obs\['group'\] has no label for 1 of 3 cells, th"
    ):
        InMemory(adata).named_column("group", "label")
    assert "obs['group']: 2 categories have no cells and are left out: z, y" in caplog.text


@pytest.mark.parametrize("one", [[1, 0], (1, 0), np.array([1, 0]), {"a": 1}])
def test_a_value_that_is_not_a_name_is_refused(one):
    values = pd.Series(["a", one, "a"], dtype=object, index=["c0", "c1", "c2"])
    adata = make(np.ones((3, 2)))
    adata.obs["group"] = values
    with pytest.raises(
        CountsError, match=r"obs\['group'\] holds .* for cell c1, which is not a na"
    ):
        InMemory(adata).column("group")


def test_columns_that_do_not_exist_or_are_two_are_refused():
    adata = make(np.ones((3, 2)), state=1)
    adata.obsm["hot"] = np.eye(3)
    with pytest.raises(CountsError, match="no column 'knd'; the columns are kind, state"):
        InMemory(adata).column("knd")
    with pytest.raises(CountsError, match="no column 7; the columns are"):
        InMemory(adata).column(7)  # type: ignore[arg-type]
    with pytest.raises(
        CountsError, match="obsm has 'hot': make it a column with one name for each"
    ):
        InMemory(adata).column("hot")
    adata.obs.columns = ["kind", "kind"]
    with pytest.raises(CountsError, match="column 'kind' more than once"):
        InMemory(adata).column("kind")


class FromDask:
    """What anndata holds where X was read lazily."""

    shape, dtype, ndim = (3, 2), np.dtype("f4"), 2

    def compute(self) -> None: ...


FromDask.__module__, FromDask.__qualname__ = "dask.array.core", "Array"


@pytest.mark.parametrize(
    ("given_instead", "words"),
    [
        ("atlas.h5ad", "adata is the path 'atlas.h5ad', not an AnnData; read it first"),
        (Path("a.h5ad"), "adata is the path 'a.h5ad'"),
        (np.ones((3, 2)), r"adata is a ndarray, not an AnnData; pass anndata.AnnData\(X, obs, var"),
        (sparse.eye(3).tocsr(), "adata is a csr_matrix"),
        (pd.DataFrame(np.ones((3, 2))), "adata is a DataFrame"),
        (None, "adata is a NoneType, not an AnnData; pass an AnnData of cells x genes"),
        (type("MuData", (), {"mod": {"rna": 1, "atac": 2}})(), "a MuData.*: 'rna', 'atac'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_an_anndata_is_refused(given_instead, words):
    with pytest.raises(CountsError, match=words):
        InMemory(given_instead)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (FromDask(), r"adata.X is a dask.array.core.Array; bring it into memory: adata.to_memory"),
        (np.ma.masked_array(np.eye(3), np.eye(3)), "adata.X is a masked array; fill it"),
        (np.eye(3, dtype=complex), "adata.X holds values of type complex128"),
        (np.array([["1"] * 3] * 3, object), "adata.X holds values of type object"),
        (sparse.coo_matrix(np.eye(3)), "adata.X is a scipy.sparse.*coo_matrix; make it a numpy"),
        (None, "adata has no X; name a layer: counts"),
        (-np.eye(3), "adata.X: -1.0 at cell c0, gene g0 is negative; .*layer='counts'"),
        (np.eye(3) * np.nan, "adata.X: nan at cell c0, gene g0 is not finite"),
        (np.eye(3) / 2, "adata.X: 0.5 at cell c0, gene g0 is not a whole number"),
        (np.eye(3) * 2.0**31, "adata.X: 2147483648.0 at cell c0, gene g0 is above the largest"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_matrix_that_is_not_counts_in_memory_is_refused(x, words):
    adata = make(np.eye(3))
    adata.layers["counts"] = np.eye(3)
    adata._X = x  # as a reader of files would set it: the setter refuses some
    with pytest.raises(CountsError, match=words):
        InMemory(adata).counts()


@pytest.mark.parametrize(
    ("part", "value"), [("indices", [9, 0, 0]), ("indices", [-1, 0, 0]), ("indptr", [0, 2, 1, 3])]
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_arrays_that_do_not_fit_together_are_refused(form, part, value):
    adata = make(form(np.eye(3)))
    getattr(adata.X, part)[:] = value
    with pytest.raises(CountsError, match="adata.X is damaged"):
        InMemory(adata).counts()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([5000], "indices has the position 5000, and there are 3 cells; give 3 truth values, or"),
        ([0, -1], "indices has the position -1"),
        ([True, False], r"indices is an array of bool of shape \(2,\) for 3 cells"),
        ([0.5], "indices is an array of float64"),
        ([[0]], "indices is an array of int64"),
        (["c1"], r"such as adata.obs_names.get_indexer\(names\)"),
    ],
    ids=str,
)
def test_positions_outside_are_refused(rows, words):
    with pytest.raises(ConfigError, match=words):
        InMemory(make(np.eye(3)), rows=rows)


@pytest.mark.parametrize("rows", [[], 1, np.int64(1), range(1, 3), np.array([2, 2], np.uint8)])
def test_positions_are_taken(rows):
    chosen = np.arange(3)[np.asarray(rows, int).ravel()]
    source = InMemory(make(np.eye(3)), rows=rows)
    assert source.counts().toarray().tolist() == np.eye(3)[chosen].tolist()
    assert source.n_cells == len(source.names) == len(chosen)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_one_name_are_told_apart_by_all_cells(caplog):
    adata = make(np.eye(4))
    adata.obs_names = ["a", "b", "a", "a-1"]
    assert InMemory(adata).names == ["a", "b", "a-3", "a-1"]
    message = "adata.obs_names: 1 of 4 cells have the name of an earlier one"
    assert caplog.text.count(message) == 1
    assert "'a-3'" in caplog.text
    # The third cell is the second "a" whatever cells are chosen beside it.
    assert InMemory(adata, rows=[2, 1]).names == ["a-3", "b"]
    assert InMemory(adata, rows=[1, 1, 2, 1]).names == ["b", "b-1", "a-3", "b-2"]
    assert list(adata.obs_names) == ["a", "b", "a", "a-1"]
    caplog.clear()
    assert InMemory(make(np.eye(4)), rows=[1, 1]).names == ["c1", "c1-1"]
    assert not caplog.records  # a cell is asked for twice on purpose


def test_genes_of_one_name_are_refused():
    adata = make(np.eye(2))
    adata.raw = adata.copy()
    adata.var.index = pd.Index(["g", "g"])
    with pytest.raises(CountsError, match="adata has 1 gene names more than once: g"):
        _ = InMemory(adata).genes
    assert InMemory(adata, "raw").genes == ["g0", "g1"]
    assert re.search("counts", str(InMemory(adata, "raw").layers)) is None
